//! Contexts, buffers and jobs: what is answered, when, and the effect on memory.

use job_stream::{
    At, CAPSET_ID, Capset, Compare, Context, Mode, Priority, Range, Space, SpinBehaviour, Stream,
};

use super::*;

const MEMORY: u64 = 0x50_0000;

fn place(id: u32, address: u64) -> At {
    At::new(Space::resource(id), address)
}

fn some(id: u32) -> Range {
    place(id, 0).range(64)
}

impl Harness {
    /// A context with the buffers 10 (4096 bytes) and 11 (64 KiB).
    fn context(&mut self, ctx: u32) {
        assert_eq!(self.status(&ctx_create(ctx)), OK_NODATA);
        for (id, bytes) in [(10, 4096), (11, 0x1_0000)] {
            if self.device.resources.get(id).is_err() {
                let at = MEMORY + u64::from(id) * 0x10_0000;
                self.memory.fill(ByteRange::new(Iova::new(at), bytes.into()).unwrap());
                assert_eq!(self.status(&create_buffer(id, bytes)), OK_NODATA);
                assert_eq!(self.status(&attach_backing(id, &[(at, bytes)])), OK_NODATA);
            }
            assert_eq!(self.status(&ctx_attach(ctx, id)), OK_NODATA);
        }
        self.answers();
    }

    fn submit(&mut self, ctx: u32, fence: u64, stream: Stream) -> u64 {
        self.send(&fenced(submit_3d(ctx, &stream.finish_bytes()), fence))
    }

    /// Word `index` of buffer 10.
    fn buffer_word(&self, index: u64) -> u32 {
        use crate::mmu::JobMemory;
        let mut bytes = [0; 4];
        let at = Iova::new(MEMORY + 10 * 0x10_0000 + index * 4);
        self.memory.read(crate::addr::DomainId::DEVICE, at, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }

    fn run_all(&mut self) {
        while let Some(job) = self.jobs.first_mut() {
            match job.step(&self.memory, 64 << 10) {
                Step::Done => self.finish(JobOutcome::Done),
                Step::Error(error) => self.finish(JobOutcome::Failed(error)),
                Step::Yield => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn the_capability_set_says_what_the_device_takes() {
    let mut h = Harness::new();
    assert_eq!(h.device.config_space()[12..], [1, 0, 0, 0]);
    let info = h.send(&get_capset_info(0));
    let info = h.response(info).unwrap();
    assert_eq!((info.kind(), word(info, 6), word(info, 7), word(info, 8)), (OK_CAPSET_INFO, 30, 2, 104));
    let capset = h.send(&get_capset(CAPSET_ID, 0));
    let capset = h.response(capset).unwrap();
    assert_eq!(capset.kind(), OK_CAPSET);
    let capset = Capset::parse(&capset.as_bytes()[24..]).unwrap();
    assert_eq!((capset.modes, capset.default_mode, capset.max_jobs), (0b11110, 2, 1024));
    assert_eq!((capset.max_address_spaces, capset.gva_bits), (64, 48));
    assert_eq!(h.status(&get_capset_info(1)), ERR_INVALID_PARAMETER);
    assert_eq!(h.status(&get_capset(1, 1)), ERR_INVALID_PARAMETER);
}

#[test]
fn without_the_feature_there_are_no_contexts() {
    let mut h = Harness::new();
    h.device.set_features(0);
    assert_eq!(h.status(&ctx_create(1)), ERR_UNSPEC);
    assert_eq!(h.status(&create_buffer(1, 64)), ERR_UNSPEC);
    assert_eq!(h.status(&get_capset_info(0)), ERR_INVALID_PARAMETER);
}

#[test]
fn each_misuse_of_contexts_and_buffers_gets_its_error() {
    let mut h = Harness::new();
    h.context(1);
    assert_eq!(h.status(&ctx_create(0)), ERR_INVALID_CONTEXT_ID);
    assert_eq!(h.status(&ctx_create(1)), ERR_INVALID_CONTEXT_ID);
    assert_eq!(h.status(&ctx_destroy(2)), ERR_INVALID_CONTEXT_ID);
    assert_eq!(h.status(&ctx_attach(2, 10)), ERR_INVALID_CONTEXT_ID);
    assert_eq!(h.status(&ctx_attach(1, 99)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&ctx_detach(1, 99)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&create_buffer(0, 64)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&create_buffer(10, 64)), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&create_buffer(12, 0)), ERR_INVALID_PARAMETER);
    assert_eq!(h.status(&create_3d(12, 2, 64, 1)), ERR_INVALID_PARAMETER);
    assert_eq!(h.status(&create_3d(12, 0, 64, 2)), ERR_INVALID_PARAMETER);
    assert_eq!(h.status(&flush(10, rect(0, 0, 1, 1))), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&set_scanout(0, 10, rect(0, 0, 32, 32))), ERR_INVALID_RESOURCE_ID);
    assert_eq!(h.status(&transfer_3d(true, 1, 10, 4000, 97)), ERR_INVALID_PARAMETER);
    assert_eq!(h.status(&transfer_3d(true, 1, 10, 4000, 96)), OK_NODATA);
    assert_eq!(h.status(&transfer_3d(false, 0, 10, 0, 4096)), OK_NODATA);
}

#[test]
fn a_fenced_job_is_answered_at_its_end_and_an_unfenced_one_at_once() {
    let mut h = Harness::new();
    h.context(1);
    let fenced = h.submit(1, 7, Stream::new().fill(some(10), 0x0102_0304));
    assert_eq!(h.answers(), []);
    let unfenced = h.send(&submit_3d(1, &Stream::new().signal(place(10, 64), 5).finish_bytes()));
    assert_eq!((h.answers(), h.jobs.len()), (vec![(unfenced, OK_NODATA)], 1), "one job of a context runs");
    h.run_all();
    assert_eq!(h.answers(), [(fenced, OK_NODATA)]);
    assert_eq!((h.buffer_word(15), h.buffer_word(16)), (0x0102_0304, 5));
    assert_eq!(h.device.usage().jobs, 0);
}

#[test]
fn a_stream_that_is_refused_leaves_no_trace() {
    let mut h = Harness::new();
    h.context(1);
    assert_eq!(h.status(&create_buffer(12, 64)), OK_NODATA);
    assert_eq!(h.status(&create_buffer(13, 64)), OK_NODATA);
    assert_eq!(h.status(&ctx_attach(1, 13)), OK_NODATA);
    assert_eq!(h.status(&create_buffer(14, 64)), OK_NODATA);
    assert_eq!(h.status(&attach_backing(14, &[(MEMORY, 64)])), OK_NODATA);
    let good = Stream::new().mode(Mode::Preempt).fill(some(10), 1);
    let bytes = |stream: &Stream| stream.clone().finish_bytes();
    for (stream, status) in [
        (bytes(&good.clone().fill(some(99), 1)), ERR_INVALID_RESOURCE_ID),
        (bytes(&good.clone().fill(some(12), 1)), ERR_INVALID_RESOURCE_ID),
        (bytes(&good.clone().fill(some(13), 1)), ERR_INVALID_RESOURCE_ID),
        (bytes(&good.clone().fill(some(14), 1)), ERR_INVALID_RESOURCE_ID),
        (bytes(&good.clone().fill(place(10, 4064).range(64), 1)), ERR_INVALID_PARAMETER),
        (bytes(&good.clone().fill(place(10, 1).range(64), 1)), ERR_INVALID_PARAMETER),
        (bytes(&good)[..44].to_vec(), ERR_INVALID_PARAMETER),
        (bytes(&good)[..43].to_vec(), ERR_INVALID_PARAMETER),
        (bytes(&Stream::new().mode(Mode::RegistrationCache)), ERR_INVALID_PARAMETER),
    ] {
        assert_eq!(h.status(&submit_3d(1, &stream)), status);
    }
    assert_eq!(h.status(&submit_3d_claiming(1, 5000, &bytes(&good))), ERR_INVALID_PARAMETER);
    assert_eq!(h.status(&submit_3d(2, &bytes(&good))), ERR_INVALID_CONTEXT_ID);
    assert_eq!((h.jobs.len(), h.device.usage().jobs), (0, 0));
    assert_eq!(
        h.status(&submit_3d(1, &bytes(&Stream::new().mode(Mode::Fault)))),
        OK_NODATA,
        "no mode was set"
    );
    assert_eq!(h.jobs[0].mode(), Mode::Fault);
}

#[test]
fn the_first_job_settles_the_mode_and_any_job_the_priority() {
    let mut h = Harness::new();
    h.context(1);
    let ask =
        |mode, priority| Stream::new().push(Context { mode, priority, fence: None, done: 0, failed: 0 });
    h.submit(1, 1, ask(None, Some(Priority::High)));
    assert_eq!((h.jobs[0].mode(), h.jobs[0].priority()), (Mode::Fence, Priority::High));
    h.run_all();
    assert_eq!(h.status(&submit_3d(1, &ask(Some(Mode::Strict), None).finish_bytes())), ERR_INVALID_PARAMETER);
    h.submit(1, 2, ask(Some(Mode::Fence), None));
    assert_eq!((h.jobs[0].mode(), h.jobs[0].priority()), (Mode::Fence, Priority::High));
}

#[test]
fn unref_and_detach_wait_for_the_jobs_that_use_the_memory_and_nobody_waits_for_them() {
    let mut h = Harness::new();
    h.context(1);
    let job = h.submit(1, 1, Stream::new().fill(some(10), 1));
    let queued = h.submit(1, 2, Stream::new().fill(some(11), 1));
    let (detach, unref) = (h.send(&detach_backing(10)), h.send(&unref(11)));
    h.resource(3, 8, 8, 0x10_0000);
    assert_eq!(h.status(&flush(3, rect(0, 0, 8, 8))), OK_NODATA);
    assert_eq!(
        h.status(&submit_3d(1, &Stream::new().fill(some(11), 1).finish_bytes())),
        ERR_INVALID_RESOURCE_ID
    );
    assert_eq!((h.response(detach), h.response(unref)), (None, None));
    h.answers();
    let first = h.jobs.remove(0);
    h.jobs.insert(0, first);
    h.run();
    assert_eq!(h.answers(), [(job, OK_NODATA), (detach, OK_NODATA)]);
    h.run();
    assert_eq!(h.answers(), [(queued, OK_NODATA), (unref, OK_NODATA)]);
}

#[test]
fn a_failed_job_loses_its_context_and_no_other() {
    let mut h = Harness::new();
    h.context(1);
    h.context(2);
    let fence = Context { mode: None, priority: None, fence: Some(place(10, 128)), done: 1, failed: 2 };
    let failing = h.submit(1, 1, Stream::new().nop(0).spin(SpinBehaviour::Wedged, 0));
    let behind = h.submit(1, 2, Stream::new().push(fence).fill(some(10), 0x55));
    let other = h.submit(2, 3, Stream::new().signal(place(10, 256), 9));
    assert_eq!(h.jobs.len(), 2);
    h.finish(JobOutcome::Failed(JobError::Wedged { packet: 1 }));
    assert_eq!(h.status(&submit_3d(1, &[])), ERR_INVALID_CONTEXT_ID);
    h.answers();
    h.run_all();
    assert_eq!(h.answers(), [(behind, ERR_UNSPEC), (other, OK_NODATA)]);
    assert!(h.response(failing).is_none(), "it was answered before");
    assert_eq!((h.buffer_word(32), h.buffer_word(64)), (2, 9), "its fence says that it failed");
    assert_ne!(h.buffer_word(0), 0x55);
    assert_eq!(h.status(&ctx_destroy(1)), OK_NODATA);
    h.context(1);
    assert_eq!(h.status(&submit_3d(1, &[])), OK_NODATA, "a new context of that number takes jobs");
}

#[test]
fn destroying_a_context_stops_its_job_fails_those_that_wait_and_is_answered_after_them() {
    let mut h = Harness::new();
    h.context(1);
    let running = h.submit(1, 1, Stream::new().wait(place(10, 0), Compare::Equal, 0, 0));
    let waiting = h.submit(1, 2, Stream::new().nop(0));
    let detach = h.send(&ctx_detach(1, 11));
    let destroy = h.send(&ctx_destroy(1));
    assert_eq!(h.status(&submit_3d(1, &[])), ERR_INVALID_CONTEXT_ID);
    assert_eq!(h.status(&ctx_create(1)), OK_NODATA, "the number is free at once");
    assert_eq!(h.device.usage().contexts, 2);
    h.answers();
    assert_eq!(h.jobs[0].step(&h.memory, 1), Step::Error(JobError::Killed));
    h.finish(JobOutcome::Failed(JobError::Killed));
    let answers = [(running, ERR_UNSPEC), (waiting, ERR_UNSPEC), (detach, OK_NODATA), (destroy, OK_NODATA)];
    assert_eq!(h.answers(), answers);
    assert_eq!((h.device.usage().contexts, h.device.usage().jobs), (1, 0));
}

#[test]
fn transfers_of_a_buffer_are_answered_behind_the_jobs_of_their_context() {
    let mut h = Harness::new();
    h.context(1);
    h.context(2);
    let job = h.submit(1, 1, Stream::new().fill(some(10), 1));
    let transfer = h.send(&transfer_3d(false, 1, 10, 0, 64));
    assert_eq!(h.status(&transfer_3d(true, 2, 10, 0, 64)), OK_NODATA);
    h.answers();
    h.run_all();
    assert_eq!(h.answers(), [(job, OK_NODATA), (transfer, OK_NODATA)]);
}

#[test]
fn jobs_and_contexts_are_bounded() {
    let quotas = Quotas { queued_jobs: 2, contexts: 1, ..Quotas::default() };
    let mut h = Harness::with(DeviceConfig { quotas, ..DeviceConfig::default() });
    h.context(1);
    assert_eq!(h.status(&ctx_create(2)), ERR_OUT_OF_MEMORY);
    h.submit(1, 1, Stream::new().nop(0));
    h.submit(1, 2, Stream::new().nop(0));
    assert_eq!(h.status(&submit_3d(1, &[])), ERR_OUT_OF_MEMORY);
    h.run_all();
    assert_eq!(h.status(&submit_3d(1, &[])), OK_NODATA);
}

#[test]
fn reset_hands_back_what_waits_for_jobs_and_old_jobs_are_dropped() {
    let mut h = Harness::new();
    h.context(1);
    let mut pending = vec![h.submit(1, 1, Stream::new().fill(some(10), 1)), h.submit(1, 2, Stream::new())];
    pending.push(h.send(&ctx_detach(1, 10)));
    pending.push(h.send(&detach_backing(10)));
    let mut back = h.device.reset();
    back.sort_unstable();
    assert_eq!(back, pending);
    assert_eq!(h.device.usage(), Usage::default());
    h.device.set_features(features());
    h.context(1);
    h.answers();
    h.finish(JobOutcome::Done);
    assert_eq!(h.answers(), []);
}
