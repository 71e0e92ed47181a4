//! A minimal device on the other side of the ring, which checks what the driver wrote.

use std::sync::Arc;

use super::super::frames::Frames;
use super::super::iommu::Iommu;
use super::super::memory::{GuestRam, RamConfig};
use super::*;

fn space() -> DmaSpace {
    let ram = Arc::new(GuestRam::new(RamConfig::default()).unwrap());
    DmaSpace::new(Arc::new(Frames::new(ram, 5)), Arc::new(Iommu::default()), true)
}

fn read(space: &DmaSpace, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for (i, byte) in bytes.iter_mut().enumerate() {
        let at = Iova(at + i as u64);
        let frame = space.iommu().look_up(at).unwrap().frame;
        space.frames().ram().read(frame.plus(at.page_offset()), std::slice::from_mut(byte)).unwrap();
    }
    bytes
}

fn write(space: &DmaSpace, at: u64, bytes: &[u8]) {
    for (i, byte) in bytes.iter().enumerate() {
        let at = Iova(at + i as u64);
        let frame = space.iommu().look_up(at).unwrap().frame;
        space.frames().ram().write(frame.plus(at.page_offset()), std::slice::from_ref(byte)).unwrap();
    }
}

fn number<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().unwrap()
}

/// The segments of the chain in available slot `index`, as (address, length, device writes).
fn chain(space: &DmaSpace, ring: &Virtqueue, index: u16) -> (u16, Vec<(u64, u32, bool)>) {
    let setup = ring.setup();
    let slot = setup.available.0 + 4 + 2 * u64::from(index % setup.size);
    let head = u16::from_le_bytes(number(&read(space, slot, 2)));
    let (mut table, mut next, mut segments) = (setup.descriptors.0, head, Vec::new());
    loop {
        let bytes = read(space, table + 16 * u64::from(next), 16);
        let at = u64::from_le_bytes(number(&bytes[..8]));
        let len = u32::from_le_bytes(number(&bytes[8..12]));
        let flags = u16::from_le_bytes(number(&bytes[12..14]));
        if flags & DESC_INDIRECT != 0 {
            (table, next) = (at, 0);
            continue;
        }
        segments.push((at, len, flags & DESC_WRITE != 0));
        if flags & DESC_NEXT == 0 {
            return (head, segments);
        }
        next = u16::from_le_bytes(number(&bytes[14..]));
    }
}

fn complete(space: &DmaSpace, ring: &Virtqueue, index: u16, head: u32, len: u32) {
    let setup = ring.setup();
    let slot = setup.used.0 + 4 + 8 * u64::from(index % setup.size);
    write(space, slot, &[head.to_le_bytes(), len.to_le_bytes()].concat());
    write(space, setup.used.0 + 2, &index.wrapping_add(1).to_le_bytes());
}

#[test]
fn a_device_finds_each_chain_and_the_driver_each_completion_over_many_laps() {
    let space = space();
    for (indirect, start) in [(false, 0), (true, 0), (false, 4000), (true, 4080)] {
        let config = RingConfig { size: 8, indirect, event_idx: false, start };
        let mut ring = Virtqueue::new(&space, config).unwrap();
        for lap in 0..70_000_u32 {
            let readable = [Segment { at: Iova(0x1000), len: lap }, Segment { at: Iova(0x9000), len: 24 }];
            let writable = [Segment { at: Iova(0x5000), len: 64 }];
            if lap > 2000 && lap < 65_500 {
                // The indices wrap near 65,536; the laps between are all alike.
                let head = ring.submit(&readable, &writable).unwrap();
                complete(&space, &ring, lap as u16, head.into(), 1);
                ring.take_used().unwrap();
                continue;
            }
            let head = ring.submit(&readable, &writable).unwrap();
            let expected = vec![(0x1000, lap, false), (0x9000, 24, false), (0x5000, 64, true)];
            assert_eq!(chain(&space, &ring, lap as u16), (head, expected));
            complete(&space, &ring, lap as u16, head.into(), lap);
            assert_eq!(ring.take_used().unwrap(), [Used { head, len: lap }]);
        }
        assert_eq!(ring.in_flight(), 0);
    }
}

#[test]
fn a_head_that_is_completed_twice_is_an_error() {
    let space = space();
    let mut ring = Virtqueue::new(&space, RingConfig::new(8)).unwrap();
    let head = ring.submit(&[Segment { at: Iova(0), len: 1 }], &[]).unwrap();
    complete(&space, &ring, 0, head.into(), 0);
    complete(&space, &ring, 1, head.into(), 0);
    let twice = ring.take_used().unwrap_err();
    assert!(matches!(twice, Error::NotInFlight { index: 1, head: id } if id == u32::from(head)), "{twice}");
}

#[test]
fn a_full_ring_takes_no_more_and_says_so() {
    let space = space();
    let config = RingConfig { size: 4, indirect: false, event_idx: false, start: 0 };
    let mut ring = Virtqueue::new(&space, config).unwrap();
    let segment = [Segment { at: Iova(0), len: 1 }];
    ring.submit(&segment, &segment).unwrap();
    ring.submit(&segment, &segment).unwrap();
    assert!(matches!(ring.submit(&segment, &segment), Err(Error::RingFull { needed: 2, free: 0 })));
}

#[test]
fn a_completion_without_interrupt_is_told_from_no_completion() {
    let space = space();
    let mut ring = Virtqueue::new(&space, RingConfig::new(8)).unwrap();
    let head = ring.submit(&[Segment { at: Iova(0), len: 1 }], &[]).unwrap();
    assert!(matches!(ring.wait_used(Duration::from_millis(10)), Err(Error::Timeout { .. })));
    for rings in [false, true] {
        let (slot, index) = (ring.setup().used.0 + 4, ring.setup().used.0 + 2);
        let call = ring.setup().call.try_clone().unwrap();
        std::thread::scope(|scope| {
            let space = &space;
            scope.spawn(move || {
                // Without the driver's knowledge: it has polled, and waits for an interrupt.
                wire::wait_readable(&[], Some(Duration::from_millis(100))).unwrap();
                write(space, slot, &[u32::from(head).to_le_bytes(), [0; 4]].concat());
                write(space, index, &1_u16.to_le_bytes());
                if rings {
                    call.write(1).unwrap();
                }
            });
            if rings {
                assert_eq!(ring.wait_used(Duration::from_secs(10)).unwrap(), [Used { head, len: 0 }]);
            } else {
                let lost = ring.wait_used(Duration::from_millis(300)).unwrap_err();
                assert!(matches!(lost, Error::LostInterrupt { waiting: 1, .. }), "{lost}");
            }
        });
        // As if nothing had come, for the second round.
        write(&space, index, &0_u16.to_le_bytes());
    }
}

#[test]
fn the_kick_is_left_out_when_the_device_has_moved_past() {
    assert!(crossed(5, 6, 5) && crossed(5, 9, 3) && crossed(0xffff, 0, 0xffff));
    assert!(!crossed(5, 5, 4) && !crossed(4, 9, 6) && !crossed(0, 0, 0xffff));
}
