//! The index against a naive twin, and its cost: counted in look-ups, not in time.

use std::time::Duration;

use job_stream::{At, Compare, Limits, Priority, Space as StreamSpace, Stream, verify};
use proptest::prelude::*;

use super::*;
use crate::jobs::backing::Backing;
use crate::jobs::backing::RawEntry;
use crate::jobs::job::Treatment;
use crate::jobs::operands::{Operands, ResourceMemory};
use crate::jobs::program::Execution;
use crate::jobs::schedule::suspects::Found;
use crate::mmu::Permissions;

/// Pages of the resource that many jobs share: as many entries as the quota allows.
const PAGES: u64 = 16_383;
const HOST: u64 = 0x7000_0000_0000;

/// A backing of single pages, with a foreign page between any two.
fn scattered(pages: u64) -> Backing {
    let entry = |page| RawEntry { at: Iova::new((2 * page + 1) * PAGE_SIZE), len: PAGE_SIZE as u32 };
    Backing::new((0..pages).map(entry)).unwrap()
}

fn job_on(id: u64, mode: Mode, stream: Stream, backings: &[Backing]) -> Job {
    let limits = Limits { modes: Limits::default().modes.with(Mode::RegistrationCache), ..Limits::default() };
    let program = verify(&stream.finish(), &limits).unwrap();
    let space = |id: u32| {
        let backing = backings[id as usize - 1].clone();
        Ok(ResourceMemory { bytes: backing.bytes(), backing })
    };
    let treatment = Treatment { context: Some(1), mode, priority: Priority::Normal };
    let execution = Execution::new(Operands::new(program, space).unwrap(), Duration::from_secs(1));
    Job::program(JobId(id), treatment, execution)
}

fn place(id: u32, at: u64) -> At {
    At::new(StreamSpace::resource(id), at)
}

/// A job that waits for a word, and then reads everything.
fn waits(id: u64, backing: &Backing) -> Job {
    let all = place(1, 0).range(backing.bytes() - 8);
    let stream = Stream::new().wait(place(1, 0), Compare::Equal, 1, 0);
    let stream = stream.checksum(all, place(1, backing.bytes() - 8));
    job_on(id, Mode::Fence, stream, std::slice::from_ref(backing))
}

fn by(number: u64) -> InvalidationInfo {
    let range = ByteRange::everything();
    InvalidationInfo { number, range, begun: Duration::ZERO, acked: None }
}

fn page(number: u64) -> ByteRange<Iova> {
    ByteRange::new(Iova::new(number * PAGE_SIZE), PAGE_SIZE).unwrap()
}

fn mapped(range: ByteRange<Iova>, host: u64) -> MappedRange {
    let permissions = Permissions { read: true, write: true };
    MappedRange { space: DomainId::DEVICE, range, host, permissions }
}

/// What an INVALIDATE costs if all that jobs use is mapped.
fn lookups_of(footprints: &mut Footprints, range: ByteRange<Iova>) -> u64 {
    let before = footprints.looked;
    let judged = footprints.judged(DomainId::DEVICE, range);
    let single = judged.iter().flat_map(|range| range.pages());
    let taken: Vec<_> = single.map(|at| mapped(page(at.raw() / PAGE_SIZE), HOST + 3 * at.raw())).collect();
    footprints.suspect(by(1), &taken);
    footprints.touches(DomainId::DEVICE, range);
    footprints.first_in(DomainId::DEVICE, range);
    footprints.looked - before
}

fn with_waits(backing: &Backing, jobs: u64) -> Footprints {
    let mut footprints = Footprints::default();
    (0..jobs).for_each(|id| footprints.begin(&waits(id, backing)));
    footprints
}

#[test]
fn an_invalidate_of_a_page_that_no_job_has_costs_no_lookup() {
    let backing = scattered(PAGES);
    for jobs in [0, 1, 256, 1024] {
        let mut footprints = with_waits(&backing, jobs);
        assert_eq!(lookups_of(&mut footprints, page(10)), 0, "{jobs} jobs");
        assert_eq!(lookups_of(&mut footprints, page(1 << 40)), 0, "{jobs} jobs");
    }
}

#[test]
fn an_invalidate_of_everything_looks_up_each_page_once_and_not_for_each_job() {
    let backing = scattered(PAGES);
    for jobs in [1, 256, 1024] {
        let mut footprints = with_waits(&backing, jobs);
        let lookups = lookups_of(&mut footprints, ByteRange::everything());
        // To find the pages, to note each, and to know that there is work and whose it is.
        assert_eq!(lookups, 2 * PAGES + 2, "{jobs} jobs");
        assert_eq!(footprints.take_unjudged(), 0);
    }
}

#[test]
fn jobs_share_the_pages_of_their_backing_and_add_what_their_packets_name() {
    let backing = scattered(PAGES);
    let footprints = with_waits(&backing, 256);
    assert_eq!(footprints.backings.len(), 1);
    // All but the last word is read, and the last is written.
    assert_eq!(footprints.pieces, 256 * 2);
    let parts = footprints.jobs.values().map(|footprint| footprint.memory.parts());
    let mut entries = parts.flatten().map(|part| Arc::as_ptr(&part.entries));
    let shared = entries.next();
    assert!(entries.all(|entries| Some(entries) == shared));
}

#[test]
fn an_answer_looks_up_only_the_jobs_that_use_the_page() {
    let backing = scattered(PAGES);
    let mut footprints = with_waits(&backing, 256);
    lookups_of(&mut footprints, ByteRange::everything());
    let before = footprints.looked;
    let found = Found::Nothing;
    let gone = Revealed { space: DomainId::DEVICE, pages: page(7), access: Access::Read, found };
    let job_verdicts = footprints.judge(&gone, |_| (Stands::Apart, None));
    assert_eq!(job_verdicts.len(), 256);
    assert_eq!(
        job_verdicts.iter().map(|job_verdict| job_verdict.job.raw()).collect::<Vec<_>>(),
        (0..256).collect::<Vec<_>>()
    );
    assert!(footprints.looked - before <= 2 * 256 + 1, "{}", footprints.looked - before);
    assert!(footprints.judge(&gone, |_| (Stands::Apart, None)).is_empty());
}

/// A guest may list one page as often as it has entries, and use any of that.
#[test]
fn a_page_that_is_listed_ten_thousand_times_costs_a_bounded_number_of_looks() {
    let entry = |number: u64| {
        let at = if number.is_multiple_of(2) { 1 } else { 3 + number };
        RawEntry { at: Iova::new(at * PAGE_SIZE), len: PAGE_SIZE as u32 }
    };
    let backing = Backing::new((0..PAGES).map(entry)).unwrap();
    let mut footprints = Footprints::default();
    // The first one uses everything; the others use one other page.
    footprints.begin(&waits(0, &backing));
    for id in 1..256 {
        let stream = Stream::new().fill(place(1, PAGE_SIZE).range(64), 0);
        footprints.begin(&job_on(id, Mode::Fence, stream, std::slice::from_ref(&backing)));
    }
    lookups_of(&mut footprints, ByteRange::everything());
    let before = footprints.looked;
    let found = Found::Nothing;
    let gone = Revealed { space: DomainId::DEVICE, pages: page(1), access: Access::Read, found };
    let job_verdicts = footprints.judge(&gone, |_| (Stands::Apart, None));
    assert_eq!(job_verdicts.iter().map(|job_verdict| job_verdict.job.raw()).collect::<Vec<_>>(), [0]);
    assert!(footprints.looked - before <= LOOKUPS as u64);
    assert!(footprints.take_unjudged() > 200, "the jobs that were not looked at are counted");
}

#[test]
fn jobs_that_name_more_pieces_than_are_kept_are_counted_and_never_judged() {
    let backing = scattered(64);
    let mut footprints = Footprints::default();
    // Each names 8,000 words that do not touch.
    let words = |stream: Stream, word: u64| stream.signal(place(1, word * 8), 1);
    for id in 0..10 {
        let stream = (0..8_000).fold(Stream::new(), words);
        footprints.begin(&job_on(id, Mode::Strict, stream, std::slice::from_ref(&backing)));
    }
    assert_eq!((footprints.pieces, footprints.take_unjudged(), footprints.take_unjudged()), (64_000, 2, 0));
    lookups_of(&mut footprints, ByteRange::everything());
    let found = Found::Nothing;
    let gone = Revealed { space: DomainId::DEVICE, pages: page(1), access: Access::Write, found };
    assert_eq!(footprints.judge(&gone, |_| (Stands::Needs, None)).len(), 8);
    (0..10).for_each(|id| footprints.end(JobId(id)));
    assert_eq!((footprints.pieces, footprints.backings.len()), (0, 0));
}

#[test]
fn what_there_is_no_room_to_note_is_counted() {
    let backing = Backing::new(std::iter::once(RawEntry { at: Iova::new(0), len: 1 << 30 })).unwrap();
    let mut footprints = with_waits(&backing, 1);
    assert_eq!(footprints.judged(DomainId::DEVICE, ByteRange::everything()).len(), 1);
    // Scattered in memory; 20,000 pages for reading and for writing make 40,000 ranges.
    let pages: Vec<_> =
        (0..20_000).map(|number| mapped(page(number), HOST + 2 * number * PAGE_SIZE)).collect();
    footprints.suspect(by(1), &pages);
    assert_eq!((footprints.suspects.len(), footprints.take_unjudged()), (1 << 15, 40_000 - (1 << 15)));
    // Notes about jobs that have ended make room.
    footprints.begin(&waits(1, &backing));
    footprints.end(JobId(0));
    footprints.suspect(by(2), &pages[..10]);
    assert_eq!((footprints.suspects.len(), footprints.take_unjudged()), (20, 0));
}

/// The naive twin: each job records, page by page, what was taken from it.
#[derive(Default)]
struct Twin(BTreeMap<u64, TwinJob>);

struct TwinJob {
    uses: BTreeSet<(Access, u64)>,
    is_judged: bool,
    taken: BTreeMap<(Access, u64), (u64, u64)>,
}

/// Job, access, page, verdict, INVALIDATE.
type Told = (u64, Access, u64, Verdict, u64);

impl Twin {
    fn begin(&mut self, job: &Job) {
        let uses = job.working_set().into_iter();
        let uses = uses.flat_map(|used| {
            used.range.pages().map(move |at| (used.access, at.raw() / PAGE_SIZE)).collect::<Vec<_>>()
        });
        let is_judged = job.mode() != Mode::RegistrationCache;
        let twin = TwinJob { uses: uses.collect(), is_judged, taken: BTreeMap::new() };
        self.0.insert(job.id().raw(), twin);
    }

    fn pages_used(&self, judged_only: bool) -> BTreeSet<u64> {
        let jobs = self.0.values().filter(|job| job.is_judged || !judged_only);
        jobs.flat_map(|job| job.uses.iter().map(|(_, page)| *page)).collect()
    }

    fn suspect(&mut self, number: u64, page: u64, (host, permissions): (u64, Permissions)) {
        for job in self.0.values_mut().filter(|job| job.is_judged) {
            for access in [Access::Read, Access::Write] {
                if permissions.allow(access) && job.uses.contains(&(access, page)) {
                    job.taken.entry((access, page)).or_insert((number, host));
                }
            }
        }
    }

    fn reveal(&mut self, page: u64, access: Access, host: Option<u64>) -> Vec<Told> {
        let mut told = Vec::new();
        for (id, job) in &mut self.0 {
            for of in [Access::Read, Access::Write] {
                let Some((number, before)) = job.taken.get(&(of, page)).copied() else { continue };
                let verdict = match host {
                    Some(now) if now == before && of != access => continue,
                    Some(now) if now == before => Verdict::Benign,
                    Some(_) => Verdict::Moved,
                    None if of == access => Verdict::Gone,
                    None => continue,
                };
                job.taken.remove(&(of, page));
                told.push((*id, of, page, verdict, number));
            }
        }
        told
    }
}

#[derive(Clone, Debug)]
enum Op {
    Begin { mode: usize, reads: (u32, u64, u64), writes: (u32, u64) },
    End(usize),
    Map { page: u64, access: bool, frame: u64 },
    Refuse { page: u64, access: bool },
    Invalidate { first: u64, pages: u64 },
    Check(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0_usize..5, (1_u32..4, 0_u64..40_000, 1_u64..30_000), (1_u32..4, 0_u64..9_000))
            .prop_map(|(mode, reads, writes)| Op::Begin { mode, reads, writes }),
        any::<usize>().prop_map(Op::End),
        (0_u64..24, any::<bool>(), 0_u64..3).prop_map(|(page, access, frame)| Op::Map {
            page,
            access,
            frame
        }),
        (0_u64..24, any::<bool>(), 0_u64..3).prop_map(|(page, access, frame)| Op::Map {
            page,
            access,
            frame
        }),
        (0_u64..24, any::<bool>()).prop_map(|(page, access)| Op::Refuse { page, access }),
        (0_u64..24, 1_u64..24).prop_map(|(first, pages)| Op::Invalidate { first, pages }),
        any::<usize>().prop_map(Op::Check),
    ]
}

/// Backings that overlap, list pages twice, and split pages.
fn backings() -> Vec<Backing> {
    let lists: [&[(u64, u32)]; 3] = [
        &[(0x1000, 0x3000), (0x8000, 0x1000), (0x2000, 0x2000), (0xa000, 0x4000)],
        &[
            (0x5800, 0x800),
            (0x1ff8, 0x10),
            (0x9010, 0x17f8),
            (0x5000, 0x1000),
            (0x5000, 0x1000),
            (0x6000, 0x6000),
        ],
        &[(0x10000, 0x1000), (0x12000, 0x1000), (0x11000, 0x1000), (0x0, 0x18000)],
    ];
    let backing = |list: &[(u64, u32)]| {
        Backing::new(list.iter().map(|&(at, len)| RawEntry { at: Iova::new(at), len })).unwrap()
    };
    lists.map(backing).into()
}

fn access_of(write: bool) -> Access {
    if write { Access::Write } else { Access::Read }
}

/// The index, its twin, and the mirror's contents. As in the device, pages are invalidated only while they are mapped,
/// and only an answer maps them.
struct Both {
    backings: Vec<Backing>,
    real: Footprints,
    twin: Twin,
    mirror: BTreeMap<u64, (u64, Permissions)>,
    next: u64,
    invalidations: u64,
}

impl Both {
    fn new() -> Self {
        let (real, twin, mirror) = (Footprints::default(), Twin::default(), BTreeMap::new());
        Self { backings: backings(), real, twin, mirror, next: 0, invalidations: 0 }
    }

    fn play(&mut self, op: Op) {
        match op {
            Op::Begin { mode, reads, writes } => self.begin(Mode::ALL[mode], reads, writes),
            Op::End(which) => {
                if let Some(id) = self.job(which) {
                    self.real.end(JobId(id));
                    self.twin.0.remove(&id);
                }
            }
            Op::Map { page, access, frame } => {
                let host = HOST + (frame * 64 + page) * PAGE_SIZE;
                self.answer(page, access_of(access), Some(host));
                self.map(page, access_of(access), host);
            }
            Op::Refuse { page, access } => self.answer(page, access_of(access), None),
            Op::Invalidate { first, pages } => self.invalidate(first..first + pages),
            Op::Check(which) => self.check(which),
        }
    }

    fn job(&self, which: usize) -> Option<u64> {
        self.twin.0.keys().nth(which % self.twin.0.len().max(1)).copied()
    }

    fn begin(&mut self, mode: Mode, (id, at, len): (u32, u64, u64), (to, word): (u32, u64)) {
        let bytes = |id: u32| self.backings[id as usize - 1].bytes();
        let at = at % bytes(id);
        let range = place(id, at).range(len.min(bytes(id) - at));
        let stream = Stream::new().checksum(range, place(to, word % (bytes(to) / 8) * 8));
        let space = |id: u32| {
            Ok(ResourceMemory { bytes: bytes(id), backing: self.backings[id as usize - 1].clone() })
        };
        // A word that spans two entries is refused at submission, and so is a checksum inside its own input.
        let program = verify(&stream.clone().finish(), &Limits::default());
        if program.is_ok_and(|program| Operands::new(program, space).is_ok()) {
            let job = job_on(self.next, mode, stream, &self.backings);
            self.real.begin(&job);
            self.twin.begin(&job);
            self.next += 1;
        }
    }

    fn answer(&mut self, number: u64, access: Access, host: Option<u64>) {
        let found = host.map_or(Found::Nothing, Found::Memory);
        let revealed = Revealed { space: DomainId::DEVICE, pages: page(number), access, found };
        let job_verdicts = self.real.judge(&revealed, |_| (Stands::Apart, None));
        assert_eq!(told(job_verdicts), self.twin.reveal(number, access, host));
    }

    /// The same frame gains a permission, or another one takes its place.
    fn map(&mut self, number: u64, access: Access, host: u64) {
        let none = Permissions { read: false, write: false };
        let known = self.mirror.get(&number).filter(|(before, _)| *before == host);
        let Permissions { read, write } = known.map_or(none, |(_, permissions)| *permissions);
        let (read, write) = (read || access == Access::Read, write || access == Access::Write);
        self.mirror.insert(number, (host, Permissions { read, write }));
    }

    fn invalidate(&mut self, numbers: std::ops::Range<u64>) {
        self.invalidations += 1;
        let bytes = (numbers.end - numbers.start) * PAGE_SIZE;
        let range = ByteRange::new(Iova::new(numbers.start * PAGE_SIZE), bytes).unwrap();
        let judged = self.real.judged(DomainId::DEVICE, range);
        let judged = judged.iter().flat_map(|part| part.pages()).map(|at| at.raw() / PAGE_SIZE);
        let within = |number: &u64| numbers.contains(number);
        let wanted: Vec<u64> = self.twin.pages_used(true).into_iter().filter(within).collect();
        assert_eq!(judged.collect::<Vec<_>>(), wanted);
        let touches = self.twin.pages_used(false).iter().any(within);
        assert_eq!(self.real.touches(DomainId::DEVICE, range), touches);
        let taken = wanted.iter().filter_map(|number| Some((*number, *self.mirror.get(number)?)));
        let taken: Vec<_> = taken.collect();
        let had = |(number, (host, permissions)): &(u64, (u64, Permissions))| MappedRange {
            permissions: *permissions,
            ..mapped(page(*number), *host)
        };
        self.real.suspect(by(self.invalidations), &taken.iter().map(had).collect::<Vec<_>>());
        for (number, what) in taken {
            self.twin.suspect(self.invalidations, number, what);
        }
        self.mirror.retain(|number, _| !within(number));
    }

    fn check(&self, which: usize) {
        let Some(id) = self.job(which) else { return };
        let missing = self.real.to_check(JobId(id)).into_iter();
        let pages = missing.flat_map(|missing| {
            missing.pages().map(|at| (missing.access, at.raw() / PAGE_SIZE)).collect::<Vec<_>>()
        });
        let is_fence = self.real.jobs[&JobId(id)].mode == Mode::Fence;
        let taken = self.twin.0[&id].taken.keys().filter(|_| is_fence).copied();
        assert_eq!(pages.collect::<BTreeSet<_>>(), taken.collect::<BTreeSet<_>>());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn the_index_tells_what_a_list_of_pages_for_each_job_tells(ops in prop::collection::vec(op(), 1..60)) {
        let mut both = Both::new();
        ops.into_iter().for_each(|op| both.play(op));
    }
}

fn told(job_verdicts: Vec<JobVerdict>) -> Vec<Told> {
    let pages = |job_verdict: JobVerdict| {
        let JobVerdict { job, access, verdict, by, .. } = job_verdict;
        let pages = job_verdict.range.pages().map(move |at| at.raw() / PAGE_SIZE);
        pages.map(move |page| (job.raw(), access, page, verdict, by.number)).collect::<Vec<_>>()
    };
    job_verdicts.into_iter().flat_map(pages).collect()
}
