//! The events of the flight recorder: one table, from which the events, their packed form and their names are
//! generated. Knows nothing of when they are recorded.

use job_stream::{Choice, Mode};
use serde::{Serialize, Serializer};

use super::pack::{Bits, Nanoseconds, Packed, WORDS, packed_enums};
use crate::addr::{Access, Asid, ByteRange, Gva, Iova};
use crate::jobs::address_space::FaultKind;
use crate::jobs::job::JobId;
use crate::jobs::verdict::Verdict;

/// Bits for the kind of an event; no kind is 0.
const KIND_BITS: u32 = 8;

/// The result of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepEnd {
    /// The job has ended.
    Done,
    /// There is more to do.
    More,
    /// It spins.
    Spins,
    /// It waits for a value in memory.
    Waits,
    /// A translation is missing.
    Misses,
    /// The job failed.
    Fails,
    /// The driver has to answer a fault.
    Faults,
}

/// Why a job left its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeftFor {
    /// It succeeded.
    Done,
    /// It failed.
    Failed,
    /// The engine had to stop.
    Stop,
    /// Another job wanted the engine.
    Others,
    /// It waits for a value in memory.
    Wait,
    /// A drain has waited too long for its pin, or its mode yields at once.
    Eviction,
    /// Translations are missing.
    Miss,
    /// What it has to pin is being invalidated.
    Invalidation,
    /// The driver has to answer a fault.
    Fault,
}

/// How a miss ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MissEnd {
    /// The page is mapped.
    Mapped,
    /// The front-end refused it.
    Refused,
    /// No answer came in time.
    TimedOut,
    /// There was no channel to send it on.
    NoChannel,
}

/// How an UPDATE was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateUse {
    /// It is held until its MISS is granted.
    Staged,
    /// It belongs to a miss from before a stop.
    Stale,
    /// It answered no MISS.
    Unsolicited,
}

packed_enums! {
    StepEnd: Done, More, Spins, Waits, Misses, Fails, Faults;
    LeftFor: Done, Failed, Stop, Others, Wait, Eviction, Miss, Invalidation, Fault;
    MissEnd: Mapped, Refused, TimedOut, NoChannel;
    UpdateUse: Staged, Stale, Unsolicited;
}

macro_rules! events {
    ($(
        $(#[doc = $doc:literal])+
        $number:literal $Event:ident {$(
            $(#[$meta:meta])+
            $field:ident: $Type:ty,
        )*}
    )*) => {
        /// Something that the device did. Ranges are of whole pages.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
        #[serde(tag = "event", rename_all = "kebab-case")]
        pub enum Event {$(
            $(#[doc = $doc])+
            $Event {$(
                $(#[$meta])+
                $field: $Type,
            )*},
        )*}

        impl Event {
            /// The event as words; never all of them 0.
            #[inline]
            pub(super) fn pack(self) -> [u64; WORDS] {
                let mut bits = Bits::default();
                match self {$(
                    Self::$Event { $($field),* } => {
                        bits.push(KIND_BITS, $number);
                        $($field.pack(&mut bits);)*
                    }
                )*}
                bits.words
            }

            /// The packed event; `None`: these words are no event.
            pub(super) fn unpack(words: [u64; WORDS]) -> Option<Self> {
                let mut bits = Bits::of(words);
                Some(match bits.take(KIND_BITS)? {
                    $($number => Self::$Event { $($field: Packed::unpack(&mut bits)?),* },)*
                    _ => return None,
                })
            }

            /// The bits of each kind of event.
            #[cfg(test)]
            fn sizes() -> Vec<(&'static str, u32)> {
                vec![$({
                    let mut bits = Bits::of([u64::MAX; WORDS]);
                    let _ = bits.take(KIND_BITS);
                    $(let _: Option<$Type> = Packed::unpack(&mut bits);)*
                    (stringify!($Event), bits.used())
                },)*]
            }
        }
    };
}

events! {
    /// The device runs.
    1 Start {}
    /// The device stops: jobs stay, and go on after the next start.
    2 Stop {}
    /// The device is reset: all earlier state is discarded.
    3 Reset {}
    /// The guest submitted a job.
    4 Submitted {
        /// The job.
        job: JobId,
        /// Its context; a 2D transfer has none.
        context: Option<u32>,
        /// How invalidations treat it.
        #[serde(serialize_with = "name_of")]
        mode: Mode,
    }
    /// The device processed the end of a job.
    5 Ended {
        /// The job.
        job: JobId,
        /// Whether it failed.
        failed: bool,
    }
    /// A command is answered: the response goes to the guest, and signals its fence if there is one.
    6 Answered {
        /// The fence that signals.
        fence: Option<u64>,
        /// Whether the answer reports an error.
        error: bool,
    }
    /// A ring misses a translation and waits.
    7 RingMiss {
        /// The first missing pages.
        range: ByteRange<Iova>,
        /// The access.
        access: Access,
    }
    /// An engine starts or resumes a job.
    8 Taken {
        /// The job.
        job: JobId,
        /// The packet that it had reached.
        packet: Option<usize>,
        /// Whether it holds a pin; otherwise it opens a section for each step.
        pinned: bool,
    }
    /// A step of a job; the record's time is its start.
    9 Step {
        /// The job.
        job: JobId,
        /// The packet that it had reached.
        packet: Option<usize>,
        /// Bytes that it moved.
        bytes: u32,
        /// Its duration.
        took: Nanoseconds,
        /// Its result.
        end: StepEnd,
    }
    /// A job leaves its engine: no section and no pin is held for it any more.
    10 Left {
        /// The job.
        job: JobId,
        /// The reason.
        why: LeftFor,
    }
    /// A MISS is sent to the front-end.
    11 Miss {
        /// The page.
        range: ByteRange<Iova>,
        /// The access.
        access: Access,
    }
    /// A miss is settled.
    12 MissSettled {
        /// The page.
        range: ByteRange<Iova>,
        /// The access.
        access: Access,
        /// The outcome.
        end: MissEnd,
    }
    /// An UPDATE came.
    13 Update {
        /// What it maps.
        range: ByteRange<Iova>,
        /// How it was used.
        used: UpdateUse,
    }
    /// An INVALIDATE, or a message that takes memory away (number 0), begins.
    14 Invalidation {
        /// Its number.
        number: u64,
        /// The range that it invalidates.
        range: ByteRange<Iova>,
    }
    /// Its drain takes time: the ack is parked.
    15 Parked {
        /// The number of the invalidation.
        number: u64,
        /// Open sections.
        sections: u32,
        /// Overlapping pins.
        pins: u32,
        /// A job that uses the range.
        job: Option<JobId>,
    }
    /// The drain took too long: jobs are told to leave.
    16 Ladder {
        /// The number of the invalidation.
        number: u64,
    }
    /// The drain is over, and the ack goes out; the record's time is the end of the span.
    17 Acked {
        /// The number of the invalidation.
        number: u64,
        /// The time since the message.
        took: Nanoseconds,
    }
    /// An engine does not leave: guest memory is replaced by zero pages.
    18 Revoked {
        /// The number of the invalidation.
        number: u64,
    }
    /// The verdict on an INVALIDATE under a job.
    19 Judged {
        /// The job.
        job: JobId,
        /// The verdict.
        verdict: Verdict,
        /// The page.
        range: ByteRange<Iova>,
        /// The number of the violation's record.
        violation: u32,
    }
    /// A job needs a page that the front-end refused.
    20 Fault {
        /// The job.
        job: JobId,
        /// The page.
        range: ByteRange<Iova>,
        /// The access.
        access: Access,
    }
    /// The page tables of an address space do not permit what a job does.
    21 TranslationFault {
        /// The job.
        job: JobId,
        /// The address space.
        asid: Asid,
        /// The address.
        gva: Gva,
        /// What is wrong.
        kind: FaultKind,
        /// The level of the table that ended the walk.
        level: u32,
    }
}

fn name_of<S: Serializer>(mode: &Mode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(mode.name())
}

impl Default for JobId {
    fn default() -> Self {
        Self::new(0)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn pages(first: u64, last: u64) -> ByteRange<Iova> {
        ByteRange::inclusive(Iova::new(first), Iova::new(last)).unwrap()
    }

    #[test]
    fn what_is_packed_comes_back() {
        let took = Nanoseconds::from(Duration::from_micros(8));
        let job = JobId::new(1 << 40);
        let events = [
            Event::Start {},
            Event::Submitted { job, context: Some(u32::MAX), mode: Mode::Preempt },
            Event::Submitted { job, context: None, mode: Mode::RegistrationCache },
            Event::Answered { fence: Some(u64::MAX), error: true },
            Event::Answered { fence: None, error: false },
            Event::Step { job, packet: Some(77), bytes: u32::MAX, took, end: StepEnd::Misses },
            Event::Left { job, why: LeftFor::Invalidation },
            Event::Miss { range: pages(u64::MAX - 4095, u64::MAX), access: Access::Write },
            Event::MissSettled { range: pages(0, 4095), access: Access::Read, end: MissEnd::TimedOut },
            Event::Invalidation { number: u64::MAX, range: ByteRange::everything() },
            Event::Parked { number: 3, sections: 1, pins: 64, job: Some(job) },
            Event::Judged { job, verdict: Verdict::Gone, range: pages(0x1000, 0x2fff), violation: 9 },
        ];
        for event in events {
            assert_eq!(Event::unpack(event.pack()), Some(event));
        }
    }

    #[test]
    fn every_event_fits_its_words_and_an_empty_slot_is_none() {
        for (name, bits) in Event::sizes() {
            assert!(bits <= WORDS as u32 * u64::BITS, "{name} has {bits} bits");
        }
        assert_eq!(Event::unpack([0; WORDS]), None);
        assert_eq!(Event::unpack([0xff; WORDS]), None);
    }

    #[test]
    fn what_does_not_fit_its_bits_is_as_large_as_they_hold() {
        let took = Nanoseconds::from(Duration::from_secs(1 << 30));
        let event =
            Event::Step { job: JobId::new(1), packet: Some(1 << 30), bytes: 0, took, end: StepEnd::More };
        let Some(Event::Step { packet, took, .. }) = Event::unpack(event.pack()) else { panic!() };
        assert_eq!(packet, Some((1 << 24) - 1));
        assert_eq!(Duration::from(took).as_nanos(), (1 << 40) - 1);
    }
}
