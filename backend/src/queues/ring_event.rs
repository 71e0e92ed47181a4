//! The eventfds of a ring, which are the front-end's. It may send any other file instead, fill the counter, or make the
//! open file description blocking at any time, which it shares with us: nothing here waits for it.

use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use device_model::locking::lock;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::io::ReadWriteFlags;

/// One eventfd that the front-end may replace or take away.
#[derive(Debug, Default)]
pub struct RingEvent(Mutex<Option<Arc<File>>>);

impl RingEvent {
    /// Uses this file from now on; returns the one before it, which another thread may be about to use.
    pub fn set(&self, file: Option<File>) -> io::Result<Option<Arc<File>>> {
        file.as_ref().map_or(Ok(()), set_nonblocking)?;
        Ok(std::mem::replace(&mut *lock(&self.0), file.map(Arc::new)))
    }

    /// Its descriptor, which stays open until it is replaced.
    pub fn descriptor(&self) -> Option<RawFd> {
        lock(&self.0).as_ref().map(|file| file.as_raw_fd())
    }

    /// Signals it.
    ///
    /// LOCKING: nothing is locked during the write. If the front-end fills a blocking eventfd between the check and the
    /// write, the write lasts until [`crate::threads::DeviceThread`] interrupts it.
    pub fn signal(&self) {
        let file = lock(&self.0).clone();
        if let Some(mut file) = file.as_deref()
            && is_writable(file)
        {
            // A full counter is already a signal, and a closed one has no reader.
            let _ = file.write(&1u64.to_ne_bytes());
        }
    }

    /// Clears the signals that were made so far, if the file can be read without waiting. It is watched edge-triggered,
    /// so a counter that stays set wakes no thread again.
    pub fn clear(&self) {
        let file = lock(&self.0).clone();
        if let Some(file) = file {
            let mut count = [0; 8];
            // An offset of -1 stands for the current position (preadv2(2)): an eventfd has no other.
            let _ = rustix::io::preadv2(
                &file,
                &mut [IoSliceMut::new(&mut count)],
                u64::MAX,
                ReadWriteFlags::NOWAIT,
            );
        }
    }
}

fn is_writable(file: &File) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut files = [PollFd::new(file, PollFlags::OUT)];
    rustix::event::poll(&mut files, Some(&now)).is_ok() && files[0].revents().contains(PollFlags::OUT)
}

fn set_nonblocking(file: &File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags | OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{FromRawFd, IntoRawFd};

    use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

    use super::*;

    /// An event, and the front-end's handle of its eventfd, which it has made blocking.
    fn blocking() -> (RingEvent, EventFd) {
        let theirs = EventFd::new(EFD_CLOEXEC).unwrap();
        // SAFETY: the descriptor is open, and nothing else owns it.
        let ours = unsafe { File::from_raw_fd(theirs.try_clone().unwrap().into_raw_fd()) };
        let event = RingEvent::default();
        assert!(event.set(Some(ours)).unwrap().is_none());
        let flags = rustix::fs::fcntl_getfl(borrow(&theirs)).unwrap();
        assert!(flags.contains(OFlags::NONBLOCK));
        rustix::fs::fcntl_setfl(borrow(&theirs), flags - OFlags::NONBLOCK).unwrap();
        (event, theirs)
    }

    fn borrow(event: &EventFd) -> std::os::fd::BorrowedFd<'_> {
        // SAFETY: the eventfd is open as long as it is borrowed.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) }
    }

    #[test]
    fn a_full_eventfd_that_blocks_is_not_written_and_an_empty_one_is_not_read() {
        let (event, theirs) = blocking();
        event.clear();
        theirs.write(u64::MAX - 1).unwrap();
        event.signal();
        event.clear();
        event.signal();
        assert_eq!(theirs.read().unwrap(), 1);
    }

    #[test]
    fn an_event_without_a_file_is_signalled_in_vain() {
        let event = RingEvent::default();
        event.signal();
        event.clear();
        let file = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).unwrap();
        // SAFETY: the descriptor is open, and nothing else owns it.
        let file = unsafe { File::from_raw_fd(file.into_raw_fd()) };
        assert!(event.set(Some(file)).unwrap().is_none());
        assert!(event.descriptor().is_some());
        assert!(event.set(None).unwrap().is_some() && event.descriptor().is_none());
    }
}
