//! The three kinds of address that a front-end and its guest use, and permissions. Written independently of the
//! device's own types on purpose: a mistake there is not repeated here. Knows nothing of memory.

use std::fmt;

/// Bytes of a page, of a frame and of an IOMMU entry.
pub const PAGE: u64 = 4096;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` above. Test code: an overflow is a bug of the test.
            pub fn plus(self, bytes: u64) -> Self {
                Self(self.0 + bytes)
            }

            /// The start of the page that this address lies in.
            pub fn page(self) -> Self {
                Self(self.0 & !(PAGE - 1))
            }

            /// The distance from the start of the page.
            pub fn page_offset(self) -> u64 {
                self.0 & (PAGE - 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// What the device uses as an address: an I/O virtual address behind an IOMMU, a guest-physical one without.
    Iova
}
address! {
    /// A guest-physical address. A *frame* is one that is page-aligned.
    Gpa
}
address! {
    /// An address in the front-end's own address space, as the memory table and UPDATEs give it. It is invented here,
    /// and mapped nowhere.
    UserAddr
}

/// What the device may do with a mapped page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Permission {
    /// Only read it.
    ReadOnly,
    /// Only write it.
    WriteOnly,
    /// Both.
    ReadWrite,
}

impl Permission {
    /// Whether an access of this kind (a write, else a read) is allowed.
    pub fn allows(self, write: bool) -> bool {
        match self {
            Self::ReadOnly => !write,
            Self::WriteOnly => write,
            Self::ReadWrite => true,
        }
    }
}
