//! The front-end against a minimal back-end, which records what comes and answers as the specification requires.

use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use zerocopy::FromBytes;

use super::super::addr::{PAGE, Permission, UserAddr};
use super::super::dma::DmaSpace;
use super::super::driver::{DriverConfig, GpuDriver};
use super::super::frames::Frames;
use super::super::iommu::Fault;
use super::super::memory::RamConfig;
use super::super::misses::Answer;
use super::super::turn::held;
use super::super::wire::{self, IOTLB_MISS, IOTLB_UPDATE, NEED_REPLY, PERM_READ, PERM_WRITE, REPLY};
use super::*;

/// A recorded message: request, whether a reply was wanted, body, number of descriptors.
type Noted = (u32, bool, Vec<u8>, usize);

/// Sends misses while the ack of an INVALIDATE is pending, and returns the result.
type OnInvalidate = Box<dyn FnMut(&UnixStream) + Send>;

struct Stub {
    noted: Arc<Mutex<Vec<Noted>>>,
    channel: Arc<Mutex<Option<UnixStream>>>,
    thread: Option<JoinHandle<()>>,
}

impl Stub {
    fn start(protocol: u64, mut on_invalidate: OnInvalidate) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (noted, channel) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(None)));
        let (notes, slot) = (noted.clone(), channel.clone());
        let body = move || {
            while let Ok(Some(mut message)) = wire::receive(&ours) {
                let need_reply = message.flags & NEED_REPLY != 0;
                let fds = message.files.len();
                if message.request == 21 {
                    *held(&slot) = message.files.pop().map(|fd: OwnedFd| UnixStream::from(fd));
                }
                held(&notes).push((message.request, need_reply, message.body.clone(), fds));
                if message.request == 22 && message.body[25] == 3 {
                    on_invalidate(held(&slot).as_ref().unwrap());
                }
                let reply = match message.request {
                    1 => Some(
                        (feature::PROTOCOL_FEATURES | feature::VERSION_1 | feature::EDID)
                            .to_le_bytes()
                            .to_vec(),
                    ),
                    15 => Some(protocol.to_le_bytes().to_vec()),
                    17 => Some(2_u64.to_le_bytes().to_vec()),
                    36 => Some(32_u64.to_le_bytes().to_vec()),
                    11 => Some([&message.body[..4], &77_u32.to_le_bytes()].concat()),
                    24 => Some(message.body.clone()),
                    _ if need_reply => Some(vec![0; 8]),
                    _ => None,
                };
                if let Some(reply) = reply {
                    // It fails when the front-end has given up: its own test checks that.
                    let _ = wire::send(&ours, message.request, VERSION | REPLY, &reply, &[]);
                }
            }
        };
        (Self { noted, channel, thread: Some(thread::spawn(body)) }, theirs)
    }

    fn take_notes(&self) -> Vec<Noted> {
        std::mem::take(&mut held(&self.noted))
    }

    /// Waits for this many records: a message without a reply does not show when it was read.
    fn next_notes(&self, count: usize) -> Vec<Noted> {
        let begin = Instant::now();
        while held(&self.noted).len() < count && begin.elapsed() < Duration::from_secs(5) {
            thread::yield_now();
        }
        self.take_notes()
    }

    fn miss(&self, iova: Iova, permission: u8) -> u64 {
        let channel = held(&self.channel);
        let channel = channel.as_ref().unwrap();
        send_miss(channel, iova, permission);
        wire::receive(channel).unwrap().unwrap().number().unwrap()
    }
}

fn send_miss(channel: &UnixStream, iova: Iova, permission: u8) {
    let miss = IotlbMessage::new(iova, 0, UserAddr(0), permission, IOTLB_MISS);
    wire::send(channel, 1, VERSION | NEED_REPLY, miss.as_bytes(), &[]).unwrap();
}

impl Drop for Stub {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

const ALL: u64 = 1 | 8 | 0x20 | 0x200 | 0x2000;
const SLOTS: u64 = 0x8000;

struct Side {
    front_end: FrontEnd,
    driver: GpuDriver,
    space: DmaSpace,
    // Last: its thread ends when the front-end is gone.
    stub: Stub,
}

fn side(protocol: u64, config: FrontEndConfig, on_invalidate: OnInvalidate) -> Side {
    let (stub, stream) = Stub::start(protocol, on_invalidate);
    let ram = Arc::new(GuestRam::new(RamConfig::default()).unwrap());
    let (frames, iommu) = (Arc::new(Frames::new(ram.clone(), 9)), Arc::new(Iommu::default()));
    let front_end = FrontEnd::connect(stream, ram, iommu.clone(), config).unwrap();
    let space = DmaSpace::new(frames, iommu, config.iommu);
    let driver = GpuDriver::new(space.clone(), DriverConfig::default()).unwrap();
    Side { front_end, driver, space, stub }
}

fn requests(notes: &[Noted]) -> Vec<(u32, bool)> {
    notes.iter().map(|&(request, need_reply, ..)| (request, need_reply)).collect()
}

#[test]
fn messages_come_in_the_order_of_qemu() {
    let side = side(ALL, FrontEndConfig::default(), Box::new(|_| {}));
    let connected = side.stub.next_notes(6);
    let expected = [(1, false), (15, false), (16, false), (17, false), (21, true), (3, false)];
    assert_eq!(requests(&connected), expected);

    let display = UnixStream::pair().unwrap().0;
    side.front_end.start(&side.driver.queues(), Some(&display)).unwrap();
    let started = side.stub.take_notes();
    let ring = [(8, false), (10, false), (9, false), (12, false)];
    let mut expected =
        vec![(14, false), (14, false), (33, false), (13, false), (13, false), (2, false), (5, true)];
    expected.extend([ring, ring].concat());
    expected.extend([(18, true), (18, true), (22, true), (22, true)]);
    assert_eq!(requests(&started), expected);
    assert_eq!((started[2].3, started[6].3), (1, 3), "descriptors of the display and of the memory table");
    let features = u64::from_le_bytes(started[5].2.clone().try_into().unwrap());
    assert_eq!(features, 1 << 1 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32 | 1 << 33 | 1 << 40);

    let update = IotlbMessage::read_from_bytes(&started[started.len() - 2].2).unwrap();
    let used = side.driver.queues()[0].used;
    assert_eq!((update.iova(), update.size(), update.permission()), (used.page(), PAGE, 3));

    let stopped = side.front_end.reset(&side.driver.queues()).unwrap();
    assert_eq!(stopped.bases, [77, 77]);
    let expected = [(18, true), (18, true), (11, false), (11, false), (13, false), (13, false), (34, false)];
    // RESET_DEVICE has no reply: only a message that has one proves that it was read.
    side.front_end.config_space().unwrap();
    assert_eq!(requests(&side.stub.take_notes())[..7], expected);
}

#[test]
fn memory_slots_send_differences_and_nothing_on_an_unchanged_restart() {
    let side = side(ALL | SLOTS, FrontEndConfig::default(), Box::new(|_| {}));
    let memory = |side: &Side| {
        let notes = requests(&side.stub.take_notes());
        notes.into_iter().filter(|(request, _)| [5, 37, 38].contains(request)).collect::<Vec<_>>()
    };
    side.front_end.start(&side.driver.queues(), None).unwrap();
    assert_eq!(memory(&side), [(37, true); 3]);
    side.front_end.stop(&side.driver.queues()).unwrap();
    side.front_end.start(&side.driver.queues(), None).unwrap();
    assert_eq!(memory(&side), []);
    let regions = side.front_end.core.ram.regions().to_vec();
    side.front_end.set_memory(&regions[1..]).unwrap();
    assert_eq!(memory(&side), [(38, true)]);
    side.front_end.set_memory(&regions).unwrap();
    assert_eq!(memory(&side), [(37, true)]);
}

#[test]
fn a_miss_is_answered_by_an_update_that_claims_both_and_a_write_to_read_only_is_refused() {
    let side = side(ALL, FrontEndConfig::default(), Box::new(|_| {}));
    side.front_end.start(&side.driver.queues(), None).unwrap();
    let buffer = side.space.allocate(2, Permission::ReadOnly).unwrap();
    side.stub.take_notes();
    assert_eq!(side.stub.miss(buffer.address(PAGE + 8), PERM_READ), 0);
    let notes = side.stub.take_notes();
    let update = IotlbMessage::read_from_bytes(&notes[0].2).unwrap();
    assert_eq!((update.kind(), update.iova(), update.permission()), (IOTLB_UPDATE, buffer.address(PAGE), 3));
    assert_eq!(side.stub.miss(buffer.address(PAGE), PERM_WRITE), 1);
    assert_eq!(side.stub.miss(Iova(0x1000), PERM_READ), 1);
    let faults =
        [Fault { iova: buffer.address(PAGE), write: true }, Fault { iova: Iova(0x1000), write: false }];
    assert_eq!(side.space.iommu().faults(), faults);
    assert_eq!(side.stub.take_notes(), []);
    let counts = side.front_end.miss_counts();
    assert_eq!((counts.seen, counts.refused, counts.updates), (3, 2, 1));
    side.front_end.stop(&side.driver.queues()).unwrap();
    assert_eq!(side.stub.miss(buffer.address(0), PERM_READ), 1);
    assert_eq!(side.front_end.miss_counts().after_stop, 1);
}

#[test]
fn no_miss_is_served_while_an_invalidate_waits_for_its_ack() {
    let (seen, noted) = std::sync::mpsc::channel();
    let miss = Arc::new(Mutex::new(Iova(0)));
    let wanted = miss.clone();
    let on_invalidate = move |channel: &UnixStream| {
        send_miss(channel, *held(&wanted), PERM_READ);
        let answered = wire::wait_readable(&[channel.as_raw_fd()], Some(Duration::from_millis(200)));
        seen.send(answered.unwrap().is_some()).unwrap();
    };
    let side = side(ALL, FrontEndConfig::default(), Box::new(on_invalidate));
    side.front_end.start(&side.driver.queues(), None).unwrap();
    *held(&miss) = side.space.allocate(1, Permission::ReadOnly).unwrap().address(0);
    let ack = side.front_end.invalidate(Iova(0), 0).unwrap();
    assert!(!noted.recv().unwrap(), "the miss was answered before the ack");
    assert!(ack.latency >= Duration::from_millis(200) && ack.status == 0);
    let channel = held(&side.stub.channel).as_ref().unwrap().try_clone().unwrap();
    assert_eq!(wire::receive(&channel).unwrap().unwrap().number(), Some(0));
}

#[test]
fn an_odd_front_end_refuses_keeps_silent_or_answers_something_else() {
    let side = side(ALL, FrontEndConfig::default(), Box::new(|_| {}));
    side.front_end.start(&side.driver.queues(), None).unwrap();
    let run = side.space.allocate_run(8, Permission::ReadWrite).unwrap();
    side.front_end.on_miss(Box::new(|_| Answer::Refuse));
    assert_eq!(side.stub.miss(run.address(0), PERM_READ), 1);
    side.front_end.on_miss(Box::new(|_| Answer::ServeRun));
    side.stub.take_notes();
    assert_eq!(side.stub.miss(run.address(5 * PAGE), PERM_WRITE), 0);
    let update = IotlbMessage::read_from_bytes(&side.stub.take_notes()[0].2).unwrap();
    assert_eq!((update.iova(), update.size()), (run.address(0), 8 * PAGE));
    let odd = IotlbMessage::update(Iova(0x5000), 0, UserAddr(1), 0);
    side.front_end.on_miss(Box::new(move |_| Answer::Odd { updates: vec![odd], status: 7 }));
    assert_eq!(side.stub.miss(run.address(0), PERM_READ), 7);
    assert_eq!(side.stub.take_notes()[0].2, odd.as_bytes());
    side.front_end.on_miss(Box::new(|_| Answer::Silence));
    send_miss(held(&side.stub.channel).as_ref().unwrap(), run.address(0), PERM_READ);
    assert!(side.front_end.wait_for_misses(Duration::from_secs(10), |counts| counts.ignored == 1));
}

#[test]
fn a_reply_that_never_comes_ends_the_wait() {
    let stuck = |channel: &UnixStream| drop(wire::receive(channel));
    let config = FrontEndConfig { reply_timeout: Duration::from_millis(300), ..FrontEndConfig::default() };
    let side = side(ALL, config, Box::new(stuck));
    side.front_end.start(&side.driver.queues(), None).unwrap();
    let timeout = side.front_end.invalidate(Iova(0), 0).unwrap_err();
    assert!(matches!(&timeout, Error::Timeout { after, .. } if *after == config.reply_timeout), "{timeout}");
}
