//! The findings of the device: accesses to memory that the guest had unmapped. A [`Violation`] is a job that needed a
//! page that an INVALIDATE had taken from it; a [`Fault`] is an access that the front-end refused. Values and their
//! texts; knows nothing of how a verdict is reached, nor of where a record is kept.

use std::fmt;
use std::time::Duration;

use job_stream::Mode;

use crate::addr::{Access, ByteRange, Iova};
use crate::jobs::address_space::TranslationFault;
use crate::jobs::job::{Job, JobError, JobId};
use crate::jobs::verdict::{Confidence, InvalidationInfo, Verdict};
use crate::mmu::Missing;

/// A job whose memory the guest unmapped before the job's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The number of the record, assigned by its keeper.
    pub id: u64,
    /// When it was found, on the device's clock.
    pub at: Duration,
    /// What the guest did.
    pub verdict: Verdict,
    /// How sure that is.
    pub confidence: Confidence,
    /// How invalidations treat the job.
    pub mode: Mode,
    /// The job that used the memory.
    pub job: JobId,
    /// The context of the job; a 2D transfer has none.
    pub context: Option<u32>,
    /// The packet that the job had reached, counted from 0; a transfer has none.
    pub packet: Option<usize>,
    /// The range that the job needed.
    pub range: ByteRange<Iova>,
    /// The access.
    pub access: Access,
    /// The INVALIDATE.
    pub invalidation: InvalidationInfo,
}

/// An access that failed: the guest has not mapped the page for it, in its IOMMU or in an address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// When it was found, on the device's clock.
    pub at: Duration,
    /// The job.
    pub job: JobId,
    /// The context of the job; a 2D transfer has none.
    pub context: Option<u32>,
    /// The packet that the job had reached, counted from 0; a transfer has none.
    pub packet: Option<usize>,
    /// How invalidations treat the job.
    pub mode: Mode,
    /// What was refused, by whom.
    pub cause: FaultCause,
}

/// The cause of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultCause {
    /// The front-end refused a page of a resource, or of a 2D transfer.
    Refused {
        /// The page.
        range: ByteRange<Iova>,
        /// The access.
        access: Access,
    },
    /// The page tables of an address space do not permit it, or name a page that the front-end refused.
    Translation(TranslationFault),
}

impl Verdict {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Benign => "BENIGN",
            Self::Moved => "MOVED",
            Self::Gone => "GONE",
        }
    }

    /// What the guest did, in words.
    fn sentence(self) -> &'static str {
        match self {
            Self::Benign => "The guest flushed memory of a job in flight and left it mapped.",
            Self::Moved => {
                "The guest remapped an address that a job in flight still uses to other memory: depending on timing, the \
                 job uses the old page or the new one."
            }
            Self::Gone => "The guest unmapped memory that a job in flight still uses.",
        }
    }
}

impl Confidence {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Certain => "certain",
            Self::Likely => "likely",
            Self::CannotTell => "cannot tell",
        }
    }

    fn meaning(self) -> &'static str {
        match self {
            Self::Certain => "certain: no correct driver does this",
            Self::Likely => "likely: in rare cases a correct driver causes the same events; check the trace",
            Self::CannotTell => "cannot tell: the events fit a correct driver too",
        }
    }
}

/// The most likely mistake of the driver, and how to fix it.
fn likely_cause(mode: Mode, verdict: Verdict) -> &'static str {
    match (mode, verdict) {
        (_, Verdict::Benign) => "none: a driver may flush more than it unmapped",
        (Mode::Strict | Mode::Fence, Verdict::Gone) => {
            "the driver unmapped or freed a buffer (dma_unmap, unpin, munmap) before the fence of a job that uses it \
             had signalled. Wait for the fence of this job, and for the response to UNREF or DETACH_BACKING, first. If \
             the driver does wait, compare the two ranges: an unmap may be larger than its buffer, or a second unmap of \
             one buffer may hit an address that now belongs to another. A DMA device without page faults would have \
             accessed memory that belongs to someone else"
        }
        (Mode::Strict | Mode::Fence, Verdict::Moved) => {
            "the driver mapped other memory at the address of a buffer before the fence of a job that uses the buffer \
             had signalled: it reused the buffer, or its address, too early. Wait for the fence of this job first. A DMA \
             device without page faults would have kept using the old page"
        }
        (Mode::Preempt, _) => {
            "the driver released a buffer that a job still references. Preemption only pauses a job: cancel the job, or \
             wait for its fence, before unmapping its memory"
        }
        (Mode::Fault, _) => {
            "the program freed memory that its job still uses. With page faults this harms no other memory, but the job \
             cannot continue"
        }
        (Mode::RegistrationCache, _) => {
            "memory was unmapped while it was registered. In this mode the device keeps using the old page: unregister \
             the memory and wait for the jobs that use it before unmapping"
        }
    }
}

impl Fault {
    /// The fault that has ended `job`, if it was one of an address space.
    pub fn of_job(at: Duration, job: &Job, error: JobError) -> Option<Self> {
        let cause = match error {
            JobError::Translation(fault) => FaultCause::Translation(fault),
            // Of a job without address spaces, the session has recorded it when the answer came.
            JobError::Refused(Missing { range, access, .. }) if job.is_translated() => {
                FaultCause::Refused { range, access }
            }
            _ => return None,
        };
        Some(Self::at(at, job, cause))
    }

    /// A TLB entry that `job` has used, and that the driver most likely forgot to flush.
    pub fn overdue_flush(at: Duration, job: &Job) -> Option<Self> {
        job.take_overdue().map(|fault| Self::at(at, job, FaultCause::Translation(fault)))
    }

    fn at(at: Duration, job: &Job, cause: FaultCause) -> Self {
        let (context, packet, mode) = (job.context(), job.packet(), job.mode());
        Self { at, job: job.id(), context, packet, mode, cause }
    }

    /// What the author of the driver should check.
    pub fn advice(&self) -> &'static str {
        let access = match self.cause {
            FaultCause::Refused { access, .. } => access,
            FaultCause::Translation(fault) => return fault.advice(),
        };
        match access {
            Access::Write => {
                "the device may not write there: check that the whole buffer is mapped for writes (DMA_BIDIRECTIONAL or \
                 DMA_FROM_DEVICE) from before the job is submitted until its fence has signalled"
            }
            Access::Read => {
                "the device may not read there: check that the whole buffer is mapped from before the job is submitted \
                 until its fence has signalled"
            }
        }
    }
}

/// A violation as a text for the driver's author.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    /// The violation.
    pub violation: &'a Violation,
    /// The names of the address: resource, job, packet. Lines of text, possibly none.
    pub names: &'a [String],
    /// Where its trace is, or how to get one.
    pub trace: &'a str,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation { id, verdict, confidence, mode, job, access, range, .. } = self.violation;
        writeln!(f, "Violation {id}: {} ({}). {}", verdict.name(), confidence.name(), verdict.sentence())?;
        write!(f, "  job           {}", job.raw())?;
        if let Some(context) = self.violation.context {
            write!(f, " of context {context}")?;
        }
        write!(f, ", mode {mode}")?;
        if let Some(packet) = self.violation.packet {
            write!(f, ", at packet {packet}")?;
        }
        writeln!(f, "\n  needed        {range} for {access}")?;
        for name in self.names {
            writeln!(f, "                which is {name}")?;
        }
        self.invalidation(f)?;
        writeln!(f, "  how sure      {}", confidence.meaning())?;
        writeln!(f, "  likely cause  {}", wrapped(likely_cause(*mode, *verdict)))?;
        let repeat = format!(
            "run the same jobs on a device with --default-mode {mode}; --inject step-delay=1ms makes jobs take longer, \
             which makes the race more likely"
        );
        writeln!(f, "  to repeat     {}", wrapped(&repeat))?;
        write!(f, "  trace         {}", self.trace)
    }
}

impl Report<'_> {
    fn invalidation(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let InvalidationInfo { number, range, begun, acked } = self.violation.invalidation;
        writeln!(f, "  taken away    by INVALIDATE {number} of {range}")?;
        let at = self.violation.at;
        let since = Since(at, begun);
        match acked {
            Some(acked) => {
                let took = acked.saturating_sub(begun);
                writeln!(f, "  when          the need was found {since} it came; its ack took {took:?}")
            }
            None => writeln!(f, "  when          the need was found {since} it came; it was not yet acked"),
        }
    }
}

/// Columns of text to the right of the label.
const COLUMNS: usize = 88;

/// Wraps a long text to the right of its label: for reports in this form.
pub fn wrapped(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        if let Some(line) = lines.last_mut().filter(|line| line.len().saturating_add(word.len()) < COLUMNS) {
            line.push_str(if line.is_empty() { "" } else { " " });
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines.join("\n                ")
}

/// The position of one time relative to another.
struct Since(Duration, Duration);

impl fmt::Display for Since {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(at, reference) = *self;
        match at.checked_sub(reference) {
            Some(after) => write!(f, "{after:?} after"),
            None => write!(f, "{:?} before", reference.saturating_sub(at)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violation() -> Violation {
        let page = |start, len| ByteRange::new(Iova::new(start), len).unwrap();
        Violation {
            id: 3,
            at: Duration::from_millis(1250),
            verdict: Verdict::Gone,
            confidence: Confidence::Certain,
            mode: Mode::Fence,
            job: JobId::new(12),
            context: Some(4),
            packet: Some(2),
            range: page(0x1_0000, 0x1000),
            access: Access::Read,
            invalidation: InvalidationInfo {
                number: 41,
                range: page(0, 0x100_0000),
                begun: Duration::from_millis(1000),
                acked: Some(Duration::from_millis(1100)),
            },
        }
    }

    #[test]
    fn a_report_says_who_needed_what_and_who_took_it_when() {
        let violation = violation();
        let names = ["resource 7 (backing entry 0, offset 0x2000)".to_owned()];
        let report = Report { violation: &violation, names: &names, trace: "t.json" }.to_string();
        let lines: Vec<&str> = report.lines().collect();
        assert_eq!(
            lines[0],
            "Violation 3: GONE (certain). The guest unmapped memory that a job in flight still uses."
        );
        let expected = [
            "  job           12 of context 4, mode fence, at packet 2",
            "  needed        0x10000+0x1000 for read",
            "                which is resource 7 (backing entry 0, offset 0x2000)",
            "  taken away    by INVALIDATE 41 of 0x0+0x1000000",
            "  when          the need was found 250ms after it came; its ack took 100ms",
        ];
        assert_eq!(lines[1..6], expected);
        let cause = "  likely cause  the driver unmapped or freed a buffer (dma_unmap, unpin, munmap) before the fence of a";
        assert_eq!(lines[7], cause);
        assert!(lines.iter().all(|line| line.len() <= COLUMNS + 16), "{report}");
        assert_eq!(lines.last(), Some(&"  trace         t.json"));
    }

    #[test]
    fn the_likely_cause_of_moved_memory_is_not_an_unmap() {
        let cause = |verdict| likely_cause(Mode::Fence, verdict);
        assert!(cause(Verdict::Moved).contains("too early") && !cause(Verdict::Gone).contains("too early"));
        assert!(cause(Verdict::Gone).contains("larger than its buffer"));
    }

    #[test]
    fn what_is_not_known_is_not_said() {
        let mut violation = violation();
        (violation.context, violation.packet, violation.invalidation.acked) = (None, None, None);
        violation.at = Duration::from_millis(999);
        let report = Report { violation: &violation, names: &[], trace: "none" }.to_string();
        assert!(report.contains("  job           12, mode fence\n  needed"), "{report}");
        assert!(report.contains("the need was found 1ms before it came; it was not yet acked"), "{report}");
    }

    #[test]
    fn verdicts_and_confidences_have_the_names_that_tools_read() {
        let verdicts = serde_json::json!([Verdict::Benign, Verdict::Moved, Verdict::Gone]);
        assert_eq!(verdicts, serde_json::json!(["benign", "moved", "gone"]));
        let sure = serde_json::json!([Confidence::Certain, Confidence::Likely, Confidence::CannotTell]);
        assert_eq!(sure, serde_json::json!(["certain", "likely", "cannot-tell"]));
    }
}
