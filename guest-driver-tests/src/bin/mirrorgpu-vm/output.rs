//! The files that results can be written to.

use guest_driver_tests::rig::error::RigError;
use guest_driver_tests::suite::report::{html, junit, ktap};
use guest_driver_tests::suite::results::Results;
use std::path::{Path, PathBuf};

/// Heading of `--help`.
pub(crate) const RESULTS: &str = "Results";

/// Which are wanted.
#[derive(clap::Args)]
pub(crate) struct Output {
    /// Write the results to this file, as JUnit XML.
    #[arg(long, help_heading = RESULTS, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Write the results to this file, as KTAP.
    #[arg(long, help_heading = RESULTS, value_name = "FILE")]
    ktap: Option<PathBuf>,
    /// Write the results to this file, as one HTML page with timelines and screenshots.
    #[arg(long, help_heading = RESULTS, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl Output {
    /// Writes them.
    pub(crate) fn write(&self, results: &Results) -> Result<(), RigError> {
        if let Some(path) = &self.junit {
            let text = junit::render(results)
                .map_err(|error| RigError::Check(format!("The results are no XML: {error}")))?;
            write(path, &text)?;
        }
        if let Some(path) = &self.ktap {
            write(path, &ktap::render(results))?;
        }
        if let Some(path) = &self.html {
            write(path, &html::render(results))?;
        }
        Ok(())
    }
}

/// Writes a file.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), RigError> {
    std::fs::write(path, text)
        .map_err(|source| RigError::Io { what: format!("write {}", path.display()), source })
}
