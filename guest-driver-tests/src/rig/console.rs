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

/// A bug of the kernel itself: Linux 6.12 leaks objects when virtio_gpu is unbound with commands in flight, whatever
/// the device does. The slab allocator's report names it.
const KNOWN: &str = "BUG virtio-gpu-vbufs";
/// Where the kernel then warns: the allocator, twice, and the code that would have freed these objects.
const KNOWN_COMPANIONS: [&str; 3] = ["__kmem_cache_shutdown+", "kmem_cache_destroy+", "drm_mm_takedown+"];

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

/// What is ignored in a guest's log: what a scenario has provoked.
#[derive(Clone, Debug, Default)]
pub struct Forgiven {
    /// From here on the IOMMU may block accesses of the device.
    faults_from: Option<usize>,
    /// In these places, lines with these words.
    lines: Vec<(Range<usize>, &'static str)>,
}

impl Forgiven {
    /// From the byte `from` of the log on, the IOMMU may block accesses of the device.
    pub fn faults(&mut self, from: usize) {
        self.faults_from = Some(self.faults_from.map_or(from, |earlier| earlier.min(from)));
    }

    /// In `place`, lines that contain `words` are ignored. Returns how many there are.
    pub fn lines(&mut self, log: &str, place: Range<usize>, words: &'static str) -> usize {
        let count =
            log.get(place.clone()).map_or(0, |text| text.lines().filter(|line| line.contains(words)).count());
        self.lines.push((place, words));
        count
    }

    /// The lines of the log from the byte `from` on that show trouble.
    pub fn troubles(&self, log: &str, from: usize) -> Vec<String> {
        let mut at = 0;
        let (mut strict, mut lenient) = (String::new(), String::new());
        for line in log.split_inclusive('\n') {
            let start = at;
            at += line.len();
            let is_forgiven =
                self.lines.iter().any(|(place, words)| place.contains(&start) && line.contains(words));
            if start < from || is_forgiven {
                continue;
            }
            let may_fault = self.faults_from.is_some_and(|faults| start >= faults);
            if may_fault { lenient.push_str(line) } else { strict.push_str(line) }
        }
        let companion_is_known = log.contains(KNOWN);
        let mut found = judge(&strict, companion_is_known);
        found.extend(find(strict.lines(), &FAULTS));
        found.extend(judge(&lenient, companion_is_known));
        found
    }
}

/// The first serious message of the kernel and the lines after it: for a person, when the log ends there.
pub fn oops(log: &str) -> Option<String> {
    let companion_is_known = log.contains(KNOWN);
    let is_first =
        |line: &str| SERIOUS.iter().any(|word| line.contains(word)) && !is_known(line, companion_is_known);
    let mut lines = log.lines().skip_while(|line| !is_first(line)).take(OOPS_LINES).peekable();
    lines.peek()?;
    Some(lines.map(str::trim_end).collect::<Vec<_>>().join("\n"))
}

/// Why the kernel has panicked, in its own words, if it has. The agent is its init.
pub fn panic(log: &str) -> Option<String> {
    let (_, rest) = log.rsplit_once(PANIC)?;
    let words = rest.lines().next().unwrap_or_default().trim();
    let of_the_agent =
        if words.contains(INIT_GONE) { " (init is the agent: it has crashed or ended)" } else { "" };
    Some(format!("{words}{of_the_agent}"))
}

/// The lines of the guest's log that show trouble, each with its meaning.
pub fn troubles(log: &str) -> Vec<String> {
    let mut found = troubles_but_faults(log);
    found.extend(find(log.lines(), &FAULTS));
    found
}

/// The same without accesses that the IOMMU has blocked.
pub fn troubles_but_faults(log: &str) -> Vec<String> {
    judge(log, log.contains(KNOWN))
}

fn judge(log: &str, companion_is_known: bool) -> Vec<String> {
    find(log.lines().filter(|line| !is_known(line, companion_is_known)), &TROUBLES)
}

fn is_known(line: &str, companion_is_known: bool) -> bool {
    line.contains(KNOWN) || companion_is_known && KNOWN_COMPANIONS.iter().any(|place| line.contains(place))
}

/// How many lines of the guest's log report an access that the IOMMU has blocked.
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
        assert_eq!(troubles_but_faults(log), found[..2]);
    }

    #[test]
    fn a_known_fault_of_the_kernel_is_not_held_against_the_run() {
        let known = "[9.0] BUG virtio-gpu-vbufs (Not tainted): Objects remaining on __kmem_cache_shutdown()";
        let companion = "[9.1] WARNING: CPU: 0 PID: 1 at mm/slub.c:1149 __kmem_cache_shutdown+0x246/0x320";
        assert!(troubles(&format!("{known}\n{companion}")).is_empty());
        assert_eq!(troubles(companion).len(), 1);
        assert_eq!(troubles("[9.0] BUG kmalloc-64 (Not tainted): Poison overwritten").len(), 1);
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
        forgiven.faults(0);
        assert!(forgiven.troubles(&log, 0).is_empty());
    }

    #[test]
    fn an_oops_is_shown_from_its_first_line_on() {
        let log =
            "[1.0] fine\n[2.0] BUG: kernel NULL pointer dereference, address: 08\n[2.1] #PF: supervisor\n";
        assert!(oops(log).unwrap().starts_with("[2.0] BUG: kernel NULL"));
        assert!(oops(log).unwrap().ends_with("supervisor"));
        assert_eq!(oops("[1.0] fine"), None);
        let companion = "[9.1] WARNING: CPU: 0 PID: 1 at mm/slub.c:1149 __kmem_cache_shutdown+0x246/0x320";
        assert_eq!(oops(&format!("[9.0] {KNOWN} (Not tainted): Objects remaining\n{companion}")), None);
        assert_eq!(oops(companion).as_deref(), Some(companion));
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
