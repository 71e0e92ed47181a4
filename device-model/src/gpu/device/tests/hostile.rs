//! Known bugs of virtio-gpu devices, each as a negative test.

use super::*;

/// CVE-2016-7994, -9846, -9912, CVE-2017-5552, -5578, -5857, CVE-2021-3544.
#[test]
fn loops_of_bad_creates_second_attaches_and_unrefs_in_use_leave_nothing_behind() {
    let mut h = Harness::new();
    h.memory.fill(ByteRange::new(Iova::new(0x10_0000), 4096).unwrap());
    for _ in 0..100_000 {
        h.send(&create_2d(1, 5, 16, 16));
        h.send(&create_2d(1, B8G8R8X8, 16, 16));
        h.send(&create_2d(1, B8G8R8X8, 16, 16));
        h.send(&attach_backing(1, &[(0x10_0000, 512), (0x10_0800, 512), (0, 0)]));
        h.send(&attach_backing(1, &[(0x10_0000, 512), (0x10_0800, 512)]));
        h.send(&attach_backing(1, &[(0x10_0000, 1024)]));
        h.send(&set_scanout(0, 1, rect(0, 0, 16, 16)));
        h.send(&transfer_to_host_2d(1, rect(0, 0, 16, 16), 0));
        h.send_cursor(&update_cursor(Default::default(), 1, (0, 0)));
        h.send(&unref(1));
        h.run();
        assert_eq!(h.device.usage(), Usage::default());
        h.answers();
        h.shown.clear();
    }
    assert_eq!(h.device.next_job, 100_000);
    assert!(h.device.reset().is_empty(), "nothing is pending");
}

#[test]
fn an_image_is_freed_when_nobody_uses_it_any_more() {
    let mut h = Harness::new();
    h.resource(1, 32, 32, 0x10_0000);
    h.send(&set_scanout(0, 1, rect(0, 0, 32, 32)));
    let Some(DisplayCommand::SetScanout { source: Some(source), .. }) = h.shown.pop() else { panic!() };
    let image = std::sync::Arc::downgrade(&source.image);
    drop(source);
    h.send(&transfer_to_host_2d(1, rect(0, 0, 32, 32), 0));
    h.send(&unref(1));
    assert!(image.upgrade().is_some(), "the job uses it");
    h.run();
    assert!(image.upgrade().is_none());
}

/// CVE-2016-9845, -9908, CVE-2021-3545: every byte of a response comes from the command or is 0.
#[test]
fn responses_to_the_same_command_are_the_same_to_the_last_byte() {
    let requests = [get_display_info(), get_edid(0), create_2d(1, 99, 1, 1), get_capset(1, 1), Vec::new()];
    for request in requests {
        let answers = [0, 1].map(|_| {
            let mut h = Harness::new();
            h.send(&request);
            if let Some((ticket, question)) = h.asked.pop() {
                h.answer(
                    ticket,
                    match question {
                        DisplayQuery::Modes => DisplayAnswer::Modes(None),
                        DisplayQuery::Edid { .. } => DisplayAnswer::Edid(None),
                    },
                );
            }
            h.completed[0].1.as_bytes().to_vec()
        });
        assert_eq!(answers[0], answers[1]);
        assert_eq!(answers[0][4..24], [0; 20], "flags, fence, context and padding");
    }
}

/// CVE-2016-10028, -10029, CVE-2021-3546.
#[test]
fn capability_sets_of_any_other_number_are_refused_without_data() {
    let mut h = Harness::new();
    for number in [1, 2, 63, 64, u32::MAX] {
        assert_eq!(h.status(&get_capset_info(number)), ERR_INVALID_PARAMETER);
        assert_eq!(h.status(&get_capset(number, number)), ERR_INVALID_PARAMETER);
    }
    assert!(h.completed.iter().all(|(_, response)| response.as_bytes().len() == HEADER));
}

/// CVE-2026-3886.
#[test]
fn images_of_any_size_are_created_or_refused_by_their_true_size() {
    let sides = [0, 1, 1 << 15, (1 << 15) + 1, 1 << 16, 1 << 31, u32::MAX];
    let mut h = Harness::new();
    for (width, height) in sides.into_iter().flat_map(|width| sides.map(|height| (width, height))) {
        let bytes = u128::from(width) * u128::from(height) * 4;
        let expected = match bytes {
            0 => ERR_INVALID_PARAMETER,
            1..=0x1000_0000 => OK_NODATA,
            _ => ERR_OUT_OF_MEMORY,
        };
        assert_eq!(h.status(&create_2d(1, B8G8R8X8, width, height)), expected, "{width}x{height}");
        h.send(&unref(1));
    }
}

#[test]
fn more_entries_than_there_are_bytes_for_are_refused() {
    let mut h = Harness::new();
    h.send(&create_2d(1, B8G8R8X8, 16, 16));
    for count in [2, 3, 16_385, 1 << 28, 1 << 31, u32::MAX] {
        let request = attach_backing_claiming(1, count, &[(0x1000, 16)]);
        assert_eq!(h.status(&request), ERR_INVALID_PARAMETER);
    }
    assert_eq!(h.device.usage().backing_entries, 0);
    let many = vec![(0x1000, 16); 16_385];
    assert_eq!(h.status(&attach_backing(1, &many)), ERR_OUT_OF_MEMORY);
    let most = create_blob(2, 16, &many[1..]);
    assert_eq!(most.len(), h.device.max_request_bytes());
    assert_eq!(h.status(&most), OK_NODATA);
}

#[test]
fn every_truncation_of_every_command_is_an_error_and_an_unharmed_device() {
    let whole = [
        get_edid(0),
        create_2d(7, B8G8R8X8, 1, 1),
        unref(1),
        attach_backing(1, &[(0x1000, 16)]),
        create_blob(9, 16, &[(0x1000, 16)]),
        detach_backing(1),
        set_scanout(0, 1, rect(0, 0, 32, 32)),
        transfer_to_host_2d(1, rect(0, 0, 1, 1), 0),
        flush(1, rect(0, 0, 1, 1)),
        get_capset_info(0),
        get_capset(0, 0),
    ];
    let mut h = Harness::new();
    h.resource(1, 32, 32, 0x10_0000);
    for request in whole {
        for len in 0..request.len() {
            assert_eq!(h.status(&request[..len]), ERR_INVALID_PARAMETER);
        }
    }
    for request in [update_cursor(Default::default(), 0, (0, 0)), move_cursor(Default::default(), 0)] {
        for len in 0..request.len() {
            assert_eq!(h.status_of_cursor(&request[..len]), ERR_INVALID_PARAMETER);
        }
    }
    assert_eq!(
        h.device.usage(),
        Usage { resources: 1, resource_bytes: 4096, backing_entries: 1, ..Usage::default() }
    );
}

#[test]
fn an_image_that_the_host_has_no_memory_for_is_refused_and_costs_no_quota() {
    let quotas = Quotas { resource_bytes: u64::MAX, resources: 1, ..Quotas::default() };
    let mut h = Harness::with(DeviceConfig { quotas, ..DeviceConfig::default() });
    // 2^62 bytes.
    assert_eq!(h.status(&create_2d(1, 1, 1 << 31, 1 << 29)), ERR_OUT_OF_MEMORY);
    assert_eq!(h.status(&create_2d(1, 1, 64, 64)), OK_NODATA);
}
