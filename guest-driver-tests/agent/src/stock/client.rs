//! A context with jobs that are steered: each fills a page of its own, at once, after a time, or when it is told to;
//! its user fence says how it ended. Knows what a page must hold; knows nothing of why.

use crate::error::{AgentError, Doing};
use crate::mapping::Mapping;
use crate::virtgpu::{Buffer, RenderNode, Submission, SyncFile, SyncPoint};
use drm::control::{self, Device as _};
use guest_agent::stock_words::{Standing, Until};
use job_stream::{At, Compare, Context, Space, SpinBehaviour, Stream};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

pub(super) const PAGE: usize = 4096;
/// Pages of the buffer that jobs fill; the first is nobody's.
pub(super) const PAGES: usize = 16;
/// Jobs of one client, at the most.
pub(super) const JOBS: u32 = PAGES as u32 - 1;
/// For whatever has to come.
pub(super) const LIMIT: Duration = Duration::from_secs(30);
/// How often memory is looked at: a device does not wake who waits for a value.
const LOOK: Duration = Duration::from_micros(200);

/// Places in the buffer by which jobs are steered: up to which number they may go on, which has begun, which has come to
/// its last packet, one that nobody writes, a counter, and the user fences.
const TOLD: u64 = 0x00;
const BEGUN: u64 = 0x08;
const PAST: u64 = 0x10;
const NEVER: u64 = 0x18;
const COUNTER: u64 = 0x20;
const FENCES: u64 = 0x100;
const FAILED: u64 = u64::MAX;
const POISON: u8 = 0xa5;

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageState {
    Poison,
    Filled,
    Torn,
}

/// The context.
pub(super) struct Client {
    pub(super) node: RenderNode,
    pub(super) ring: Option<u32>,
    /// What jobs fill.
    pub(super) data: Buffer,
    /// What steers them.
    gate: Buffer,
    fences: Vec<SyncFile>,
}

/// A submission in a thread of its own.
pub(super) type Aside = JoinHandle<Result<SyncFile, AgentError>>;

/// What goes with a job beside its packets.
#[derive(Clone, Copy, Default)]
pub(super) struct With<'a> {
    pub(super) after: Option<BorrowedFd<'a>>,
    pub(super) waits_for: &'a [SyncPoint],
    pub(super) signals: &'a [SyncPoint],
}

impl Client {
    /// A context, with timelines of its own if the driver has such.
    pub(super) fn open() -> Result<Self, AgentError> {
        let (node, ring) = RenderNode::open_best(2)?;
        let (data, gate) = (node.create_buffer(PAGES * PAGE)?, node.create_buffer(PAGE)?);
        data.write(&[POISON; PAGES * PAGE]);
        gate.write(&[0; PAGE]);
        // Making them has fences too, which nobody is to count among those of jobs.
        data.wait()?;
        gate.wait()?;
        Ok(Self { node, ring, data, gate, fences: Vec::new() })
    }

    /// Submits the next job. Its fence is kept.
    pub(super) fn submit(&mut self, until: Until) -> Result<u32, AgentError> {
        self.submit_with(until, &With::default())
    }

    /// The same, with fences.
    pub(super) fn submit_with(&mut self, until: Until, with: &With<'_>) -> Result<u32, AgentError> {
        let number = self.next_number();
        let words = self.words(number, until);
        self.submit_words(&words, with)?;
        Ok(number)
    }

    /// Submits the job with this number behind a fence of somebody else's, in a thread of its own: the driver waits in
    /// the call. [`Self::join`] takes its fence.
    pub(super) fn submit_aside(&self, number: u32, after: SyncFile) -> Aside {
        let (node, ring, words) = (self.node.clone(), self.ring, self.words(number, Until::AtOnce));
        let handles = [self.gate.handle(), self.data.handle()];
        thread::spawn(move || {
            let after = Some(after.as_fd());
            node.submit_job(&Submission {
                words: &words,
                handles: &handles,
                ring,
                after,
                ..Submission::default()
            })
        })
    }

    /// Waits until a job that was submitted aside has been.
    pub(super) fn join(&mut self, aside: Aside) -> Result<(), AgentError> {
        let end = Instant::now() + LIMIT;
        while !aside.is_finished() {
            if Instant::now() > end {
                return Err(AgentError::Late {
                    what: "a submission behind a fence".into(),
                    seconds: LIMIT.as_secs(),
                });
            }
            thread::sleep(LOOK);
        }
        self.fences.push(aside.join().map_err(|_| AgentError::Thread)??);
        Ok(())
    }

    /// The number of the next job, and of its page.
    pub(super) fn next_number(&self) -> u32 {
        self.fences.len() as u32 + 1
    }

    /// Submits a stream as the next job.
    pub(super) fn submit_words(&mut self, words: &[u32], with: &With<'_>) -> Result<(), AgentError> {
        let handles = [self.gate.handle(), self.data.handle()];
        let handles = handles.iter().copied().filter(|handle| *handle != 0).collect::<Vec<_>>();
        let With { after, waits_for, signals } = *with;
        let job = Submission { words, handles: &handles, ring: self.ring, after, waits_for, signals };
        self.fences.push(self.node.submit_job(&job)?);
        Ok(())
    }

    /// The words of the job with this number.
    pub(super) fn words(&self, number: u32, until: Until) -> Vec<u32> {
        let stream = self.begin(number);
        let told = self.at(TOLD);
        let stream = match until {
            Until::AtOnce => stream,
            Until::Told => stream.wait(told, Compare::GreaterOrEqual, number, 0),
            Until::Spun(ms) => stream.spin(SpinBehaviour::Preemptible, u64::from(ms) * 1_000_000),
        };
        self.end(number, stream)
    }

    /// The first packets of the job with this number.
    pub(super) fn begin(&self, number: u32) -> Stream {
        let fence = Some(self.at(FENCES + 8 * u64::from(number)));
        let context = Context { mode: None, priority: None, fence, done: number.into(), failed: FAILED };
        Stream::new().push(context).signal(self.at(BEGUN), number)
    }

    /// The last packets: the page.
    pub(super) fn end(&self, number: u32, stream: Stream) -> Vec<u32> {
        let page = At::new(Space::resource(self.data.resource()), u64::from(number) * PAGE as u64);
        stream.fill(page.range(PAGE as u64), pattern(number)).signal(self.at(PAST), number).finish()
    }

    /// A place in the buffer by which jobs are steered.
    fn at(&self, offset: u64) -> At {
        At::new(Space::resource(self.gate.resource()), offset)
    }

    /// A place that nothing ever writes.
    pub(super) fn never(&self) -> At {
        self.at(NEVER)
    }

    /// Where jobs are told to go on.
    pub(super) fn told(&self) -> At {
        self.at(TOLD)
    }

    /// Where jobs can count.
    pub(super) fn counter(&self) -> At {
        self.at(COUNTER)
    }

    /// What they have counted.
    pub(super) fn count(&self) -> u32 {
        self.gate.word(COUNTER)
    }

    /// Lets jobs up to this number go on.
    pub(super) fn tell(&self, number: u32) {
        self.gate.write(&number.to_le_bytes());
    }

    /// The number of the last job that has begun.
    pub(super) fn begun(&self) -> u32 {
        self.gate.word(BEGUN)
    }

    /// The number of the last job that has filled its page.
    pub(super) fn past(&self) -> u32 {
        self.gate.word(PAST)
    }

    /// Waits until the job with this number has begun.
    pub(super) fn wait_begun(&self, number: u32) -> Result<(), AgentError> {
        self.wait_value("a job's begin", || self.begun() >= number)
    }

    /// Waits until the job with this number has filled its page.
    pub(super) fn wait_past(&self, number: u32) -> Result<(), AgentError> {
        self.wait_value("a job's last packet", || self.past() >= number)
    }

    fn wait_value(&self, what: &str, is_there: impl Fn() -> bool) -> Result<(), AgentError> {
        wait_for(what, is_there)
    }

    /// What the job's user fence says: its number when it is done, all ones if it failed.
    pub(super) fn user_fence(&self, number: u32) -> u64 {
        let mut bytes = [0; 8];
        self.gate.read((FENCES + 8 * u64::from(number)) as usize, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn says_failed(&self, number: u32) -> bool {
        self.user_fence(number) == FAILED
    }

    pub(super) fn is_done(&self, number: u32) -> bool {
        self.user_fence(number) == u64::from(number)
    }

    /// The fences of all jobs, the first one first.
    pub(super) fn fences(&self) -> &[SyncFile] {
        &self.fences
    }

    /// Waits for the end of all jobs up to the number, for so long at the most.
    pub(super) fn wait(&self, limit: Duration) -> Result<bool, AgentError> {
        wait_for_all(&self.fences, limit)
    }

    /// Waits for the end of all jobs, which has to come.
    pub(super) fn wait_end(&self) -> Result<(), AgentError> {
        if self.wait(LIMIT)? {
            Ok(())
        } else {
            Err(AgentError::Late { what: "the end of all jobs".into(), seconds: LIMIT.as_secs() })
        }
    }

    /// What the page of the job with this number holds.
    pub(super) fn page(&self, number: u32) -> PageState {
        let mut bytes = [0; PAGE];
        self.data.read(number as usize * PAGE, &mut bytes);
        page_state(&bytes, number)
    }

    /// How the jobs stand now.
    pub(super) fn standing(&self) -> Result<Standing, AgentError> {
        let submitted = self.fences.len() as u32;
        let mut standing = Standing { submitted, ..Standing::default() };
        for fence in &self.fences {
            standing.signalled += u32::from(fence.is_signalled(Duration::ZERO)?);
        }
        for number in 1..=submitted {
            standing.done += u32::from(self.is_done(number));
            standing.failed += u32::from(self.says_failed(number));
        }
        count_pages(&mut standing, &self.data.bytes());
        Ok(standing)
    }

    /// What jobs fill as a dma-buf: it stays when the context ends.
    pub(super) fn export(&self) -> Result<OwnedFd, AgentError> {
        export(&self.node, self.data.handle())
    }

    /// Takes the fences out of it, and ends the context.
    pub(super) fn close(self) -> Vec<SyncFile> {
        self.fences
    }
}

/// A buffer of a node as a dma-buf.
pub(super) fn export(node: &RenderNode, handle: u32) -> Result<OwnedFd, AgentError> {
    let handle = control::from_u32(handle).ok_or(AgentError::NoRenderNode)?;
    node.buffer_to_prime_fd(handle, (libc::O_CLOEXEC | libc::O_RDWR) as u32).doing("export a buffer")
}

/// The memory of a dma-buf of a client's size.
pub(super) fn map_export(file: OwnedFd) -> Result<Mapping, AgentError> {
    Mapping::of_file(&File::from(file), 0, PAGES * PAGE)
}

/// Waits until memory says so.
pub(super) fn wait_for(what: &str, is_there: impl Fn() -> bool) -> Result<(), AgentError> {
    let end = Instant::now() + LIMIT;
    while !is_there() {
        if Instant::now() > end {
            return Err(AgentError::Late { what: what.to_owned(), seconds: LIMIT.as_secs() });
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

/// Whether all are signalled within so long.
pub(super) fn wait_for_all(fences: &[SyncFile], limit: Duration) -> Result<bool, AgentError> {
    let end = Instant::now() + limit;
    for fence in fences {
        if !fence.is_signalled(end.saturating_duration_since(Instant::now()))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What the page with this number holds, by way of another mapping.
pub(super) fn state_of(memory: &Mapping, number: u32) -> PageState {
    let mut bytes = [0; PAGE];
    memory.read(number as usize * PAGE, &mut bytes);
    page_state(&bytes, number)
}

/// Counts what the pages of a client's buffer hold.
pub(super) fn count_pages(standing: &mut Standing, bytes: &[u8]) {
    for (number, page) in (0..).zip(bytes.chunks(PAGE)) {
        match page_state(page, number) {
            PageState::Filled => standing.filled += 1,
            PageState::Poison => standing.poison += 1,
            PageState::Torn => {}
        }
    }
}

fn page_state(page: &[u8], number: u32) -> PageState {
    let pattern = pattern(number).to_le_bytes();
    if page.iter().all(|byte| *byte == POISON) {
        PageState::Poison
    } else if page.chunks(4).all(|word| word == pattern) {
        PageState::Filled
    } else {
        PageState::Torn
    }
}

/// What the job with this number fills its page with.
fn pattern(number: u32) -> u32 {
    0x5eed_0000 | number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_poison_or_filled_or_neither() {
        let filled: Vec<u8> = (0..PAGE / 4).flat_map(|_| pattern(3).to_le_bytes()).collect();
        let (poison, mut torn) = (vec![POISON; PAGE], filled.clone());
        torn[PAGE - 1] = POISON;
        assert_eq!(page_state(&filled, 3), PageState::Filled);
        assert_eq!(page_state(&filled, 4), PageState::Torn);
        assert_eq!(page_state(&poison, 3), PageState::Poison);
        assert_eq!(page_state(&torn, 3), PageState::Torn);
    }
}
