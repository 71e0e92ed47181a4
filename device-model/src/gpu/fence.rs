//! The timelines of the fences: responses that complete a fence go out in the order in which their commands came,
//! whatever the order in which the commands ended, since a driver takes fence N to mean that all fences before it on
//! its timeline are complete (I5). Timelines are independent. Knows the order; knows nothing of what waits in it.

use std::collections::{BTreeMap, VecDeque};

/// A timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TimelineId {
    /// The timeline of all commands that name no ring.
    Global,
    /// The timeline of a ring of a context (VIRTIO_GPU_FLAG_INFO_RING_IDX).
    Ring { ctx: u32, ring: u8 },
}

/// A place in a timeline, reserved for a command until it ends.
#[derive(Debug)]
#[must_use = "all later fences of the timeline wait for this one"]
pub(crate) struct FenceSlot {
    timeline: TimelineId,
    number: u64,
}

/// Places reserved and not yet released, by timeline; an empty timeline is not kept.
#[derive(Debug)]
pub(crate) struct Timelines<T> {
    by_id: BTreeMap<TimelineId, VecDeque<(u64, Option<T>)>>,
    /// The number of the next place, the same for all timelines.
    next: u64,
}

impl<T> Timelines<T> {
    pub(crate) fn new() -> Self {
        Self { by_id: BTreeMap::new(), next: 0 }
    }

    /// The next place of a timeline.
    pub(crate) fn begin(&mut self, timeline: TimelineId) -> FenceSlot {
        let number = self.next;
        // OVERFLOW: each place needs a command, and no guest sends 2^64.
        self.next = number.saturating_add(1);
        self.by_id.entry(timeline).or_default().push_back((number, None));
        FenceSlot { timeline, number }
    }

    /// The command of this place ended: releases `value` in its turn, and with it what waits after it.
    pub(crate) fn end(&mut self, slot: FenceSlot, value: T, mut released: impl FnMut(T)) {
        let FenceSlot { timeline, number } = slot;
        // `None`: it is from before all places were cleared.
        let Some(places) = self.by_id.get_mut(&timeline) else { return };
        let index = places.binary_search_by_key(&number, |(number, _)| *number);
        let Some((_, place)) = index.ok().and_then(|index| places.get_mut(index)) else { return };
        *place = Some(value);
        while let Some(value) = places.front_mut().and_then(|(_, place)| place.take()) {
            places.pop_front();
            released(value);
        }
        if places.is_empty() {
            self.by_id.remove(&timeline);
        }
    }

    /// Clears all places and returns what waited in them. Earlier slots become void.
    pub(crate) fn clear(&mut self) -> impl Iterator<Item = T> + use<T> {
        std::mem::take(&mut self.by_id).into_values().flatten().filter_map(|(_, value)| value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GLOBAL: TimelineId = TimelineId::Global;

    fn end(timelines: &mut Timelines<u32>, slot: FenceSlot, value: u32) -> Vec<u32> {
        let mut released = Vec::new();
        timelines.end(slot, value, |value| released.push(value));
        released
    }

    #[test]
    fn fences_go_out_in_the_order_of_their_commands() {
        let mut t = Timelines::new();
        let [first, second, third] = [(); 3].map(|()| t.begin(GLOBAL));
        assert_eq!(end(&mut t, second, 2), [0; 0]);
        assert_eq!(end(&mut t, first, 1), [1, 2]);
        assert_eq!(end(&mut t, third, 3), [3]);
        let fourth = t.begin(GLOBAL);
        assert_eq!(end(&mut t, fourth, 4), [4]);
    }

    #[test]
    fn timelines_do_not_wait_for_each_other() {
        let mut t = Timelines::new();
        let ids = [(1, 0), (1, 1), (2, 0)].map(|(ctx, ring)| TimelineId::Ring { ctx, ring });
        let slow = [GLOBAL, ids[0], ids[1], ids[2]].map(|id| t.begin(id));
        let behind = [GLOBAL, ids[0], ids[1], ids[2]].map(|id| t.begin(id));
        for (slot, value) in behind.into_iter().zip(10..) {
            assert_eq!(end(&mut t, slot, value), [0; 0]);
        }
        for (slot, value) in slow.into_iter().zip(0..) {
            assert_eq!(end(&mut t, slot, value), [value, 10 + value]);
        }
        assert!(t.by_id.is_empty(), "what the guest names is not kept for ever");
    }

    #[test]
    fn what_ended_but_did_not_go_out_is_handed_back() {
        let mut t = Timelines::new();
        let (first, second) = (t.begin(GLOBAL), t.begin(GLOBAL));
        assert_eq!(end(&mut t, second, 2), [0; 0]);
        assert_eq!(t.clear().collect::<Vec<_>>(), [2]);
        let next = t.begin(GLOBAL);
        assert_eq!(end(&mut t, first, 1), [0; 0], "a slot from before is void");
        assert_eq!(end(&mut t, next, 3), [3]);
    }
}
