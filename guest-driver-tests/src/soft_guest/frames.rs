//! Which frames of guest memory are free. Hands them out scattered, so that code that only works for contiguous
//! frames does not pass by luck. Knows nothing of their contents.

use std::sync::{Arc, Mutex};

use super::addr::{Gpa, PAGE};
use super::error::{Error, Result};
use super::memory::GuestRam;
use super::turn::held;

/// The free frames of a guest.
#[derive(Debug)]
pub struct Frames {
    ram: Arc<GuestRam>,
    free: Mutex<Free>,
}

#[derive(Debug)]
struct Free {
    // Shuffled; taken from the end. What is freed goes to a random place.
    scattered: Vec<Gpa>,
    // Runs of contiguous frames are cut off the second half of the memory above 4 GiB, and never come back.
    next_run: Gpa,
    end_of_runs: Gpa,
    dice: Dice,
}

impl Frames {
    /// All frames of this memory (but those of the module), in an order that `seed` decides.
    pub fn new(ram: Arc<GuestRam>, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let last =
            ram.regions().get(2).copied().expect("guest memory has two lower regions and a higher one");
        let next_run = Gpa(last.gpa.0 + (last.len / 2).next_multiple_of(PAGE));
        let end_of_runs = last.gpa.plus(last.len);
        let all = ram.regions().iter().flat_map(|region| {
            (0..region.len / PAGE).map(|page| region.gpa.plus(page * PAGE)).filter(|&at| at < next_run)
        });
        // Frame 0 stays unused: an uninitialised address must not be a valid one.
        let mut scattered: Vec<_> = all.filter(|&frame| frame != Gpa(0)).collect();
        for i in (1..scattered.len()).rev() {
            scattered.swap(i, dice.below(i + 1));
        }
        Self { ram, free: Mutex::new(Free { scattered, next_run, end_of_runs, dice }) }
    }

    /// The memory that the frames are of.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Takes `count` frames, no two of which in a row are neighbours.
    pub fn take(&self, count: usize) -> Result<Vec<Gpa>> {
        let mut free = held(&self.free);
        let mut taken: Vec<Gpa> = Vec::with_capacity(count);
        for _ in 0..count {
            let before = taken.last().copied();
            let Some(frame) = free.one_that_is_no_neighbour_of(before) else {
                free.scattered.append(&mut taken);
                return Err(Error::OutOfFrames { wanted: count });
            };
            taken.push(frame);
        }
        Ok(taken)
    }

    /// Takes `count` frames that follow one another, for what a driver without IOMMU needs in one piece and for
    /// huge pages (`count` a power of two: the run is aligned to its size). They cannot be given back.
    pub fn take_run(&self, count: usize) -> Result<Vec<Gpa>> {
        let mut free = held(&self.free);
        let bytes = count as u64 * PAGE;
        let start = Gpa(free.next_run.0.next_multiple_of(bytes.next_power_of_two()));
        if start.0 + bytes > free.end_of_runs.0 {
            return Err(Error::OutOfFrames { wanted: count });
        }
        free.next_run = start.plus(bytes);
        Ok((0..count as u64).map(|page| start.plus(page * PAGE)).collect())
    }

    /// Gives frames back.
    pub fn give_back(&self, frames: impl IntoIterator<Item = Gpa>) {
        let mut free = held(&self.free);
        for frame in frames {
            let place = free.scattered.len() + 1;
            let place = free.dice.below(place);
            free.scattered.push(frame);
            let last = free.scattered.len() - 1;
            free.scattered.swap(place, last);
        }
    }

    /// How many scattered frames are free.
    pub fn free(&self) -> usize {
        held(&self.free).scattered.len()
    }
}

impl Free {
    fn one_that_is_no_neighbour_of(&mut self, before: Option<Gpa>) -> Option<Gpa> {
        let apart = |frame: &Gpa| before.is_none_or(|before| frame.0.abs_diff(before.0) != PAGE);
        let place = self.scattered.iter().rposition(apart)?;
        Some(self.scattered.swap_remove(place))
    }
}

/// Numbers that look random and repeat with the same seed (xorshift64*).
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// Starts a sequence.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The next number, below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.roll() >> 16) as usize % limit
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::RamConfig;
    use super::*;

    fn frames() -> Frames {
        Frames::new(Arc::new(GuestRam::new(RamConfig::default()).unwrap()), 1)
    }

    #[test]
    fn frames_are_scattered_and_each_is_handed_out_once() {
        let frames = frames();
        let taken = frames.take(frames.free()).unwrap();
        assert!(taken.windows(2).all(|pair| pair[0].0.abs_diff(pair[1].0) != PAGE));
        assert!(taken.iter().any(|frame| frame.0 >= 1 << 32) && taken.iter().any(|frame| frame.0 < 0xa_0000));
        let mut sorted = taken.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(sorted.len(), taken.len());
        assert!(matches!(frames.take(1), Err(Error::OutOfFrames { wanted: 1 })));
        frames.give_back(taken.iter().copied());
        assert_eq!(frames.free(), taken.len());
    }

    #[test]
    fn a_run_is_contiguous_and_aligned_to_its_size() {
        let frames = frames();
        frames.take_run(1).unwrap();
        let run = frames.take_run(512).unwrap();
        assert!(run[0].0.is_multiple_of(512 * PAGE));
        assert!(run.windows(2).all(|pair| pair[1] == pair[0].plus(PAGE)));
    }
}
