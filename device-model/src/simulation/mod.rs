//! The deterministic simulation: the whole model on one thread, driven by a list of operations that a seed generates. A
//! model guest with an IOMMU over scattered frames sends commands and job streams, maps, unmaps and remaps; a model
//! front-end answers misses, or refuses, loses or mangles the answers; engines make steps, with everything else
//! happening in the middle of them; time is a number. An oracle checks every access, ack, answer and verdict, and naive
//! twins compute what a job does, what it leaves, and what an INVALIDATE under it meant.
//!
//! The code that runs here is that of the back-end: [`crate::jobs::schedule`], [`crate::jobs::engine`],
//! [`crate::session::drain`], [`crate::mmu`], [`crate::gpu::device`]. `session`, `engines` (with `checked`) and `queue`
//! stand for the threads. Interleavings within one call of the mirror are not covered here: loom checks those.
//!
//! A seed always generates the same events. [`Bug`] seeds known bugs, to prove that each would be found.

mod bug;
mod checked;
mod contexts;
mod driver;
mod engines;
mod follower;
mod front_end;
mod guest;
mod job_oracle;
mod memory;
mod ops;
mod oracle;
mod queue;
mod random;
mod regressions;
mod session;
mod shrink;
mod sim_jobs;
mod streams;
mod submitted;
mod suspicions;
mod trace;
mod verdicts;
mod world;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use job_stream::Mode;

pub use bug::Bug;
pub use oracle::{Invariant, Violation};
pub use regressions::regressions;
pub use trace::Counts;

use ops::Op;
use oracle::violation;
use random::Random;
use world::{Flavor, World};

/// Approximate bytes of a table: limits are given in tables.
const TABLE: usize = 4224;

/// With this many tables no page evicts another. With fewer there are only transfers, which take one page at a time:
/// the two pages of a COPY, or those of several jobs, might evict each other for ever.
const FEWEST_TABLES: usize = 24;

/// A schedule: operations, and the kind of world in which they are played.
#[derive(Clone, Debug)]
pub struct Schedule {
    seed: u64,
    flavor: Flavor,
    ops: Vec<Op>,
}

/// The result of a schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// A hash of all events, in order.
    pub hash: u64,
    /// What it exercised.
    pub counts: Counts,
    /// The invariant that was broken, if any.
    pub violation: Option<Violation>,
}

impl Schedule {
    /// Generates the schedule of a seed.
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let tables = random.weighted(&[(6, 256), (3, FEWEST_TABLES), (2, 10), (1, 5)]);
        let faulty = random.one_in(4);
        let flavor = Flavor {
            table_limit: tables * TABLE,
            pipelined: random.one_in(3),
            overclaims: !faulty && random.one_in(2),
            faulty,
            careful: random.one_in(4),
            default_mode: *random.one_of(Mode::ALL),
        };
        let len = 60 + random.index(140);
        Self { seed, flavor, ops: ops::generate(&mut random, len, tables >= FEWEST_TABLES) }
    }

    /// Plays it, optionally with a seeded bug.
    pub fn play(&self, bug: Option<Bug>) -> Report {
        self.run(&self.ops, bug, false)
    }

    /// Plays it, and prints all events.
    pub fn watch(&self, bug: Option<Bug>) -> Report {
        self.run(&self.ops, bug, true)
    }

    /// A schedule with fewer operations that breaks the same invariant.
    pub fn shrunk(&self, bug: Option<Bug>) -> Self {
        let broken = |ops: &[Op]| self.run(ops, bug, false).violation.map(|violation| violation.invariant);
        let Some(wanted) = broken(&self.ops) else { return self.clone() };
        let ops = shrink::shrink(&self.ops, |ops| broken(ops) == Some(wanted));
        Self { ops, ..self.clone() }
    }

    /// The number of operations.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether it has no operations.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    fn run(&self, ops: &[Op], bug: Option<Bug>, watched: bool) -> Report {
        let (mut world, readers) = World::new(self.flavor, bug, watched);
        let played = catch_unwind(AssertUnwindSafe(|| world.play(&readers, ops)));
        if let Err(panic) = played {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?");
            world.fail(violation(Invariant::I6, format!("Panic: {text}")));
        }
        Report { hash: world.trace.hash(), counts: world.counts.clone(), violation: world.violation.take() }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Schedule of seed {:#x}, {} operations, {:?}", self.seed, self.ops.len(), self.flavor)?;
        self.ops.iter().enumerate().try_for_each(|(number, op)| writeln!(f, "{number:>5}  {op:?}"))
    }
}
