//! What a scenario needs of its machine beyond its topology. Knows words and arguments; knows nothing of the
//! scenarios.

/// How a machine differs from its topology.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Variation {
    /// Words for the guest's command line, after the topology's.
    pub guest: &'static str,
    /// Arguments of QEMU's, after all others.
    pub qemu: &'static [&'static str],
    /// Modules to load after the display's.
    pub modules: &'static [&'static str],
    /// Arguments of the back-end's, after all others.
    pub backend: &'static [&'static str],
    /// The guest cannot be used afterwards.
    pub alone: bool,
    /// MiB of memory, where the topology's are not enough.
    pub memory: Option<u32>,
    /// The guest has its own kernel as a file, and an initramfs for it.
    pub second_kernel: bool,
    /// The arguments of QEMU define the memory: the topology does not.
    pub has_nodes: bool,
    /// The guest loads no driver for the device but the user's own.
    pub no_driver: bool,
}

impl Variation {
    /// The topology's own machine.
    pub const NONE: Self = Self {
        guest: "",
        qemu: &[],
        modules: &[],
        backend: &[],
        alone: false,
        memory: None,
        second_kernel: false,
        has_nodes: false,
        no_driver: false,
    };

    /// Whether a machine of the topology itself is enough.
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }
}
