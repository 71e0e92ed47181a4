//! The commands of the device as native values. Knows what each carries; knows nothing of its bytes, which are in
//! `crate::wire`, or of what it does.

use crate::gpu::scanout::CursorPosition;
use crate::image::Rect;

/// The header of every command; its response returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The number of the command.
    pub(crate) kind: u32,
    /// The context, for commands that have one.
    pub(crate) ctx: u32,
    /// The ring of the context, if the guest named one.
    pub(crate) ring: Option<u8>,
    /// The fence that the response completes.
    pub(crate) fence: Option<Fence>,
}

/// A guest fence: the response returns all of this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fence {
    pub(crate) id: u64,
    pub(crate) ctx_id: u32,
    /// The ring, if the guest named one.
    pub(crate) ring_idx: Option<u8>,
}

/// A command without a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Nothing;

/// RESOURCE_CREATE_2D.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CreateResource {
    pub(crate) id: u32,
    pub(crate) format: u32,
    pub(crate) width: u32,
    pub(crate) height: u32,
}

/// RESOURCE_UNREF, RESOURCE_DETACH_BACKING.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OfResource {
    pub(crate) id: u32,
}

/// SET_SCANOUT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SetScanout {
    pub(crate) scanout: u32,
    /// 0: none.
    pub(crate) resource: u32,
    pub(crate) rect: Rect,
}

/// RESOURCE_FLUSH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flush {
    pub(crate) resource: u32,
    pub(crate) rect: Rect,
}

/// TRANSFER_TO_HOST_2D.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TransferToHost {
    pub(crate) resource: u32,
    pub(crate) rect: Rect,
    /// Where the first row of the rect begins in the backing.
    pub(crate) offset: u64,
}

/// RESOURCE_ATTACH_BACKING. `E` yields as many entries as the command really contains.
#[derive(Clone, Debug)]
pub(crate) struct AttachBacking<E> {
    pub(crate) resource: u32,
    pub(crate) entries: E,
}

/// CTX_CREATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CreateContext {
    pub(crate) ctx: u32,
    /// The capability set; 0: none is named.
    pub(crate) init: u32,
}

/// CTX_DESTROY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OfContext {
    pub(crate) ctx: u32,
}

/// CTX_ATTACH_RESOURCE, CTX_DETACH_RESOURCE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ContextResource {
    pub(crate) ctx: u32,
    pub(crate) resource: u32,
}

/// RESOURCE_CREATE_3D, as far as buffers need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CreateBuffer {
    pub(crate) id: u32,
    pub(crate) target: u32,
    /// In bytes.
    pub(crate) width: u32,
    /// Height, depth and array size: not a buffer unless they are all 1.
    pub(crate) others: [u32; 3],
}

/// RESOURCE_CREATE_BLOB. `E` as in [`AttachBacking`].
#[derive(Clone, Debug)]
pub(crate) struct CreateBlob<E> {
    pub(crate) id: u32,
    /// The kind of memory.
    pub(crate) memory: u32,
    /// The host's blob id; 0: none.
    pub(crate) blob: u64,
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) entries: E,
}

/// TRANSFER_TO_HOST_3D, TRANSFER_FROM_HOST_3D, as far as buffers need them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TransferBuffer {
    pub(crate) ctx: u32,
    pub(crate) resource: u32,
    pub(crate) x: u32,
    pub(crate) width: u32,
}

/// SUBMIT_3D, with as many bytes as it announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Submit<'a> {
    pub(crate) ctx: u32,
    pub(crate) ring: u8,
    pub(crate) stream: &'a [u8],
}

/// A command about an address space of a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OfAddressSpace<C> {
    pub(crate) ctx: u32,
    pub(crate) command: C,
}

/// GET_CAPSET_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GetCapsetInfo {
    pub(crate) index: u32,
}

/// GET_CAPSET.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GetCapset {
    pub(crate) id: u32,
}

/// GET_EDID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GetEdid {
    pub(crate) scanout: u32,
}

/// UPDATE_CURSOR; MOVE_CURSOR, which uses the position only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UpdateCursor {
    pub(crate) position: CursorPosition,
    /// 0: no cursor.
    pub(crate) resource: u32,
    pub(crate) hot_x: u32,
    pub(crate) hot_y: u32,
}
