//! How a session with its real threads ends when one of them fails.

use std::io::{Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use device_model::gpu::device::{Device, DeviceConfig, Effect};
use device_model::session::CONTROL_QUEUE;
use device_model::telemetry::stats::Stats;

use super::*;
use crate::fault_injection::Injection;
use crate::queues::mailbox::QueueMessage;
use crate::session::start::{DeviceSettings, start};
use crate::session::{Session, SessionState};
use crate::telemetry::instruments::Instruments;
use crate::vhost_user::session_end::SessionEnd;

/// Time limit of every wait in these tests.
const PATIENCE: Duration = Duration::from_secs(20);

/// How a session ends in which `fail` makes something fail. Its front-end is connected and sends nothing.
fn end_after(fail: impl FnOnce(&SessionState, &Injection) + Send + 'static) -> String {
    let (sender, ended) = channel();
    let session = move || {
        let (settings, stats, waker) =
            (DeviceSettings::for_tests(), Arc::new(Stats::default()), Waker::new().unwrap());
        let instruments = Instruments::start(settings.engines, None, Arc::clone(&stats)).unwrap();
        let state = start(&settings, &stats, &instruments, &waker).unwrap();
        fail(&state, &settings.injection);
        let (ours, _front_end) = UnixStream::pair().unwrap();
        let (signal, _never) = UnixStream::pair().unwrap();
        let end = Session::new(ours, state, waker, &signal).unwrap().run();
        assert!(matches!(end, SessionEnd::ThreadFailed(_)), "{end:?}");
        assert!(instruments.query_channel.connection().is_err());
        sender.send(crate::error::chain(&end)).unwrap();
    };
    let thread = thread::spawn(session);
    let end = ended.recv_timeout(PATIENCE);
    if end.is_ok() || thread.is_finished() {
        thread.join().unwrap();
    }
    end.expect("the session goes on without the thread")
}

/// A command as in virtio 1.3 (5.7.6.7).
fn command(kind: u32, context: u32, payload: &[u8]) -> Vec<u8> {
    let header = [kind, 0, 0, 0, context, 0];
    header.iter().flat_map(|word| word.to_le_bytes()).chain(payload.iter().copied()).collect()
}

/// Submits a job of one packet to the engines.
fn submit_a_job(state: &SessionState) {
    let mut device = Device::new(DeviceConfig::default());
    device.set_features(device_model::gpu::device::features());
    let stream = job_stream::Stream::new().nop(0).finish();
    let stream: Vec<u8> = stream.iter().flat_map(|word| word.to_le_bytes()).collect();
    let size = u32::try_from(stream.len()).unwrap().to_le_bytes();
    let mut effects = Vec::new();
    device.control(&command(0x0200, 1, &[0; 72]), (), &mut effects);
    device.control(&command(0x0207, 1, &[&size[..], &[0; 4], &stream].concat()), (), &mut effects);
    let job = effects.into_iter().find_map(|effect| match effect {
        Effect::Run(job) => Some(job),
        _ => None,
    });
    state.scheduler.submit(job.expect("SUBMIT_3D makes a job"));
    state.scheduler.resume();
}

#[test]
fn an_engine_that_panics_in_a_step_ends_the_session() {
    let end = end_after(|state, injection| {
        injection.panics.set("in a step").unwrap();
        submit_a_job(state);
    });
    let thread = |index| {
        format!(
            "A thread of the device has failed: Thread engine-{index} has panicked: Told to panic in a step"
        )
    };
    assert!(end == thread(0) || end == thread(1), "{end}");
}

#[test]
fn a_queue_thread_that_panics_with_a_ring_ends_the_session() {
    let end = end_after(|state, injection| {
        injection.panics.set("in a ring").unwrap();
        state.queue.mailbox.post(QueueMessage::RingReady(CONTROL_QUEUE));
    });
    let expected = "A thread of the device has failed: Thread queue has panicked: Told to panic in a ring";
    assert_eq!(end, expected);
}

#[test]
fn a_queue_thread_whose_epoll_fails_ends_the_session() {
    let end = end_after(|state, _| {
        let null = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: the number of the epoll instance stays open, as another file; its owner closes it later.
        let mut epoll = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(state.queue.poller.as_raw_fd()) });
        rustix::io::dup2(null, &mut epoll).unwrap();
        state.queue.mailbox.post(QueueMessage::RingReady(CONTROL_QUEUE));
    });
    let expected =
        "A thread of the device has failed: Thread queue cannot go on: Invalid argument (os error 22)";
    assert_eq!(end, expected);
}

#[test]
fn a_dropped_thread_has_ended_and_one_that_does_its_work_reports_nothing() {
    let failures = ThreadFailures::new(Waker::new().unwrap());
    let ended = Arc::new(AtomicBool::new(false));
    let theirs = Arc::clone(&ended);
    let thread = DeviceThread::spawn("test", &failures, move || {
        thread::sleep(Duration::from_millis(20));
        theirs.store(true, Ordering::Release);
        Ok(())
    });
    drop(thread.unwrap());
    assert!(ended.load(Ordering::Acquire) && failures.first().is_none());
}

/// The front-end can make a descriptor of its own block after it was checked.
#[test]
fn a_thread_that_blocks_in_a_system_call_is_interrupted_when_it_has_to_end() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let (blocks, is_blocking) = std::sync::mpsc::channel();
    let waker = Waker::new().unwrap();
    let thread = DeviceThread::spawn("blocked", &ThreadFailures::new(waker), move || {
        blocks.send(()).unwrap();
        // `read_exact` would try again.
        let mut byte = [0];
        match (&reader).read(&mut byte) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            other => panic!("The read was not interrupted: {other:?}"),
        }
    })
    .unwrap();
    is_blocking.recv().unwrap();
    let begin = std::time::Instant::now();
    drop(thread);
    assert!(begin.elapsed() >= BLOCKED);
    writer.write_all(&[1]).unwrap_err();
}
