use super::*;

#[test]
fn each_misuse_of_a_resource_gets_its_error() {
    let mut h = Harness::new();
    h.resource(1, 32, 32, 0x10_0000);
    assert_eq!(h.status(&create_2d(0, B8G8R8X8, 1, 1)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&create_2d(1, B8G8R8X8, 1, 1)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&create_2d(2, 5, 1, 1)), ERR_INVALID_PARAMETER);
    assert_eq!(h.status(&create_2d(2, B8G8R8X8, 1, 0)), ERR_INVALID_PARAMETER);
    assert_eq!(h.status(&create_2d(2, B8G8R8X8, 1 << 15, 1 << 15)), ERR_OUT_OF_MEMORY);

    assert_eq!(h.status(&unref(2)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&attach_backing(2, &[(0, 16)])), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&detach_backing(2)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&transfer_to_host_2d(2, rect(0, 0, 1, 1), 0)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&flush(2, rect(0, 0, 1, 1))), ERR_INVALID_RESOURCE_ID);

    assert_eq!(h.status(&attach_backing(1, &[(0, 16)])), ERR_UNSPEC);
    assert_eq!(h.status(&detach_backing(1)), OK_NODATA);
    assert_eq!(h.status(&detach_backing(1)), ERR_UNSPEC);
    assert_eq!(h.status(&transfer_to_host_2d(1, rect(0, 0, 1, 1), 0)), ERR_UNSPEC);
    assert_eq!(h.status(&attach_backing(1, &[])), ERR_INVALID_PARAMETER);
    assert_eq!(h.status(&attach_backing(1, &[(0x1000, 0)])), ERR_INVALID_PARAMETER);
    assert_eq!(h.status(&attach_backing(1, &[(u64::MAX - 2, 4)])), ERR_INVALID_PARAMETER);

    for outside in [rect(0, 0, 33, 1), rect(1, 0, 32, 1), rect(0, 33, 0, 0), rect(2, 2, u32::MAX, 1)] {
        assert_eq!(h.status(&flush(1, outside)), ERR_INVALID_PARAMETER);
        h.status(&attach_backing(1, &[(0x10_0000, 4096)]));
        assert_eq!(h.status(&transfer_to_host_2d(1, outside, 0)), ERR_INVALID_PARAMETER);
    }
    assert_eq!(h.status(&transfer_to_host_2d(1, rect(0, 31, 1, 1), u64::MAX)), ERR_INVALID_PARAMETER);
}

#[test]
fn a_transfer_of_no_pixels_is_fine_and_runs_nothing() {
    let mut h = Harness::new();
    h.resource(1, 32, 32, 0x10_0000);
    assert_eq!(h.status(&transfer_to_host_2d(1, rect(32, 32, 0, 0), 0)), OK_NODATA);
    assert!(h.jobs.is_empty());
}

#[test]
fn all_eight_formats_can_be_created() {
    let mut h = Harness::new();
    for (id, format) in (1..).zip(FORMATS) {
        assert_eq!(h.status(&create_2d(id, format, 1, 1)), OK_NODATA);
    }
}

#[test]
fn quotas_are_refused_with_out_of_memory_and_given_back() {
    let quotas = Quotas { resource_bytes: 64, backing_entries: 3, resources: 2, ..Quotas::default() };
    let mut h = Harness::with(DeviceConfig { quotas, scanouts: 1, ..DeviceConfig::default() });
    assert_eq!(h.status(&create_2d(1, B8G8R8X8, 2, 4)), OK_NODATA);
    assert_eq!(h.status(&create_2d(2, B8G8R8X8, 3, 3)), ERR_OUT_OF_MEMORY);
    assert_eq!(h.status(&create_2d(2, B8G8R8X8, 2, 2)), OK_NODATA);
    assert_eq!(h.status(&create_2d(3, B8G8R8X8, 1, 1)), ERR_OUT_OF_MEMORY);
    assert_eq!(h.status(&attach_backing(1, &[(0, 1), (1, 1)])), OK_NODATA);
    assert_eq!(h.status(&attach_backing(2, &[(0, 1), (1, 1)])), ERR_OUT_OF_MEMORY);
    assert_eq!(h.status(&attach_backing(2, &[(0, 1)])), OK_NODATA);
    let usage = Usage { resources: 2, resource_bytes: 48, backing_entries: 3, ..Usage::default() };
    assert_eq!(h.device.usage(), usage);
    assert_eq!((h.status(&unref(1)), h.status(&detach_backing(2))), (OK_NODATA, OK_NODATA));
    assert_eq!(
        h.device.usage(),
        Usage { resources: 1, resource_bytes: 16, backing_entries: 0, ..Usage::default() }
    );
    assert_eq!(h.status(&unref(2)), OK_NODATA);
    assert_eq!(h.device.usage(), Usage::default());
}

#[test]
fn an_id_is_free_as_soon_as_its_unref_was_sent() {
    let mut h = Harness::new();
    h.resource(1, 32, 32, 0x10_0000);
    h.send(&transfer_to_host_2d(1, rect(0, 0, 32, 32), 0));
    let unref = h.send(&unref(1));
    assert_eq!(h.status(&create_2d(1, B8G8R8A8, 8, 8)), OK_NODATA);
    assert!(h.response(unref).is_none());
    assert_eq!(h.device.usage().resource_bytes, 4096 + 256, "what a job uses is still accounted for");
    h.run();
    assert_eq!(h.device.usage().resource_bytes, 256);
    assert_eq!(h.status(&attach_backing(1, &[(0, 256)])), OK_NODATA, "it is the new one");
}

#[test]
fn unknown_commands_and_those_of_the_other_queue_are_refused() {
    let mut h = Harness::new();
    for kind in [0, 0xff, 0x10b, 0x10e, 0x208, 0x209, 0x1100, u32::MAX] {
        assert_eq!(h.status(&raw(kind, &[0; 64])), ERR_UNSPEC);
    }
    assert_eq!(h.status(&move_cursor(Default::default(), 0)), ERR_UNSPEC);
    assert_eq!(h.status_of_cursor(&get_display_info()), ERR_UNSPEC);
}
