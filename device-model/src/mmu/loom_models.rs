//! The protocol under loom: small models, one for each race, two threads each. Run them with
//! `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=3 cargo test -p device-model --lib --release loom`.
//!
//! A frame of guest memory is a loom cell: a device access reads it, and its owner writes it once the invalidation is
//! drained. If the drain does not order the two, loom reports the race.

use std::sync::Arc as StdArc;

use loom::cell::UnsafeCell;
use loom::sync::Notify;
use loom::thread;

use super::*;
use crate::addr::{Access, ByteRange, Iova, PAGE_SIZE};
use crate::sync::Arc;

const SPACE: DomainId = DomainId::DEVICE;
/// The frame's address; it is never dereferenced.
const FRAME: u64 = 0x7000;

/// A waker that never misses and never waits; the model checks that it is called.
struct Bell(Notify);

impl DrainWaker for Bell {
    fn wake(&self) {
        self.0.notify();
    }
}

fn page(number: u64) -> ByteRange<Iova> {
    ByteRange::new(Iova::new(number * PAGE_SIZE), PAGE_SIZE).unwrap()
}

fn wanted(number: u64) -> PinRange {
    PinRange { space: SPACE, range: page(number), access: Access::Read }
}

/// A mirror with one reader that has mapped page 1, and the bell.
fn model() -> (MirrorWriter, Reader, StdArc<Bell>) {
    let bell = StdArc::new(Bell(Notify::new()));
    let (mut writer, mut readers) = mirror(MirrorConfig { readers: 1, table_limit: 1 << 30 }, bell.clone());
    writer.map(SPACE, page(1), HostRange::invented(FRAME, PAGE_SIZE), Permissions::READ).unwrap();
    (writer, readers.pop().unwrap(), bell)
}

/// Waits as the session does: parked until the bell rings, then polled again. Loom reports a lost ring as a deadlock.
fn drain(mut invalidation: Invalidation, bell: &Bell) -> Drained {
    loop {
        match invalidation.poll() {
            Ok(drained) => return drained,
            Err(parked) => invalidation = parked,
        }
        bell.0.wait();
    }
}

/// The owner's side: invalidates page 1, and uses the frame for something else.
fn take_away(writer: &mut MirrorWriter, bell: &Bell, frame: &UnsafeCell<u8>) {
    let drained = drain(writer.begin(SPACE, page(1)), bell);
    // SAFETY: loom's own cell; it reports an access at the same time.
    frame.with_mut(|frame| unsafe { *frame = 1 });
    let _ = writer.end(drained);
}

/// What the device reads from the frame.
fn look(frame: &UnsafeCell<u8>) -> u8 {
    // SAFETY: loom's own cell; it reports an access at the same time.
    frame.with(|frame| unsafe { *frame })
}

/// Race on entry, and what the drain orders: a section that finds the page is alone in using the frame.
#[test]
fn loom_a_section_that_finds_a_page_is_waited_for() {
    loom::model(|| {
        let (mut writer, reader, bell) = model();
        let frame = Arc::new(UnsafeCell::new(0));
        let theirs = Arc::clone(&frame);
        let device = thread::spawn(move || {
            let section = reader.enter();
            if section.translate(SPACE, Iova::new(PAGE_SIZE), Access::Read).is_ok() {
                assert_eq!(look(&theirs), 0);
            }
        });
        take_away(&mut writer, &bell, &frame);
        device.join().unwrap();
    });
}

/// The same for the second of two sections: the drain does not stop at the first.
#[test]
fn loom_a_reader_that_comes_back_finds_nothing_old() {
    loom::model(|| {
        let (mut writer, reader, bell) = model();
        let frame = Arc::new(UnsafeCell::new(0));
        let theirs = Arc::clone(&frame);
        let device = thread::spawn(move || {
            for _ in 0..2 {
                let section = reader.enter();
                if section.translate(SPACE, Iova::new(PAGE_SIZE), Access::Read).is_ok() {
                    assert_eq!(look(&theirs), 0);
                }
            }
        });
        take_away(&mut writer, &bell, &frame);
        device.join().unwrap();
    });
}

/// Race on exit: whenever a drain is parked on a section, the section rings the bell when it leaves. The section
/// touches nothing, so that nothing else hides a lost ring. Two invalidations in a row show whether the second mistakes
/// a ring for the first as its own.
#[test]
fn loom_a_parked_drain_is_woken_by_the_section_that_leaves() {
    loom::model(|| {
        let (mut writer, reader, bell) = model();
        let device = thread::spawn(move || {
            drop(reader.enter());
            drop(reader.enter());
        });
        for _ in 0..2 {
            let drained = drain(writer.begin(SPACE, page(1)), &bell);
            let _ = writer.end(drained);
        }
        device.join().unwrap();
    });
}

/// A pin is refused, or it is waited for.
#[test]
fn loom_a_pin_is_validated_or_waited_for() {
    loom::model(|| {
        let (mut writer, reader, bell) = model();
        let frame = Arc::new(UnsafeCell::new(0));
        let theirs = Arc::clone(&frame);
        let device = thread::spawn(move || {
            if let Ok(pin) = reader.pin(&[wanted(1)]) {
                assert_eq!(look(&theirs), 0);
                pin.release();
            }
        });
        take_away(&mut writer, &bell, &frame);
        device.join().unwrap();
    });
}

/// A pin that exists when the invalidation begins: its release rings the bell.
#[test]
fn loom_a_parked_drain_is_woken_by_the_pin_that_is_released() {
    loom::model(|| {
        let (mut writer, reader, bell) = model();
        let frame = Arc::new(UnsafeCell::new(0));
        let pin = reader.pin(&[wanted(1)]).unwrap();
        let theirs = Arc::clone(&frame);
        let device = thread::spawn(move || {
            assert_eq!(look(&theirs), 0);
            pin.release();
        });
        take_away(&mut writer, &bell, &frame);
        device.join().unwrap();
    });
}

/// A walk never meets a freed table, which each walk checks under loom.
#[test]
fn loom_a_table_is_freed_only_when_no_section_can_see_it() {
    loom::model(|| {
        let (mut writer, reader, _bell) = model();
        let device = thread::spawn(move || {
            let section = reader.enter();
            if let Ok(span) = section.translate(SPACE, Iova::new(PAGE_SIZE), Access::Read) {
                assert_eq!(span.address(), FRAME);
            }
        });
        // The tables of page 1 become empty and are unlinked; mapping elsewhere frees them when possible.
        drop(writer.begin(SPACE, page(1)));
        writer.map(SPACE, page(6), HostRange::invented(FRAME, PAGE_SIZE), Permissions::READ).unwrap();
        device.join().unwrap();
    });
}

/// A walk that meets a new table sees its contents: no mapped page goes missing when its leaf is split, and none is
/// found half built.
#[test]
fn loom_a_new_table_is_seen_with_what_is_in_it() {
    loom::model(|| {
        let (mut writer, reader, _bell) = model();
        // Pages 4 to 7 are one leaf of the root.
        let leaf = ByteRange::new(Iova::new(4 * PAGE_SIZE), 4 * PAGE_SIZE).unwrap();
        writer.map(SPACE, leaf, HostRange::invented(FRAME, 4 * PAGE_SIZE), Permissions::READ).unwrap();
        let device = thread::spawn(move || {
            let section = reader.enter();
            let span = section.translate(SPACE, Iova::new(6 * PAGE_SIZE), Access::Read).unwrap();
            assert_eq!(span.address(), FRAME + 2 * PAGE_SIZE);
        });
        writer.map(SPACE, page(7), HostRange::invented(FRAME, PAGE_SIZE), Permissions::WRITE).unwrap();
        device.join().unwrap();
    });
}
