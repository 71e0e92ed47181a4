//! One descriptor chain, parsed: where its request is and where its response goes. `virtio-queue` ends a chain silently
//! at anything that it cannot follow (a miss, a bad index, a loop), so the end is checked here: a chain is complete
//! only if its last descriptor has no NEXT flag.

use std::ops::Deref;

use device_model::addr::{ByteRange, Iova, RangeError};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT};
use vm_memory::GuestMemory;

/// A part of a chain's buffer.
pub type Segment = ByteRange<Iova>;

/// A chain as the driver offered it. It is a copy, because the driver may overwrite the descriptors.
#[derive(Debug, PartialEq, Eq)]
pub struct Chain {
    /// The index for the used ring.
    pub head: u16,
    /// The buffers of the request, in order.
    pub readable: Vec<Segment>,
    /// The buffers for the response, in order.
    pub writable: Vec<Segment>,
}

/// Why a ring is broken; it stays broken until the driver starts it again.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The indices of the available ring are invalid.
    #[error("Available ring makes no sense")]
    Available(#[source] virtio_queue::Error),
    /// The used ring cannot be written.
    #[error("Used ring cannot be written")]
    Used(#[source] virtio_queue::Error),
    /// A chain that has no end, leaves its table, or nests tables.
    #[error("Descriptor chain {head} does not end where it should")]
    Endless {
        /// Its head.
        head: u16,
    },
    /// A chain with more descriptors than the device accepts.
    #[error("Descriptor chain {head} has more than {limit} descriptors that a chain may have")]
    TooLong {
        /// Its head.
        head: u16,
        /// The limit.
        limit: usize,
    },
    /// A readable descriptor behind a writable one.
    #[error("Descriptor chain {head} has a readable descriptor behind a writable one")]
    Order {
        /// Its head.
        head: u16,
    },
    /// A descriptor whose buffer wraps around.
    #[error("Descriptor chain {head} has a buffer that is no range")]
    Buffer {
        /// Its head.
        head: u16,
        /// Why.
        #[source]
        source: RangeError,
    },
    /// A head that was offered again before it was used.
    #[error("Descriptor chain {head} was offered twice")]
    Twice {
        /// Its head.
        head: u16,
    },
    /// A page of the ring is not mapped in the guest's IOMMU.
    #[error("A page of the ring is not mapped for {0}")]
    Unmapped(&'static str),
}

/// Takes the next chain off the available ring. `Ok(None)`: there is none, *or a page was missing*; the caller checks
/// the memory's list of misses first, and rewinds the ring if it is not empty.
pub fn take<M>(queue: &mut Queue, memory: M, limit: usize) -> Result<Option<Chain>, RingError>
where
    M: Deref + Clone,
    M::Target: GuestMemory,
{
    let mut available = queue.iter(memory).map_err(RingError::Available)?;
    available.next().map(|chain| take_apart(chain, limit)).transpose()
}

fn take_apart<M>(descriptors: DescriptorChain<M>, limit: usize) -> Result<Chain, RingError>
where
    M: Deref + Clone,
    M::Target: GuestMemory,
{
    let head = descriptors.head_index();
    let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
    let mut ended = false;
    for (index, descriptor) in descriptors.enumerate() {
        if index >= limit {
            return Err(RingError::TooLong { head, limit });
        }
        ended = !descriptor.has_next();
        if !descriptor.is_write_only() && !chain.writable.is_empty() {
            return Err(RingError::Order { head });
        }
        // An empty buffer is legal and has no effect.
        if descriptor.len() == 0 {
            continue;
        }
        let segment = Segment::new(Iova::new(descriptor.addr().0), u64::from(descriptor.len()))
            .map_err(|source| RingError::Buffer { head, source })?;
        let side = if descriptor.is_write_only() { &mut chain.writable } else { &mut chain.readable };
        side.push(segment);
    }
    if ended { Ok(chain) } else { Err(RingError::Endless { head }) }
}

#[cfg(test)]
mod tests {
    use virtio_queue::QueueT;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;

    fn taken(descriptors: &[(u64, u32, u16, u16)], limit: usize) -> Result<Option<Chain>, RingError> {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let ring = MockSplitQueue::new(&memory, 16);
        for (index, (addr, len, flags, next)) in descriptors.iter().enumerate() {
            let descriptor = RawDescriptor::from(Descriptor::new(*addr, *len, *flags, *next));
            ring.desc_table().store(index as u16, descriptor).unwrap();
        }
        ring.avail().ring().ref_at(0).unwrap().store(0);
        ring.avail().idx().store(1);
        // An indirect table that refers to itself, for a descriptor that refers to it.
        memory.write_obj(Descriptor::new(0x8000, 16, INDIRECT, 0), GuestAddress(0x8000)).unwrap();
        let mut queue: Queue = ring.create_queue().unwrap();
        assert!(queue.ready());
        take(&mut queue, &memory, limit)
    }

    fn segment(start: u64, len: u64) -> Segment {
        Segment::new(Iova::new(start), len).unwrap()
    }

    #[test]
    fn a_chain_is_taken_apart_and_empty_buffers_are_passed_over() {
        let chain = taken(
            &[
                (0x4000, 24, NEXT, 1),
                (u64::MAX, 0, NEXT, 2),
                (0x5000, 8, NEXT | WRITE, 3),
                (0x6000, 16, WRITE, 0),
            ],
            8,
        );
        let expected = Chain {
            head: 0,
            readable: vec![segment(0x4000, 24)],
            writable: vec![segment(0x5000, 8), segment(0x6000, 16)],
        };
        assert_eq!(chain.unwrap(), Some(expected));
    }

    #[test]
    fn a_chain_that_loops_or_leaves_its_table_is_an_error() {
        assert!(matches!(taken(&[(0x4000, 1, NEXT, 0)], 64), Err(RingError::Endless { head: 0 })));
        assert!(matches!(taken(&[(0x4000, 1, NEXT, 99)], 64), Err(RingError::Endless { head: 0 })));
        assert!(matches!(taken(&[(0x8000, 16, INDIRECT, 0)], 64), Err(RingError::Endless { head: 0 })));
    }

    #[test]
    fn a_chain_too_long_out_of_order_or_wrapping_is_an_error() {
        assert!(matches!(taken(&[(0x4000, 1, NEXT, 0)], 4), Err(RingError::TooLong { head: 0, limit: 4 })));
        let order = taken(&[(0x4000, 1, NEXT | WRITE, 1), (0x4000, 1, 0, 0)], 4);
        assert!(matches!(order, Err(RingError::Order { head: 0 })));
        let wraps = taken(&[(u64::MAX, 2, 0, 0)], 4);
        assert!(matches!(wraps, Err(RingError::Buffer { head: 0, .. })));
    }
}
