//! Processors for which there is no table of system calls: the process goes without filters, and says so.

use std::io;

use super::{Failure, Needs};
use crate::thread_kind::ThreadKind;

/// There are none.
pub(super) struct Filters;

impl Filters {
    /// Fails.
    pub(super) fn new(_: &Needs<'_>) -> Result<Self, Failure> {
        Err("its lists of system calls are those of x86-64".into())
    }

    pub(super) fn apply(&self, _: ThreadKind) -> Result<(), Failure> {
        Ok(())
    }

    pub(super) fn summary(&self) -> String {
        String::new()
    }
}

pub(super) fn name_violations() -> io::Result<()> {
    Ok(())
}

pub(super) fn print_panics_without_files() {}
