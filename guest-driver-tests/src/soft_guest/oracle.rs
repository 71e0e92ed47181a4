//! The late-touch oracle. Once an invalidation has been acknowledged, it punches holes through the frames of its
//! range. Any later read or write of the back-end brings a page back, which the file shows. Knows frames, not why
//! they were unmapped.

use std::sync::{Arc, Mutex};

use super::addr::{Gpa, PAGE};
use super::error::{Error, Result};
use super::frames::Frames;
use super::turn::held;

/// A byte that no picture and no command of the soft guest consists of.
pub const POISON: u8 = 0xa5;

/// Frames in quarantine: they must not be touched any more.
#[derive(Debug)]
pub struct LateTouch {
    frames: Arc<Frames>,
    quarantine: Mutex<Vec<Gpa>>,
}

impl LateTouch {
    /// An oracle over this memory, with an empty quarantine.
    pub fn new(frames: Arc<Frames>) -> Self {
        Self { frames, quarantine: Mutex::default() }
    }

    /// Punches the frames, whose invalidation must have been acknowledged, and watches them from now on.
    pub fn retire(&self, frames: &[Gpa]) -> Result<()> {
        for &frame in frames {
            self.frames.ram().punch(frame)?;
        }
        held(&self.quarantine).extend_from_slice(frames);
        Ok(())
    }

    /// How many frames are being watched.
    pub fn watched(&self) -> usize {
        held(&self.quarantine).len()
    }

    /// The frames that were touched so far. All stay in quarantine.
    pub fn touched(&self) -> Result<Vec<Gpa>> {
        let mut touched = Vec::new();
        for &frame in held(&self.quarantine).iter() {
            if self.frames.ram().is_populated(frame)? {
                touched.push(frame);
            }
        }
        Ok(touched)
    }

    /// Asserts that no frame was touched: an error names those that were.
    pub fn check(&self) -> Result<usize> {
        let touched = self.touched()?;
        if touched.is_empty() { Ok(self.watched()) } else { Err(Error::LateTouch(touched)) }
    }

    /// Checks, and frees the frames for reuse. Call it when everything that could touch them has ended.
    pub fn release(&self) -> Result<usize> {
        let clean = self.check();
        self.frames.give_back(held(&self.quarantine).drain(..));
        clean
    }

    /// Stops watching, without freeing the frames: they are still in use.
    pub fn forget(&self) {
        held(&self.quarantine).clear();
    }

    /// Fills a frame with poison, to see later whether it was written.
    pub fn poison(&self, frame: Gpa) -> Result<()> {
        self.frames.ram().write(frame, &[POISON; PAGE as usize])
    }

    /// Whether every byte of the frame is still poison.
    pub fn is_poisoned(&self, frame: Gpa) -> Result<bool> {
        let mut bytes = [0; PAGE as usize];
        self.frames.ram().read(frame, &mut bytes)?;
        Ok(bytes.iter().all(|&byte| byte == POISON))
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::{GuestRam, RamConfig};
    use super::*;

    #[test]
    fn a_late_touch_is_named_and_a_clean_quarantine_is_released() {
        let frames = Arc::new(Frames::new(Arc::new(GuestRam::new(RamConfig::default()).unwrap()), 7));
        let oracle = LateTouch::new(frames.clone());
        let taken = frames.take(100).unwrap();
        for &frame in &taken {
            oracle.poison(frame).unwrap();
        }
        let before = frames.free();
        oracle.retire(&taken).unwrap();
        assert_eq!(oracle.check().unwrap(), 100);
        frames.ram().read(taken[40], &mut [0]).unwrap();
        frames.ram().write(taken[60].plus(5), &[0]).unwrap();
        assert!(matches!(oracle.check(), Err(Error::LateTouch(late)) if late == [taken[40], taken[60]]));
        assert!(oracle.release().is_err());
        assert_eq!((oracle.watched(), frames.free()), (0, before + 100));
    }
}
