//! Rings and blobs, if the driver has negotiated them: which fences wait for which, and how jobs use a blob.

use job_stream::{At, CAPSET_ID, Mode, Space, Stream};
use virtio_bindings::virtio_gpu::VIRTIO_GPU_F_RESOURCE_BLOB;

use super::*;
use crate::addr::DomainId;
use crate::mmu::JobMemory;

const MEMORY: u64 = 0x70_0000;

/// Two contexts and the blob 5, of two pages that are not adjacent.
fn two_contexts() -> Harness {
    let mut h = Harness::new();
    for at in [MEMORY, MEMORY + 0x2000] {
        h.memory.fill(ByteRange::new(Iova::new(at), 0x1000).unwrap());
    }
    let blob = create_blob(5, 0x2000, &[(MEMORY + 0x2000, 0x1000), (MEMORY, 0x1000)]);
    assert_eq!(h.status(&blob), OK_NODATA);
    for ctx in [1, 2] {
        assert_eq!(h.status(&ctx_create_for(ctx, CAPSET_ID)), OK_NODATA);
        assert_eq!(h.status(&ctx_attach(ctx, 5)), OK_NODATA);
    }
    h.answers();
    h
}

fn signal(address: u64, value: u32) -> Stream {
    Stream::new().signal(At::new(Space::resource(5), address), value)
}

impl Harness {
    fn submit_on(&mut self, (ctx, ring): (u32, u8), fence: u64, stream: Stream) -> u64 {
        self.send(&on_ring(fenced(submit_3d(ctx, &stream.finish_bytes()), fence), ring))
    }

    /// Ends the running job with this index.
    fn end(&mut self, index: usize, outcome: JobOutcome) {
        let job = self.jobs.remove(index);
        self.jobs.insert(0, job);
        self.finish(outcome);
    }
}

#[test]
fn rings_and_contexts_run_beside_each_other_and_each_in_order() {
    let mut h = two_contexts();
    let rings = [(1, 0), (1, 1), (2, 0)];
    let first = rings.map(|ring| h.submit_on(ring, 1, Stream::new()));
    let second = rings.map(|ring| h.submit_on(ring, 2, Stream::new()));
    let global = h.send(&fenced(get_capset_info(0), 3));
    assert_eq!(h.answers(), [(global, OK_CAPSET_INFO)], "the global timeline waits for no ring");
    assert_eq!(h.jobs.len(), 3, "one job a ring");
    h.end(1, JobOutcome::Done);
    assert_eq!((h.answers(), h.jobs.len()), (vec![(first[1], OK_NODATA)], 3));
    h.end(2, JobOutcome::Done);
    assert_eq!(h.answers(), [(second[1], OK_NODATA)], "not held back by the first of its own context");
    h.end(1, JobOutcome::Done);
    h.end(0, JobOutcome::Done);
    assert_eq!(h.answers(), [(first[2], OK_NODATA), (first[0], OK_NODATA)]);
}

#[test]
fn fences_of_one_ring_go_out_in_order_whatever_their_commands_are() {
    let mut h = two_contexts();
    let job = h.submit_on((1, 3), 1, Stream::new());
    let quick = h.send(&in_context(on_ring(fenced(get_capset_info(0), 2), 3), 1));
    let other = h.send(&in_context(on_ring(fenced(get_capset_info(0), 2), 3), 2));
    assert_eq!(h.answers(), [(other, OK_CAPSET_INFO)]);
    h.end(0, JobOutcome::Done);
    let [(first, response), (second, _)] = h.completed.as_slice() else { panic!("{:?}", h.completed) };
    assert_eq!((*first, *second), (job, quick));
    assert_eq!((word(response, 1), word(response, 2), word(response, 4), word(response, 5)), (3, 1, 1, 3));
}

#[test]
fn jobs_without_a_ring_run_on_ring_0_and_their_fences_on_the_global_timeline() {
    let mut h = two_contexts();
    let on_ring_0 = h.submit_on((1, 0), 1, Stream::new());
    let nowhere = h.send(&fenced(submit_3d(1, &[]), 2));
    let next = h.submit_on((1, 0), 3, Stream::new());
    assert_eq!(h.jobs.len(), 1, "one after the other");
    let behind = h.send(&fenced(get_capset_info(0), 4));
    h.end(0, JobOutcome::Done);
    assert_eq!(h.answers(), [(on_ring_0, OK_NODATA)]);
    h.end(0, JobOutcome::Done);
    assert_eq!(h.answers(), [(nowhere, OK_NODATA), (behind, OK_CAPSET_INFO)]);
    h.end(0, JobOutcome::Done);
    assert_eq!(h.answers(), [(next, OK_NODATA)]);
}

#[test]
fn a_job_that_fails_takes_all_rings_of_its_context_with_it() {
    let mut h = two_contexts();
    let [failing, beside] = [0, 1].map(|ring| h.submit_on((1, ring), 1, signal(0, 9)));
    let [behind, other] = [(1, 1), (2, 0)].map(|ring| h.submit_on(ring, 2, signal(8, 9)));
    h.end(0, JobOutcome::Failed(JobError::Killed));
    assert_eq!(h.answers(), [(failing, ERR_UNSPEC)]);
    assert_eq!(h.jobs[0].step(&h.memory, 1), Step::Error(JobError::Killed), "it is stopped at its next step");
    h.end(0, JobOutcome::Failed(JobError::Killed));
    assert_eq!(h.answers(), [(beside, ERR_UNSPEC), (behind, ERR_UNSPEC)]);
    h.run();
    assert_eq!(h.answers(), [(other, OK_NODATA)], "other contexts never notice");
}

#[test]
fn what_waits_for_a_context_waits_for_all_of_its_rings() {
    let mut h = two_contexts();
    let jobs = [0, 1, 2].map(|ring| h.submit_on((1, ring), 1, Stream::new()));
    let detach = h.send(&ctx_detach(1, 5));
    let behind = [0, 1].map(|ring| h.submit_on((1, ring), 2, Stream::new()));
    let destroy = h.send(&ctx_destroy(1));
    assert_eq!((h.answers(), h.device.usage().contexts), (vec![], 2));
    h.end(2, JobOutcome::Done);
    h.end(1, JobOutcome::Done);
    assert_eq!(h.answers(), [(jobs[2], OK_NODATA), (jobs[1], OK_NODATA), (behind[1], ERR_UNSPEC)]);
    h.end(0, JobOutcome::Failed(JobError::Killed));
    let last = [(jobs[0], ERR_UNSPEC), (detach, OK_NODATA), (behind[0], ERR_UNSPEC), (destroy, OK_NODATA)];
    assert_eq!(h.answers(), last);
    assert_eq!((h.device.usage().contexts, h.device.usage().jobs), (1, 0));
}

#[test]
fn the_mode_is_one_for_all_rings_of_a_context() {
    let mut h = two_contexts();
    h.submit_on((1, 0), 1, Stream::new().mode(Mode::Strict));
    h.submit_on((1, 1), 1, Stream::new());
    assert_eq!(h.jobs[1].mode(), Mode::Strict);
    let other = on_ring(submit_3d(1, &Stream::new().mode(Mode::Fault).finish_bytes()), 1);
    assert_eq!(h.status(&other), ERR_INVALID_PARAMETER);
}

#[test]
fn a_context_is_of_our_capability_set_and_a_ring_below_64() {
    let mut h = two_contexts();
    for init in [1, 59, 61, 0x100 | CAPSET_ID, u32::MAX] {
        assert_eq!(h.status(&ctx_create_for(3, init)), ERR_INVALID_PARAMETER, "{init:#x}");
    }
    assert_eq!(
        h.status(&ctx_create_for(3, 0)),
        OK_NODATA,
        "the stock driver, when nobody asked for a context"
    );
    for ring in [64, 255] {
        assert_eq!(h.status(&on_ring(fenced(submit_3d(1, &[]), 1), ring)), ERR_INVALID_PARAMETER);
    }
    h.submit_on((1, 63), 1, Stream::new());
    assert_eq!(h.jobs.len(), 1);
}

#[test]
fn what_was_not_negotiated_is_refused() {
    let mut h = two_contexts();
    let blob = create_blob(6, 16, &[(MEMORY, 16)]);
    h.device.set_features(features() & !(1 << VIRTIO_GPU_F_CONTEXT_INIT));
    assert_eq!(h.status(&ctx_create_for(4, CAPSET_ID)), ERR_INVALID_PARAMETER);
    assert_eq!(h.status(&on_ring(fenced(submit_3d(1, &[]), 1), 1)), ERR_INVALID_PARAMETER);
    assert_eq!((h.status(&ctx_create_for(4, 0)), h.status(&blob)), (OK_NODATA, OK_NODATA));
    h.device.set_features(features() & !(1 << VIRTIO_GPU_F_RESOURCE_BLOB));
    assert_eq!(h.status(&create_blob(7, 16, &[(MEMORY, 16)])), ERR_UNSPEC);
    assert_eq!(h.status(&set_scanout_blob(5)), ERR_UNSPEC);
    assert_eq!(h.status(&ctx_create_for(5, CAPSET_ID)), OK_NODATA);
}

#[test]
fn a_blob_is_a_buffer_that_comes_with_its_backing() {
    let mut h = two_contexts();
    let across = Stream::new().fill(At::new(Space::resource(5), 0xff0).range(0x20), 0x0102_0304);
    h.submit_on((1, 0), 1, across);
    let gone = h.send(&unref(5));
    assert_eq!(h.response(gone), None, "it goes when the job is done with it");
    h.answers();
    h.run();
    assert_eq!(h.answers()[1..], [(gone, OK_NODATA)]);
    for at in [MEMORY + 0x2ff0, MEMORY] {
        let mut bytes = [0; 16];
        h.memory.read(DomainId::DEVICE, Iova::new(at), &mut bytes).unwrap();
        assert_eq!(bytes, [4, 3, 2, 1].repeat(4)[..]);
    }
    assert_eq!((h.device.usage().resources, h.device.usage().backing_entries), (0, 0));
}

#[test]
fn a_blob_that_is_not_plain_guest_memory_is_refused_and_costs_nothing() {
    let mut h = two_contexts();
    let (before, page) = (h.device.usage(), (MEMORY, 0x1000));
    for (request, status) in [
        (create_blob(5, 16, &[page]), ERR_INVALID_RESOURCE_ID),
        (create_blob(0, 16, &[page]), ERR_INVALID_RESOURCE_ID),
        (create_blob(6, 0, &[page]), ERR_INVALID_PARAMETER),
        (create_blob(6, 16, &[]), ERR_INVALID_PARAMETER),
        (create_blob(6, 0x1001, &[page]), ERR_INVALID_PARAMETER),
        (create_blob(6, u64::MAX, &[page]), ERR_INVALID_PARAMETER),
        (create_blob(6, 16, &[(u64::MAX, 2)]), ERR_INVALID_PARAMETER),
        (create_blob(6, 16, &vec![page; 16_384]), ERR_OUT_OF_MEMORY),
        (create_blob_of((2, 0), 6, 16, &[]), ERR_INVALID_PARAMETER),
        (create_blob_of((3, 0), 6, 16, &[page]), ERR_INVALID_PARAMETER),
        (create_blob_of((1, 1), 6, 16, &[page]), ERR_INVALID_PARAMETER),
        (attach_backing(5, &[page]), ERR_UNSPEC),
        (set_scanout(0, 5, rect(0, 0, 16, 16)), ERR_INVALID_RESOURCE_ID),
        (set_scanout_blob(5), ERR_UNSPEC),
    ] {
        assert_eq!(h.status(&request), status, "{request:x?}");
    }
    assert_eq!(h.device.usage(), before);
}

/// Linux attaches and detaches a resource once for each handle that a process has of it.
#[test]
fn a_resource_stays_attached_until_it_is_detached_as_often_as_it_was_attached() {
    let mut h = two_contexts();
    assert_eq!(h.status(&ctx_attach(1, 5)), OK_NODATA);
    assert_eq!(h.status(&ctx_detach(1, 5)), OK_NODATA);
    h.submit_on((1, 0), 1, signal(0, 1));
    assert_eq!(h.jobs.len(), 1, "one handle is left");
    h.end(0, JobOutcome::Done);
    h.answers();
    assert_eq!(h.status(&ctx_detach(1, 5)), OK_NODATA);
    assert_eq!(h.status(&ctx_detach(1, 5)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&submit_3d(1, &signal(0, 1).finish_bytes())), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&submit_3d(2, &signal(0, 1).finish_bytes())), OK_NODATA);
}

/// Another process of the guest may have queued as many jobs as there is room for.
#[test]
fn a_context_that_queues_all_jobs_leaves_each_other_context_its_share() {
    let mut h = two_contexts();
    let (most, contexts) = (Quotas::default().queued_jobs, Quotas::default().contexts);
    let share = most / contexts;
    for fence in 1..=most - share {
        h.submit_on((1, 0), fence, Stream::new());
    }
    assert_eq!(h.answers(), [], "each waits for the first");
    let one_more = submit_3d(1, &Stream::new().finish_bytes());
    assert_eq!(h.status(&one_more), ERR_OUT_OF_MEMORY, "the other context's share is kept");
    h.answers();
    for fence in 1..=share {
        h.submit_on((2, 0), fence, Stream::new());
    }
    assert_eq!(h.answers(), []);
    assert_eq!(h.jobs.len(), 2, "the other context's job runs");
}
