//! Who may have which address space, and how long.

use job_stream::{Space, Stream};

use super::*;
use crate::gpu::quota::Quotas;

const ROOT: u64 = 0x7000;

/// A device with the contexts 1 and 2.
fn device() -> Harness {
    let quotas = Quotas { address_spaces: 2, ..Quotas::default() };
    let mut gpu = Harness::with(DeviceConfig { quotas, ..DeviceConfig::default() });
    for ctx in [1, 2] {
        assert_eq!(gpu.status(&ctx_create(ctx)), OK_NODATA);
    }
    gpu
}

fn job(ctx: u32, asid: u32) -> Vec<u8> {
    let range = job_stream::Range::new(Space::address_space(asid), 0, 4);
    submit_3d(ctx, &Stream::new().fill(range, 0).finish_bytes())
}

fn killed() -> JobOutcome {
    JobOutcome::Failed(JobError::Killed)
}

#[test]
fn an_address_space_is_used_by_jobs_of_its_context_alone() {
    let mut gpu = device();
    assert_eq!(gpu.status(&job(1, 9)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(gpu.status(&as_create(1, 9, ROOT)), OK_NODATA);
    assert_eq!(gpu.status(&job(2, 9)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(gpu.status(&as_destroy(2, 9)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(gpu.status(&as_create(2, 9, ROOT)), ERR_INVALID_RESOURCE_ID, "asids are of the whole device");
    assert_eq!(gpu.status(&job(1, 9)), OK_NODATA);
    assert_eq!(gpu.jobs.len(), 1);
    assert!(gpu.jobs[0].is_translated());
}

#[test]
fn nonsense_creates_no_address_space() {
    let mut gpu = device();
    assert_eq!(gpu.status(&as_create(3, 1, ROOT)), ERR_INVALID_CONTEXT_ID);
    for (asid, flags, root) in [(1 << 31, 0, ROOT), (1, 2, ROOT), (1, 0, ROOT + 8), (1, 0, 1 << 52)] {
        let request = as_create_with(1, asid, flags, root);
        assert_eq!(gpu.status(&request), ERR_INVALID_PARAMETER, "{asid:#x} {flags} {root:#x}");
        assert_eq!(gpu.status(&request[..request.len() - 1]), ERR_INVALID_PARAMETER);
    }
    assert_eq!(gpu.status(&as_destroy(1, 1)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(gpu.status(&in_context(raw(0x4dff, &[0; 64]), 1)), ERR_UNSPEC);
    assert_eq!(gpu.device.usage().address_spaces, 0);
}

#[test]
fn without_virgl_there_are_no_address_spaces() {
    let mut gpu = device();
    gpu.device.set_features(0);
    assert_eq!(gpu.status(&as_create(1, 1, ROOT)), ERR_UNSPEC);
}

#[test]
fn the_end_of_an_address_space_is_answered_when_no_job_uses_it_and_its_number_is_free_at_once() {
    let mut gpu = device();
    gpu.status(&as_create(1, 5, ROOT));
    gpu.status(&job(1, 5));
    let destroy = gpu.send(&as_destroy(1, 5));
    assert_eq!(gpu.response(destroy), None, "a job uses it");
    assert_eq!(gpu.status(&job(1, 5)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(gpu.status(&as_create(2, 5, ROOT)), OK_NODATA);
    gpu.finish(killed());
    assert_eq!(gpu.response(destroy).unwrap().kind(), OK_NODATA);
    assert_eq!(gpu.status(&as_destroy(2, 5)), OK_NODATA, "no job uses the other");
}

#[test]
fn the_quota_counts_those_that_jobs_still_use() {
    let mut gpu = device();
    gpu.status(&as_create(1, 5, ROOT));
    gpu.status(&as_create(1, 6, ROOT));
    assert_eq!(gpu.status(&as_create(2, 7, ROOT)), ERR_OUT_OF_MEMORY);
    gpu.status(&job(1, 5));
    gpu.send(&as_destroy(1, 5));
    assert_eq!(
        (gpu.status(&as_create(2, 7, ROOT)), gpu.device.usage().address_spaces),
        (ERR_OUT_OF_MEMORY, 2)
    );
    gpu.finish(killed());
    assert_eq!(gpu.status(&as_create(2, 7, ROOT)), OK_NODATA);
}

#[test]
fn the_end_of_a_context_ends_its_address_spaces() {
    let mut gpu = device();
    gpu.status(&as_create(1, 5, ROOT));
    gpu.status(&as_create(2, 6, ROOT));
    gpu.status(&job(1, 5));
    let destroy = gpu.send(&ctx_destroy(1));
    assert_eq!((gpu.response(destroy), gpu.device.usage().address_spaces), (None, 2));
    gpu.finish(killed());
    assert_eq!(gpu.response(destroy).unwrap().kind(), OK_NODATA);
    assert_eq!(gpu.device.usage().address_spaces, 1);
    assert_eq!(gpu.status(&ctx_create(1)), OK_NODATA);
    assert_eq!(gpu.status(&job(1, 5)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(gpu.status(&job(2, 6)), OK_NODATA);
}

#[test]
fn a_reset_leaves_no_address_space() {
    let mut gpu = device();
    gpu.status(&as_create(1, 5, ROOT));
    gpu.status(&job(1, 5));
    let destroy = gpu.send(&as_destroy(1, 5));
    assert_eq!(gpu.device.reset(), [destroy]);
    assert_eq!(gpu.device.usage(), Usage::default());
}
