//! Jobs for tests of the schedule and the engines: streams over one resource of one page.

use std::sync::Arc;
use std::time::Duration;

use job_stream::{At, Limits, Mode, Priority, Space, Stream, verify};

use crate::addr::{Asid, Iova};
use crate::jobs::address_space::tlb::TlbConfig;
use crate::jobs::address_space::{AddressSpace, TlbPolicy};
use crate::jobs::backing::Backing;
use crate::jobs::backing::RawEntry;
use crate::jobs::error::InvalidMemory;
use crate::jobs::job::{Job, JobId, Treatment};
use crate::jobs::operands::{self, Operands};
use crate::jobs::program::Execution;

/// The page of the resource.
pub(crate) const AT: u64 = 0x1000;

/// The first bytes of the resource.
pub(crate) fn place() -> At {
    At::new(Space::resource(1), 0)
}

/// The execution of a stream over the resource.
pub(crate) fn execution(stream: Stream) -> Execution {
    execution_over(1, stream)
}

/// The same, over a resource of so many pages.
pub(crate) fn execution_over(pages: u32, stream: Stream) -> Execution {
    let program = verify(&stream.finish(), &Limits::default()).unwrap();
    let len = pages * 0x1000;
    let entry = RawEntry { at: Iova::new(AT), len };
    let space = |_| {
        Ok(operands::ResourceMemory { bytes: len.into(), backing: Backing::new(std::iter::once(entry))? })
    };
    Execution::new(Operands::new(program, space).unwrap(), Duration::from_secs(1))
}

/// The root table of address space 1.
pub(crate) const ROOT: u64 = 0x7000;

/// The settings of a TLB that keeps what it has.
pub(crate) fn tlb() -> TlbConfig {
    TlbConfig::new(TlbPolicy::Sticky, 1024)
}

/// The execution of a stream over address space 1.
pub(crate) fn translated(stream: Stream) -> Execution {
    let program = verify(&stream.finish(), &Limits::default()).unwrap();
    let space = |asid| Ok(Arc::new(AddressSpace::new(Asid::new(asid), Iova::new(ROOT), tlb())));
    let none = |id| -> Result<_, InvalidMemory> { panic!("Operand in resource {id}") };
    Execution::new(Operands::resolve(program, none, space).unwrap(), Duration::from_secs(1))
}

/// A job that executes that, for context 1.
pub(crate) fn job(id: u64, mode: Mode, execution: Execution) -> Job {
    let treatment = Treatment { context: Some(1), mode, priority: Priority::Normal };
    Job::program(JobId(id), treatment, execution)
}
