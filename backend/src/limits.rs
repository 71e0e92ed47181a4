//! Limits that the kernel keeps for the process.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Allows at most `most` open file descriptors, or as many as the process is allowed at all if that is less.
pub fn limit_descriptors(most: u32) -> io::Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let most = u64::from(most);
    let current = Some(maximum.map_or(most, |maximum| maximum.min(most)));
    Ok(setrlimit(Resource::Nofile, Rlimit { current, maximum })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_what_was_asked_for_and_no_more_than_allowed() {
        for most in [1000, u32::MAX] {
            limit_descriptors(most).unwrap();
            let limit = getrlimit(Resource::Nofile);
            let allowed = limit.maximum.unwrap_or(u64::MAX).min(most.into());
            assert_eq!(limit.current, Some(allowed));
        }
    }
}
