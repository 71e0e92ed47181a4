//! The table of all scenarios: number, name, promise, and which parts run where. Numbers never change; new ones come
//! at the end. Knows nothing of how a part is run.

use crate::rig::error::RigError;
use crate::rig::hot_plug::SLOT;
use crate::rig::run::Run;
use crate::rig::scenario::Needs;
use crate::rig::variation::Variation;
use crate::rig::{jobs, scenario, stock, vfio};
use crate::suite::driver_bugs;
use crate::suite::failure::Result;
use crate::suite::results::{self, Level};
use crate::suite::scenarios::{faults, fences, life_cycle, meaning, modes, ranges, timing};
use crate::suite::stage::Stage;

/// What a scenario does on a stage.
pub type OnStage = fn(&mut Stage<'_>) -> Result<()>;

/// A part of a scenario: something that shows its promise.
pub enum Part {
    /// In the soft guest, and in a real one with a user-space driver that has the device through VFIO.
    Both(OnStage),
    /// In the soft guest alone.
    Soft(OnStage),
    /// In a real guest with such a driver, on its own machine.
    On(Variation, OnStage),
    /// In a real guest, whose stock driver has the device.
    Stock(StockPart),
}

/// A part with the stock driver.
#[derive(Clone, Copy)]
pub struct StockPart {
    /// What it requires.
    pub needs: Needs,
    /// The machine that it needs.
    pub variation: Variation,
    /// What it does.
    pub run: fn(&mut Run<'_>) -> std::result::Result<(), RigError>,
}

const fn with_stock(needs: Needs, run: fn(&mut Run<'_>) -> std::result::Result<(), RigError>) -> Part {
    Part::Stock(StockPart { needs, variation: Variation::NONE, run })
}

/// A scenario.
pub struct Scenario {
    /// Its number.
    pub number: u32,
    /// Its name: what happens, in a few words.
    pub name: &'static str,
    /// Its subject.
    pub group: &'static str,
    /// What must hold, in a sentence.
    pub promise: &'static str,
    /// What shows it. None: it is not shown, and `elsewhere` says why.
    pub parts: &'static [Part],
    /// Why it is not shown at a level, if so.
    pub elsewhere: &'static str,
}

impl Scenario {
    /// Its name on a command line.
    pub fn id(&self) -> String {
        results::id(self.number, self.name)
    }

    /// Whether any part of it runs in a real guest.
    pub fn has_real_part(&self) -> bool {
        self.on_stage(Level::Real).next().is_some() || self.with_the_stock_driver().next().is_some()
    }

    /// The parts with the stock driver of a real guest: here, and among the rig's.
    pub fn with_the_stock_driver(&self) -> impl Iterator<Item = StockPart> + '_ {
        let own = self.parts.iter().filter_map(|part| match part {
            Part::Stock(part) => Some(*part),
            _ => None,
        });
        let of_the_rig = stock::ALL.iter().filter(|stock| stock.numbers.first() == Some(&self.number));
        own.chain(of_the_rig.map(|stock| StockPart {
            needs: stock.needs,
            variation: stock.variation,
            run: stock.run,
        }))
    }

    /// The parts on a stage at this level.
    pub fn on_stage(&self, level: Level) -> impl Iterator<Item = (Variation, OnStage)> + '_ {
        self.parts.iter().filter_map(move |part| match (part, level) {
            (Part::Both(run), _) | (Part::Soft(run), Level::Soft) => Some((Variation::NONE, *run)),
            (Part::On(variation, run), Level::Real) => Some((*variation, *run)),
            _ => None,
        })
    }
}

const RANGES: &str = "Range arithmetic";
const TIMING: &str = "Timing";
const FAULTS: &str = "Permissions and faults";
const MODES: &str = "Modes";
const FENCES: &str = "Fences";
const LIFE: &str = "Life cycle";
const MEANING: &str = "What an invalidation meant";
const DMA: &str = "DMA API";
const SCHEDULING: &str = "Scheduling and fences";
const PLATFORM: &str = "Platform";

const ONLY_QEMU_SENDS: &str = "only a front-end can send it: no driver makes QEMU do so at will";
const NEEDS_A_KERNEL: &str = "it is about a kernel";
const NEEDS_A_FLUSH: &str = "VFIO has no flush that takes nothing away; a lazy guest's kernel sends it (17)";
const NEEDS_ITS_MISSES: &str = "only a front-end can keep a MISS waiting";

/// A row: number, name, group, promise, parts, and why not elsewhere.
macro_rules! scenarios {
    ($($number:literal $name:literal, $group:ident, $promise:literal, [$($part:expr),*] $(, $elsewhere:expr)?;)+) => {
        /// All scenarios, by number.
        pub const ALL: &[Scenario] = &[$(Scenario {
            number: $number,
            name: $name,
            group: $group,
            promise: $promise,
            parts: &[$($part),*],
            elsewhere: last(&["" $(, $elsewhere)?]),
        }),+];
    };
}

/// The last of some texts: the one that was given, or none.
const fn last(texts: &[&'static str]) -> &'static str {
    match texts {
        [.., text] => text,
        [] => "",
    }
}

use Part::{Both, On, Soft};

scenarios! {
    1 "idle-page", RANGES, "What no job uses goes at once, whatever else is in flight.", [Both(ranges::idle)];
    2 "exact-range", RANGES, "Memory that is taken from under a job is not touched after the ack.", [Both(ranges::exact)];
    3 "partial-overlap", RANGES, "Head, tail and middle of a job's range are drained like all of it.", [Both(ranges::partial)];
    4 "larger-range", RANGES, "An invalidation that is larger than the job finds it.", [Both(ranges::larger)];
    5 "adjacent-range", RANGES, "A neighbour of a job's range waits for nothing.", [Soft(ranges::adjacent)],
        "VT-d rounds ranges, so that a neighbour may be hit (54)";
    6 "size-zero", RANGES, "Size 0 takes the whole space away.", [Soft(ranges::size_zero)], ONLY_QEMU_SENDS;
    7 "to-the-end", RANGES, "Ranges up to 2^64, and past it, take away what they touch.", [Soft(ranges::to_the_end)], ONLY_QEMU_SENDS;
    8 "thirty-in-a-row", RANGES, "Thirty unmaps beside a job wait for nothing, and a burst of 28 over it is acked.",
        [Both(ranges::thirty), Soft(ranges::burst)];
    9 "ring-page", RANGES, "Pages of a ring can be invalidated: no command is lost.", [Soft(ranges::ring_page)],
        "a driver's rings stay mapped; a lazy guest's kernel flushes them (17)";
    10 "phases-of-a-job", TIMING, "At every phase of a job's life an unmap is acked in time, and nothing is touched after it.",
        [Both(timing::phases)];
    11 "fence-against-unmap", TIMING, "Who waits for the fence is never accused; who does not, hurts only himself.", [Both(timing::race)];
    12 "miss-pending", TIMING, "An UPDATE for a page that was invalidated while it was asked for is not believed.",
        [Soft(timing::pending_miss)], NEEDS_ITS_MISSES;
    13 "parked-on-a-miss", TIMING, "A job that waits for a translation holds up no ack.", [Soft(timing::parked)], NEEDS_ITS_MISSES;
    14 "overlapping", TIMING, "Invalidations that overlap are acked each, and bounded.", [Soft(timing::overlapping)], ONLY_QEMU_SENDS;
    15 "unmap-then-remap", TIMING, "After a remap at the same address the old page never changes (ABA).", [Both(timing::aba)];
    16 "slow-access", TIMING, "An ack waits for the access in progress, however slow.", [Both(timing::slow_access)];
    17 "strict-and-lazy", TIMING, "The invalidations of the guest's kernel come, and hurt nobody.",
        [with_stock(Needs::Screen, scenario::invalidations)], "the soft guest flushes in 53";
    18 "ats", TIMING, "The same where the device translates by itself.",
        [with_stock(Needs::Ats, scenario::invalidations)], "the soft guest has no PCI";
    19 "write-to-read-only", FAULTS, "A write to memory that the device may only read fails, and is recorded.", [Both(faults::read_only)];
    20 "read-only-to-writable", FAULTS, "More rights are found at once.", [Both(faults::upgrade), Soft(faults::upgrade_in_place)];
    21 "writable-to-read-only", FAULTS, "Fewer rights hold from the ack on.", [Both(faults::downgrade)];
    22 "unmapped", FAULTS, "A page that is not mapped: error fence, fault record, and a fault in the guest's IOMMU log.",
        [Both(faults::unmapped)];
    23 "scattered-pages", FAULTS, "Scattered pages behind contiguous addresses are one buffer.", [Both(faults::scattered)];
    24 "second-page-unmapped", FAULTS, "What a job wrote before its fault is where it should be, and nothing else.",
        [Both(faults::second_page)];
    25 "correct-driver", MODES, "A driver that waits for its fences is never accused.", [Both(modes::correct)];
    26 "preempt", MODES, "Off the engine within the bound, back again, right result.", [Soft(modes::preempt), Both(modes::leaves_at_once)];
    27 "preempt-times-out", MODES, "A job that does not leave is taken off: the ack stays bounded (I2).", [Both(modes::stubborn)];
    28 "fault-map-replay", MODES, "In fault mode a job goes on in the memory that has come instead.", [Both(modes::replay)];
    29 "fault-storm", FAULTS, "Faults without end fill no memory, and the device goes on.", [Both(faults::storm)];
    30 "livelock", MODES, "A job whose translations are taken away each time comes to its end.", [Soft(modes::livelock)], NEEDS_A_FLUSH;
    31 "scratch-page", MODES, "Reads give 0, writes vanish.", [],
        "the device has no scratch page: an access to what is gone is a fault (22), in every mode";
    32 "fences-in-order", FENCES, "Fences of one ring come in order.", [Both(fences::in_order)];
    33 "fences-out-of-order", FENCES, "Between contexts nobody waits.", [Both(fences::out_of_order)];
    34 "late-fence", FENCES, "A fence that is late comes; one of a failed job carries the error.", [Both(fences::late_and_in_error)];
    35 "hang-and-reset", FENCES, "A job that hangs costs its context, and no other.", [Both(fences::hang)];
    36 "fence-backwards", FENCES, "Fence ids may go backwards.", [Both(fences::backwards)];
    37 "fence-twice", FENCES, "The same fence id may come again.", [Both(fences::duplicates)];
    44 "end-under-jobs", LIFE, "DETACH, UNREF and CTX_DESTROY under a job are answered when its memory is free.",
        [Both(life_cycle::ends_under_jobs)];
    45 "rebind", LIFE, "The driver is taken away and comes back, idle and while it draws.",
        [with_stock(Needs::Screen, scenario::rebind_idle), with_stock(Needs::Screen, scenario::rebind_drawing)], NEEDS_A_KERNEL;
    46 "reset-under-jobs", LIFE, "A reset under jobs leaves memory alone, and the device comes up again.", [Soft(life_cycle::reset)];
    47 "reboot", LIFE, "A reboot while the guest draws: then all is as after the first boot.",
        [with_stock(Needs::Screen, scenario::reboot_drawing)], NEEDS_A_KERNEL;
    48 "memory-hot-plug", LIFE, "Memory comes and goes under the device, and under jobs.",
        [On(SLOT, life_cycle::hot_plug)], "tests/memory_table.rs: what QEMU sends, and worse";
    49 "stop-and-cont", LIFE, "While the machine is stopped nothing moves; then all goes on.",
        [Soft(life_cycle::stop), with_stock(Needs::Screen, scenario::stop_and_cont)];
    50 "back-end-killed", LIFE, "The back-end dies and comes back: the guest has lost its device, and nothing else.", [], NEEDS_A_KERNEL;
    51 "isolation", LIFE, "A context cannot use what it was not given.", [Both(life_cycle::isolation)];
    52 "registration-cache", MODES, "What goes on with memory that is gone is counted, and harms nobody else.",
        [Both(modes::registration_cache)];
    53 "domain-flush", MEANING, "A flush that takes nothing away kills nothing and accuses nobody.",
        [Soft(meaning::domain_flush)], NEEDS_A_FLUSH;
    54 "rounded-range", MEANING, "A rounded invalidation that hits a neighbour accuses nobody.", [Both(meaning::rounding)];
    55 "after-a-flush", MEANING, "The same, moved, gone, read-only: each has its verdict.", [Both(meaning::after_a_flush)];
    56 "domain-switched", MEANING, "The IOMMU's domain is switched at run time, and the device works in each.", [], NEEDS_A_KERNEL;
    57 "under-invalidation", MEANING, "Memory that is taken without an INVALIDATE is found by an audit.",
        [Soft(meaning::audit)], "a kernel's VFIO always says so";
    58 "two-mappings", MEANING, "Of two mappings of a page one may go; an unmap may go across maps.", [Both(meaning::aliases)];
    59 "address-reused", MEANING, "An address that another buffer gets leads to that buffer.", [Both(meaning::reuse)];
    60 "bouncing", DMA, "A kernel that bounces all that devices touch sees what it copies, and nothing breaks.", [], NEEDS_A_KERNEL;
    61 "narrow-mask", DMA, "A device that reaches 32 bits only.", [], "the stock driver asks for 64 bits and QEMU has no device with fewer; 60 bounces";
    62 "wrong-direction", DMA, "A buffer that is mapped for the wrong direction is not written.", [Both(faults::wrong_direction)];
    64 "huge-mapping", DMA, "Large mappings work; operands past their end are refused.", [Both(meaning::huge)];
    83 "hang-to-the-end", SCHEDULING, "Against a job that never leaves, the ladder is climbed to its end (I2).", [Both(modes::ladder)];
    84 "at-the-timeout", SCHEDULING, "A job that ends just at the timeout ends well or badly, not both.", [Both(life_cycle::at_the_timeout)];
    86 "invalidation-storm", SCHEDULING, "A storm of invalidations starves no job.", [Both(life_cycle::storm)];
    88 "interrupts", SCHEDULING, "A value without an interrupt is there; an interrupt without a value finds nothing.",
        [Soft(fences::interrupts)], "the driver in user space polls; the stock one is in 34";
    89 "numbers-wrap", SCHEDULING, "Fence ids and counters wrap as numbers do.", [Both(fences::wrap)];
    90 "sync-points", SCHEDULING, "Merged sync_files, timeline points and event descriptors tell what the fences tell.", [], NEEDS_A_KERNEL;
    91 "foreign-fence", SCHEDULING, "Another driver's fence that never comes holds up its own job only; buffers are shared.", [], NEEDS_A_KERNEL;
    94 "posted-writes", SCHEDULING, "Who sees a signal sees what was written before it.", [Both(timing::posted)];
    98 "sleep", PLATFORM, "Devices sleep and wake with jobs in flight: nothing is written, and a driver bound anew works.",
        [], NEEDS_A_KERNEL;
    99 "removal", PLATFORM, "The device is pulled out under jobs: nothing is written, the kernel survives, and it can come back.",
        [], NEEDS_A_KERNEL;
    100 "balloon", PLATFORM, "A balloon takes the guest's memory and gives it back: no job notices.", [], NEEDS_A_KERNEL;
    102 "kdump", PLATFORM, "The crashed kernel's jobs do not write into the dump's.", [], NEEDS_A_KERNEL;
    103 "frozen-vmm", PLATFORM, "A VMM that stands still is not one that does not answer.", [Soft(life_cycle::frozen)];
    104 "full-ring", PLATFORM, "A ring full of endless jobs holds up UNREF, and nobody else; indices wrap.",
        [Both(life_cycle::full_ring), Soft(life_cycle::index_wrap)];
    105 "module-unload", PLATFORM, "The driver is not unloaded while files or buffers are out; then it is, and comes back.",
        [], NEEDS_A_KERNEL;
    106 "replay", PLATFORM, "A failing schedule can be run again, event by event.", [],
        "device-model/tests/simulation.rs: a seed gives the same events; here --seed decides only what a driver does";
    107 "picture", PLATFORM, "The screen shows what the guest draws, byte for byte, and both sides count the same.",
        [with_stock(Needs::Screen, scenario::usual_picture)], "tests/picture.rs";
    108 "jobs", PLATFORM, "Through the stock driver each packet does in each mode what the twin says, and both sides count the same.",
        [with_stock(Needs::Nothing, jobs::jobs)], "tests/jobs.rs";
    109 "rings", PLATFORM, "A job that waits holds back its own ring, and no other.",
        [with_stock(Needs::AllFeatures, jobs::rings)], "tests/rings.rs";
    110 "jobs-by-vfio", PLATFORM, "The same jobs through a driver in user space, while ranges come and go.",
        [with_stock(Needs::Iommu, vfio::vfio)], "25";
    111 "driver-bugs", MEANING, "A driver that takes memory from under its jobs is found out, in every mode that looks.",
        [with_stock(Needs::Iommu, vfio::driver_bugs)], "tests/verdicts.rs";
    113 "flagged-bugs", MEANING, "Each seeded bug of a driver is flagged with job, packet, address and invalidation.",
        [Both(driver_bugs::all)];
    114 "nothing-in-silence", MEANING, "An audit of all that the device holds of a stock driver's memory finds nothing stale.",
        [with_stock(Needs::Strict, scenario::audit)], "tests/check_front_end.rs";
    115 "kexec", LIFE, "A kernel that jumps into another leaves no job behind.", [], NEEDS_A_KERNEL;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_unique_and_in_order_and_what_is_not_shown_has_a_reason() {
        assert!(ALL.is_sorted_by(|a, b| a.number < b.number));
        for scenario in ALL {
            let [soft, real] = [scenario.on_stage(Level::Soft).next().is_some(), scenario.has_real_part()];
            assert!(soft && real || !scenario.elsewhere.is_empty(), "{}: why not everywhere?", scenario.id());
        }
    }

    #[test]
    fn every_scenario_of_the_rig_has_a_row() {
        for stock in stock::ALL {
            let first = stock.numbers.first();
            assert!(ALL.iter().any(|row| Some(&row.number) == first), "{:?} {}", stock.numbers, stock.name);
        }
    }
}
