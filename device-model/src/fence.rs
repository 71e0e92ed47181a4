//! The timeline of the fences: responses that complete a fence go out in the order in which their commands came,
//! whatever the order in which these ended, for a driver takes fence N as the end of all before it (I5). Knows the
//! order; knows nothing of what waits in it.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::unwrap_used
    )
)]

use std::collections::VecDeque;

/// A place in the timeline, kept for a command until it ends.
#[derive(Debug)]
#[must_use = "all later fences wait for this one"]
pub(crate) struct FenceSlot(u64);

/// Places taken and not yet released.
#[derive(Debug)]
pub(crate) struct Timeline<T> {
    /// The number of the first place in `slots`.
    first: u64,
    slots: VecDeque<Option<T>>,
}

impl<T> Timeline<T> {
    pub(crate) fn new() -> Self {
        Self { first: 0, slots: VecDeque::new() }
    }

    /// The next place.
    pub(crate) fn begin(&mut self) -> FenceSlot {
        self.slots.push_back(None);
        // OVERFLOW: a place is taken by a command; nobody sends 2^64.
        FenceSlot(self.first.saturating_add(self.slots.len() as u64).saturating_sub(1))
    }

    /// The command of this place ended, and `value` is to go out when it is its turn.
    pub(crate) fn end(&mut self, slot: FenceSlot, value: T) {
        let place = slot.0.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        let place = place.and_then(|index| self.slots.get_mut(index));
        debug_assert!(!matches!(place, Some(Some(_))), "a command ends once");
        if let Some(place) = place {
            *place = Some(value);
        }
    }

    /// The next value whose turn it is.
    pub(crate) fn release(&mut self) -> Option<T> {
        let value = self.slots.front_mut()?.take()?;
        self.slots.pop_front();
        self.first = self.first.saturating_add(1);
        Some(value)
    }

    /// Forgets all places; what waited in them is handed back. Slots from before are void.
    pub(crate) fn clear(&mut self) -> impl Iterator<Item = T> + '_ {
        self.first = self.first.saturating_add(self.slots.len() as u64);
        self.slots.drain(..).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fences_go_out_in_the_order_of_their_commands() {
        let mut timeline = Timeline::new();
        let (first, second, third) = (timeline.begin(), timeline.begin(), timeline.begin());
        timeline.end(second, 2);
        assert_eq!(timeline.release(), None);
        timeline.end(first, 1);
        assert_eq!((timeline.release(), timeline.release(), timeline.release()), (Some(1), Some(2), None));
        timeline.end(third, 3);
        assert_eq!(timeline.release(), Some(3));
        let fourth = timeline.begin();
        timeline.end(fourth, 4);
        assert_eq!(timeline.release(), Some(4));
    }

    #[test]
    fn what_ended_but_did_not_go_out_is_handed_back() {
        let mut timeline = Timeline::new();
        let (first, second) = (timeline.begin(), timeline.begin());
        timeline.end(second, 2);
        assert_eq!(timeline.clear().collect::<Vec<_>>(), [2]);
        let next = timeline.begin();
        timeline.end(first, 1);
        assert_eq!(timeline.release(), None, "a slot from before is void");
        timeline.end(next, 3);
        assert_eq!(timeline.release(), Some(3));
    }
}
