//! What a scenario needs of its machine beyond its topology. Knows words and arguments; knows nothing of who needs them.

/// How a machine differs from its topology.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Variation {
    /// Words for the guest's command line, behind the topology's.
    pub guest: &'static str,
    /// Arguments of QEMU's, behind all others.
    pub qemu: &'static [&'static str],
    /// Modules to load behind the display's.
    pub modules: &'static [&'static str],
    /// Arguments of the back-end's, behind all others.
    pub backend: &'static [&'static str],
    /// The guest is of no use to anybody afterwards.
    pub alone: bool,
    /// MiB of memory, where the topology's do not do.
    pub memory: Option<u32>,
    /// The guest has its own kernel as a file, and an initramfs for it.
    pub second_kernel: bool,
    /// The arguments of QEMU's say which memory is whose: the topology does not.
    pub has_nodes: bool,
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
    };

    /// Whether a machine of the topology's own will do.
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }
}
