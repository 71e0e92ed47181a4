//! Limits that the kernel keeps for the process.

use std::io;

/// Allows at most `most` open file descriptors, or as many as the process is allowed at all if that is less.
pub fn limit_descriptors(most: u32) -> io::Result<()> {
    let mut limit = descriptor_limit()?;
    limit.rlim_cur = limit.rlim_max.min(most.into());
    // SAFETY: `limit` is an initialised rlimit that outlives the call.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn descriptor_limit() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a place of the right type that we own.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_what_was_asked_for_and_no_more_than_allowed() {
        for most in [1000, u32::MAX] {
            limit_descriptors(most).unwrap();
            let limit = descriptor_limit().unwrap();
            assert_eq!(limit.rlim_cur, limit.rlim_max.min(most.into()));
        }
    }
}
