//! Resource limits of the process.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Sets the limit of open file descriptors to `most`, or to the hard limit if that is lower.
pub fn limit_descriptors(most: u32) -> io::Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let most = u64::from(most);
    let current = Some(maximum.map_or(most, |maximum| maximum.min(most)));
    Ok(setrlimit(Resource::Nofile, Rlimit { current, maximum })?)
}

/// Has the process, and what it might execute, gain no privileges from now on (PR_SET_NO_NEW_PRIVS, prctl(2)).
pub fn gain_no_privileges() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// Has the process start no further process or thread, unless it may exceed limits as root may.
pub fn start_no_processes() -> io::Result<()> {
    Ok(setrlimit(Resource::Nproc, Rlimit { current: Some(0), maximum: Some(0) })?)
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
