//! Parsers of the values on the command line. Each error says what is accepted.

use std::num::ParseIntError;
use std::time::Duration;

use device_model::jobs::address_space::TlbPolicy;
use job_stream::{Choice, Mode};

use crate::units::duration;

/// Longest timeout that is accepted: a VM may stand still for as long.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(600);
/// Fewest bytes of page tables with which the device can work.
const LEAST_IOTLB: u64 = 64 << 10;

/// A drain timeout; 0 evicts pins at once.
pub(super) fn drain_timeout(text: &str) -> Result<Duration, String> {
    timeout(text, Duration::ZERO)
}

/// A miss timeout.
pub(super) fn miss_timeout(text: &str) -> Result<Duration, String> {
    timeout(text, Duration::from_millis(1))
}

fn timeout(text: &str, least: Duration) -> Result<Duration, String> {
    let duration = duration(text)?;
    if duration < least || duration > LONGEST_TIMEOUT {
        let [least, longest] = [least, LONGEST_TIMEOUT].map(humantime::format_duration);
        return Err(format!("must be from {least} to {longest}"));
    }
    Ok(duration)
}

/// A policy of the TLB.
pub(super) fn tlb_policy(text: &str) -> Result<TlbPolicy, String> {
    let number = |text: &str, error: ParseIntError| {
        format!("'{text}': {error}; write random:SEED (a number of 64 bits) or prefetch:PAGES (0 to 255)")
    };
    match text.split_once(':').map_or((text, None), |(name, number)| (name, Some(number))) {
        ("sticky", None) => Ok(TlbPolicy::Sticky),
        ("thrash", None) => Ok(TlbPolicy::Thrash),
        ("random", Some(seed)) => {
            Ok(TlbPolicy::Random { seed: seed.parse().map_err(|error| number(seed, error))? })
        }
        ("prefetch", Some(pages)) => {
            Ok(TlbPolicy::Prefetch { pages: pages.parse().map_err(|error| number(pages, error))? })
        }
        _ => Err("the policies are sticky, thrash, random:SEED and prefetch:PAGES".to_owned()),
    }
}

/// A coherence mode.
pub(super) fn mode(text: &str) -> Result<Mode, String> {
    Mode::from_name(text).ok_or_else(|| {
        let known: Vec<_> = Mode::ALL.iter().map(|mode| mode.name()).collect();
        format!("the modes are {}", known.join(", "))
    })
}

/// A number of bytes that is not 0.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let size = parse_size::parse_size(text)
        .map_err(|error| format!("{error}; write a number with a unit, such as 64MiB"))?;
    if size == 0 { Err("must not be 0".to_owned()) } else { Ok(size) }
}

/// The memory of the mirror's page tables.
pub(super) fn iotlb_limit(text: &str) -> Result<usize, String> {
    let bytes = size(text)?;
    if bytes < LEAST_IOTLB {
        return Err(format!("must be at least {}KiB", LEAST_IOTLB >> 10));
    }
    usize::try_from(bytes).map_err(|_| format!("{bytes} bytes are more than this machine can address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_of_the_tlb_has_the_number_that_it_needs_and_no_other() {
        assert_eq!(tlb_policy("sticky"), Ok(TlbPolicy::Sticky));
        assert_eq!(tlb_policy("thrash"), Ok(TlbPolicy::Thrash));
        assert_eq!(tlb_policy("random:7"), Ok(TlbPolicy::Random { seed: 7 }));
        assert_eq!(tlb_policy("prefetch:255"), Ok(TlbPolicy::Prefetch { pages: 255 }));
        for (bad, explanation) in [
            ("random", "the policies are"),
            ("sticky:1", "the policies are"),
            ("lazy", "the policies are"),
            ("random:x", "'x': invalid digit found in string; write random:SEED"),
            ("prefetch:256", "prefetch:PAGES (0 to 255)"),
        ] {
            let text = tlb_policy(bad).unwrap_err();
            assert!(text.contains(explanation), "{bad}: {text}");
        }
    }
}
