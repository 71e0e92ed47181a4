//! What the flight recorder costs: one event, and a step of a job with and without it.
//!
//! The clock is part of it: an event of the real device takes the time once more than the device would without.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use device_model::addr::{ByteRange, DomainId, Iova};
use device_model::jobs::job::JobId;
use device_model::mmu::{DrainWaker, HostRange, MirrorConfig, Permissions, mirror};
use device_model::telemetry::record::{Event, Recorder, StepEnd};

struct Silent;

impl DrainWaker for Silent {
    fn wake(&self) {}
}

fn event(number: u64) -> Event {
    Event::Step {
        job: JobId::new(number),
        packet: Some(3),
        bytes: 65_536,
        took: Duration::from_nanos(number & 0xffff).into(),
        end: StepEnd::More,
    }
}

fn record(criterion: &mut Criterion) {
    let recorder = Recorder::new(["bench".to_owned()]);
    let writer = recorder.writer(0).expect("nobody else has it");
    let epoch = Instant::now();
    let mut group = criterion.benchmark_group("record");
    let mut number = 0_u64;
    group.bench_function("one event", |bencher| {
        bencher.iter(|| {
            number += 1;
            writer.record(Duration::from_nanos(number), black_box(event(number)));
        });
    });
    group.bench_function("the clock", |bencher| bencher.iter(|| black_box(epoch.elapsed())));
    group.bench_function("one event and the clock", |bencher| {
        bencher.iter(|| {
            number += 1;
            writer.record(epoch.elapsed(), black_box(event(number)));
        });
    });
    group.bench_function("one invalidation: begun and acked", |bencher| {
        bencher.iter(|| {
            number += 1;
            let range = ByteRange::new(Iova::new(number << 12), 4096).expect("a page");
            writer.record(Duration::from_nanos(number), black_box(Event::Invalidation { number, range }));
            let took = Duration::from_nanos(900).into();
            writer.record(Duration::from_nanos(number), black_box(Event::Acked { number, took }));
        });
    });
    group.finish();
}

/// A step of 64 KiB is a copy of as much.
fn step(criterion: &mut Criterion) {
    let recorder = Recorder::new(["bench".to_owned()]);
    let writer = recorder.writer(0).expect("nobody else has it");
    let epoch = Instant::now();
    let (from, mut to) = (vec![1_u8; 65_536], vec![0_u8; 65_536]);
    let mut group = criterion.benchmark_group("step of 64 KiB");
    group.bench_function("without a record", |bencher| {
        bencher.iter(|| {
            black_box(epoch.elapsed());
            to.copy_from_slice(black_box(&from));
        });
    });
    let mut number = 0_u64;
    group.bench_function("with a record", |bencher| {
        bencher.iter(|| {
            number += 1;
            let begun = epoch.elapsed();
            to.copy_from_slice(black_box(&from));
            let took = epoch.elapsed().saturating_sub(begun).into();
            let Event::Step { job, packet, bytes, end, .. } = event(number) else { return };
            writer.record(begun, black_box(Event::Step { job, packet, bytes, took, end }));
        });
    });
    group.finish();
}

/// An INVALIDATE of a page that is mapped and that nobody uses, from begin to end: what an idle ack is made of.
fn invalidation(criterion: &mut Criterion) {
    let recorder = Recorder::new(["bench".to_owned()]);
    let pen = recorder.writer(0).expect("nobody else has it");
    let epoch = Instant::now();
    let config = MirrorConfig { readers: 2, table_limit: 1 << 24 };
    let (mut writer, _readers) = mirror(config, Arc::new(Silent));
    let page = ByteRange::new(Iova::new(0x1000), 4096).expect("a page");
    let mut invalidate = move || {
        // SAFETY: nobody reads through it: only the tables are at work.
        let host = unsafe { HostRange::new(0x7000_0000_1000 as *mut u8, 4096) };
        writer.map(DomainId::DEVICE, page, host, Permissions::READ_WRITE).expect("there is room");
        let invalidation = writer.begin(DomainId::DEVICE, page);
        let drained = invalidation.poll().expect("nobody is inside");
        drop(black_box(writer.end(drained)));
    };
    let mut group = criterion.benchmark_group("map, invalidate and drain a page");
    group.bench_function("without a record", |bencher| {
        bencher.iter(|| {
            let begun = epoch.elapsed();
            invalidate();
            black_box(epoch.elapsed().saturating_sub(begun));
        });
    });
    let mut number = 0_u64;
    group.bench_function("with a record", |bencher| {
        bencher.iter(|| {
            number += 1;
            let begun = epoch.elapsed();
            pen.record(epoch.elapsed(), Event::Invalidation { number, range: page });
            invalidate();
            let acked = epoch.elapsed();
            pen.record(acked, Event::Acked { number, took: acked.saturating_sub(begun).into() });
        });
    });
    group.finish();
}

criterion_group!(benches, record, step, invalidation);
criterion_main!(benches);
