//! Checks the guest's console, and QEMU's own output: a damaged driver shows there. Knows the kernel's messages;
//! knows nothing of their causes.

use std::ops::Range;

/// What the kernel's log must not contain, and what it means.
const TROUBLES: [(&str, &str); 10] = [
    ("WARNING: ", "the kernel warned"),
    ("BUG: ", "the kernel found a bug"),
    ("BUG ", "the slab allocator found a bug"),
    ("Oops: ", "the kernel oopsed"),
    ("Kernel panic", "the kernel panicked"),
    ("general protection fault", "the kernel faulted"),
    ("blocked for more than", "a task hangs"),
    ("self-detected stall", "a CPU hangs"),
    ("*ERROR* response 0x", "the device answered a command with an error"),
    ("*ERROR* timed out", "the device did not answer"),
];

/// What it must not contain either, unless a driver deliberately uses wrong addresses.
const FAULTS: [(&str, &str); 3] = [
    ("fault addr", "the IOMMU stopped an access of the device"),
    ("DRHD: handling fault status", "the IOMMU stopped an access of the device"),
    ("fault from EP", "the IOMMU stopped an access of the device"),
];

/// A fault of the guest's kernel, which is not the device's: what it writes then. The scenario that provokes it forgives
/// it, between two marks of the console; anywhere else the same lines are troubles.
#[derive(Clone, Copy, Debug)]
pub struct KernelFault {
    /// Lines with these words say that it has happened, and what.
    causes: &'static [&'static str],
    /// Lines with these words say by themselves that it has happened.
    lines: &'static [&'static str],
    /// Lines with these words may come with one of the causes, and mean nothing without: they name none.
    companions: &'static [&'static str],
}

/// Linux 6.12 leaves commands behind when virtio_gpu loses its device while they are in flight, whatever the device does.
/// 6.12.95 finds them in the slab allocator, which lists those of slabs that are not full, and warns. Both it and
/// 6.12.117, which says nothing of the commands, warn of the addresses that their ends would have given back.
pub const COMMANDS_LEFT_BEHIND: KernelFault = KernelFault {
    causes: &["BUG virtio-gpu-vbufs", "kmem_cache_destroy virtio-gpu-vbufs: Slab cache still has objects"],
    lines: &["drm_mm_takedown+"],
    companions: &["__kmem_cache_shutdown+", "kmem_cache_destroy+"],
};

/// Where an oops begins, and how many of its lines are shown.
const SERIOUS: [&str; 6] =
    ["BUG: ", "Oops: ", "WARNING: ", "Kernel panic", "general protection fault", "panicked at"];
const OOPS_LINES: usize = 45;
/// The text before the reason of a kernel panic, and the reason if the first process has died.
const PANIC: &str = "Kernel panic - not syncing: ";
const INIT_GONE: &str = "Attempted to kill init!";

/// What QEMU's own output must not contain. (Good runs print too: `Unexpected IOTLB message when virtio device is
/// stopped` and the like.)
const QEMU_TROUBLES: [(&str, &str); 2] = [
    ("Fail to invalidate device iotlb", "QEMU got no good ack for an INVALIDATE"),
    ("Failed to read msg header", "the back-end closed the connection"),
];

/// What of a guest's log is not held against it: what a scenario has caused on purpose, where it did.
#[derive(Clone, Debug, Default)]
pub struct Forgiven {
    /// Here the IOMMU may stop the device. The last of them may have no end yet.
    faults: Vec<Range<usize>>,
    /// In these places, lines with these words.
    lines: Vec<(Range<usize>, &'static str)>,
}

impl Forgiven {
    /// From the byte `from` of the log on, the IOMMU may stop the device; until [`Self::no_more_faults`].
    pub fn faults(&mut self, from: usize) {
        if self.faults.last().is_none_or(|last| last.end <= from) {
            self.faults.push(from..usize::MAX);
        }
    }

    /// From the byte `from` of the log on, the IOMMU has no reason to stop the device any more.
    pub fn no_more_faults(&mut self, from: usize) {
        if let Some(last) = self.faults.last_mut() {
            last.end = last.end.min(from);
        }
    }

    /// In `place`, lines that contain `words` are ignored. Returns how many there are.
    pub fn lines(&mut self, log: &str, place: Range<usize>, words: &'static str) -> usize {
        let count =
            log.get(place.clone()).map_or(0, |text| text.lines().filter(|line| line.contains(words)).count());
        self.lines.push((place, words));
        count
    }

    /// In `place`, the lines of a fault of the kernel are no trouble.
    pub fn kernel_fault(&mut self, log: &str, place: &Range<usize>, fault: &KernelFault) {
        fault.lines.iter().for_each(|words| _ = self.lines(log, place.clone(), words));
        let found: usize = fault.causes.iter().map(|words| self.lines(log, place.clone(), words)).sum();
        if found > 0 {
            self.lines.extend(fault.companions.iter().map(|words| (place.clone(), *words)));
        }
    }

    /// The lines of the log from the byte `from` on that tell of trouble.
    pub fn troubles(&self, log: &str, from: usize) -> Vec<String> {
        let lines = || self.unforgiven(log).filter(move |(start, _)| *start >= from);
        let may_fault = |start: usize| self.faults.iter().any(|place| place.contains(&start));
        let mut found = find(lines().map(|(_, line)| line), &TROUBLES);
        let strict = lines().filter(|(start, _)| !may_fault(*start)).map(|(_, line)| line);
        found.extend(find(strict, &FAULTS));
        found
    }

    /// The first serious words of the kernel's that nothing excuses, and what follows them: for a person, when there is no
    /// more to come.
    pub fn oops(&self, log: &str) -> Option<String> {
        let is_serious = |line: &str| SERIOUS.iter().any(|word| line.contains(word));
        let (start, _) = self.unforgiven(log).find(|(_, line)| is_serious(line))?;
        let lines = log.get(start..)?.lines().take(OOPS_LINES);
        Some(lines.map(str::trim_end).collect::<Vec<_>>().join("\n"))
    }

    /// The lines that are not forgiven by their words, each with where it begins.
    fn unforgiven<'a>(&'a self, log: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
        let mut at = 0;
        let with_places = log.split_inclusive('\n').map(move |line| {
            let start = at;
            at += line.len();
            (start, line)
        });
        with_places.filter(|(start, line)| {
            !self.lines.iter().any(|(place, words)| place.contains(start) && line.contains(words))
        })
    }
}

/// Why the kernel has panicked, in its own words, if it has. The agent is its init.
pub fn panic(log: &str) -> Option<String> {
    let (_, rest) = log.rsplit_once(PANIC)?;
    let words = rest.lines().next().unwrap_or_default().trim();
    let of_the_agent =
        if words.contains(INIT_GONE) { " (init is the agent: it has crashed or ended)" } else { "" };
    Some(format!("{words}{of_the_agent}"))
}

/// How many lines of the guest's log tell of an access that the IOMMU has stopped.
pub fn faults(log: &str) -> u64 {
    find(log.lines(), &FAULTS).len() as u64
}

/// The lines of QEMU's output that show trouble.
pub fn qemu_troubles(output: &str) -> Vec<String> {
    find(output.lines(), &QEMU_TROUBLES)
}

fn find<'a>(lines: impl Iterator<Item = &'a str>, troubles: &[(&str, &str)]) -> Vec<String> {
    let meaning =
        |line: &str| troubles.iter().find(|(pattern, _)| line.contains(pattern)).map(|(_, what)| *what);
    lines.filter_map(|line| Some(format!("{}: {}", meaning(line)?, line.trim()))).collect()
}

/// The last `count` lines of a log.
pub fn end(log: &str, count: usize) -> String {
    let skipped = log.lines().count().saturating_sub(count);
    let lines: Vec<_> = log.lines().skip(skipped).map(str::trim_end).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUG: &str =
        "[9.0] BUG virtio-gpu-vbufs (Not tainted): Objects remaining on __kmem_cache_shutdown()\n";
    const COMPANION: &str =
        "[9.1] WARNING: CPU: 0 PID: 1 at mm/slub.c:1149 __kmem_cache_shutdown+0x246/0x320\n";
    const TAKEDOWN: &str =
        "[9.2] WARNING: CPU: 0 PID: 1 at drivers/gpu/drm/drm_mm.c:964 drm_mm_takedown+0x27/0x30 [drm]\n";

    /// What there is against a log of which nothing is forgiven.
    fn troubles(log: &str) -> Vec<String> {
        Forgiven::default().troubles(log, 0)
    }

    #[test]
    fn a_warning_a_fault_and_a_refused_command_are_troubles() {
        let log = "[1.0] Booting\n[2.0] WARNING: CPU: 0 PID: 1 at mm/slub.c\n\
                   [3.0] DMAR: [DMA Read NO_PASID] Request device [00:02.0] fault addr 0xfff\n\
                   [4.0] [drm:virtio_gpu_dequeue_ctrl_func] *ERROR* response 0x1203 (command 0x105)\n";
        let found = troubles(log);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].starts_with("the kernel warned: [2.0]"));
        assert!(found[1].starts_with("the device answered a command with an error"));
        assert!(found[2].starts_with("the IOMMU stopped an access of the device: [3.0]"));
    }

    #[test]
    fn a_known_fault_of_the_kernel_is_forgiven_in_the_scenario_that_provokes_it_and_in_no_other() {
        let fault = [BUG, COMPANION, TAKEDOWN].concat();
        let log = format!("{fault}[9.3] The next scenario\n{fault}");
        let mut forgiven = Forgiven::default();
        assert_eq!(forgiven.troubles(&log, 0).len(), 6);
        forgiven.kernel_fault(&log, &(0..fault.len()), &COMMANDS_LEFT_BEHIND);
        // Judged by the scenario, by the next one, and at the end of the guest.
        assert!(forgiven.troubles(&fault, 0).is_empty());
        assert_eq!(forgiven.troubles(&log, fault.len()).len(), 3);
        assert_eq!(forgiven.troubles(&log, 0).len(), 3);
        // A place in which it did not come forgives nothing of another place.
        let mut forgiven = Forgiven::default();
        forgiven.kernel_fault(&log, &(fault.len()..fault.len() + 5), &COMMANDS_LEFT_BEHIND);
        assert_eq!(forgiven.troubles(&log, 0).len(), 6);
    }

    /// Slabs that are full are not listed.
    #[test]
    fn commands_that_fill_their_slabs_are_known_by_the_caches_name() {
        let log = "[9.0] kmem_cache_destroy virtio-gpu-vbufs: Slab cache still has objects when called from virtio_gpu\n\
                   [9.1] WARNING: CPU: 0 PID: 1 at mm/slab_common.c:521 kmem_cache_destroy+0x134/0x140\n";
        assert_eq!(troubles(log).len(), 1);
        let mut forgiven = Forgiven::default();
        forgiven.kernel_fault(log, &(0..log.len()), &COMMANDS_LEFT_BEHIND);
        assert!(forgiven.troubles(log, 0).is_empty());
        assert_eq!(forgiven.oops(log), None);
    }

    #[test]
    fn what_comes_with_a_known_fault_is_a_trouble_without_it() {
        let log = [TAKEDOWN, COMPANION].concat();
        let mut forgiven = Forgiven::default();
        forgiven.kernel_fault(&log, &(0..log.len()), &COMMANDS_LEFT_BEHIND);
        let [found] = &forgiven.troubles(&log, 0)[..] else { panic!() };
        assert!(found.contains("__kmem_cache_shutdown"), "{found}");
        let other = "[9.0] BUG kmalloc-64 (Not tainted): Poison overwritten\n";
        forgiven.kernel_fault(other, &(0..other.len()), &COMMANDS_LEFT_BEHIND);
        assert_eq!(forgiven.troubles(other, 0).len(), 1);
    }

    #[test]
    fn what_is_forgiven_is_so_in_its_place_only() {
        let refused = "[1.0] [drm] *ERROR* response 0x1203 (command 0x207)\n";
        let log = format!("{refused}[2.0] fine\n{refused}{refused}");
        let mut forgiven = Forgiven::default();
        assert_eq!(forgiven.troubles(&log, 0).len(), 3);
        assert_eq!(forgiven.troubles(&log, refused.len()).len(), 2);
        let place = refused.len()..log.len() - refused.len();
        assert_eq!(forgiven.lines(&log, place, "response 0x1203"), 1);
        assert_eq!(forgiven.troubles(&log, 0).len(), 2);
        assert_eq!(forgiven.lines(&log, 0..log.len(), "response 0x1200"), 0);
        assert_eq!(forgiven.troubles(&log, 0).len(), 2);
    }

    #[test]
    fn faults_are_forgiven_from_where_a_driver_makes_them_on() {
        let fault = "[3.0] DMAR: [DMA Read NO_PASID] Request device [00:02.0] fault addr 0xfff\n";
        let log = format!("{fault}[4.0] fine\n{fault}");
        let mut forgiven = Forgiven::default();
        forgiven.faults(fault.len());
        assert_eq!(forgiven.troubles(&log, 0).len(), 1);
        let mut forgiven = Forgiven::default();
        forgiven.faults(0);
        forgiven.faults(fault.len());
        assert!(forgiven.troubles(&log, 0).is_empty());
    }

    #[test]
    fn faults_are_forgiven_until_the_driver_that_makes_them_is_gone() {
        let fault = "[3.0] DMAR: [DMA Read NO_PASID] Request device [00:02.0] fault addr 0xfff\n";
        let log = fault.repeat(4);
        let mut forgiven = Forgiven::default();
        forgiven.no_more_faults(0);
        forgiven.faults(0);
        forgiven.no_more_faults(fault.len());
        forgiven.no_more_faults(2 * fault.len());
        assert_eq!(forgiven.troubles(&log, 0).len(), 3);
        forgiven.faults(3 * fault.len());
        assert_eq!(forgiven.troubles(&log, 0).len(), 2);
    }

    #[test]
    fn an_oops_is_shown_from_its_first_line_on() {
        let oops = |log: &str| Forgiven::default().oops(log);
        let log =
            "[1.0] fine\n[2.0] BUG: kernel NULL pointer dereference, address: 08\n[2.1] #PF: supervisor\n";
        assert!(oops(log).unwrap().starts_with("[2.0] BUG: kernel NULL"));
        assert!(oops(log).unwrap().ends_with("supervisor"));
        assert_eq!(oops("[1.0] fine"), None);
        let log = [BUG, COMPANION].concat();
        assert_eq!(oops(&log).as_deref(), Some(COMPANION.trim_end()));
        let mut forgiven = Forgiven::default();
        forgiven.kernel_fault(&log, &(0..log.len()), &COMMANDS_LEFT_BEHIND);
        assert_eq!(forgiven.oops(&log), None);
    }

    #[test]
    fn a_panic_is_told_in_the_kernels_words_and_whose_end_it_was() {
        assert_eq!(panic("[1.0] fine"), None);
        let log = "[4.6] Kernel panic - not syncing: VFS: Unable to mount root\r\n[4.7] CPU: 0\n";
        assert_eq!(panic(log).as_deref(), Some("VFS: Unable to mount root"));
        let agent =
            panic("[4.6] Kernel panic - not syncing: Attempted to kill init! exitcode=0x0b\n").unwrap();
        assert!(agent.ends_with("exitcode=0x0b (init is the agent: it has crashed or ended)"), "{agent}");
    }

    #[test]
    fn qemus_chatter_is_not_trouble_but_a_failed_invalidation_is() {
        assert!(qemu_troubles("Unexpected IOTLB message when virtio device is stopped").is_empty());
        assert_eq!(qemu_troubles("qemu: Fail to invalidate device iotlb").len(), 1);
    }

    #[test]
    fn the_end_of_a_log_is_its_last_lines() {
        assert_eq!(end("a\nb\r\nc\n", 2), "b\nc");
        assert_eq!(end("a", 5), "a");
    }
}
