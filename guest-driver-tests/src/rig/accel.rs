//! Which accelerator QEMU uses. Knows nothing of QEMU's other options.

use std::fs::{self, File};

/// How the guest's CPU runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// On the host's CPU.
    Kvm,
    /// Translated by QEMU.
    Tcg,
}

impl Accel {
    /// KVM where it can really run a guest. A /dev/kvm that opens is not enough: on a nested host it may boot only
    /// guests that were made for it, and QEMU does not fall back once KVM has initialised. So the CPU also has to
    /// show its virtualization extension.
    pub fn detect() -> Self {
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let opens = File::options().read(true).write(true).open("/dev/kvm").is_ok();
        if opens && has_virtualization(&cpu) { Self::Kvm } else { Self::Tcg }
    }

    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// QEMU's options for it. Interrupt remapping needs the split interrupt controller under KVM.
    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm,kernel-irqchip=split", "-cpu", "host"],
            Self::Tcg => &["-accel", "tcg", "-cpu", "max"],
        }
    }
}

fn has_virtualization(cpuinfo: &str) -> bool {
    let mut flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    flags.any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_is_believed_only_where_the_cpu_shows_virtualization() {
        assert!(has_virtualization("model name\t: a cpu\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualization("flags\t\t: svm\n"));
        assert!(!has_virtualization("flags\t\t: fpu sse\nvmx flags\t: vnmi\n"));
    }
}
