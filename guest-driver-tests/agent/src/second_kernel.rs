//! A second kernel beside the one that runs: loaded from the files that the agent was packed with, and entered by a jump
//! or by a crash; and what it can read of the first one's memory. Knows the kernel's calls and files; knows nothing of
//! what was in flight.

use crate::error::{AgentError, Doing};
use crate::system::{self, End};
use guest_agent::protocol::{Way, Word};
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// What the rig has packed.
const KERNEL: &str = "/second/kernel";
const INITRAMFS: &str = "/second/initramfs";
/// The load is for a crash (linux: include/uapi/linux/kexec.h).
const ON_CRASH: libc::c_ulong = 2;
/// What was said to the first kernel alone, and what is said to one that takes devices over from a kernel that crashed.
const FIRST_ONLY: &str = "crashkernel=";
const AFTER_A_CRASH: &str = "reset_devices nr_cpus=1";
/// Where the physical memory is listed, and what that calls the part that is kept for a crash.
const MEMORY: &str = "/proc/iomem";
const RESERVED: &str = "Crash kernel";
/// The memory of a kernel that has crashed, as an ELF file.
const DUMP: &str = "/proc/vmcore";
/// Sizes of its header and of its program headers, how many of these there are, and the kind that is memory.
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const COUNT_AT: usize = 56;
const LOAD: u64 = 1;

/// Loads it. Says which memory was kept for it, if any was: first byte and last.
pub(crate) fn load(way: Way) -> Result<Option<[u64; 2]>, AgentError> {
    let words = CString::new(words(&read("/proc/cmdline")?, way)).unwrap_or_default();
    let open = |path: &str| File::open(path).doing(format!("open {path}"));
    let (kernel, initramfs) = (open(KERNEL)?, open(INITRAMFS)?);
    let flags = if way == Way::Crash { ON_CRASH } else { 0 };
    let (len, address) = (words.as_bytes_with_nul().len(), words.as_ptr());
    let files = [kernel.as_raw_fd(), initramfs.as_raw_fd()];
    // SAFETY: both files are open, and the words end with a NUL within their length; all three outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_kexec_file_load, files[0], files[1], len, address, flags) };
    if result < 0 {
        return Err(io::Error::last_os_error()).doing("load a second kernel");
    }
    Ok(reserved(&read(MEMORY)?))
}

/// Enters it; returns only if the kernel refused.
pub(crate) fn enter(way: Way) -> AgentError {
    match way {
        Way::Jump => system::end(End::Kexec),
        Way::Crash => match fs::write("/proc/sysrq-trigger", "c") {
            Ok(()) => AgentError::Survived,
            Err(source) => AgentError::System { what: "crash".into(), source },
        },
    }
}

/// What the memory of a kernel that has crashed holds at these physical addresses.
pub(crate) fn dump(addresses: &[u64]) -> Result<Vec<Word>, AgentError> {
    let file = File::open(DUMP).doing(format!("open {DUMP}"))?;
    let ranges = ranges(&file)?;
    let word = |&address: &u64| {
        let at = ranges.iter().find_map(|range| range.place(address));
        let mut bytes = [0; 4];
        let at = at.ok_or(AgentError::NotInTheDump { address })?;
        file.read_exact_at(&mut bytes, at).doing(format!("read {DUMP} at {at:#x}"))?;
        Ok(Word { address, value: u32::from_le_bytes(bytes) })
    };
    addresses.iter().map(word).collect()
}

/// A range of physical memory, and where it stands in the dump.
struct DumpRange {
    offset: u64,
    address: u64,
    len: u64,
}

impl DumpRange {
    fn place(&self, address: u64) -> Option<u64> {
        let within = address.checked_sub(self.address).filter(|within| *within < self.len)?;
        Some(self.offset + within)
    }
}

/// The ranges that the dump has.
fn ranges(file: &File) -> Result<Vec<DumpRange>, AgentError> {
    let mut header = [0; ELF_HEADER];
    file.read_exact_at(&mut header, 0).doing(format!("read the header of {DUMP}"))?;
    let mut bytes = vec![0; PROGRAM_HEADER * number(&header, COUNT_AT, 2) as usize];
    file.read_exact_at(&mut bytes, ELF_HEADER as u64).doing(format!("read the headers of {DUMP}"))?;
    let is_memory = |header: &&[u8]| number(header, 0, 4) == LOAD;
    let range = |header: &[u8]| {
        let [offset, address, len] = [8, 24, 32].map(|at| number(header, at, 8));
        DumpRange { offset, address, len }
    };
    Ok(bytes.chunks(PROGRAM_HEADER).filter(is_memory).map(range).collect())
}

/// A number of an ELF header.
fn number(header: &[u8], at: usize, bytes: usize) -> u64 {
    let field = header.get(at..at + bytes).unwrap_or_default();
    field.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn read(path: &str) -> Result<String, AgentError> {
    fs::read_to_string(path).doing(format!("read {path}"))
}

/// What is said to the second kernel: what was said to the first.
fn words(first: &str, way: Way) -> String {
    let mut words: Vec<_> = first.split_whitespace().filter(|word| !word.starts_with(FIRST_ONLY)).collect();
    words.extend((way == Way::Crash).then_some(AFTER_A_CRASH));
    words.join(" ")
}

/// The range that /proc/iomem calls so.
fn reserved(list: &str) -> Option<[u64; 2]> {
    let line = list.lines().find(|line| line.trim_end().ends_with(RESERVED))?;
    let (first, last) = line.split_once(" : ")?.0.trim().split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some([number(first)?, number(last)?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_second_kernel_hears_what_the_first_heard_but_for_the_reservation() {
        let first = "console=ttyS0 crashkernel=256M intel_iommu=on\n";
        assert_eq!(words(first, Way::Jump), "console=ttyS0 intel_iommu=on");
        assert_eq!(words(first, Way::Crash), "console=ttyS0 intel_iommu=on reset_devices nr_cpus=1");
    }

    #[test]
    fn the_reserved_range_is_found_among_the_others() {
        let list = "00100000-3ffdefff : System RAM\n  2f000000-3effffff : Crash kernel\n";
        assert_eq!(reserved(list), Some([0x2f00_0000, 0x3eff_ffff]));
        assert_eq!(reserved("00100000-3ffdefff : System RAM\n"), None);
    }

    #[test]
    fn a_word_of_a_dump_is_found_by_its_physical_address() {
        let mut dump = vec![0; ELF_HEADER + 2 * PROGRAM_HEADER];
        dump[COUNT_AT] = 2;
        // A note, which is no memory; then 0x1000 bytes from the physical address 0x5000 on.
        dump[ELF_HEADER] = 4;
        let memory = ELF_HEADER + PROGRAM_HEADER;
        dump[memory] = LOAD as u8;
        for (at, value) in [(8, 0x200_u64), (24, 0x5000), (32, 0x1000)] {
            dump[memory + at..memory + at + 8].copy_from_slice(&value.to_le_bytes());
        }
        dump.resize(0x200, 0);
        dump.extend([1, 2, 3, 4, 5, 6, 7, 8]);
        let mut file = tempfile();
        file.write_all(&dump).unwrap();
        let ranges = ranges(&file).unwrap();
        let place = |address| ranges.iter().find_map(|range| range.place(address));
        assert_eq!((ranges.len(), place(0x5004)), (1, Some(0x204)));
        assert_eq!((place(0x4fff), place(0x6000)), (None, None));
    }

    /// A file without a name.
    fn tempfile() -> File {
        // SAFETY: the name ends with a NUL, and outlives the call.
        let file = unsafe { libc::memfd_create(c"dump".as_ptr(), 0) };
        assert!(file >= 0);
        // SAFETY: the call has opened it, for us alone.
        unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(file) }
    }
}
