//! The table of misses and the mirror, as a session drives them, beside a naive twin: a list of what is asked, a list
//! of what was sent, and what was proved of each page. What the twin says of an UPDATE, an answer or a timeout is what
//! the table has to say, and no page leads anywhere that the twin does not know of.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use device_model::addr::{Access, ByteRange, DomainId, FrontendVa, Iova, PAGE_SHIFT, PAGE_SIZE};
use device_model::mmu::miss::{
    Answer, MISS_WINDOW, MissRequest, MissTable, Outcome, Requested, Resolution, UpdateVerdict,
};
use device_model::mmu::{
    DrainWaker, Drained, HostRange, HostSpan, MapError, MirrorConfig, MirrorWriter, Permissions, Reader,
    mirror,
};
use device_model::testing::frames::Frames;
use mirrorgpu::vhost_user::iotlb::{self, IotlbEvent, Update};

use crate::raw_messages::check_iotlb;

const SPACE: DomainId = DomainId::DEVICE;
const TIMEOUT: Duration = Duration::from_secs(1);
/// Pages that the device asks for, from 0 on; and those of the front-end's memory, which lie at [`REGION`].
const ASKED: u64 = 40;
const FRAMES: u64 = 1100;
const REGION: u64 = 0x7f00_0000_0000;

/// What happens next.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    /// A message of the device IOTLB.
    Message([u8; 32]),
    /// A thread needs a page.
    Request { page: u64, access: Access, waiter: u8 },
    /// Misses go out, so many.
    Send { count: u8 },
    /// The answer to the oldest miss.
    Reply { granted: bool },
    /// An invalidation that is drained ends.
    End { which: u8 },
    /// GET_VRING_BASE: everything is forgotten.
    Stop,
    /// SET_MEM_TABLE: nothing that leads to the old memory may be left.
    ChangeTable,
    /// SET_BACKEND_REQ_FD.
    ReplaceChannel,
    /// Time passes, and what is late is given up.
    Advance { millis: u16 },
    /// We owe a reply from now on, or no longer.
    Owe(bool),
    /// The front-end is found to stand still, or to read again.
    Still(bool),
}

impl Step {
    /// The next step of an input.
    pub(crate) fn decode(u: &mut Unstructured<'_>) -> Result<Self> {
        let access = |u: &mut Unstructured<'_>| Ok(if u.arbitrary()? { Access::Write } else { Access::Read });
        Ok(match u.int_in_range(0..=31)? {
            0..=6 => Self::Request { page: page(u)?, access: access(u)?, waiter: u.int_in_range(0..=5)? },
            7..=11 => Self::Send { count: u.int_in_range(1..=4)? },
            12..=17 => Self::Message(message(u)?),
            18..=22 => Self::Reply { granted: u.ratio(3, 4)? },
            23..=24 => Self::End { which: u.int_in_range(0..=3)? },
            25..=27 => Self::Advance { millis: u.arbitrary::<u16>()? >> u.int_in_range(0..=15)? },
            28 => Self::Owe(u.arbitrary()?),
            29 => Self::Still(u.arbitrary()?),
            30 if u.arbitrary()? => Self::Stop,
            30 => Self::ChangeTable,
            _ => Self::ReplaceChannel,
        })
    }
}

fn page(u: &mut Unstructured<'_>) -> Result<u64> {
    if u.arbitrary()? { u.int_in_range(0..=3) } else { u.int_in_range(0..=ASKED - 1) }
}

/// A struct vhost_iotlb_msg; most are UPDATEs that fit a page which is asked for.
fn message(u: &mut Unstructured<'_>) -> Result<[u8; 32]> {
    let shape: u8 = u.arbitrary()?;
    let iova = page(u)? << PAGE_SHIFT;
    let (iova, size) = match shape & 7 {
        0 => (u.arbitrary()?, u.arbitrary()?),
        1 => (iova + u64::from(u.arbitrary::<u16>()?), u.arbitrary::<u16>()?.into()),
        2 => (iova & !0x3fff, 0x4000),
        3 => (0, 512 * PAGE_SIZE),
        _ => (iova, PAGE_SIZE),
    };
    let uaddr = match shape >> 3 & 7 {
        0 => u.arbitrary()?,
        1 => REGION + u64::from(u.arbitrary::<u16>()?),
        _ => (REGION + (u.int_in_range(0..=3_u64)? << PAGE_SHIFT)).wrapping_add(iova),
    };
    let kind = match shape >> 6 {
        0 => 3,
        1 if u.ratio(1, 16)? => u.arbitrary()?,
        _ => 2,
    };
    let permission = if u.ratio(1, 4)? { u.arbitrary()? } else { 3 };
    let mut bytes = [0; 32];
    for (field, value) in bytes.chunks_mut(8).zip([iova, size, uaddr]) {
        field.copy_from_slice(&value.to_ne_bytes());
    }
    (bytes[24], bytes[25]) = (permission, kind);
    Ok(bytes)
}

/// What the twin knows of a page that is asked for.
#[derive(Debug)]
struct Asked {
    waiters: Vec<u8>,
    is_sent: bool,
    fell_short: bool,
    /// When its timeout began, in time that counts.
    since: Duration,
}

/// A miss that was sent and is not answered; `None`: from before a stop.
#[derive(Debug, Default)]
struct Sent {
    request: Option<MissRequest>,
    staged: Option<(ByteRange<Iova>, HostRange, Permissions)>,
    is_invalidated: bool,
}

/// The naive twin.
#[derive(Default)]
struct Twin {
    asked: BTreeMap<MissRequest, Asked>,
    sent: VecDeque<Sent>,
    /// What was proved of each page, and not taken away since.
    pages: BTreeMap<u64, (u64, Permissions)>,
    /// Time in which the front-end could have answered.
    counted: Duration,
}

/// What the twin says of an answer.
#[derive(Debug, PartialEq, Eq)]
enum Meaning {
    Unexpected,
    Stale,
    AskedAgain,
    Resolved { request: MissRequest, waiters: Vec<u8>, outcome: Outcome },
}

impl Twin {
    fn request(&mut self, request: MissRequest, waiter: u8) -> Requested {
        let counted = self.counted;
        let Some(asked) = self.asked.get_mut(&request) else {
            let asked = Asked { waiters: vec![waiter], is_sent: false, fell_short: false, since: counted };
            self.asked.insert(request, asked);
            return Requested::Queued;
        };
        if asked.waiters.is_empty() {
            asked.since = counted;
        }
        if !asked.waiters.contains(&waiter) {
            asked.waiters.push(waiter);
        }
        Requested::Joined
    }

    fn has_unsent(&self) -> bool {
        self.asked.values().any(|asked| !asked.is_sent)
    }

    fn update(&mut self, range: ByteRange<Iova>, host: HostRange, claimed: Permissions) -> UpdateVerdict {
        let Some(oldest) = self.sent.front_mut() else { return UpdateVerdict::Unsolicited };
        let Some(request) = oldest.request else { return UpdateVerdict::Stale };
        if !range.overlaps(page_range(request.iova)) {
            return UpdateVerdict::Unsolicited;
        }
        (oldest.staged, oldest.is_invalidated) = (Some((range, host, claimed)), false);
        UpdateVerdict::Staged
    }

    fn reply(&mut self, granted: bool) -> Meaning {
        let Some(Sent { request, staged, is_invalidated }) = self.sent.pop_front() else {
            return Meaning::Unexpected;
        };
        let Some(request) = request else { return Meaning::Stale };
        let fits = staged.filter(|(range, _, claimed)| {
            range.whole_pages().is_some_and(|pages| pages.contains(request.iova))
                && claimed.allow(request.access)
        });
        if granted && fits.is_none() {
            let asked = self.asked.get_mut(&request).expect("What was sent is asked for");
            if is_invalidated || !std::mem::replace(&mut asked.fell_short, true) {
                asked.since = self.counted;
                self.not_sent(request);
                return Meaning::AskedAgain;
            }
        }
        let asked = self.asked.remove(&request).expect("What was sent is asked for");
        let mut waiters = asked.waiters;
        let outcome = match fits {
            _ if !granted => Outcome::Refused,
            None => Outcome::NotCovered,
            Some((range, host, _)) => {
                waiters.extend(self.settle_unsent(request, range));
                Outcome::Mapped { range, host, permissions: request.access.into() }
            }
        };
        Meaning::Resolved { request, waiters, outcome }
    }

    /// What was not sent yet and lies in what is mapped now needs no answer of its own.
    fn settle_unsent(&mut self, answered: MissRequest, range: ByteRange<Iova>) -> Vec<u8> {
        let pages = range.whole_pages().expect("It covers a page");
        let lies_in = |request: &MissRequest, asked: &mut Asked| {
            !asked.is_sent && request.access == answered.access && pages.contains(request.iova)
        };
        let settled = self.asked.extract_if(.., lies_in);
        settled.flat_map(|(_, asked)| asked.waiters).collect()
    }

    /// It has to be sent once more, if anybody still waits.
    fn not_sent(&mut self, request: MissRequest) {
        let asked = self.asked.get_mut(&request).expect("What was sent is asked for");
        asked.is_sent = false;
        if asked.waiters.is_empty() {
            self.asked.remove(&request);
        }
    }

    fn invalidate(&mut self, range: ByteRange<Iova>) {
        for sent in &mut self.sent {
            if sent.staged.take_if(|(staged, ..)| staged.page_aligned().overlaps(range)).is_some() {
                sent.is_invalidated = true;
            }
        }
        self.pages.retain(|page, _| !range.overlaps(page_range(Iova::new(page << PAGE_SHIFT))));
    }

    fn map(&mut self, range: ByteRange<Iova>, host: HostRange, proved: Permissions) {
        let Some(pages) = range.whole_pages() else { return };
        for at in pages.pages() {
            let frame = host.address() + (at.raw() - range.first().raw());
            let known = self.pages.entry(at.raw() >> PAGE_SHIFT).or_insert((frame, proved));
            *known = match *known {
                (same, old) if same == frame => {
                    (frame, Permissions { read: old.read || proved.read, write: old.write || proved.write })
                }
                _ => (frame, proved),
            };
        }
    }

    fn give_up(&mut self, request: MissRequest) -> Vec<u8> {
        let asked = self.asked.get_mut(&request).expect("Only what is asked for can be late");
        assert!(self.counted.saturating_sub(asked.since) >= TIMEOUT, "{request:?} was given up too early");
        let waiters = std::mem::take(&mut asked.waiters);
        if !asked.is_sent {
            self.asked.remove(&request);
        }
        waiters
    }

    fn stop(&mut self) {
        self.asked.clear();
        self.sent.iter_mut().for_each(|sent| *sent = Sent::default());
    }
}

struct NoWaker;

impl DrainWaker for NoWaker {
    fn wake(&self) {}
}

/// The table and the mirror, with their twin.
struct Play {
    misses: MissTable<u8>,
    writer: MirrorWriter,
    reader: Reader,
    twin: Twin,
    open: Vec<(Drained, ByteRange<Iova>)>,
    now: Duration,
    owes: bool,
}

/// Plays a script.
pub(crate) fn play(script: Vec<Step>) {
    let config = MirrorConfig { readers: 1, table_limit: 1 << 20 };
    let (writer, mut readers) = mirror(config, Arc::new(NoWaker));
    let reader = readers.pop().expect("The mirror was asked for a reader");
    let (misses, twin) = (MissTable::new(TIMEOUT), Twin::default());
    let mut play = Play { misses, writer, reader, twin, open: Vec::new(), now: Duration::ZERO, owes: false };
    for step in script {
        play.act(step);
        play.check();
    }
    play.owe(false);
    // Longer than a front-end may stand still.
    play.advance(Duration::from_secs(1000));
    assert!(play.twin.asked.values().all(|asked| asked.waiters.is_empty()), "Somebody waits for ever");
}

impl Play {
    fn act(&mut self, step: Step) {
        match step {
            Step::Message(payload) => self.message(&payload),
            Step::Request { page, access, waiter } => {
                let request = MissRequest { space: SPACE, access, iova: Iova::new(page << PAGE_SHIFT) };
                let requested = self.misses.request(self.now, SPACE, request.iova, access, waiter);
                assert_eq!(requested, self.twin.request(request, waiter));
            }
            Step::Send { count } => self.send(count),
            Step::Reply { granted } => self.reply(granted),
            Step::End { which } if usize::from(which) < self.open.len() => {
                let (drained, range) = self.open.swap_remove(which.into());
                assert_eq!(self.writer.end(drained).range(), range.page_aligned());
            }
            Step::End { .. } => {}
            Step::Stop => {
                self.misses.clear();
                self.twin.stop();
                self.invalidate(ByteRange::everything());
            }
            Step::ChangeTable => self.invalidate(ByteRange::everything()),
            Step::ReplaceChannel => self.replace_channel(),
            Step::Advance { millis } => self.advance(Duration::from_millis(millis.into())),
            Step::Owe(owes) => self.owe(owes),
            Step::Still(true) => _ = self.misses.put_off(self.now),
            Step::Still(false) => _ = self.misses.reads_again(self.now),
        }
    }

    fn message(&mut self, payload: &[u8; 32]) {
        check_iotlb(payload);
        match iotlb::parse(payload) {
            Ok(IotlbEvent::Update(update)) => self.update(update),
            Ok(IotlbEvent::Invalidate(range)) => self.invalidate(range),
            Err(_) => {}
        }
    }

    fn update(&mut self, update: Update) {
        let Some(host) = host_of(update.target) else { return };
        let claimed = Permissions { read: update.read, write: update.write };
        let verdict = self.misses.on_update(update.range, host, claimed);
        assert_eq!(verdict, self.twin.update(update.range, host, claimed));
    }

    fn invalidate(&mut self, range: ByteRange<Iova>) {
        self.misses.invalidate(SPACE, range);
        let invalidation = self.writer.begin(SPACE, range);
        self.open.push((invalidation.poll().expect("Nothing is in flight"), range));
        self.twin.invalidate(range.page_aligned());
    }

    fn send(&mut self, count: u8) {
        for _ in 0..count {
            let room = self.twin.sent.len() < MISS_WINDOW;
            let Some(request) = self.misses.next_to_send(self.now) else {
                return assert!(!room || !self.twin.has_unsent(), "A miss is never sent");
            };
            assert!(room);
            let asked = self.twin.asked.get_mut(&request).expect("Only what is asked for is sent");
            assert!(!std::mem::replace(&mut asked.is_sent, true), "{request:?} is sent twice");
            self.twin.sent.push_back(Sent { request: Some(request), ..Sent::default() });
        }
    }

    fn reply(&mut self, granted: bool) {
        let expected = self.twin.reply(granted);
        let found = match self.misses.on_reply(self.now, granted) {
            Answer::Unexpected => Meaning::Unexpected,
            Answer::Stale => Meaning::Stale,
            Answer::AskedAgain => Meaning::AskedAgain,
            Answer::Resolved(Resolution { request, waiters, outcome }) => {
                let waiters = waiters.into_iter().map(|(_, waiter)| waiter).collect();
                Meaning::Resolved { request, waiters, outcome }
            }
        };
        if let Meaning::Resolved { outcome: Outcome::Mapped { range, host, permissions }, request, .. } =
            &found
        {
            self.map(*request, (*range, *host), *permissions);
        }
        assert_eq!(sorted(found), sorted(expected));
    }

    fn map(&mut self, asked: MissRequest, (range, host): (ByteRange<Iova>, HostRange), proved: Permissions) {
        let is_blocked = self.open.iter().any(|(_, open)| open.page_aligned().overlaps(range.page_aligned()));
        let is_aligned = range.first().page_offset() == host.address() % PAGE_SIZE;
        match self.writer.map(SPACE, range, host, proved) {
            Ok(_) => {
                assert!(is_aligned && !is_blocked);
                self.twin.map(range, host, proved);
                let found = self.reader.enter().translate(SPACE, asked.iova, asked.access).is_ok();
                assert!(found, "{asked:?} was mapped and is not there");
            }
            Err(MapError::Misaligned { .. }) => assert!(!is_aligned),
            Err(MapError::Invalidating { .. }) => assert!(is_blocked),
            Err(error) => panic!("{error}"),
        }
    }

    fn replace_channel(&mut self) {
        self.misses.channel_replaced();
        for sent in std::mem::take(&mut self.twin.sent) {
            if let Some(request) = sent.request {
                self.twin.not_sent(request);
            }
        }
    }

    fn advance(&mut self, time: Duration) {
        self.now += time;
        if !self.owes {
            self.twin.counted += time;
        }
        let is_due = self.misses.is_due(self.now);
        let late = self.misses.expire(self.now);
        assert_eq!(is_due, !late.is_empty(), "What is due is given up");
        for Resolution { request, waiters, outcome } in late {
            assert_eq!(outcome, Outcome::TimedOut);
            let waiters: Vec<u8> = waiters.into_iter().map(|(_, waiter)| waiter).collect();
            assert_eq!(waiters, self.twin.give_up(request));
        }
    }

    fn owe(&mut self, owes: bool) {
        if owes {
            self.misses.pause(self.now);
        } else {
            self.misses.resume(self.now);
        }
        self.owes = owes;
    }

    fn check(&self) {
        assert_eq!(self.misses.outstanding(), self.twin.sent.len());
        let pending = self.misses.pending().map(|(request, waiters)| (request, waiters.to_vec()));
        let asked = self.twin.asked.iter().map(|(request, asked)| (*request, asked.waiters.clone()));
        assert!(pending.eq(asked), "What is asked for");
        let section = self.reader.enter();
        for page in 0..ASKED + 8 {
            let known = self.twin.pages.get(&page);
            for access in [Access::Read, Access::Write] {
                let at = Iova::new(page << PAGE_SHIFT);
                let Ok(found) = section.translate(SPACE, at, access).map(HostSpan::address) else { continue };
                let proved = known.filter(|(_, permissions)| permissions.allow(access));
                assert_eq!(Some(found), proved.map(|(host, _)| *host), "Page {page:#x} for {access}");
            }
        }
    }
}

fn sorted(meaning: Meaning) -> Meaning {
    match meaning {
        Meaning::Resolved { request, mut waiters, outcome } => {
            waiters.sort_unstable();
            Meaning::Resolved { request, waiters, outcome }
        }
        other => other,
    }
}

fn page_range(at: Iova) -> ByteRange<Iova> {
    ByteRange::new(at, PAGE_SIZE).expect("The first address of a page")
}

/// The memory table has one region.
fn host_of(target: ByteRange<FrontendVa>) -> Option<HostRange> {
    static MEMORY: OnceLock<Frames> = OnceLock::new();
    let memory = MEMORY.get_or_init(|| Frames::leaked(FRAMES));
    let region = ByteRange::new(FrontendVa::new(REGION), FRAMES * PAGE_SIZE).expect("A region");
    let len = usize::try_from(target.len()).ok()?;
    region.covers(target).then(|| memory.host(target.first().raw() - REGION, len))
}
