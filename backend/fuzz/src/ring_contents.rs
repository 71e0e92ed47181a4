//! A virtqueue whose driver keeps to nothing: descriptors, rings and indirect tables of any content, which changes
//! while the device is at it, on pages that come and go. The device's side must not panic or spin, uses each head
//! once, writes only where it may, and asks only for what is missing.
//!
//! The input: how the ring is laid out, what stands in it, then what happens.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use arbitrary::{Result, Unstructured};
use device_model::addr::{Access, ByteRange, DomainId, Iova, PAGE_SIZE};
use device_model::mmu::{DrainWaker, MirrorConfig, MirrorWriter, Missing, Permissions, RingMemory, mirror};
use device_model::session::miss_port::{MissAnswer, pages_of};
use device_model::testing::frames::Frames;
use device_model::testing::noise::noise;
use mirrorgpu::fault_injection::Injection;
use mirrorgpu::queues::MAX_QUEUE_SIZE;
use mirrorgpu::queues::chain::RingError;
use mirrorgpu::queues::mailbox::Side;
use mirrorgpu::queues::ring::{Pending, Published, SharedRing, Taken, Virtqueue};
use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::QueueT;

/// Pages of the guest, from this address on; each lies on the frame of its number.
const PAGES: u64 = 8;
const FIRST: u64 = 0x1_0000;
const BYTES: usize = (PAGES * PAGE_SIZE) as usize;
/// Most actions of an input.
const ACTIONS: usize = 96;
/// Bytes of the largest request.
const MAX_REQUEST: usize = 2 * PAGE_SIZE as usize;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Plays `bytes`.
pub fn run(bytes: &[u8]) {
    let mut u = Unstructured::new(bytes);
    let Ok(layout) = Layout::of(&mut u) else { return };
    let frames = frames();
    frames.write(0, &[0; BYTES]);
    let (writer, memory) = memory();
    let shared = shared_ring(&memory, &layout);
    let injection = Injection::default();
    let ring = Virtqueue::new((0, &shared), memory, MAX_REQUEST, &injection);
    let mut play = Play::new((&shared, ring), writer, frames, layout);
    // An input that ends within an action has one action less.
    let _ = play.fill(&mut u).and_then(|()| (0..ACTIONS).try_for_each(|_| play.act(&mut u)));
    play.finish();
}

struct NoWaker;

impl DrainWaker for NoWaker {
    fn wake(&self) {}
}

fn frames() -> Frames {
    static FRAMES: OnceLock<Frames> = OnceLock::new();
    *FRAMES.get_or_init(|| Frames::leaked(PAGES))
}

fn memory() -> (MirrorWriter, RingMemory) {
    let config = MirrorConfig { readers: 1, table_limit: 1 << 20 };
    let (writer, mut readers) = mirror(config, Arc::new(NoWaker));
    (writer, RingMemory::new(readers.pop().expect("The mirror was asked for a reader")))
}

fn shared_ring(memory: &RingMemory, layout: &Layout) -> SharedRing {
    let vring = VringMutex::new(memory.clone(), MAX_QUEUE_SIZE).expect("A ring of the largest size");
    vring.set_queue_size(layout.size);
    vring.set_queue_info(layout.descriptors, layout.available, layout.used).expect("Places that are aligned");
    vring.set_queue_event_idx(layout.event_index);
    vring.set_queue_ready(true);
    vring.set_enabled(true);
    let ring = SharedRing::new(vring);
    ring.fresh.store(true, Ordering::Relaxed);
    ring
}

/// Where the parts of the ring lie.
struct Layout {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    event_index: bool,
}

impl Layout {
    fn of(u: &mut Unstructured<'_>) -> Result<Self> {
        let size = *u.choose(&[4, 8, 1, 2, 16, 128, MAX_QUEUE_SIZE])?;
        let mut place = |page: u64, unit: u64| -> Result<u64> {
            let offset = match u.int_in_range(0..=7)? {
                // Anywhere: over another part, or over the end of the memory.
                0 => u64::from(u.arbitrary::<u16>()?) % BYTES as u64,
                // Over the end of a page.
                1..=3 => (page + 1) * PAGE_SIZE - u64::from(u.arbitrary::<u8>()?),
                _ => page * PAGE_SIZE,
            };
            Ok((FIRST + offset) / unit * unit)
        };
        let (descriptors, available, used) = (place(0, 16)?, place(1, 2)?, place(2, 4)?);
        Ok(Self { size, descriptors, available, used, event_index: u.arbitrary()? })
    }

    /// What the device writes into the used ring offers it commands: there is no end to them, as there is none where a
    /// driver goes on offering.
    fn feeds_itself(&self) -> bool {
        let size = u64::from(self.size);
        self.used < self.available + 6 + 2 * size && self.available < self.used + 6 + 8 * size
    }
}

/// Commands that were taken, by what became of them.
#[derive(Default)]
struct Heads {
    /// Off the ring and not used: what the device says is in flight.
    in_flight: BTreeSet<u16>,
    /// The one whose request is being copied.
    inbound: Option<u16>,
    /// With the device.
    taken: Vec<(u16, Pending)>,
    /// Answered and not published.
    answered: VecDeque<u16>,
}

struct Play<'a> {
    shared: &'a SharedRing,
    ring: Virtqueue<'a>,
    writer: MirrorWriter,
    frames: Frames,
    layout: Layout,
    heads: Heads,
    /// What each page allows.
    mapped: [Permissions; PAGES as usize],
    /// Pages of which each side awaits an answer.
    awaited: [Vec<Missing>; 2],
    is_broken: bool,
    /// No answer had any bytes so far: only the device's own writes can be in the used ring.
    is_silent: bool,
}

impl<'a> Play<'a> {
    fn new(
        (shared, ring): (&'a SharedRing, Virtqueue<'a>),
        writer: MirrorWriter,
        frames: Frames,
        layout: Layout,
    ) -> Self {
        let (mapped, awaited) = (Default::default(), Default::default());
        let heads = Heads::default();
        Self {
            shared,
            ring,
            writer,
            frames,
            layout,
            heads,
            mapped,
            awaited,
            is_broken: false,
            is_silent: true,
        }
    }

    /// Writes the first contents of the memory, and maps the pages that are mapped from the start.
    fn fill(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let rights: u16 = u.arbitrary()?;
        for page in 0..PAGES {
            // Most pages allow all.
            let permissions = match rights >> (2 * page) & 3 {
                0 => Permissions::READ,
                1 => Permissions::default(),
                _ => Permissions::READ_WRITE,
            };
            self.map(page, permissions);
        }
        for table in [self.layout.descriptors - FIRST, 7 * PAGE_SIZE] {
            for index in 0..u.int_in_range(0..=24)? {
                self.put(table + 16 * index, &descriptor(u)?);
            }
        }
        let offered: u16 = u.int_in_range(0..=self.layout.size.min(24))?;
        for index in 0..offered {
            self.offer(index, u.int_in_range(0..=15)?);
        }
        self.put(self.layout.available - FIRST + 2, &offered.to_le_bytes());
        Ok(())
    }

    fn offer(&self, index: u16, head: u16) {
        let slot = u64::from(index % self.layout.size);
        self.put(self.layout.available - FIRST + 4 + 2 * slot, &head.to_le_bytes());
    }

    /// Writes bytes of the guest, as far as they lie in its memory.
    fn put(&self, offset: u64, bytes: &[u8]) {
        let room = (BYTES as u64).saturating_sub(offset).min(bytes.len() as u64) as usize;
        if room > 0 {
            self.frames.write(offset, &bytes[..room]);
        }
    }

    fn get(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        if at - FIRST + 2 <= BYTES as u64 {
            self.frames.read(at - FIRST, &mut bytes);
        }
        u16::from_le_bytes(bytes)
    }

    /// Gives a page these permissions and no others.
    fn map(&mut self, page: u64, permissions: Permissions) {
        let range = page_range(page);
        let drained = self.writer.begin(DomainId::DEVICE, range).poll().expect("Nothing is in flight");
        drop(self.writer.end(drained));
        if !permissions.is_none() {
            let host = self.frames.host(page * PAGE_SIZE, PAGE_SIZE as usize);
            self.writer.map(DomainId::DEVICE, range, host, permissions).expect("A page can be mapped");
        }
        self.mapped[page as usize] = permissions;
    }

    fn act(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=23)? {
            0..=5 => _ = self.take(),
            6..=8 => self.complete(u.arbitrary::<u8>()?.into(), answer(u)?),
            9..=11 => self.publish(),
            12..=13 => self.answer_misses(Side::Input, u.ratio(1, 8)?),
            14..=15 => self.answer_misses(Side::Output, u.ratio(1, 8)?),
            16 => self.map(u.int_in_range(0..=PAGES - 1)?, permissions(u)?),
            17..=20 => self.scribble(u)?,
            21 => self.restart(u.arbitrary()?),
            22 => self.reset(),
            _ => _ = self.ring.interrupt(),
        }
        Ok(())
    }

    /// The driver changes what stands in its memory.
    fn scribble(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let available = self.layout.available - FIRST;
        match u.int_in_range(0..=4)? {
            0 => self.put(self.layout.descriptors - FIRST + 16 * u.int_in_range(0..=15)?, &descriptor(u)?),
            1 => self.put(7 * PAGE_SIZE + 16 * u.int_in_range(0..=15)?, &descriptor(u)?),
            2 => {
                let index = self.get(self.layout.available + 2);
                self.offer(index, u.int_in_range(0..=15)?);
                self.put(available + 2, &index.wrapping_add(1).to_le_bytes());
            }
            3 => self.put(available + 2, &u.arbitrary::<u16>()?.to_le_bytes()),
            _ => {
                let at = u64::from(u.arbitrary::<u16>()?) % BYTES as u64;
                self.put(at, &u.arbitrary::<[u8; 8]>()?);
            }
        }
        Ok(())
    }

    /// Takes a command; `false`: there was nothing to do.
    fn take(&mut self) -> bool {
        let before = self.shared.vring.queue_next_avail();
        let next = self.layout.available + 4 + 2 * u64::from(before % self.layout.size);
        let offered = self.get(next);
        let taken = self.ring.take();
        let moved = self.shared.vring.queue_next_avail() != before;
        match taken {
            Taken::Command(request, pending) => {
                assert!(request.len() <= MAX_REQUEST, "A request of {} bytes", request.len());
                self.took(moved, offered, pending);
            }
            Taken::Unreadable(pending) => self.took(moved, offered, pending),
            Taken::Missing(missing) => {
                if moved {
                    self.takes_in(offered);
                }
                self.awaits(Side::Input, missing);
            }
            Taken::Broke(RingError::Twice { head }) => {
                assert!(self.heads.in_flight.contains(&head), "Head {head} was not in flight");
                self.is_broken = true;
            }
            Taken::Broke(_) => self.is_broken = true,
            Taken::Again => {}
            Taken::Empty | Taken::Idle => return false,
        }
        self.check();
        true
    }

    fn takes_in(&mut self, head: u16) {
        assert!(self.heads.in_flight.insert(head), "Head {head} was taken twice");
        assert_eq!(self.heads.inbound.replace(head), None, "A request was lost while it was copied");
    }

    fn took(&mut self, moved: bool, offered: u16, pending: Pending) {
        if moved {
            self.takes_in(offered);
        }
        let head = self.heads.inbound.take().expect("A command without a head");
        self.heads.taken.push((head, pending));
    }

    fn complete(&mut self, which: usize, response: Vec<u8>) {
        if self.heads.taken.is_empty() {
            return;
        }
        self.is_silent &= response.is_empty();
        let (head, pending) = self.heads.taken.swap_remove(which % self.heads.taken.len());
        self.heads.answered.push_back(head);
        self.ring.complete(pending, response);
        self.check();
    }

    fn publish(&mut self) {
        let is_fresh = self.shared.fresh.load(Ordering::Relaxed);
        let in_guest = self.get(self.layout.used + 2);
        let before = if is_fresh { in_guest } else { self.next_used() };
        let kept = self.unwritable();
        let published = self.ring.publish();
        assert!(kept == self.unwritable(), "The device wrote where it may not");
        if !self.shared.fresh.load(Ordering::Relaxed) {
            let count = self.next_used().wrapping_sub(before);
            self.used(before, count);
        }
        match published {
            Published::Nothing => {}
            Published::Missing(missing) => self.awaits(Side::Output, missing),
            Published::Broke(_) => self.is_broken = true,
        }
        self.check();
    }

    /// The oldest answers were published.
    fn used(&mut self, first: u16, count: u16) {
        for place in 0..count {
            let head =
                self.heads.answered.pop_front().expect("More heads are used than commands were answered");
            assert!(self.heads.in_flight.remove(&head));
            let slot = u64::from(first.wrapping_add(place) % self.layout.size);
            let element = self.layout.used + 4 + 8 * slot;
            if self.is_silent {
                let (id, length) = (self.get(element), self.get(element + 4));
                assert_eq!((id, length), (head, 0), "The used ring says another head");
            }
        }
    }

    fn next_used(&self) -> u16 {
        self.shared.vring.get_ref().get_queue().next_used()
    }

    /// The bytes of all pages that the device may not write.
    fn unwritable(&self) -> Vec<u8> {
        let mut bytes = vec![0; BYTES];
        self.frames.read(0, &mut bytes);
        for (page, permissions) in bytes.chunks_mut(PAGE_SIZE as usize).zip(&self.mapped) {
            if permissions.write {
                page.fill(0);
            }
        }
        bytes
    }

    fn awaits(&mut self, side: Side, missing: Vec<Missing>) {
        assert!(!missing.is_empty(), "Nothing is missing, and nobody would ever answer");
        for one in &missing {
            for page in one.range.pages() {
                let mapped =
                    self.permissions_of(page).is_some_and(|permissions| permissions.allow(one.access));
                assert!(!mapped, "{page} is asked for, and it is there");
            }
        }
        self.awaited[index(side)] = missing;
    }

    fn permissions_of(&self, page: Iova) -> Option<Permissions> {
        let number = page.raw().checked_sub(FIRST)? / PAGE_SIZE;
        self.mapped.get(usize::try_from(number).ok()?).copied()
    }

    /// Maps what a side waits for, as far as there is memory, and tells it; or refuses one page.
    fn answer_misses(&mut self, side: Side, refuse: bool) {
        let missing = std::mem::take(&mut self.awaited[index(side)]);
        let (mut left, mut refuse) = (pages_of(&missing), refuse);
        for one in missing {
            for page in one.range.pages() {
                let granted = !std::mem::take(&mut refuse) && self.grant(page, one.access);
                let answer = if granted { MissAnswer::Mapped } else { MissAnswer::Refused };
                left -= 1;
                assert_eq!(self.ring.miss_answered(self.ring.wait(), side, answer), left == 0);
            }
        }
    }

    fn grant(&mut self, page: Iova, access: Access) -> bool {
        let Some(known) = self.permissions_of(page) else { return false };
        let (read, write) = (known.read || access == Access::Read, known.write || access == Access::Write);
        self.map((page.raw() - FIRST) / PAGE_SIZE, Permissions { read, write });
        true
    }

    /// Stop and start, as the session does it.
    fn restart(&mut self, from_guest: bool) {
        self.shared.vring.set_queue_ready(false);
        self.awaited = Default::default();
        self.shared.fresh.store(from_guest || self.shared.fresh.load(Ordering::Relaxed), Ordering::Release);
        self.shared.vring.set_queue_ready(true);
        self.ring.restarted();
        self.is_broken = false;
    }

    fn reset(&mut self) {
        self.shared.resets.fetch_add(1, Ordering::Release);
        assert!(matches!(self.ring.publish(), Published::Nothing | Published::Broke(_)));
        self.ring.reset();
        self.heads = Heads::default();
        self.awaited = Default::default();
        self.shared.vring.set_queue_next_avail(0);
        self.shared.fresh.store(true, Ordering::Release);
        self.is_broken = false;
        self.check();
    }

    fn check(&self) {
        assert_eq!(self.ring.in_flight(), self.heads.in_flight.len(), "What is in flight");
    }

    /// Everything is mapped, and everything that was taken is answered: then nothing is left.
    fn finish(&mut self) {
        (0..PAGES).for_each(|page| self.map(page, Permissions::READ_WRITE));
        for _ in 0..4 * usize::from(self.layout.size) + 16 {
            self.answer_misses(Side::Input, false);
            self.answer_misses(Side::Output, false);
            let goes_on = self.take();
            while !self.heads.taken.is_empty() {
                self.complete(0, Vec::new());
            }
            self.publish();
            if !goes_on && self.left() == 0 {
                return;
            }
        }
        let is_excused = self.is_broken || self.layout.feeds_itself();
        assert!(is_excused, "{} commands are never used, or the ring is never empty", self.left());
    }

    /// Commands and answers that are on their way.
    fn left(&self) -> usize {
        let awaited = self.awaited.iter().map(Vec::len).sum::<usize>();
        self.heads.answered.len() + usize::from(self.heads.inbound.is_some()) + awaited
    }
}

fn index(side: Side) -> usize {
    match side {
        Side::Input => 0,
        Side::Output => 1,
    }
}

fn page_range(page: u64) -> ByteRange<Iova> {
    ByteRange::new(Iova::new(FIRST + page * PAGE_SIZE), PAGE_SIZE).expect("A page of the guest")
}

fn permissions(u: &mut Unstructured<'_>) -> Result<Permissions> {
    Ok(Permissions { read: u.arbitrary()?, write: u.arbitrary()? })
}

/// A response; most often empty, so that the used ring can be judged.
fn answer(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    Ok(if u.ratio(1, 4)? { vec![0xa5; u.arbitrary::<u16>()?.into()] } else { Vec::new() })
}

/// A descriptor (virtio 1.3, 2.7.5): most lie in the guest's memory.
fn descriptor(u: &mut Unstructured<'_>) -> Result<[u8; 16]> {
    let shape: u8 = u.arbitrary()?;
    let at = match shape & 7 {
        0 => u.arbitrary()?,
        1 => FIRST + 7 * PAGE_SIZE,
        _ => FIRST + u64::from(u.arbitrary::<u16>()?) % BYTES as u64,
    };
    let len: u32 = match shape >> 3 & 3 {
        0 => u.arbitrary()?,
        1 => u.int_in_range(0..=8_u32)? * 16,
        _ => u.arbitrary::<u16>()?.into(),
    };
    let flags = match shape >> 5 {
        0 => u.arbitrary()?,
        1 => INDIRECT,
        2 => 0,
        3 => WRITE,
        4 => NEXT | WRITE,
        _ => NEXT,
    };
    let next: u16 = if u.ratio(1, 16)? { u.arbitrary()? } else { u.int_in_range(0..=15)? };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&at.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    Ok(bytes)
}

/// Rings to begin with.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    noise(6, 1200)
}
