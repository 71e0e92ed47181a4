use super::*;
use crate::gpu::scanout::{DisplayMode, DisplayModes};

fn screen(h: &mut Harness) {
    h.resource(1, 64, 64, 0x10_0000);
    assert_eq!(h.status(&set_scanout(0, 1, rect(16, 16, 32, 32))), OK_NODATA);
    h.shown.clear();
}

#[test]
fn each_misuse_of_a_scanout_gets_its_error_and_changes_nothing() {
    let mut h = Harness::new();
    screen(&mut h);
    for scanout in [2, 16, 31, 32, u32::MAX] {
        assert_eq!(h.status(&set_scanout(scanout, 1, rect(0, 0, 16, 16))), ERR_INVALID_SCANOUT_ID);
        assert_eq!(h.status(&set_scanout(scanout, 0, rect(0, 0, 0, 0))), ERR_INVALID_SCANOUT_ID);
        assert_eq!(h.status(&get_edid(scanout)), ERR_INVALID_PARAMETER);
    }
    assert_eq!(h.status(&set_scanout(0, 2, rect(0, 0, 16, 16))), ERR_INVALID_RESOURCE_ID);
    for outside in [rect(49, 0, 16, 16), rect(0, 0, 65, 16), rect(u32::MAX, 0, 16, 16)] {
        assert_eq!(h.status(&set_scanout(0, 1, outside)), ERR_INVALID_PARAMETER);
    }
    assert_eq!(h.status(&set_scanout(0, 1, rect(0, 0, 15, 16))), ERR_INVALID_PARAMETER);
    assert_eq!(h.status(&set_scanout(0, 1, rect(0, 0, 16, 0))), ERR_INVALID_PARAMETER);
    assert!(h.shown.is_empty());
}

#[test]
fn a_flush_reaches_every_scanout_that_shows_the_part_in_coordinates_of_the_image() {
    let mut h = Harness::new();
    screen(&mut h);
    h.status(&set_scanout(1, 1, rect(0, 0, 16, 16)));
    h.shown.clear();
    assert_eq!(h.status(&flush(1, rect(0, 0, 20, 64))), OK_NODATA);
    let [
        DisplayCommand::Flush { scanout: 0, rect: first },
        DisplayCommand::Flush { scanout: 1, rect: second },
    ] = h.shown.as_slice()
    else {
        panic!("{:?}", h.shown)
    };
    assert_eq!((*first, *second), (rect(16, 16, 4, 32), rect(0, 0, 16, 16)));
    h.shown.clear();
    assert_eq!(h.status(&flush(1, rect(0, 48, 64, 16))), OK_NODATA);
    assert_eq!(h.status(&flush(1, rect(17, 17, 0, 4))), OK_NODATA);
    assert!(h.shown.is_empty());
}

#[test]
fn a_flush_is_seen_after_the_transfer_before_it() {
    let mut h = Harness::new();
    screen(&mut h);
    h.send(&transfer_to_host_2d(1, rect(0, 0, 64, 64), 0));
    h.send(&flush(1, rect(0, 0, 64, 64)));
    assert!(h.shown.is_empty());
    h.run();
    assert!(matches!(h.shown.as_slice(), [DisplayCommand::Flush { scanout: 0, .. }]));
}

#[test]
fn resource_zero_and_unref_take_the_picture_away() {
    let mut h = Harness::new();
    screen(&mut h);
    assert_eq!(h.status(&set_scanout(0, 0, rect(0, 0, 0, 0))), OK_NODATA);
    assert!(matches!(h.shown.as_slice(), [DisplayCommand::SetScanout { scanout: 0, source: None }]));
    h.status(&set_scanout(0, 1, rect(0, 0, 64, 64)));
    h.status(&set_scanout(1, 1, rect(0, 0, 64, 64)));
    h.shown.clear();
    assert_eq!(h.status(&unref(1)), OK_NODATA);
    let [
        DisplayCommand::SetScanout { scanout: 0, source: None },
        DisplayCommand::SetScanout { scanout: 1, source: None },
    ] = h.shown.as_slice()
    else {
        panic!("{:?}", h.shown)
    };
}

/// A page flip: the picture is drawn, shown, flushed, and the next one is sent after it.
#[test]
fn scanouts_change_in_order_with_the_transfers_and_flushes_around_them() {
    let mut h = Harness::new();
    screen(&mut h);
    h.resource(2, 64, 64, 0x20_0000);
    h.answers();
    let all = rect(0, 0, 64, 64);
    let frame = |h: &mut Harness, id| {
        [transfer_to_host_2d(id, all, 0), set_scanout(0, id, all), flush(id, all)]
            .map(|command| h.send(&command))
    };
    let [one, two] = [frame(&mut h, 1), frame(&mut h, 2)];
    let unref = h.send(&unref(1));
    h.shown.clear();
    h.run();
    assert_eq!(h.answers(), one.map(|command| (command, OK_NODATA)));
    assert!(matches!(
        h.shown.as_slice(),
        [DisplayCommand::SetScanout { source: Some(_), .. }, DisplayCommand::Flush { .. }]
    ));
    h.shown.clear();
    h.run();
    let [transfer, show, flush] = two;
    let order = [transfer, show, flush, unref];
    assert_eq!(h.answers(), order.map(|command| (command, OK_NODATA)));
    // The unreferenced resource is not shown any more: the scanout stays on.
    assert_eq!(h.shown.len(), 2, "{:?}", h.shown);
}

#[test]
fn the_scanout_of_another_resource_with_the_same_id_is_not_flushed() {
    let mut h = Harness::new();
    screen(&mut h);
    h.send(&transfer_to_host_2d(1, rect(0, 0, 64, 64), 0));
    h.send(&unref(1));
    h.resource(1, 64, 64, 0x20_0000);
    h.send(&flush(1, rect(0, 0, 64, 64)));
    h.shown.clear();
    h.run();
    assert!(matches!(h.shown.as_slice(), [DisplayCommand::SetScanout { source: None, .. }]), "{:?}", h.shown);
}

fn modes(h: &mut Harness, answer: Option<DisplayModes>) -> Response {
    let id = h.send(&get_display_info());
    let (ticket, question) = h.asked.pop().unwrap();
    assert_eq!(question, DisplayQuery::Modes);
    assert!(h.response(id).is_none());
    h.answer(ticket, DisplayAnswer::Modes(answer.map(Box::new)));
    h.response(id).unwrap().clone()
}

#[test]
fn without_an_answer_the_guest_gets_the_last_one_or_1024x768() {
    let mut h = Harness::new();
    let silent = modes(&mut h, None);
    assert_eq!((silent.kind(), silent.as_bytes().len()), (OK_DISPLAY_INFO, 408));
    // x, y, width, height, enabled, flags; then the next.
    let one = |response: &Response, n: usize| [0, 1, 2, 3, 4, 5].map(|at| word(response, 6 + n * 6 + at));
    assert_eq!(one(&silent, 0), [0, 0, 1024, 768, 1, 0]);
    assert_eq!(one(&silent, 1), [0; 6]);

    let said = DisplayModes::from([DisplayMode { rect: rect(1, 2, 800, 600), enabled: true, flags: 5 }; 16]);
    for answer in [Some(said), None] {
        let response = modes(&mut h, answer);
        assert_eq!((one(&response, 0), one(&response, 1)), ([1, 2, 800, 600, 1, 5], [1, 2, 800, 600, 1, 5]));
        assert_eq!(one(&response, 2), [0; 6], "there are two scanouts");
    }
}

fn edid(h: &mut Harness, answer: Option<Vec<u8>>) -> Response {
    let id = h.send(&get_edid(1));
    let (ticket, question) = h.asked.pop().unwrap();
    assert_eq!(question, DisplayQuery::Edid { scanout: 1 });
    h.answer(ticket, DisplayAnswer::Edid(answer));
    h.response(id).unwrap().clone()
}

#[test]
fn the_edid_is_that_of_the_display_or_our_own() {
    let mut h = Harness::new();
    let theirs = edid(&mut h, Some(vec![0x5a; 256]));
    assert_eq!((theirs.kind(), theirs.as_bytes().len(), word(&theirs, 6)), (OK_EDID, 1056, 256));
    assert!(theirs.as_bytes()[32..288].iter().all(|byte| *byte == 0x5a));
    assert!(theirs.as_bytes()[288..].iter().all(|byte| *byte == 0));
    for useless in [None, Some(Vec::new()), Some(vec![1; 1025])] {
        let ours = edid(&mut h, useless);
        assert_eq!(
            (word(&ours, 6), &ours.as_bytes()[32..40]),
            (128, &[0, 255, 255, 255, 255, 255, 255, 0][..])
        );
    }
}

#[test]
fn there_is_no_edid_without_its_feature() {
    let mut h = Harness::new();
    h.device.set_features(0);
    assert_eq!(h.status(&get_edid(0)), ERR_UNSPEC);
}

#[test]
fn the_configuration_space_counts_scanouts_and_has_no_events() {
    let h = Harness::new();
    assert_eq!(h.device.config_space(), [0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0]);
}
