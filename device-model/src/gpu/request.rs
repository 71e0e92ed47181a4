//! The commands of the 2D device as native values. Knows what each carries; knows nothing of its bytes, which stand
//! in `crate::wire`, or of what it does.

use crate::addr::Iova;
use crate::gpu::scanout::{CursorPosition, Rect};

/// What stands before every command and is given back with its response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The number of the command.
    pub(crate) kind: u32,
    /// The context that the command is for, where a command is for one.
    pub(crate) ctx: u32,
    /// The ring of the context, where the guest said that it named one.
    pub(crate) ring: Option<u8>,
    /// The fence that the response completes.
    pub(crate) fence: Option<Fence>,
}

/// A fence of the guest: its response is to carry all of this back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fence {
    pub(crate) id: u64,
    pub(crate) ctx_id: u32,
    /// The ring, where the guest said that it named one.
    pub(crate) ring_idx: Option<u8>,
}

/// A command without anything behind its header.
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
    /// Where in the backing the first row of the rect begins.
    pub(crate) offset: u64,
}

/// RESOURCE_ATTACH_BACKING. `E` yields as many entries as the command really holds.
#[derive(Clone, Debug)]
pub(crate) struct AttachBacking<E> {
    pub(crate) resource: u32,
    pub(crate) entries: E,
}

/// One entry of a backing, unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RawEntry {
    pub(crate) at: Iova,
    pub(crate) len: u32,
}

/// CTX_CREATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CreateContext {
    pub(crate) ctx: u32,
    /// The capability set that it speaks; 0: it does not say.
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

/// RESOURCE_CREATE_3D, as far as a buffer has a use for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CreateBuffer {
    pub(crate) id: u32,
    pub(crate) target: u32,
    /// In bytes.
    pub(crate) width: u32,
    /// Height, depth and array size: what makes it more than a buffer if it is not 1.
    pub(crate) others: [u32; 3],
}

/// RESOURCE_CREATE_BLOB. `E` as in [`AttachBacking`].
#[derive(Clone, Debug)]
pub(crate) struct CreateBlob<E> {
    pub(crate) id: u32,
    /// Whose memory it is.
    pub(crate) memory: u32,
    /// What of the host it stands for; 0: nothing.
    pub(crate) blob: u64,
    /// In bytes.
    pub(crate) size: u64,
    pub(crate) entries: E,
}

/// TRANSFER_TO_HOST_3D, TRANSFER_FROM_HOST_3D, as far as a buffer has a use for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TransferBuffer {
    pub(crate) ctx: u32,
    pub(crate) resource: u32,
    pub(crate) x: u32,
    pub(crate) width: u32,
}

/// SUBMIT_3D, with as many bytes as it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Submit<'a> {
    pub(crate) ctx: u32,
    pub(crate) ring: u8,
    pub(crate) stream: &'a [u8],
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

/// UPDATE_CURSOR; MOVE_CURSOR, which looks at the position only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UpdateCursor {
    pub(crate) position: CursorPosition,
    /// 0: no cursor.
    pub(crate) resource: u32,
    pub(crate) hot_x: u32,
    pub(crate) hot_y: u32,
}
