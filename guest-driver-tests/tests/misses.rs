//! Misses that are refused, never answered, answered with something else, or overtaken by an invalidation; and
//! UPDATEs that nobody can use (DESIGN.md 4.5, I7).

use std::sync::mpsc;
use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::dma::Segment;
use guest_driver_tests::soft_guest::gpu::HEADER_LEN;
use guest_driver_tests::soft_guest::iommu::Fault;
use guest_driver_tests::soft_guest::misses::Miss;
use guest_driver_tests::soft_guest::wire::{IotlbMessage, PERM_BOTH, PERM_READ, PERM_WRITE};
use guest_driver_tests::soft_guest::*;

const SECOND: Duration = Duration::from_secs(1);
const SIDE: u32 = 128;
const PAGES: u64 = 16;

fn boot(args: &[&str]) -> (Backend, SoftGuest, Surface) {
    let backend = Backend::start(args).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::default()).unwrap();
    let surface = guest.surface(Format::B8G8R8X8, SIDE, SIDE).unwrap();
    surface.draw(&picture(SIDE, SIDE, 1)).unwrap();
    (backend, guest, surface)
}

fn transfer(surface: &Surface) -> Command {
    Command::transfer(surface.resource, surface.rect(), 0)
}

fn is_of(miss: &Miss, surface: &Surface) -> bool {
    let first = surface.buffer.address(0);
    (first..first.plus(PAGES * PAGE)).contains(&miss.iova)
}

#[test]
fn a_refused_miss_is_an_error_response_and_a_fault_in_the_log() {
    let (backend, mut guest, surface) = boot(&[]);
    let iova = surface.buffer.address(7 * PAGE);
    let entry = guest.dma.space().iommu().unmap(iova, 1)[0];
    let response = guest.driver.run(&transfer(&surface).fenced(5)).unwrap();
    assert_eq!((response.kind(), response.fence()), (kind::ERR_UNSPEC, Some(5)));
    assert_eq!(guest.dma.space().iommu().faults(), [Fault { iova, write: false }]);
    assert_eq!(guest.front_end.miss_counts().refused, 1);
    let stats = backend.stats().unwrap();
    assert_eq!((stats.get("miss_refused").unwrap(), stats.get("jobs_failed").unwrap()), (1, 1));
    assert_eq!(stats.get("misses").unwrap(), guest.front_end.miss_counts().seen);
    // Mapped after all: the refusal is not remembered.
    guest.dma.space().iommu().map(iova, entry.frame, entry.permission);
    guest.must_show(&surface, &picture(SIDE, SIDE, 1)).unwrap();
}

#[test]
fn a_miss_that_is_never_answered_is_an_error_after_the_miss_timeout() {
    let (backend, mut guest, surface) = boot(&["--miss-timeout", "300ms"]);
    guest.driver.ok(&Command::display_info()).unwrap();
    let wanted = surface.buffer.address(0);
    let wanted = wanted..wanted.plus(PAGES * PAGE);
    guest.front_end.on_miss(Box::new(move |miss| {
        if wanted.contains(&miss.iova) { Answer::Silence } else { Answer::Serve }
    }));
    let start = Instant::now();
    let response = guest.driver.run(&transfer(&surface)).unwrap();
    let took = start.elapsed();
    assert_eq!(response.kind(), kind::ERR_UNSPEC);
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(3), "{took:?}");
    let stats = backend.stats().unwrap();
    assert_eq!(stats.get("miss_timeouts").unwrap(), guest.front_end.miss_counts().ignored);
    assert_eq!(stats.get("jobs_failed").unwrap(), 1);
    // The rest of the device lives, and an invalidation waits for nothing.
    guest.driver.ok(&Command::display_info()).unwrap();
    assert_eq!(guest.front_end.invalidate(Iova(0), 0).unwrap().status, 0);
}

#[test]
fn a_ring_whose_misses_are_answered_late_is_not_broken() {
    let (backend, mut guest, surface) = boot(&["--miss-timeout", "300ms"]);
    let image = picture(SIDE, SIDE, 1);
    guest.must_show(&surface, &image).unwrap();
    for queue in [Queue::Control, Queue::Cursor] {
        let command = match queue {
            Queue::Control => Command::display_info(),
            Queue::Cursor => Command::move_cursor(0, (1, 1), 0),
        };
        let late = backend.stats().unwrap().get("miss_timeouts").unwrap();
        guest.front_end.hold_misses(true);
        guest.flush_ring(queue).unwrap();
        let ticket = guest.driver.submit_to(queue, &command).unwrap();
        let timed_out = |stats: &Stats| stats.get("miss_timeouts").is_ok_and(|now| now > late);
        assert!(backend.wait_for_stats(5 * SECOND, timed_out).unwrap(), "nothing was late on {queue:?}");
        guest.front_end.hold_misses(false);
        let answered = guest.driver.wait_ok(ticket);
        answered.unwrap_or_else(|error| panic!("{queue:?}: {error}\n{}", backend.stderr()));
    }
    guest.must_show(&surface, &image).unwrap();
    let stats = backend.stats().unwrap();
    assert_eq!((stats.get("ring_errors").unwrap(), stats.get("miss_refused").unwrap()), (0, 0));
}

#[test]
fn a_response_whose_miss_is_answered_late_is_not_lost() {
    for late_in_ring in [true, false] {
        let (backend, mut guest, _) = boot(&["--miss-timeout", "300ms"]);
        // A command without a job: a job whose misses are late fails, and rightly so.
        let command = Command::display_info().fenced(7);
        guest.driver.ok(&command).unwrap();
        let memory = guest.driver.ring(Queue::Control).memory();
        let ring = memory.address(0)..memory.address(0).plus(memory.pages() as u64 * PAGE);
        let written = guest.front_end.recent_misses().into_iter().filter(|miss| miss.write);
        let response = written.map(|miss| miss.iova.page()).rfind(|page| !ring.contains(page)).unwrap();
        let late = if late_in_ring { ring } else { response..response.plus(PAGE) };
        // The first write that is missing waits until it is let go: the entry that announces a response, or that.
        let (let_go, waits) = mpsc::channel::<()>();
        let (mut waits, range) = (Some(waits), late.clone());
        guest.front_end.on_miss(Box::new(move |miss| {
            if miss.write && range.contains(&miss.iova) {
                // An error says that the test is over.
                waits.take().map(|waits| waits.recv());
            }
            Answer::Serve
        }));
        guest.front_end.invalidate(late.start, late.end.0 - late.start.0).unwrap();
        let ticket = guest.driver.submit(&command).unwrap();
        let timed_out = |stats: &Stats| stats.get("miss_timeouts").is_ok_and(|now| now > 0);
        assert!(backend.wait_for_stats(5 * SECOND, timed_out).unwrap(), "nothing was late");
        let_go.send(()).unwrap();
        let answered = guest.driver.wait_ok(ticket);
        let answered = answered.unwrap_or_else(|error| panic!("{error}\n{}", backend.stderr()));
        assert_eq!((answered.kind(), answered.fence()), (kind::OK_DISPLAY_INFO, Some(7)));
        assert_eq!(backend.stats().unwrap().get("ring_errors").unwrap(), 0);
    }
}

#[test]
fn an_update_that_does_not_cover_the_miss_is_asked_for_once_more_and_then_an_error() {
    let (backend, mut guest, surface) = boot(&[]);
    let (first, user) = {
        let frame = surface.buffer.frames()[0];
        (surface.buffer.address(0), guest.dma.space().frames().ram().user_addr(frame).unwrap())
    };
    // Page 0 is all that this front-end ever sends for the surface: QEMU does so over a hole in RAM.
    guest.front_end.on_miss(Box::new(move |miss| {
        let mine = (first..first.plus(PAGES * PAGE)).contains(&miss.iova);
        let update = IotlbMessage::update(first, PAGE, user, PERM_BOTH);
        if mine { Answer::Odd { updates: vec![update], status: 0 } } else { Answer::Serve }
    }));
    let before = backend.stats().unwrap();
    let rect = Rect { x: 0, y: SIDE / 2, width: SIDE, height: 1 };
    let offset = u64::from(SIDE * SIDE / 2) * 4;
    let response = guest.driver.run(&Command::transfer(surface.resource, rect, offset)).unwrap();
    assert_eq!(response.kind(), kind::ERR_UNSPEC);
    let after = backend.stats().unwrap();
    assert_eq!(after.since(&before, "miss_retries").unwrap(), 1);
    let asked = guest.front_end.recent_misses().into_iter().filter(|miss| is_of(miss, &surface));
    assert_eq!(asked.map(|miss| miss.iova.page()).collect::<Vec<_>>(), [first.plus(PAGES / 2 * PAGE); 2]);
}

#[test]
fn updates_that_cannot_be_right_are_refused_and_change_nothing() {
    let (backend, mut guest, surface) = boot(&[]);
    let image = picture(SIDE, SIDE, 1);
    guest.must_show(&surface, &image).unwrap();
    let (iova, ram) = (surface.buffer.address(0), guest.dma.space().frames().ram().clone());
    let regions = ram.regions().to_vec();
    let good = regions[2].user;
    let last_page = regions[2].user.plus(regions[2].len - PAGE);
    let low_end = regions[0].user.plus(regions[0].len - PAGE);
    let cases = [
        ("size 0", IotlbMessage::update(iova, 0, good, PERM_BOTH)),
        ("no permission", IotlbMessage::update(iova, PAGE, good, 0)),
        ("unknown permission", IotlbMessage::update(iova, PAGE, good, 4)),
        ("outside of the table", IotlbMessage::update(iova, PAGE, UserAddr(0x1000), PERM_BOTH)),
        ("past the end of a region", IotlbMessage::update(iova, 2 * PAGE, last_page, PERM_BOTH)),
        ("into the hole", IotlbMessage::update(iova, 2 * PAGE, low_end, PERM_BOTH)),
        ("across regions", IotlbMessage::update(iova, 0x3_0000, low_end, PERM_BOTH)),
        ("iova wraps", IotlbMessage::update(Iova(u64::MAX - PAGE + 1), 2 * PAGE, good, PERM_BOTH)),
        (
            "user address wraps",
            IotlbMessage::update(iova, 2 * PAGE, UserAddr(u64::MAX - PAGE + 1), PERM_BOTH),
        ),
        ("everything", IotlbMessage::update(Iova(0), u64::MAX, good, PERM_BOTH)),
    ];
    let before = backend.stats().unwrap();
    for (what, update) in &cases {
        assert_ne!(guest.front_end.update(update).unwrap().status, 0, "{what}");
    }
    let after = backend.stats().unwrap();
    assert_eq!(after.since(&before, "updates_rejected").unwrap(), cases.len() as u64);
    assert_eq!(after.since(&before, "mapped_bytes").unwrap(), 0);
    guest.must_show(&surface, &image).unwrap();
}

#[test]
fn an_update_that_nobody_asked_for_is_acked_and_not_believed() {
    let (backend, mut guest, surface) = boot(&[]);
    let user = guest.dma.space().frames().ram().regions()[2].user;
    let start = backend.stats().unwrap();
    // It names the surface's pages before any miss did, and points elsewhere.
    let wrong = IotlbMessage::update(surface.buffer.address(0), PAGES * PAGE, user, PERM_BOTH);
    let seen = guest.front_end.miss_counts().seen;
    assert_eq!(guest.front_end.update(&wrong).unwrap().status, 0);
    guest.must_show(&surface, &picture(SIDE, SIDE, 1)).unwrap();
    assert!(guest.front_end.miss_counts().seen >= seen + PAGES, "the pages were not asked for");
    assert_eq!(backend.stats().unwrap().since(&start, "updates_unsolicited").unwrap(), 1);
}

#[test]
fn misses_ask_for_one_permission_and_a_write_to_read_only_memory_is_refused() {
    let (backend, mut guest, surface) = boot(&[]);
    guest.driver.ok(&transfer(&surface)).unwrap();
    let misses = guest.front_end.recent_misses();
    assert!(misses.iter().all(|miss| [PERM_READ, PERM_WRITE].contains(&miss.permission) && miss.need_reply));
    assert!(misses.iter().filter(|miss| is_of(miss, &surface)).all(|miss| !miss.write));

    // A command whose response is to go where the device may only read, and whose page it has read before: what
    // UPDATE claimed for it, read and write, must not be believed.
    let buffer = guest.dma.space().allocate(1, Permission::ReadOnly).unwrap();
    guest.dma.oracle().poison(buffer.frames()[0]).unwrap();
    let command = Command::display_info();
    buffer.write(0, &command.bytes()).unwrap();
    let ring = guest.driver.ring(Queue::Control);
    let head = ring.submit(&buffer.segments(0, HEADER_LEN as u64), &buffer.segments(64, 408)).unwrap();
    ring.kick().unwrap();
    let fault = Fault { iova: buffer.address(64), write: true };
    assert!(guest.front_end.wait_for_misses(Duration::from_secs(5), |counts| counts.refused > 0));
    let faults = guest.dma.space().iommu().faults();
    assert!(faults.iter().all(|seen| seen.iova.page() == fault.iova.page() && seen.write), "{faults:?}");
    let mut bytes = [0; 408];
    buffer.read(64, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == oracle::POISON), "the response was written to read-only memory");
    // The front-end counts before it answers.
    let counted = |stats: &Stats| stats.get("miss_refused").is_ok_and(|refused| refused > 0);
    assert!(backend.wait_for_stats(5 * SECOND, counted).unwrap());
    let _ = head;
}

#[test]
fn an_iova_that_is_used_again_at_once_leads_to_the_new_frame_only() {
    let (_backend, mut guest, mut surface) = boot(&[]);
    for round in 0..50 {
        let image = picture(SIDE, SIDE, round);
        for page in 0..surface.buffer.pages() {
            guest.dma.move_page(&mut surface.buffer, page).unwrap();
        }
        surface.draw(&image).unwrap();
        guest.must_show(&surface, &image).unwrap();
    }
    assert_eq!(guest.dma.oracle().check().unwrap(), 50 * PAGES as usize);
    assert_eq!(guest.dma.space().iommu().faults(), []);
}

#[test]
fn an_update_that_was_staged_when_its_page_was_invalidated_is_not_used() {
    let (backend, mut guest, mut surface) = boot(&[]);
    let image = picture(SIDE, SIDE, 3);
    let page = surface.buffer.address(0);
    guest.front_end.on_miss(Box::new(move |miss| {
        if miss.iova.page() == page { Answer::ServeTorn } else { Answer::Serve }
    }));
    let ticket = guest.driver.submit(&transfer(&surface)).unwrap();
    assert!(guest.front_end.wait_for_misses(Duration::from_secs(5), |counts| counts.torn == 1));
    // Between the UPDATE and the reply that makes it good, the page moves.
    let frame = guest.dma.space().frames().take(1).unwrap()[0];
    guest.dma.swap_page(&mut surface.buffer, 0, frame).unwrap();
    surface.draw(&image).unwrap();
    guest.front_end.release_replies();
    guest.driver.wait_ok(ticket).unwrap();
    assert_eq!(guest.dma.oracle().check().unwrap(), 1);
    let asked = guest.front_end.recent_misses().iter().filter(|miss| miss.iova.page() == page).count();
    assert_eq!(asked, 2, "the page has to be asked for again");
    guest.must_show(&surface, &image).unwrap();
    assert_eq!(backend.stats().unwrap().get("jobs_failed").unwrap(), 0);
}

#[test]
fn pages_that_move_while_they_are_asked_for_are_right_in_the_end() {
    let (backend, mut guest, mut surface) = boot(&[]);
    let image = picture(SIDE, SIDE, 3);
    for round in 0..200 {
        guest.front_end.invalidate(Iova(0), 0).unwrap();
        let ticket = guest.driver.submit(&transfer(&surface)).unwrap();
        let page = round % surface.buffer.pages();
        let frame = guest.dma.space().frames().take(1).unwrap()[0];
        guest.dma.swap_page(&mut surface.buffer, page, frame).unwrap();
        guest.driver.wait_ok(ticket).unwrap();
    }
    assert_eq!(guest.dma.oracle().check().unwrap(), 200);
    surface.draw(&image).unwrap();
    guest.must_show(&surface, &image).unwrap();
    assert_eq!(backend.stats().unwrap().get("jobs_failed").unwrap(), 0);
}

#[test]
fn one_huge_update_serves_all_its_pages() {
    let (_backend, mut guest, _) = boot(&[]);
    guest.front_end.on_miss(Box::new(|_| Answer::ServeRun));
    let buffer = guest.dma.space().allocate_run(1024, Permission::ReadWrite).unwrap();
    let surface = guest.surface_on(buffer, Format::B8G8R8X8, 1024, 1024).unwrap();
    let image = picture(1024, 1024, 4);
    surface.draw(&image).unwrap();
    let seen = guest.front_end.miss_counts().seen;
    guest.must_show(&surface, &image).unwrap();
    let asked = guest.front_end.miss_counts().seen - seen;
    assert!(asked < 200, "{asked} misses for one run of 1024 frames");
    // A part of it goes: the rest may be asked for again, and the data is right.
    guest.front_end.invalidate(surface.buffer.address(100 * PAGE), PAGE).unwrap();
    guest.must_show(&surface, &image).unwrap();
}

#[test]
fn a_request_of_many_pages_is_read_although_flushes_fall_between_its_misses() {
    // The surface has the rest of the quota.
    const ENTRIES: usize = 16000;
    const FLUSH_EVERY: u64 = 24;
    let (backend, mut guest, surface) = boot(&[]);
    guest.driver.ok(&Command::create_2d(1000, Format::B8G8R8A8, 8, 8)).unwrap();
    let entry = Segment { at: surface.buffer.address(0), len: PAGE as u32 };
    let command = Command::attach_backing(1000, &[entry; ENTRIES]).bytes();
    let len = command.len() as u64;
    let pages = len.div_ceil(PAGE);
    let request = guest.dma.space().allocate(pages as usize, Permission::ReadOnly).unwrap();
    request.write(0, &command).unwrap();
    let response = guest.dma.space().allocate(1, Permission::WriteOnly).unwrap();
    let ram = guest.dma.space().frames().ram().clone();
    let users: Vec<_> = request.frames().iter().map(|&frame| ram.user_addr(frame).unwrap()).collect();
    // All of the request is never there at once: it is flushed before every 24th of its misses is answered.
    let (first, mut asked) = (request.address(0), 0);
    guest.front_end.on_miss(Box::new(move |miss| {
        let page = miss.iova.0.wrapping_sub(first.0) / PAGE;
        let Some(&user) = users.get(page as usize) else { return Answer::Serve };
        asked += 1;
        let flush = (asked % FLUSH_EVERY == 0).then(|| IotlbMessage::invalidate(first, pages * PAGE));
        let update = IotlbMessage::update(miss.iova.page(), PAGE, user, PERM_BOTH);
        Answer::Odd { updates: flush.into_iter().chain([update]).collect(), status: 0 }
    }));
    let before = backend.stats().unwrap();
    let ring = guest.driver.ring(Queue::Control);
    let head = ring.submit(&request.segments(0, len), &response.segments(0, HEADER_LEN as u64)).unwrap();
    ring.kick().unwrap();
    let used = ring.wait_used(10 * SECOND).unwrap();
    assert_eq!(
        used.iter().map(|used| (used.head, used.len)).collect::<Vec<_>>(),
        [(head, HEADER_LEN as u32)]
    );
    let mut kind = [0; 4];
    response.read(0, &mut kind).unwrap();
    assert_eq!(u32::from_le_bytes(kind), kind::OK_NODATA);
    let after = backend.stats().unwrap();
    assert!(after.since(&before, "invalidations").unwrap() >= pages / FLUSH_EVERY);
    assert_eq!(guest.front_end.miss_counts().updates_rejected, 0);
}
