//! Numbers with units, as a user writes them.

use std::time::Duration;

/// A duration such as `100ms`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|error| format!("{error}; write a number with a unit, such as 100ms or 1s"))
}
