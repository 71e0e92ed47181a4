//! The bytes of commands as a driver would write them, for tests. Commands of the cursor queue are marked.

use job_stream::{AsAnswerFault, AsCreate, AsDestroy, AsFetchFault, AsInvalidate};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::gpu::scanout::CursorPosition;
use crate::image::Rect;
use crate::wire::gpu::{self, command, format};

/// Bytes before the payload of a command.
pub const HEADER: usize = size_of::<gpu::Header>();

/// B8G8R8A8, the number of a format with an alpha channel.
pub const B8G8R8A8: u32 = format::B8G8R8A8;
/// B8G8R8X8, the number of the format that Linux uses for a screen.
pub const B8G8R8X8: u32 = format::B8G8R8X8;
/// The numbers of all formats.
pub const FORMATS: [u32; 8] = [
    format::B8G8R8A8,
    format::B8G8R8X8,
    format::A8R8G8B8,
    format::X8R8G8B8,
    format::R8G8B8A8,
    format::R8G8B8X8,
    format::A8B8G8R8,
    format::X8B8G8R8,
];

/// Command `kind` with this payload.
pub fn raw(kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut header = gpu::Header::new_zeroed();
    header.kind = kind.into();
    [header.as_bytes(), payload].concat()
}

fn build(kind: u32, payload: impl IntoBytes + Immutable) -> Vec<u8> {
    raw(kind, payload.as_bytes())
}

/// The same command with a fence.
pub fn fenced(mut request: Vec<u8>, fence: u64) -> Vec<u8> {
    let (header, _) = gpu::Header::mut_from_prefix(&mut request).expect("a command with its header");
    header.flags = (header.flags.get() | gpu::FLAG_FENCE).into();
    header.fence_id = fence.into();
    request
}

/// GET_DISPLAY_INFO.
pub fn get_display_info() -> Vec<u8> {
    raw(command::GET_DISPLAY_INFO, &[])
}

/// GET_EDID.
pub fn get_edid(scanout: u32) -> Vec<u8> {
    build(command::GET_EDID, gpu::GetEdid { scanout: scanout.into(), padding: 0.into() })
}

/// RESOURCE_CREATE_2D.
pub fn create_2d(id: u32, format: u32, width: u32, height: u32) -> Vec<u8> {
    let payload = gpu::ResourceCreate2d {
        resource_id: id.into(),
        format: format.into(),
        width: width.into(),
        height: height.into(),
    };
    build(command::RESOURCE_CREATE_2D, payload)
}

fn of_resource(kind: u32, id: u32) -> Vec<u8> {
    build(kind, gpu::ResourceId { resource_id: id.into(), padding: 0.into() })
}

/// RESOURCE_UNREF.
pub fn unref(id: u32) -> Vec<u8> {
    of_resource(command::RESOURCE_UNREF, id)
}

/// RESOURCE_DETACH_BACKING.
pub fn detach_backing(id: u32) -> Vec<u8> {
    of_resource(command::RESOURCE_DETACH_BACKING, id)
}

/// RESOURCE_ATTACH_BACKING with these entries: address and length.
pub fn attach_backing(id: u32, entries: &[(u64, u32)]) -> Vec<u8> {
    attach_backing_claiming(id, u32::try_from(entries.len()).expect("fewer than 2^32 entries"), entries)
}

/// RESOURCE_ATTACH_BACKING that claims to have `count` entries, however many it has.
pub fn attach_backing_claiming(id: u32, count: u32, entries: &[(u64, u32)]) -> Vec<u8> {
    let payload = gpu::AttachBacking { resource_id: id.into(), nr_entries: count.into() };
    with_entries(build(command::RESOURCE_ATTACH_BACKING, payload), entries)
}

fn with_entries(mut request: Vec<u8>, entries: &[(u64, u32)]) -> Vec<u8> {
    for &(addr, length) in entries {
        let entry = gpu::MemEntry { addr: addr.into(), length: length.into(), padding: 0.into() };
        request.extend_from_slice(entry.as_bytes());
    }
    request
}

/// SET_SCANOUT.
pub fn set_scanout(scanout: u32, id: u32, rect: Rect) -> Vec<u8> {
    let payload = gpu::SetScanout { rect: rect.into(), scanout_id: scanout.into(), resource_id: id.into() };
    build(command::SET_SCANOUT, payload)
}

/// TRANSFER_TO_HOST_2D.
pub fn transfer_to_host_2d(id: u32, rect: Rect, offset: u64) -> Vec<u8> {
    let payload = gpu::TransferToHost2d {
        rect: rect.into(),
        offset: offset.into(),
        resource_id: id.into(),
        padding: 0.into(),
    };
    build(command::TRANSFER_TO_HOST_2D, payload)
}

/// RESOURCE_FLUSH.
pub fn flush(id: u32, rect: Rect) -> Vec<u8> {
    let payload = gpu::ResourceFlush { rect: rect.into(), resource_id: id.into(), padding: 0.into() };
    build(command::RESOURCE_FLUSH, payload)
}

/// GET_CAPSET_INFO.
pub fn get_capset_info(index: u32) -> Vec<u8> {
    build(command::GET_CAPSET_INFO, gpu::GetCapsetInfo { capset_index: index.into(), padding: 0.into() })
}

/// GET_CAPSET.
pub fn get_capset(id: u32, version: u32) -> Vec<u8> {
    build(command::GET_CAPSET, gpu::GetCapset { capset_id: id.into(), capset_version: version.into() })
}

/// UPDATE_CURSOR, for the cursor queue. Resource 0 hides the cursor.
pub fn update_cursor(position: CursorPosition, id: u32, hot: (u32, u32)) -> Vec<u8> {
    cursor(command::UPDATE_CURSOR, position, id, hot)
}

/// MOVE_CURSOR, for the cursor queue; resource 0 hides the cursor.
pub fn move_cursor(position: CursorPosition, id: u32) -> Vec<u8> {
    cursor(command::MOVE_CURSOR, position, id, (0, 0))
}

fn cursor(kind: u32, position: CursorPosition, id: u32, hot: (u32, u32)) -> Vec<u8> {
    let pos = gpu::CursorPos {
        scanout_id: position.scanout.into(),
        x: position.x.into(),
        y: position.y.into(),
        padding: 0.into(),
    };
    let payload = gpu::UpdateCursor {
        pos,
        resource_id: id.into(),
        hot_x: hot.0.into(),
        hot_y: hot.1.into(),
        padding: 0.into(),
    };
    build(kind, payload)
}

/// The same command for context `ctx`.
pub fn in_context(mut request: Vec<u8>, ctx: u32) -> Vec<u8> {
    let (header, _) = gpu::Header::mut_from_prefix(&mut request).expect("a command with its header");
    header.ctx_id = ctx.into();
    request
}

/// CTX_CREATE.
pub fn ctx_create(ctx: u32) -> Vec<u8> {
    ctx_create_for(ctx, 0)
}

/// CTX_CREATE with a `context_init`.
pub fn ctx_create_for(ctx: u32, init: u32) -> Vec<u8> {
    let payload = gpu::CtxCreate { nlen: 0.into(), context_init: init.into(), debug_name: [0; 64] };
    in_context(build(command::CTX_CREATE, payload), ctx)
}

/// The same command on a ring of its context.
pub fn on_ring(mut request: Vec<u8>, ring: u8) -> Vec<u8> {
    let (header, _) = gpu::Header::mut_from_prefix(&mut request).expect("a command with its header");
    header.flags = (header.flags.get() | gpu::FLAG_INFO_RING_IDX).into();
    header.ring_idx = ring;
    request
}

/// RESOURCE_CREATE_BLOB of guest memory, with these entries: address and length.
pub fn create_blob(id: u32, size: u64, entries: &[(u64, u32)]) -> Vec<u8> {
    create_blob_of((gpu::BLOB_MEM_GUEST, 0), id, size, entries)
}

/// RESOURCE_CREATE_BLOB of any memory and blob.
pub fn create_blob_of((memory, blob): (u32, u64), id: u32, size: u64, entries: &[(u64, u32)]) -> Vec<u8> {
    let count = u32::try_from(entries.len()).expect("fewer than 2^32 entries");
    let payload = gpu::ResourceCreateBlob {
        resource_id: id.into(),
        blob_mem: memory.into(),
        blob_flags: 1.into(),
        nr_entries: count.into(),
        blob_id: blob.into(),
        size: size.into(),
    };
    with_entries(build(command::RESOURCE_CREATE_BLOB, payload), entries)
}

/// SET_SCANOUT_BLOB of the blob `id`.
pub fn set_scanout_blob(id: u32) -> Vec<u8> {
    let mut words = [0_u32; 18];
    words[5] = id;
    build(command::SET_SCANOUT_BLOB, words)
}

/// CTX_DESTROY.
pub fn ctx_destroy(ctx: u32) -> Vec<u8> {
    in_context(raw(command::CTX_DESTROY, &[]), ctx)
}

/// CTX_ATTACH_RESOURCE.
pub fn ctx_attach(ctx: u32, id: u32) -> Vec<u8> {
    in_context(of_resource(command::CTX_ATTACH_RESOURCE, id), ctx)
}

/// CTX_DETACH_RESOURCE.
pub fn ctx_detach(ctx: u32, id: u32) -> Vec<u8> {
    in_context(of_resource(command::CTX_DETACH_RESOURCE, id), ctx)
}

/// AS_CREATE.
pub fn as_create(ctx: u32, asid: u32, root: u64) -> Vec<u8> {
    as_create_with(ctx, asid, 0, root)
}

/// AS_CREATE with flags.
pub fn as_create_with(ctx: u32, asid: u32, flags: u32, root: u64) -> Vec<u8> {
    of_address_space(ctx, AsCreate::NUMBER, &AsCreate { asid, flags, root }.words())
}

/// AS_DESTROY.
pub fn as_destroy(ctx: u32, asid: u32) -> Vec<u8> {
    of_address_space(ctx, AsDestroy::NUMBER, &AsDestroy { asid, padding: 0 }.words())
}

/// AS_INVALIDATE of `first` to `last`.
pub fn as_invalidate(ctx: u32, asid: u32, flags: u32, (first, last): (u64, u64)) -> Vec<u8> {
    let words = AsInvalidate { asid, flags, first, last }.words();
    of_address_space(ctx, AsInvalidate::NUMBER, &words)
}

/// AS_FETCH_FAULT.
pub fn as_fetch_fault(ctx: u32, asid: u32) -> Vec<u8> {
    of_address_space(ctx, AsFetchFault::NUMBER, &AsFetchFault { asid, padding: 0 }.words())
}

/// AS_ANSWER_FAULT.
pub fn as_answer_fault(ctx: u32, asid: u32, action: u32, id: u64) -> Vec<u8> {
    of_address_space(ctx, AsAnswerFault::NUMBER, &AsAnswerFault { asid, action, id }.words())
}

fn of_address_space(ctx: u32, kind: u32, words: &[u32]) -> Vec<u8> {
    in_context(raw(kind, words.as_bytes()), ctx)
}

/// RESOURCE_CREATE_3D of a buffer, as Linux sends it for a resource of `width` bytes.
pub fn create_buffer(id: u32, width: u32) -> Vec<u8> {
    create_3d(id, 0, width, 1)
}

/// RESOURCE_CREATE_3D.
pub fn create_3d(id: u32, target: u32, width: u32, height: u32) -> Vec<u8> {
    let mut payload = gpu::ResourceCreate3d::new_zeroed();
    payload.resource_id = id.into();
    payload.target = target.into();
    (payload.width, payload.height) = (width.into(), height.into());
    (payload.depth, payload.array_size) = (1.into(), 1.into());
    build(command::RESOURCE_CREATE_3D, payload)
}

/// TRANSFER_TO_HOST_3D, or TRANSFER_FROM_HOST_3D, of bytes of a buffer.
pub fn transfer_3d(to_host: bool, ctx: u32, id: u32, x: u32, width: u32) -> Vec<u8> {
    let mut payload = gpu::TransferHost3d::new_zeroed();
    payload.resource_id = id.into();
    (payload.x, payload.width) = (x.into(), width.into());
    let kind = if to_host { command::TRANSFER_TO_HOST_3D } else { command::TRANSFER_FROM_HOST_3D };
    in_context(build(kind, payload), ctx)
}

/// SUBMIT_3D of a job stream.
pub fn submit_3d(ctx: u32, stream: &[u8]) -> Vec<u8> {
    let size = u32::try_from(stream.len()).expect("fewer than 2^32 bytes");
    submit_3d_claiming(ctx, size, stream)
}

/// SUBMIT_3D that claims to carry `size` bytes, however many it carries.
pub fn submit_3d_claiming(ctx: u32, size: u32, stream: &[u8]) -> Vec<u8> {
    let mut request =
        in_context(build(command::SUBMIT_3D, gpu::Submit3d { size: size.into(), padding: 0.into() }), ctx);
    request.extend_from_slice(stream);
    request
}
