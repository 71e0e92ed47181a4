//! The commands and responses of virtio-gpu as they are in guest memory (virtio 1.3, 5.7.6; the section is given with
//! each). Knows layouts and numbers; knows nothing of what they mean. Payloads do not include the header.

use std::mem::size_of;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(crate) use virtio_bindings::virtio_gpu::{
    VIRTIO_GPU_BLOB_MEM_GUEST as BLOB_MEM_GUEST, VIRTIO_GPU_FLAG_FENCE as FLAG_FENCE,
    VIRTIO_GPU_FLAG_INFO_RING_IDX as FLAG_INFO_RING_IDX, VIRTIO_GPU_MAX_SCANOUTS as MAX_SCANOUTS,
};

/// The numbers of the commands (5.7.6.7).
pub(crate) mod command {
    /// AS_CREATE, of MirrorGPU's own range.
    pub(crate) const AS_CREATE: u32 = job_stream::AsCreate::NUMBER;
    /// AS_DESTROY.
    pub(crate) const AS_DESTROY: u32 = job_stream::AsDestroy::NUMBER;
    /// AS_INVALIDATE.
    pub(crate) const AS_INVALIDATE: u32 = job_stream::AsInvalidate::NUMBER;
    /// AS_FETCH_FAULT.
    pub(crate) const AS_FETCH_FAULT: u32 = job_stream::AsFetchFault::NUMBER;
    /// AS_ANSWER_FAULT.
    pub(crate) const AS_ANSWER_FAULT: u32 = job_stream::AsAnswerFault::NUMBER;
    /// All commands about address spaces, also those that are not known yet.
    pub(crate) const ADDRESS_SPACES: std::ops::Range<u32> = 0x4d00..0x4e00;
    pub(crate) use virtio_bindings::virtio_gpu::{
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_ATTACH_RESOURCE as CTX_ATTACH_RESOURCE,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_CREATE as CTX_CREATE,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_DESTROY as CTX_DESTROY,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_CTX_DETACH_RESOURCE as CTX_DETACH_RESOURCE,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET as GET_CAPSET,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_CAPSET_INFO as GET_CAPSET_INFO,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_DISPLAY_INFO as GET_DISPLAY_INFO,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_GET_EDID as GET_EDID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_MOVE_CURSOR as MOVE_CURSOR,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_ATTACH_BACKING as RESOURCE_ATTACH_BACKING,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_2D as RESOURCE_CREATE_2D,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_3D as RESOURCE_CREATE_3D,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_CREATE_BLOB as RESOURCE_CREATE_BLOB,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_DETACH_BACKING as RESOURCE_DETACH_BACKING,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_FLUSH as RESOURCE_FLUSH,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_RESOURCE_UNREF as RESOURCE_UNREF,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SET_SCANOUT as SET_SCANOUT,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SET_SCANOUT_BLOB as SET_SCANOUT_BLOB,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_SUBMIT_3D as SUBMIT_3D,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_FROM_HOST_3D as TRANSFER_FROM_HOST_3D,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_TO_HOST_2D as TRANSFER_TO_HOST_2D,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_TRANSFER_TO_HOST_3D as TRANSFER_TO_HOST_3D,
        virtio_gpu_ctrl_type_VIRTIO_GPU_CMD_UPDATE_CURSOR as UPDATE_CURSOR,
    };
}

/// The numbers of the responses (5.7.6.7).
pub(crate) mod response {
    pub(crate) use virtio_bindings::virtio_gpu::{
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_CONTEXT_ID as ERR_INVALID_CONTEXT_ID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_PARAMETER as ERR_INVALID_PARAMETER,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_RESOURCE_ID as ERR_INVALID_RESOURCE_ID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_INVALID_SCANOUT_ID as ERR_INVALID_SCANOUT_ID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_OUT_OF_MEMORY as ERR_OUT_OF_MEMORY,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_ERR_UNSPEC as ERR_UNSPEC,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_CAPSET as OK_CAPSET,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_CAPSET_INFO as OK_CAPSET_INFO,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_DISPLAY_INFO as OK_DISPLAY_INFO,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_EDID as OK_EDID,
        virtio_gpu_ctrl_type_VIRTIO_GPU_RESP_OK_NODATA as OK_NODATA,
    };
}

/// The numbers of the pixel formats (5.7.6.8, RESOURCE_CREATE_2D).
pub(crate) mod format {
    pub(crate) use virtio_bindings::virtio_gpu::{
        virtio_gpu_formats_VIRTIO_GPU_FORMAT_A8B8G8R8_UNORM as A8B8G8R8,
        virtio_gpu_formats_VIRTIO_GPU_FORMAT_A8R8G8B8_UNORM as A8R8G8B8,
        virtio_gpu_formats_VIRTIO_GPU_FORMAT_B8G8R8A8_UNORM as B8G8R8A8,
        virtio_gpu_formats_VIRTIO_GPU_FORMAT_B8G8R8X8_UNORM as B8G8R8X8,
        virtio_gpu_formats_VIRTIO_GPU_FORMAT_R8G8B8A8_UNORM as R8G8B8A8,
        virtio_gpu_formats_VIRTIO_GPU_FORMAT_R8G8B8X8_UNORM as R8G8B8X8,
        virtio_gpu_formats_VIRTIO_GPU_FORMAT_X8B8G8R8_UNORM as X8B8G8R8,
        virtio_gpu_formats_VIRTIO_GPU_FORMAT_X8R8G8B8_UNORM as X8R8G8B8,
    };
}

/// Bytes reserved for an EDID in its response (5.7.6.8, GET_EDID).
pub(crate) const EDID_BYTES: usize = 1024;

macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident: $size:literal { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
            #[repr(C)]
            pub(crate) struct $name {
                $(pub(crate) $field: $type,)*
            }
            const _: () = assert!(size_of::<$name>() == $size);
        )*
    };
}

wire! {
    /// The header of every command and response. 5.7.6.7, struct virtio_gpu_ctrl_hdr.
    Header: 24 {
        kind: U32,
        flags: U32,
        fence_id: U64,
        ctx_id: U32,
        ring_idx: u8,
        padding: [u8; 3],
    }
    /// 5.7.6.8, struct virtio_gpu_rect.
    Rect: 16 {
        x: U32,
        y: U32,
        width: U32,
        height: U32,
    }
    /// RESOURCE_CREATE_2D. 5.7.6.8, struct virtio_gpu_resource_create_2d.
    ResourceCreate2d: 16 {
        resource_id: U32,
        format: U32,
        width: U32,
        height: U32,
    }
    /// CTX_CREATE. 5.7.6.9, struct virtio_gpu_ctx_create.
    CtxCreate: 72 {
        nlen: U32,
        context_init: U32,
        debug_name: [u8; 64],
    }
    /// RESOURCE_CREATE_3D. Of linux/virtio_gpu.h, struct virtio_gpu_resource_create_3d.
    ResourceCreate3d: 48 {
        resource_id: U32,
        target: U32,
        format: U32,
        bind: U32,
        width: U32,
        height: U32,
        depth: U32,
        array_size: U32,
        last_level: U32,
        nr_samples: U32,
        flags: U32,
        padding: U32,
    }
    /// RESOURCE_CREATE_BLOB; `nr_entries` entries follow. 5.7.6.8, struct virtio_gpu_resource_create_blob.
    ResourceCreateBlob: 32 {
        resource_id: U32,
        blob_mem: U32,
        blob_flags: U32,
        nr_entries: U32,
        blob_id: U64,
        size: U64,
    }
    /// TRANSFER_TO_HOST_3D and TRANSFER_FROM_HOST_3D. Of linux/virtio_gpu.h, struct virtio_gpu_transfer_host_3d.
    TransferHost3d: 48 {
        x: U32,
        y: U32,
        z: U32,
        width: U32,
        height: U32,
        depth: U32,
        offset: U64,
        resource_id: U32,
        level: U32,
        stride: U32,
        layer_stride: U32,
    }
    /// SUBMIT_3D; `size` bytes of a job stream follow. Of linux/virtio_gpu.h, struct virtio_gpu_cmd_submit.
    Submit3d: 8 {
        size: U32,
        padding: U32,
    }
    /// OK_CAPSET_INFO, after the header. 5.7.6.8, struct virtio_gpu_resp_capset_info.
    CapsetInfo: 16 {
        capset_id: U32,
        capset_max_version: U32,
        capset_max_size: U32,
        padding: U32,
    }
    /// RESOURCE_UNREF, RESOURCE_DETACH_BACKING, CTX_ATTACH_RESOURCE and CTX_DETACH_RESOURCE. 5.7.6.8, struct
    /// virtio_gpu_resource_unref.
    ResourceId: 8 {
        resource_id: U32,
        padding: U32,
    }
    /// SET_SCANOUT. 5.7.6.8, struct virtio_gpu_set_scanout.
    SetScanout: 24 {
        rect: Rect,
        scanout_id: U32,
        resource_id: U32,
    }
    /// RESOURCE_FLUSH. 5.7.6.8, struct virtio_gpu_resource_flush.
    ResourceFlush: 24 {
        rect: Rect,
        resource_id: U32,
        padding: U32,
    }
    /// TRANSFER_TO_HOST_2D. 5.7.6.8, struct virtio_gpu_transfer_to_host_2d.
    TransferToHost2d: 32 {
        rect: Rect,
        offset: U64,
        resource_id: U32,
        padding: U32,
    }
    /// RESOURCE_ATTACH_BACKING; `nr_entries` entries follow. 5.7.6.8, struct virtio_gpu_resource_attach_backing.
    AttachBacking: 8 {
        resource_id: U32,
        nr_entries: U32,
    }
    /// One entry of a backing. 5.7.6.8, struct virtio_gpu_mem_entry.
    MemEntry: 16 {
        addr: U64,
        length: U32,
        padding: U32,
    }
    /// GET_CAPSET_INFO. 5.7.6.8, struct virtio_gpu_get_capset_info.
    GetCapsetInfo: 8 {
        capset_index: U32,
        padding: U32,
    }
    /// GET_CAPSET. 5.7.6.8, struct virtio_gpu_get_capset.
    GetCapset: 8 {
        capset_id: U32,
        capset_version: U32,
    }
    /// GET_EDID. 5.7.6.8, struct virtio_gpu_get_edid.
    GetEdid: 8 {
        scanout: U32,
        padding: U32,
    }
    /// 5.7.6.10, struct virtio_gpu_cursor_pos.
    CursorPos: 16 {
        scanout_id: U32,
        x: U32,
        y: U32,
        padding: U32,
    }
    /// UPDATE_CURSOR and MOVE_CURSOR. 5.7.6.10, struct virtio_gpu_update_cursor.
    UpdateCursor: 32 {
        pos: CursorPos,
        resource_id: U32,
        hot_x: U32,
        hot_y: U32,
        padding: U32,
    }
    /// 5.7.6.8, struct virtio_gpu_display_one.
    DisplayOne: 24 {
        rect: Rect,
        enabled: U32,
        flags: U32,
    }
    /// OK_DISPLAY_INFO, after the header. 5.7.6.8, struct virtio_gpu_resp_display_info.
    DisplayInfo: 384 {
        modes: [DisplayOne; MAX_SCANOUTS as usize],
    }
    /// OK_EDID, after the header. 5.7.6.8, struct virtio_gpu_resp_edid.
    Edid: 1032 {
        size: U32,
        padding: U32,
        edid: [u8; EDID_BYTES],
    }
    /// The configuration space. 5.7.4, struct virtio_gpu_config.
    Config: 16 {
        events_read: U32,
        events_clear: U32,
        num_scanouts: U32,
        num_capsets: U32,
    }
}
