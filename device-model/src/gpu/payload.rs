//! From the bytes of a command to its native value, and from a native answer to bytes. The only place that uses both.
//! Knows layouts; checks only lengths.

use std::mem::size_of;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::addr::Iova;
use crate::gpu::error::CommandError;
use crate::gpu::request::{
    AttachBacking, ContextResource, CreateBlob, CreateBuffer, CreateContext, CreateResource, Fence, Flush,
    GetCapset, GetCapsetInfo, GetEdid, Header, Nothing, OfAddressSpace, OfContext, OfResource, SetScanout,
    Submit, TransferBuffer, TransferToHost, UpdateCursor,
};
use crate::gpu::scanout::{CursorPosition, DisplayMode, DisplayModes};
use crate::image::Rect;
use crate::jobs::backing::RawEntry;
use crate::wire::gpu;

/// The payload of a command.
pub(crate) trait Payload<'a>: Sized {
    /// Parses it from `body`, which may be longer: the rest is ignored.
    fn parse(header: &Header, body: &'a [u8]) -> Result<Self, CommandError>;
}

/// Bytes of the longest response, that to GET_EDID.
pub(crate) const MAX_RESPONSE: usize = size_of::<gpu::Header>() + size_of::<gpu::Edid>();

/// Bytes of the longest valid command: RESOURCE_CREATE_BLOB with this many entries, or SUBMIT_3D with this many words.
pub(crate) fn longest_request(entries: u64, words: u32) -> usize {
    const FIXED: usize = size_of::<gpu::Header>() + size_of::<gpu::ResourceCreateBlob>();
    const { assert!(size_of::<gpu::ResourceCreateBlob>() >= size_of::<gpu::AttachBacking>()) };
    const { assert!(size_of::<gpu::ResourceCreateBlob>() >= size_of::<gpu::Submit3d>()) };
    let entries = usize::try_from(entries).unwrap_or(usize::MAX).saturating_mul(size_of::<gpu::MemEntry>());
    let words = usize::try_from(words).unwrap_or(usize::MAX).saturating_mul(size_of::<u32>());
    entries.max(words).saturating_add(FIXED)
}

/// Splits a `T` off the front of `bytes`.
fn take<T>(bytes: &[u8]) -> Result<(&T, &[u8]), CommandError>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    T::ref_from_prefix(bytes)
        .map_err(|_| CommandError::Truncated { needed: size_of::<T>() as u64, found: bytes.len() as u64 })
}

/// Splits the header off a command.
pub(crate) fn header(command: &[u8]) -> Result<(Header, &[u8]), CommandError> {
    let (wire, body) = take::<gpu::Header>(command)?;
    let flags = wire.flags.get();
    let ring_idx = (flags & gpu::FLAG_INFO_RING_IDX != 0).then_some(wire.ring_idx);
    let fence = (flags & gpu::FLAG_FENCE != 0).then_some(Fence {
        id: wire.fence_id.get(),
        ctx_id: wire.ctx_id.get(),
        ring_idx,
    });
    Ok((Header { kind: wire.kind.get(), ctx: wire.ctx_id.get(), ring: ring_idx, fence }, body))
}

/// Payloads that only copy a wire struct: `native from wire`.
macro_rules! payload {
    ($($wire:ident => $native:ident |$value:ident, $header:pat_param| $make:expr;)*) => {
        $(
            impl<'a> Payload<'a> for $native {
                fn parse($header: &Header, body: &'a [u8]) -> Result<Self, CommandError> {
                    let ($value, _) = take::<gpu::$wire>(body)?;
                    Ok($make)
                }
            }
        )*
    };
}

payload! {
    ResourceCreate2d => CreateResource |w, _| CreateResource {
        id: w.resource_id.get(),
        format: w.format.get(),
        width: w.width.get(),
        height: w.height.get(),
    };
    ResourceId => OfResource |w, _| OfResource { id: w.resource_id.get() };
    SetScanout => SetScanout |w, _| SetScanout {
        scanout: w.scanout_id.get(),
        resource: w.resource_id.get(),
        rect: w.rect.into(),
    };
    ResourceFlush => Flush |w, _| Flush { resource: w.resource_id.get(), rect: w.rect.into() };
    TransferToHost2d => TransferToHost |w, _| TransferToHost {
        resource: w.resource_id.get(),
        rect: w.rect.into(),
        offset: w.offset.get(),
    };
    CtxCreate => CreateContext |w, h| CreateContext { ctx: h.ctx, init: w.context_init.get() };
    ResourceId => ContextResource |w, h| ContextResource { ctx: h.ctx, resource: w.resource_id.get() };
    ResourceCreate3d => CreateBuffer |w, _| CreateBuffer {
        id: w.resource_id.get(),
        target: w.target.get(),
        width: w.width.get(),
        others: [w.height.get(), w.depth.get(), w.array_size.get()],
    };
    TransferHost3d => TransferBuffer |w, h| TransferBuffer {
        ctx: h.ctx,
        resource: w.resource_id.get(),
        x: w.x.get(),
        width: w.width.get(),
    };
    GetCapsetInfo => GetCapsetInfo |w, _| GetCapsetInfo { index: w.capset_index.get() };
    GetCapset => GetCapset |w, _| GetCapset { id: w.capset_id.get() };
    GetEdid => GetEdid |w, _| GetEdid { scanout: w.scanout.get() };
    UpdateCursor => UpdateCursor |w, _| UpdateCursor {
        position: CursorPosition { scanout: w.pos.scanout_id.get(), x: w.pos.x.get(), y: w.pos.y.get() },
        resource: w.resource_id.get(),
        hot_x: w.hot_x.get(),
        hot_y: w.hot_y.get(),
    };
}

impl<'a> Payload<'a> for Nothing {
    fn parse(_: &Header, _: &'a [u8]) -> Result<Self, CommandError> {
        Ok(Self)
    }
}

/// Commands whose layout stands in the table of `job_stream`.
macro_rules! address_space_payload {
    ($($Command:ident)*) => {
        $(
            impl<'a> Payload<'a> for OfAddressSpace<job_stream::$Command> {
                fn parse(header: &Header, body: &'a [u8]) -> Result<Self, CommandError> {
                    let (needed, found) = (job_stream::$Command::BYTES as u64, body.len() as u64);
                    let truncated = CommandError::Truncated { needed, found };
                    let command = job_stream::$Command::parse(body).ok_or(truncated)?;
                    Ok(Self { ctx: header.ctx, command })
                }
            }
        )*
    };
}
address_space_payload! { AsCreate AsDestroy AsInvalidate AsFetchFault AsAnswerFault }

impl<'a> Payload<'a> for OfContext {
    fn parse(header: &Header, _: &'a [u8]) -> Result<Self, CommandError> {
        Ok(Self { ctx: header.ctx })
    }
}

impl<'a> Payload<'a> for Submit<'a> {
    fn parse(header: &Header, body: &'a [u8]) -> Result<Self, CommandError> {
        let (wire, rest) = take::<gpu::Submit3d>(body)?;
        let size = wire.size.get();
        let truncated = CommandError::Truncated { needed: size.into(), found: rest.len() as u64 };
        let stream = usize::try_from(size).ok().and_then(|size| rest.get(..size)).ok_or(truncated)?;
        Ok(Self { ctx: header.ctx, ring: header.ring.unwrap_or(0), stream })
    }
}

/// The entries of an ATTACH_BACKING, still in the bytes of the command: nothing is allocated for them before the quota
/// is checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemEntries<'a>(&'a [gpu::MemEntry]);

impl MemEntries<'_> {
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = RawEntry> + '_ {
        self.0.iter().map(|entry| RawEntry { at: Iova::new(entry.addr.get()), len: entry.length.get() })
    }
}

impl<'a> MemEntries<'a> {
    /// Splits `count` entries off the front of `rest`.
    fn take(count: u32, rest: &'a [u8]) -> Result<Self, CommandError> {
        let truncated = || CommandError::Truncated {
            // OVERFLOW: 32 bits times 16.
            needed: u64::from(count).saturating_mul(size_of::<gpu::MemEntry>() as u64),
            found: rest.len() as u64,
        };
        let elements = usize::try_from(count).map_err(|_| truncated())?;
        let (entries, _) =
            <[gpu::MemEntry]>::ref_from_prefix_with_elems(rest, elements).map_err(|_| truncated())?;
        Ok(Self(entries))
    }
}

impl<'a> Payload<'a> for AttachBacking<MemEntries<'a>> {
    fn parse(_: &Header, body: &'a [u8]) -> Result<Self, CommandError> {
        let (wire, rest) = take::<gpu::AttachBacking>(body)?;
        let entries = MemEntries::take(wire.nr_entries.get(), rest)?;
        Ok(Self { resource: wire.resource_id.get(), entries })
    }
}

impl<'a> Payload<'a> for CreateBlob<MemEntries<'a>> {
    fn parse(_: &Header, body: &'a [u8]) -> Result<Self, CommandError> {
        let (wire, rest) = take::<gpu::ResourceCreateBlob>(body)?;
        let entries = MemEntries::take(wire.nr_entries.get(), rest)?;
        let (id, size) = (wire.resource_id.get(), wire.size.get());
        Ok(Self { id, memory: wire.blob_mem.get(), blob: wire.blob_id.get(), size, entries })
    }
}

impl From<gpu::Rect> for Rect {
    fn from(wire: gpu::Rect) -> Self {
        Self { x: wire.x.get(), y: wire.y.get(), width: wire.width.get(), height: wire.height.get() }
    }
}

impl From<Rect> for gpu::Rect {
    fn from(rect: Rect) -> Self {
        Self { x: rect.x.into(), y: rect.y.into(), width: rect.width.into(), height: rect.height.into() }
    }
}

impl From<DisplayMode> for gpu::DisplayOne {
    fn from(mode: DisplayMode) -> Self {
        Self { rect: mode.rect.into(), enabled: u32::from(mode.enabled).into(), flags: mode.flags.into() }
    }
}

/// The header of a response. All of its bytes are defined.
pub(crate) fn response_header(kind: u32, fence: Option<&Fence>) -> gpu::Header {
    let mut header = gpu::Header::new_zeroed();
    header.kind = kind.into();
    if let Some(fence) = fence {
        let ring = if fence.ring_idx.is_some() { gpu::FLAG_INFO_RING_IDX } else { 0 };
        header.flags = (gpu::FLAG_FENCE | ring).into();
        header.fence_id = fence.id.into();
        header.ctx_id = fence.ctx_id.into();
        header.ring_idx = fence.ring_idx.unwrap_or(0);
    }
    header
}

/// The payload of OK_DISPLAY_INFO.
pub(crate) fn display_info(modes: &DisplayModes) -> gpu::DisplayInfo {
    gpu::DisplayInfo { modes: modes.map(gpu::DisplayOne::from) }
}

/// The payload of OK_EDID. The caller has bounded the length of `edid`.
pub(crate) fn edid(edid: &[u8]) -> gpu::Edid {
    let mut wire = gpu::Edid::new_zeroed();
    let len = edid.len().min(gpu::EDID_BYTES);
    wire.edid.iter_mut().zip(edid).for_each(|(to, from)| *to = *from);
    wire.size = u32::try_from(len).unwrap_or(0).into();
    wire
}

/// The payload of OK_CAPSET_INFO.
pub(crate) fn capset_info(id: u32, version: u32, size: u32) -> gpu::CapsetInfo {
    gpu::CapsetInfo {
        capset_id: id.into(),
        capset_max_version: version.into(),
        capset_max_size: size.into(),
        padding: 0.into(),
    }
}

/// The configuration space.
pub(crate) fn config(scanouts: u32, capsets: u32) -> [u8; size_of::<gpu::Config>()] {
    let mut wire = gpu::Config::new_zeroed();
    wire.num_scanouts = scanouts.into();
    wire.num_capsets = capsets.into();
    let mut bytes = [0; size_of::<gpu::Config>()];
    bytes.copy_from_slice(wire.as_bytes());
    bytes
}
