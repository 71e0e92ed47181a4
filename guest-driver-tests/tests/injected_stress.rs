//! What `--inject` calls stress is nothing that a device may not do: a driver that goes by the rules survives it, results
//! are right in every mode, and no page is touched after its ack.

use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::jobs::{every_packet, place, whole};
use guest_driver_tests::soft_guest::*;
use job_stream::{Mode, Stream};

const COHERENT: [Mode; 4] = [Mode::Strict, Mode::Fence, Mode::Preempt, Mode::Fault];

fn with(stress: &[&str]) -> Backend {
    let injected = stress.iter().flat_map(|stress| ["--inject", stress]);
    Backend::start(&injected.collect::<Vec<_>>()).unwrap()
}

/// In every mode: each packet's result is the twin's, no job fails that should not, and a storm leaves no late touch.
fn survived(stress: &[&str], cycles: u64) {
    let backend = with(stress);
    for mode in COHERENT {
        let mut client = JobGuest::boot(&backend, mode, 51).unwrap();
        assert_eq!(client.differing_from_twin(every_packet()).unwrap(), [0_u32; 0], "{stress:?}, {mode}");
    }
    assert_eq!(backend.stats().unwrap().get("jobs_failed").unwrap(), 0, "{stress:?}");
    for mode in COHERENT {
        let mut client = JobGuest::boot(&backend, mode, 51).unwrap();
        assert!(client.storm(cycles, 51).unwrap() > 0, "{stress:?}, {mode}");
    }
    for one in stress {
        let name = one.split('=').next().unwrap();
        let hits = backend.hits(name).unwrap();
        println!("{name}: {hits} times");
        assert!(hits >= cycles, "{name} took effect {hits} times");
    }
}

#[test]
fn late_acks_hurt_nobody_and_are_as_late_as_they_were_told_to_be() {
    survived(&["delay-ack=..2ms"], 100);
    let backend = with(&["delay-ack=30ms"]);
    let mut client = JobGuest::boot(&backend, Mode::Fault, 52).unwrap();
    for page in 0..5 {
        let latency = client.swap(1, page).unwrap().latency;
        assert!((30..200).contains(&latency.as_millis()), "{latency:?}");
    }
}

#[test]
fn late_steps_hurt_nobody() {
    survived(&["step-delay=..500us"], 60);
}

#[test]
fn late_misses_hurt_nobody() {
    survived(&["delay-miss=..2ms"], 60);
    let backend = with(&["delay-miss=20ms"]);
    let mut client = JobGuest::boot(&backend, Mode::Fence, 53).unwrap();
    let begin = Instant::now();
    client.run(Stream::new().fill(whole(1), 1)).unwrap();
    assert_eq!(backend.stats().unwrap().get("miss_timeouts").unwrap(), 0);
    assert!(begin.elapsed() >= Duration::from_millis(20));
}

#[test]
fn late_fences_hurt_nobody_and_keep_their_order() {
    survived(&["delay-fence=..3ms"], 60);
    let backend = with(&["delay-fence=..20ms"]);
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let fences: Vec<_> =
        (0..20).map(|fence| guest.driver.submit(&Command::capset_info(0).fenced(fence)).unwrap()).collect();
    let answers = fences.into_iter().map(|ticket| guest.driver.wait_ok(ticket).unwrap());
    assert!(answers.collect::<Vec<_>>().is_sorted_by_key(|answer| answer.order));
}

#[test]
fn jobs_that_are_preempted_at_each_step_come_to_their_end() {
    survived(&["force-preempt"], 60);
}

#[test]
fn faults_on_pages_that_are_there_are_replayed() {
    survived(&["spurious-fault=3"], 60);
}

#[test]
fn everything_at_once_hurts_nobody() {
    let all = ["delay-ack=..500us", "delay-miss=..500us", "delay-fence=..500us", "step-delay=..100us"];
    survived(&[&all[..], &["force-preempt", "spurious-fault=5", "spurious-interrupt"]].concat(), 40);
}

/// A refused page is a fault of the job: it says so, its context is lost, and the next one is as good as new.
#[test]
fn jobs_whose_misses_are_refused_say_so_and_the_device_goes_on() {
    let backend = with(&["refuse-miss=100"]);
    let (mut failed, mut done) = (0, 0);
    let mut client = JobGuest::boot(&backend, Mode::Fence, 54).unwrap();
    for round in 0..40 {
        let ticket = client.submit(Stream::new().fill(whole(1), round).fill(whole(2), round)).unwrap();
        if client.guest.driver.wait(ticket).unwrap().is_ok() {
            done += 1;
            assert!(client.bytes(2).unwrap().chunks(4).all(|word| word == round.to_le_bytes()));
        } else {
            failed += 1;
            client.guest.driver.ok(&Command::ctx_destroy(1)).unwrap();
            client.make_context(1).unwrap();
        }
        // So that pages are missed again.
        for page in 0..8 {
            client.swap(1, page).unwrap();
        }
    }
    assert!(failed > 0 && done > failed, "{failed} failed, {done} were done");
    client.guest.dma.oracle().check().unwrap();
}

/// In each grade that leaves the engine a step: drains are over in time, the context can be destroyed, and others run.
#[test]
fn a_job_that_hangs_holds_up_no_drain_for_longer_than_its_timeout() {
    for grade in ["yielding", "stubborn"] {
        let backend =
            Backend::start(&["--inject", &format!("hang-job={grade}"), "--drain-timeout", "200ms"]).unwrap();
        let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
        let buffer = guest.dma.space().allocate(1, Permission::ReadWrite).unwrap();
        guest.driver.ok(&Command::create_buffer(1, PAGE as u32)).unwrap();
        guest.driver.ok(&Command::attach_backing(1, &buffer.segments(0, PAGE))).unwrap();
        guest.driver.ok(&Command::ctx_create(1)).unwrap();
        guest.driver.ok(&Command::ctx_attach(1, 1)).unwrap();
        let fill = Stream::new().fill(place(1, 0).range(PAGE), 0);
        let hung = guest.driver.submit(&Command::submit_3d(1, &fill.finish()).fenced(1)).unwrap();
        let pinned = |stats: &Stats| stats.get("job_steps").is_ok_and(|steps| steps > 0);
        assert!(backend.wait_for_stats(Duration::from_secs(5), pinned).unwrap());
        // Nothing was taken away: the job goes on hanging afterwards.
        let latency = guest.front_end.invalidate(buffer.segments(0, PAGE)[0].at, PAGE).unwrap().latency;
        // I2: the drain timeout and a step, with room for a busy machine.
        assert!((150..400).contains(&latency.as_millis()), "{grade}: {latency:?}");
        buffer.write(0, &[3; PAGE as usize]).unwrap();
        guest.driver.ok(&Command::ctx_destroy(1)).unwrap();
        assert_eq!(guest.driver.wait(hung).unwrap().kind(), kind::ERR_UNSPEC);
        let mut bytes = [0; PAGE as usize];
        buffer.read(0, &mut bytes).unwrap();
        assert!(bytes == [3; PAGE as usize], "{grade}: it got somewhere");
    }
}

/// A step that does not end is the end of the session, but not of the process, and no page is touched after the ack.
#[test]
fn a_job_that_is_stuck_in_its_step_costs_its_guest_the_device_and_nobody_else() {
    let backend = with(&["hang-job=stuck"]);
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let mut buffer = guest.dma.space().allocate(1, Permission::ReadWrite).unwrap();
    guest.driver.ok(&Command::create_buffer(1, PAGE as u32)).unwrap();
    guest.driver.ok(&Command::attach_backing(1, &buffer.segments(0, PAGE))).unwrap();
    guest.driver.ok(&Command::ctx_create(1)).unwrap();
    guest.driver.ok(&Command::ctx_attach(1, 1)).unwrap();
    let fill = Stream::new().fill(place(1, 0).range(PAGE), 0);
    let _never = guest.driver.submit(&Command::submit_3d(1, &fill.finish()).fenced(1)).unwrap();
    let stepping = |stats: &Stats| stats.get("job_steps").is_ok_and(|steps| steps > 0);
    assert!(backend.wait_for_stats(Duration::from_secs(5), stepping).unwrap());
    let frame = guest.dma.space().frames().take(1).unwrap()[0];
    let latency = guest.dma.swap_page(&mut buffer, 0, frame).unwrap().latency;
    assert!((100..400).contains(&latency.as_millis()), "{latency:?}");
    assert!(guest.front_end.is_closed_within(Duration::from_secs(5)).unwrap());
    guest.dma.oracle().check().unwrap();
    assert_eq!(backend.stats().unwrap().get("revocations").unwrap(), 1);
    drop(guest);
    let mut next = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    next.driver.ok(&Command::display_info()).unwrap();
}

#[test]
fn a_completion_without_its_interrupt_is_there_for_whoever_looks() {
    // A completion that the driver finds before it would be interrupted needs no interrupt, and loses none: each comes only
    // when the driver has long begun to wait.
    let backend = with(&["no-interrupt=1", "delay-fence=5ms"]);
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let mut lost = 0;
    for fence in 1..400 {
        let ticket = guest.driver.submit(&Command::capset_info(0).fenced(fence)).unwrap();
        match guest.driver.wait_for(ticket, Duration::from_millis(50)) {
            Ok(response) => assert!(response.is_ok()),
            Err(Error::LostInterrupt { waiting: 1, .. }) => {
                lost += 1;
                assert!(guest.driver.try_wait(ticket).unwrap().unwrap().is_ok());
            }
            Err(other) => panic!("{other}"),
        }
        if lost == 5 {
            return;
        }
    }
    panic!("{lost} interrupts of 400 were lost");
}

#[test]
fn an_interrupt_without_a_completion_finds_nothing() {
    survived(&["spurious-interrupt"], 40);
    let backend = with(&["spurious-interrupt"]);
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    guest.driver.ring(Queue::Control).interrupts();
    for _ in 0..20 {
        guest.driver.ok(&Command::capset_info(0)).unwrap();
    }
    let cursor = guest.driver.ring(Queue::Cursor).interrupts();
    assert!(cursor > 0, "nothing was ever completed there");
}
