//! I1, seen from outside: a page whose invalidation was acknowledged is never touched again, although transfers
//! run over it all the time; and the same cycle catches a back-end that acknowledges too early.
//!
//! `MIRRORGPU_CYCLES` sets the number of cycles (100000 for the soak). Whether an INVALIDATE finds a transfer in flight is
//! up to the machine: on a busy one the transfers may all be over when the driver gets its processor back. So there are
//! more cycles until enough of them were hits.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::driver::Ticket;
use guest_driver_tests::soft_guest::frames::Dice;
use guest_driver_tests::soft_guest::*;

const WIDTH: u32 = 512;
const HEIGHT: u32 = 512;
const PAGES: usize = (WIDTH * HEIGHT * 4 / 4096) as usize;

fn cycles() -> u64 {
    std::env::var("MIRRORGPU_CYCLES").ok().and_then(|cycles| cycles.parse().ok()).unwrap_or(3000)
}

/// How many times as many cycles there may be until enough of them were hits.
const MOST: u64 = 10;

/// A guest whose driver takes pages away from under its own transfers, of which a few are always on their way.
struct Careless {
    guest: SoftGuest,
    surface: Surface,
    dice: Dice,
    on_their_way: VecDeque<Ticket>,
    moved: u64,
    usual: Duration,
}

impl Careless {
    fn new(backend: &Backend, seed: u64) -> Self {
        let config = GuestConfig { seed, ..GuestConfig::headless() };
        let mut guest = SoftGuest::boot(backend, config).unwrap();
        let surface = guest.surface(Format::R8G8B8A8, WIDTH, HEIGHT).unwrap();
        let (dice, on_their_way) = (Dice::new(seed), VecDeque::new());
        let mut this = Self { guest, surface, dice, on_their_way, moved: 0, usual: Duration::ZERO };
        this.guest.driver.ok(&this.transfer()).unwrap();
        let start = Instant::now();
        this.guest.driver.ok(&this.transfer()).unwrap();
        this.usual = start.elapsed();
        this
    }

    fn transfer(&self) -> Command {
        Command::transfer(self.surface.resource, self.surface.rect(), 0)
    }

    /// Has `count` transfers on their way.
    fn fill(&mut self, count: usize) {
        while self.on_their_way.len() < count {
            let ticket = self.guest.driver.submit(&self.transfer()).unwrap();
            self.on_their_way.push_back(ticket);
        }
    }

    /// Waits for the transfers on their way until `count` are left.
    fn drain(&mut self, count: usize) {
        while self.on_their_way.len() > count {
            let ticket = self.on_their_way.pop_front().unwrap();
            let response = self.guest.driver.wait(ticket).unwrap();
            // A page that is gone for a moment may be missed just then: such a transfer fails, and rightly so.
            assert!(response.is_ok() || response.kind() == kind::ERR_UNSPEC, "{:#x}", response.kind());
        }
    }

    /// Somewhere in a transfer, `pages` pages get other frames, each after its own INVALIDATE.
    fn cycle(&mut self, pages: usize) {
        self.fill(3);
        let pause = self.usual.mul_f64(self.dice.below(1000) as f64 / 1000.0);
        wire::wait_readable(&[], Some(pause)).unwrap();
        for _ in 0..pages {
            let page = self.dice.below(PAGES);
            if self.dice.below(4) == 0 {
                self.guest.dma.move_page(&mut self.surface.buffer, page).unwrap();
            } else {
                let frame = self.guest.dma.space().frames().take(1).unwrap()[0];
                self.guest.dma.swap_page(&mut self.surface.buffer, page, frame).unwrap();
            }
            self.moved += 1;
        }
        self.drain(2);
    }

    /// Waits for everything, and lets the oracle judge the frames of the cycles so far.
    fn judge(&mut self) -> usize {
        self.drain(0);
        self.guest.dma.oracle().release().unwrap()
    }
}

#[test]
fn invalidate_during_transfer_is_acked_only_after_it_ends() {
    let backend = Backend::start(&["--drain-timeout", "1s"]).unwrap();
    let mut careless = Careless::new(&backend, 11);
    let before = backend.stats().unwrap();
    let hits = || backend.stats().unwrap().since(&before, "invalidations_with_work_in_flight").unwrap();
    let (mut clean, mut cycle) = (0, 0);
    while cycle < cycles() || hits() < cycles() / 10 && cycle < MOST * cycles() {
        for _ in 0..64 {
            careless.cycle(1);
        }
        cycle += 64;
        if cycle % 256 == 0 {
            clean += careless.judge() as u64;
        }
    }
    clean += careless.judge() as u64;
    let (after, in_flight) = (backend.stats().unwrap(), hits());
    let invalidations = after.since(&before, "invalidations").unwrap();
    println!("{invalidations} invalidations, {in_flight} with work in flight, {clean} frames clean");
    println!("ack latency: {}", after.0["ack_latency_ns"]);
    assert_eq!((invalidations, clean), (careless.moved, careless.moved));
    assert!(in_flight >= cycles() / 10, "only {in_flight} of {invalidations} found work in flight");
}

#[test]
fn whole_domain_flushes_during_transfers_hurt_nobody() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut careless = Careless::new(&backend, 12);
    let faults = careless.guest.dma.space().iommu().faults().len();
    let before = backend.stats().unwrap();
    let rounds = cycles() / 10;
    for _ in 0..rounds {
        careless.fill(2);
        // Something was unmapped earlier, and is retired by this flush; the surface stays mapped.
        let idle = careless.guest.dma.space().allocate(2, Permission::ReadWrite).unwrap();
        careless.guest.dma.unmap_later(idle).unwrap();
        careless.guest.dma.flush().unwrap();
        careless.drain(1);
    }
    assert_eq!(careless.judge() as u64, 2 * rounds);
    let after = backend.stats().unwrap();
    assert_eq!(after.since(&before, "invalidations").unwrap(), 2 * rounds);
    assert!(after.since(&before, "invalidations_with_work_in_flight").unwrap() > 0);
    assert_eq!(after.since(&before, "jobs_failed").unwrap(), 0);
    assert_eq!(careless.guest.dma.space().iommu().faults().len(), faults);
}

#[test]
fn an_ack_before_the_drain_is_caught() {
    let backend = Backend::start(&["--inject", "ack-before-drain", "--inject", "step-delay=2ms"]).unwrap();
    let mut careless = Careless::new(&backend, 13);
    for cycle in 1..=500 {
        careless.cycle(4);
        let late = careless.guest.dma.oracle().touched().unwrap();
        if !late.is_empty() {
            println!("caught after {cycle} cycles: {} frames touched after the ack", late.len());
            assert!(
                matches!(careless.guest.dma.oracle().check(), Err(Error::LateTouch(frames)) if frames == late)
            );
            return;
        }
    }
    panic!("the back-end acknowledged before its drain 500 times, and nothing was noticed");
}

#[test]
fn buffers_of_commands_are_left_alone_once_they_are_answered() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut config = GuestConfig::headless();
    config.driver.fresh_buffers = true;
    let mut guest = SoftGuest::boot(&backend, config).unwrap();
    let surface = guest.surface(Format::B8G8R8A8, 64, 64).unwrap();
    let before = backend.stats().unwrap();
    let mut unmapped = 0;
    for _ in 0..200 {
        guest.driver.ok(&Command::transfer(surface.resource, surface.rect(), 0)).unwrap();
        for buffer in guest.driver.spent_buffers() {
            unmapped += 1;
            guest.dma.unmap(buffer).unwrap();
        }
    }
    assert_eq!(guest.dma.oracle().check().unwrap() as u64, unmapped);
    assert_eq!(guest.dma.space().iommu().faults(), []);
    assert_eq!(backend.stats().unwrap().since(&before, "invalidations").unwrap(), unmapped);
}
