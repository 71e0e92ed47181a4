//! INVALIDATE → ack of an idle range against a bare socket echo: the same message sizes, the same client code,
//! another process on the other side. And a burst of 28. `cargo speed` measures both in turns, for a ratio that a change
//! of the machine's mood does not move.

use criterion::Criterion;
use guest_driver_tests::bench::{Echo, exchange, serve_if_asked};
use guest_driver_tests::soft_guest::dma_api::burst;
use guest_driver_tests::soft_guest::{Backend, GuestConfig, SoftGuest};

fn main() {
    serve_if_asked();
    let echo = Echo::start().expect("the echo starts");
    let backend = Backend::start(&["--log-level", "error"]).expect("the back-end starts");
    let guest = SoftGuest::boot(&backend, GuestConfig::headless()).expect("the soft guest boots");
    let main = guest.front_end.main_socket().expect("the main socket can be shared");
    let mut criterion = Criterion::default().configure_from_args();
    criterion.bench_function("bare socket echo", |b| b.iter(|| echo.exchange().expect("it answers")));
    criterion.bench_function("INVALIDATE idle", |b| b.iter(|| exchange(&main).expect("it is acked")));
    let ranges = burst();
    criterion.bench_function("burst of 28", |b| {
        b.iter(|| guest.front_end.invalidate_all(&ranges).expect("the burst is acknowledged"));
    });
    criterion.final_summary();
}
