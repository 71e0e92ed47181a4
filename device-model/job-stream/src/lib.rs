//! The job stream of MirrorGPU: what a guest submits with SUBMIT_3D. Made of one table of packets (`packets`), from
//! which the decoder, the builder's encoder, the rows of `MANUAL.md` and the C header come; of the verifier, which
//! judges a whole stream before anything happens; of the capability set; of the commands and page-table bits of address
//! spaces ([`address_space`]); and of a naive interpreter, the [`twin`].
//! Shared by the device and by guest programs, so it needs no more than an allocator. Knows words and their meaning;
//! knows nothing of resources, of the guest's memory, of engines or of virtio.
//!
//! A guest builds a stream with [`Stream`], the device takes it apart with [`verify()`]:
//!
//! ```
//! use job_stream::{Limits, Packet, Range, Space, Stream, verify};
//!
//! let buffer = Range::new(Space::resource(7), 0, 4096);
//! let words = Stream::new().fill(buffer, 0xdead_beef).signal(buffer.at().plus(4096), 1).finish();
//! let program = verify(&words, &Limits::default()).unwrap();
//! assert!(matches!(program.packets(), [Packet::Fill(_), Packet::Signal(_)]));
//! ```

#![no_std]
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::unwrap_used
    )
)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod address_space;
mod capset;
mod choice;
mod crc;
mod error;
mod field;
mod limits;
mod operand;
mod packets;
mod stream;
mod table;
pub mod twin;
mod verify;

pub use address_space::{
    AsAnswerFault, AsCommandInfo, AsCreate, AsDestroy, AsFault, AsFetchFault, AsInvalidate,
};
pub use capset::{CAPSET_ID, CAPSET_VERSION, Capset, CapsetError, CapsetFieldInfo};
pub use choice::{AtomicOperation, Choice, ChoiceInfo, Compare, Mode, ModeSet, Priority, SpinBehaviour};
pub use crc::Crc32c;
pub use error::{Problem, StreamError};
pub use field::{Kind, Payload};
pub use limits::{Limits, PacketSet};
pub use operand::{Access, At, Operand, Range, Space};
// All of it: a new row of the table needs no line here.
pub use packets::*;
pub use stream::Stream;
pub use table::{FieldInfo, FlagInfo, OperandInfo, PacketInfo, RuleInfo};
pub use verify::{Program, verify, verify_bytes};
