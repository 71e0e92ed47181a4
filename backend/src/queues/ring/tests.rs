//! A virtqueue against a driver that is written out here: what a miss, a stop and a refusal may do to a command.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use device_model::addr::{ByteRange, Iova, PAGE_SIZE};
use device_model::mmu::{DrainWaker, MirrorConfig, MirrorWriter, Permissions as Rights, mirror};
use device_model::testing::frames::Frames;
use rustix::event::{EventfdFlags, eventfd};

use super::*;

/// What is on each page of the guest. The used ring starts 4 bytes before the end of its first page, so that its index
/// and its elements are on different pages; so do the driver's flags and index and the heads that it offers.
const DESCRIPTORS: u64 = 0;
const AVAILABLE_INDEX: u64 = 1;
const AVAILABLE_HEADS: u64 = 2;
const USED_INDEX: u64 = 3;
const USED_ELEMENTS: u64 = 4;
const REQUEST: u64 = 5;
const RESPONSE: u64 = 6;
const PAGES: u64 = 7;
const AVAILABLE: u64 = AVAILABLE_HEADS * PAGE_SIZE - 4;
const USED: u64 = USED_ELEMENTS * PAGE_SIZE - 4;
const SIZE: u16 = 8;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct NoWaker;

impl DrainWaker for NoWaker {
    fn wake(&self) {}
}

/// The guest and its IOMMU.
struct Guest {
    frames: Frames,
    writer: MirrorWriter,
    offered: u16,
}

/// The device's side, as the session sets it up.
struct Device {
    shared: SharedRing,
    memory: RingMemory,
    injection: Injection,
    calls: File,
}

/// A ring that runs, with all pages mapped.
fn start() -> (Guest, Device) {
    let (writer, mut readers) = mirror(MirrorConfig { readers: 1, table_limit: 1 << 20 }, Arc::new(NoWaker));
    let memory = RingMemory::new(readers.pop().unwrap());
    let vring = VringMutex::new(memory.clone(), super::super::MAX_QUEUE_SIZE).unwrap();
    vring.set_queue_size(SIZE);
    vring.set_queue_info(DESCRIPTORS * PAGE_SIZE, AVAILABLE, USED).unwrap();
    vring.set_queue_ready(true);
    vring.set_enabled(true);
    let calls = File::from(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    let shared = SharedRing::new(vring);
    shared.call.set(Some(calls.try_clone().unwrap())).unwrap();
    shared.fresh.store(true, Ordering::Relaxed);
    let mut guest = Guest { frames: Frames::leaked(PAGES), writer, offered: 0 };
    (0..PAGES).for_each(|page| guest.map(page));
    (guest, Device { shared, memory, injection: Injection::default(), calls })
}

impl Device {
    fn ring(&self) -> Virtqueue<'_> {
        Virtqueue::new((0, &self.shared), self.memory.clone(), 2 * PAGE_SIZE as usize, &self.injection)
    }

    /// Whether the driver was interrupted since the last call.
    fn was_called(&mut self) -> bool {
        self.calls.read(&mut [0; 8]).is_ok()
    }
}

impl Guest {
    fn map(&mut self, page: u64) {
        let host = self.frames.host(page * PAGE_SIZE, PAGE_SIZE as usize);
        self.writer.map(DomainId::DEVICE, page_range(page), host, Rights::READ_WRITE).unwrap();
    }

    fn unmap(&mut self, page: u64) {
        let drained = self.writer.begin(DomainId::DEVICE, page_range(page)).poll().unwrap();
        drop(self.writer.end(drained));
    }

    /// Maps a page again and tells the side that waits for it.
    fn answer(&mut self, ring: &mut Virtqueue<'_>, side: Side, page: u64) {
        self.map(page);
        assert!(ring.miss_answered(ring.wait(), side, MissAnswer::Mapped));
    }

    /// Offers a command of two descriptors, `head` and the one after it.
    fn offer(&mut self, head: u16, request: &[u8]) {
        let descriptor = |address: u64, len: u32, flags: u16, next: u16| {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            bytes
        };
        self.frames.write(REQUEST * PAGE_SIZE, request);
        let table = DESCRIPTORS * PAGE_SIZE + 16 * u64::from(head);
        let len = u32::try_from(request.len()).unwrap();
        self.frames.write(table, &descriptor(REQUEST * PAGE_SIZE, len, NEXT, head + 1));
        self.frames.write(table + 16, &descriptor(RESPONSE * PAGE_SIZE, 64, WRITE, 0));
        let slot = AVAILABLE + 4 + 2 * u64::from(self.offered % SIZE);
        self.frames.write(slot, &head.to_le_bytes());
        self.offered += 1;
        self.frames.write(AVAILABLE + 2, &self.offered.to_le_bytes());
    }

    /// What the device has used: heads and lengths.
    fn used(&self) -> Vec<(u32, u32)> {
        let word = |at: u64| {
            let mut bytes = [0; 4];
            self.frames.read(at, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        let element = |slot: u64| (word(USED + 4 + 8 * slot), word(USED + 8 + 8 * slot));
        (0..u64::from(word(USED) >> 16)).map(element).collect()
    }
}

fn page_range(page: u64) -> ByteRange<Iova> {
    ByteRange::new(Iova::new(page * PAGE_SIZE), PAGE_SIZE).unwrap()
}

/// Takes a command that is there.
fn command(ring: &mut Virtqueue<'_>) -> (Vec<u8>, Pending) {
    match ring.take() {
        Taken::Command(request, pending) => (request, pending),
        other => panic!("{other:?}"),
    }
}

/// The page that a side now waits for.
fn missing_page(missing: &[Missing]) -> u64 {
    assert_eq!(pages_of(missing), 1, "{missing:?}");
    missing[0].range.first().raw() / PAGE_SIZE
}

fn input_miss(ring: &mut Virtqueue<'_>) -> u64 {
    match ring.take() {
        Taken::Missing(missing) => missing_page(&missing),
        other => panic!("{other:?}"),
    }
}

fn output_miss(ring: &mut Virtqueue<'_>) -> u64 {
    match ring.publish() {
        Published::Missing(missing) => missing_page(&missing),
        other => panic!("{other:?}"),
    }
}

fn publish(ring: &mut Virtqueue<'_>) {
    assert!(matches!(ring.publish(), Published::Nothing));
}

#[test]
fn a_command_is_taken_once_used_once_and_the_driver_is_interrupted() {
    let (mut guest, mut device) = start();
    let mut calls = device.calls.try_clone().unwrap();
    let mut ring = device.ring();
    guest.offer(2, b"draw");
    let (request, pending) = command(&mut ring);
    assert_eq!((request.as_slice(), ring.in_flight()), (b"draw".as_slice(), 1));
    assert!(matches!(ring.take(), Taken::Empty));
    publish(&mut ring);
    assert!(guest.used().is_empty() && calls.read(&mut [0; 8]).is_err());
    ring.complete(pending, b"drawn".to_vec());
    publish(&mut ring);
    assert_eq!((guest.used(), ring.in_flight()), (vec![(2, 5)], 0));
    publish(&mut ring);
    assert_eq!(guest.used(), [(2, 5)]);
    drop(ring);
    assert!(device.was_called() && !device.was_called());
}

#[test]
fn a_head_is_used_once_though_the_used_index_was_missing_after_its_element_was_written() {
    let (mut guest, device) = start();
    let mut ring = device.ring();
    guest.offer(2, b"1");
    guest.offer(4, b"2");
    for head in [2, 4] {
        let (_, pending) = command(&mut ring);
        ring.complete(pending, vec![0; 8]);
        if head == 2 {
            // The ring's own index is read once after a start.
            publish(&mut ring);
            assert_eq!(guest.used(), [(2, 8)]);
        }
    }
    guest.unmap(USED_INDEX);
    assert_eq!(output_miss(&mut ring), USED_INDEX);
    // It waits: nothing is written meanwhile.
    publish(&mut ring);
    assert_eq!((guest.used(), ring.in_flight()), (vec![(2, 8)], 1));
    guest.answer(&mut ring, Side::Output, USED_INDEX);
    publish(&mut ring);
    assert_eq!((guest.used(), ring.in_flight()), (vec![(2, 8), (4, 8)], 0));
}

#[test]
fn an_answer_is_written_whole_after_a_miss_of_its_buffer() {
    let (mut guest, device) = start();
    let mut ring = device.ring();
    guest.offer(2, b"draw");
    let (_, pending) = command(&mut ring);
    ring.complete(pending, b"drawn".to_vec());
    guest.unmap(RESPONSE);
    assert_eq!(output_miss(&mut ring), RESPONSE);
    assert!(guest.used().is_empty());
    guest.answer(&mut ring, Side::Output, RESPONSE);
    publish(&mut ring);
    let mut written = [0; 6];
    guest.frames.read(RESPONSE * PAGE_SIZE, &mut written);
    assert_eq!((guest.used(), &written), (vec![(2, 5)], b"drawn\0"));
}

#[test]
fn a_command_is_taken_after_a_miss_of_any_part_of_it_and_none_is_skipped() {
    for page in [DESCRIPTORS, AVAILABLE_INDEX, AVAILABLE_HEADS, REQUEST] {
        let (mut guest, device) = start();
        let mut ring = device.ring();
        guest.offer(2, b"draw");
        guest.unmap(page);
        assert_eq!(input_miss(&mut ring), page);
        assert!(matches!(ring.take(), Taken::Idle), "it waits");
        guest.answer(&mut ring, Side::Input, page);
        let (request, _) = command(&mut ring);
        assert_eq!(request, b"draw");
        assert!(matches!(ring.take(), Taken::Empty), "it was offered once");
    }
}

#[test]
fn a_command_that_comes_before_kicks_are_enabled_is_not_left_lying() {
    let (mut guest, device) = start();
    let mut ring = device.ring();
    // The ring was found empty. Then the driver adds a command, and need not kick.
    guest.offer(2, b"draw");
    assert!(matches!(device.shared.locked(|vring| ring.wait_for_kick(vring)), Taken::Again));
    assert_eq!(command(&mut ring).0, b"draw");
    assert!(matches!(device.shared.locked(|vring| ring.wait_for_kick(vring)), Taken::Empty));
    let mut flags = [1; 2];
    guest.frames.read(USED, &mut flags);
    assert_eq!(flags, [0, 0], "the driver is told to kick");
}

#[test]
fn answers_that_an_earlier_start_asked_for_are_ignored() {
    let (mut guest, device) = start();
    let mut ring = device.ring();
    guest.offer(2, b"draw");
    guest.unmap(REQUEST);
    assert_eq!(input_miss(&mut ring), REQUEST);
    let before = ring.wait();
    ring.restarted();
    assert_eq!(input_miss(&mut ring), REQUEST);
    assert!(!ring.miss_answered(before, Side::Input, MissAnswer::Refused));
    assert!(matches!(ring.take(), Taken::Idle), "it still waits for its own answer");
    guest.answer(&mut ring, Side::Input, REQUEST);
    assert_eq!(command(&mut ring).0, b"draw");
}

#[test]
fn a_refused_buffer_costs_its_command_and_a_refused_ring_the_ring() {
    let refuse = |ring: &mut Virtqueue<'_>, side| {
        assert!(ring.miss_answered(ring.wait(), side, MissAnswer::Refused));
    };
    let (mut guest, device) = start();
    let mut ring = device.ring();
    guest.offer(2, b"draw");
    guest.unmap(REQUEST);
    input_miss(&mut ring);
    refuse(&mut ring, Side::Input);
    let Taken::Unreadable(pending) = ring.take() else { panic!("It cannot be read") };
    guest.unmap(RESPONSE);
    ring.complete(pending, b"unreadable".to_vec());
    output_miss(&mut ring);
    refuse(&mut ring, Side::Output);
    publish(&mut ring);
    assert_eq!(guest.used(), [(2, 0)], "it is used, with nothing written");

    guest.unmap(AVAILABLE_INDEX);
    input_miss(&mut ring);
    refuse(&mut ring, Side::Input);
    assert!(matches!(ring.take(), Taken::Broke(RingError::Unmapped("read"))));
    guest.map(AVAILABLE_INDEX);
    assert!(matches!(ring.take(), Taken::Idle), "it stays broken until it is started again");
    ring.restarted();
    assert!(matches!(ring.take(), Taken::Empty));
}

#[test]
fn a_head_that_is_offered_again_before_it_is_used_breaks_the_ring() {
    let (mut guest, device) = start();
    let mut ring = device.ring();
    guest.offer(2, b"draw");
    let (_, pending) = command(&mut ring);
    guest.offer(2, b"draw");
    assert!(matches!(ring.take(), Taken::Broke(RingError::Twice { head: 2 })));
    ring.complete(pending, Vec::new());
    publish(&mut ring);
    assert!(guest.used().is_empty(), "a broken ring is not written");
}

#[test]
fn a_ring_is_left_alone_while_it_is_stopped_and_between_a_reset_and_its_message() {
    let (mut guest, device) = start();
    let mut ring = device.ring();
    guest.offer(2, b"draw");
    let (_, pending) = command(&mut ring);
    ring.complete(pending, vec![0; 8]);
    guest.offer(4, b"draw");
    let idles = |ring: &mut Virtqueue<'_>| {
        publish(ring);
        matches!(ring.take(), Taken::Idle)
    };
    device.shared.vring.set_enabled(false);
    assert!(idles(&mut ring));
    device.shared.vring.set_enabled(true);
    device.shared.vring.set_queue_ready(false);
    assert!(idles(&mut ring));
    device.shared.vring.set_queue_ready(true);
    device.shared.resets.fetch_add(1, Ordering::Release);
    assert!(idles(&mut ring) && guest.used().is_empty());
    ring.reset();
    assert_eq!(ring.in_flight(), 0);
    publish(&mut ring);
    assert!(guest.used().is_empty(), "the old driver's command is forgotten");
    assert_eq!(command(&mut ring).0, b"draw");
}

#[test]
fn a_ring_that_is_started_again_goes_on_behind_what_the_guest_says_is_used() {
    let (mut guest, device) = start();
    let mut ring = device.ring();
    guest.frames.write(USED + 2, &3u16.to_le_bytes());
    guest.offer(2, b"draw");
    let (_, pending) = command(&mut ring);
    ring.complete(pending, vec![0; 8]);
    guest.unmap(USED_INDEX);
    assert_eq!(output_miss(&mut ring), USED_INDEX);
    guest.answer(&mut ring, Side::Output, USED_INDEX);
    publish(&mut ring);
    assert_eq!(guest.used()[3..], [(2, 8)]);
}

#[test]
fn the_driver_is_interrupted_when_it_wants_to_be_and_whenever_that_cannot_be_read() {
    let (mut guest, mut device) = start();
    device.shared.vring.set_queue_event_idx(true);
    // How many more commands have to be used before the driver wants to be interrupted.
    for (used, more, is_readable, called) in
        [(0, 0, true, true), (1, 5, true, false), (2, 0, true, true), (3, 5, false, true)]
    {
        let mut ring = device.ring();
        guest.frames.write(AVAILABLE + 4 + 2 * u64::from(SIZE), &u16::to_le_bytes(used + more));
        guest.offer(2, b"draw");
        let (_, pending) = command(&mut ring);
        if !is_readable {
            guest.unmap(AVAILABLE_HEADS);
        }
        ring.complete(pending, Vec::new());
        publish(&mut ring);
        drop(ring);
        assert_eq!(device.was_called(), called, "after {used} commands");
    }
}

#[test]
fn a_request_of_more_than_the_limit_is_not_read() {
    let (mut guest, device) = start();
    let ring = |most| Virtqueue::new((0, &device.shared), device.memory.clone(), most, &device.injection);
    guest.offer(2, b"drawn");
    assert!(matches!(ring(4).take(), Taken::Unreadable(_)));
    guest.offer(4, b"drawn");
    assert_eq!(command(&mut ring(5)).0, b"drawn");
}

/// A stop may come between a completion and its interrupt, for which the driver waits after the next start.
#[test]
fn an_interrupt_that_a_stop_has_overtaken_follows_the_next_start() {
    let (mut guest, device) = start();
    let mut calls = device.calls.try_clone().unwrap();
    let mut was_called = || calls.read(&mut [0; 8]).is_ok();
    let mut ring = device.ring();
    guest.offer(2, b"1");
    let (_, pending) = command(&mut ring);
    ring.complete(pending, b"1".to_vec());
    let interrupting = lock(&device.shared.interrupting);
    std::thread::scope(|scope| {
        let publisher = scope.spawn(|| publish(&mut ring));
        while guest.used().is_empty() {
            std::thread::yield_now();
        }
        device.shared.vring.set_queue_ready(false);
        drop(interrupting);
        publisher.join().unwrap();
    });
    assert!(!was_called(), "a stopped ring is silent");
    publish(&mut ring);
    assert!(!was_called());
    device.shared.vring.set_queue_ready(true);
    ring.restarted();
    publish(&mut ring);
    assert!(was_called());
    publish(&mut ring);
    assert!(!was_called(), "once is enough");
}

#[test]
fn a_reset_takes_back_an_interrupt_that_was_not_delivered() {
    let (_guest, device) = start();
    let mut calls = device.calls.try_clone().unwrap();
    let mut ring = device.ring();
    ring.call_replaced();
    device.shared.resets.fetch_add(1, Ordering::Release);
    publish(&mut ring);
    ring.reset();
    publish(&mut ring);
    assert!(calls.read(&mut [0; 8]).is_err());
}
