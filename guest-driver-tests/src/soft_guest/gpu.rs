//! virtio-gpu commands as bytes (virtio 1.3, 5.7.6), made here and read by the device. Every field can be given a
//! wrong value: nothing is checked.

use super::addr::Iova;
use super::dma::Segment;

/// Command and response types (virtio 1.3, 5.7.6.7, enum virtio_gpu_ctrl_type).
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod kind {
    pub const GET_DISPLAY_INFO: u32 = 0x100;
    pub const RESOURCE_CREATE_2D: u32 = 0x101;
    pub const RESOURCE_UNREF: u32 = 0x102;
    pub const SET_SCANOUT: u32 = 0x103;
    pub const RESOURCE_FLUSH: u32 = 0x104;
    pub const TRANSFER_TO_HOST_2D: u32 = 0x105;
    pub const RESOURCE_ATTACH_BACKING: u32 = 0x106;
    pub const RESOURCE_DETACH_BACKING: u32 = 0x107;
    pub const GET_CAPSET_INFO: u32 = 0x108;
    pub const GET_CAPSET: u32 = 0x109;
    pub const GET_EDID: u32 = 0x10a;
    pub const RESOURCE_CREATE_BLOB: u32 = 0x10c;
    pub const CTX_CREATE: u32 = 0x200;
    pub const CTX_DESTROY: u32 = 0x201;
    pub const CTX_ATTACH_RESOURCE: u32 = 0x202;
    pub const CTX_DETACH_RESOURCE: u32 = 0x203;
    pub const RESOURCE_CREATE_3D: u32 = 0x204;
    pub const TRANSFER_TO_HOST_3D: u32 = 0x205;
    pub const TRANSFER_FROM_HOST_3D: u32 = 0x206;
    pub const SUBMIT_3D: u32 = 0x207;
    pub const AS_CREATE: u32 = 0x4d00;
    pub const AS_DESTROY: u32 = 0x4d01;
    pub const AS_INVALIDATE: u32 = 0x4d02;
    pub const UPDATE_CURSOR: u32 = 0x300;
    pub const MOVE_CURSOR: u32 = 0x301;
    pub const OK_NODATA: u32 = 0x1100;
    pub const OK_DISPLAY_INFO: u32 = 0x1101;
    pub const OK_CAPSET_INFO: u32 = 0x1102;
    pub const OK_CAPSET: u32 = 0x1103;
    pub const OK_EDID: u32 = 0x1104;
    pub const ERR_UNSPEC: u32 = 0x1200;
    pub const ERR_OUT_OF_MEMORY: u32 = 0x1201;
    pub const ERR_INVALID_SCANOUT_ID: u32 = 0x1202;
    pub const ERR_INVALID_RESOURCE_ID: u32 = 0x1203;
    pub const ERR_INVALID_CONTEXT_ID: u32 = 0x1204;
    pub const ERR_INVALID_PARAMETER: u32 = 0x1205;
}

/// The header has a fence.
pub const FLAG_FENCE: u32 = 1;
/// The header names a ring.
pub const FLAG_INFO_RING_IDX: u32 = 2;
/// Length of the header of each command and response (struct virtio_gpu_ctrl_hdr).
pub const HEADER_LEN: usize = 24;

/// A pixel format: the name gives the bytes in memory order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the specification")]
pub enum Format {
    B8G8R8A8 = 1,
    B8G8R8X8 = 2,
    A8R8G8B8 = 3,
    X8R8G8B8 = 4,
    R8G8B8A8 = 67,
    X8B8G8R8 = 68,
    A8B8G8R8 = 121,
    R8G8B8X8 = 134,
}

impl Format {
    /// All eight.
    pub const ALL: [Self; 8] = [
        Self::B8G8R8A8,
        Self::B8G8R8X8,
        Self::A8R8G8B8,
        Self::X8R8G8B8,
        Self::R8G8B8A8,
        Self::X8B8G8R8,
        Self::A8B8G8R8,
        Self::R8G8B8X8,
    ];

    /// The bytes of a pixel 0x??RRGGBB in memory. Alpha or padding is `other`.
    pub fn bytes(self, rgb: u32, other: u8) -> [u8; 4] {
        let [b, g, r, _] = rgb.to_le_bytes();
        match self {
            Self::B8G8R8A8 | Self::B8G8R8X8 => [b, g, r, other],
            Self::A8R8G8B8 | Self::X8R8G8B8 => [other, r, g, b],
            Self::R8G8B8A8 | Self::R8G8B8X8 => [r, g, b, other],
            Self::X8B8G8R8 | Self::A8B8G8R8 => [other, b, g, r],
        }
    }
}

/// A rectangle in pixels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rect {
    /// Left edge.
    pub x: u32,
    /// Upper edge.
    pub y: u32,
    /// Width.
    pub width: u32,
    /// Height.
    pub height: u32,
}

impl Rect {
    /// A rectangle at the origin.
    pub fn sized(width: u32, height: u32) -> Self {
        Self { x: 0, y: 0, width, height }
    }

    fn words(self) -> [u32; 4] {
        [self.x, self.y, self.width, self.height]
    }
}

/// A command, which can be sent any number of times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Its type.
    pub kind: u32,
    /// A fence that the response is to carry back.
    pub fence: Option<u64>,
    /// The context that it is for; 0: none.
    pub ctx: u32,
    /// The ring of the context that it is for.
    pub ring: Option<u8>,
    /// What follows the header.
    pub body: Vec<u8>,
    /// Bytes of the buffer for the response.
    pub response_len: usize,
}

impl Command {
    /// Any command, with a body of 32-bit words.
    pub fn new(kind: u32, words: &[u32]) -> Self {
        let body = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Self { kind, fence: None, ctx: 0, ring: None, body, response_len: HEADER_LEN }
    }

    /// The same with a fence.
    pub fn fenced(mut self, id: u64) -> Self {
        self.fence = Some(id);
        self
    }

    /// The same with another length of the buffer for the response.
    pub fn with_response_len(mut self, len: usize) -> Self {
        self.response_len = len;
        self
    }

    /// The same for a context.
    pub fn in_context(mut self, ctx: u32) -> Self {
        self.ctx = ctx;
        self
    }

    /// The same for a ring of its context.
    pub fn on_ring(mut self, ring: u8) -> Self {
        self.ring = Some(ring);
        self
    }

    /// CTX_CREATE.
    pub fn ctx_create(ctx: u32) -> Self {
        Self::ctx_create_for(ctx, 0)
    }

    /// CTX_CREATE with a `context_init`.
    pub fn ctx_create_for(ctx: u32, init: u32) -> Self {
        let mut words = [0; 18];
        words[1] = init;
        Self::new(kind::CTX_CREATE, &words).in_context(ctx)
    }

    /// RESOURCE_CREATE_BLOB of guest memory, mappable, as the stock driver sends it for VIRTGPU_BLOB_MEM_GUEST.
    pub fn create_blob(resource: u32, bytes: u64, entries: &[Segment]) -> Self {
        let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        let mut words = vec![resource, 1, 1, count, 0, 0, bytes as u32, (bytes >> 32) as u32];
        words.extend(entries.iter().flat_map(Segment::words));
        Self::new(kind::RESOURCE_CREATE_BLOB, &words)
    }

    /// CTX_DESTROY.
    pub fn ctx_destroy(ctx: u32) -> Self {
        Self::new(kind::CTX_DESTROY, &[]).in_context(ctx)
    }

    /// CTX_ATTACH_RESOURCE.
    pub fn ctx_attach(ctx: u32, resource: u32) -> Self {
        Self::new(kind::CTX_ATTACH_RESOURCE, &[resource, 0]).in_context(ctx)
    }

    /// CTX_DETACH_RESOURCE.
    pub fn ctx_detach(ctx: u32, resource: u32) -> Self {
        Self::new(kind::CTX_DETACH_RESOURCE, &[resource, 0]).in_context(ctx)
    }

    /// RESOURCE_CREATE_3D of a buffer, as the stock driver sends it when no Mesa asks for more.
    pub fn create_buffer(resource: u32, bytes: u32) -> Self {
        Self::new(kind::RESOURCE_CREATE_3D, &[resource, 0, 0, 0, bytes, 1, 1, 1, 0, 0, 0, 0])
    }

    /// SUBMIT_3D of a job stream, given by its words.
    pub fn submit_3d(ctx: u32, stream: &[u32]) -> Self {
        let mut words = vec![u32::try_from(stream.len() * 4).unwrap_or(u32::MAX), 0];
        words.extend(stream);
        Self::new(kind::SUBMIT_3D, &words).in_context(ctx)
    }

    /// AS_CREATE.
    pub fn as_create(ctx: u32, asid: u32, root: Iova) -> Self {
        let words = [asid, 0, root.0 as u32, (root.0 >> 32) as u32];
        Self::new(kind::AS_CREATE, &words).in_context(ctx)
    }

    /// AS_DESTROY.
    pub fn as_destroy(ctx: u32, asid: u32) -> Self {
        Self::new(kind::AS_DESTROY, &[asid, 0]).in_context(ctx)
    }

    /// AS_INVALIDATE of `first` to `last`: of leaves, or of tables too.
    pub fn as_invalidate(ctx: u32, asid: u32, tables_too: bool, (first, last): (u64, u64)) -> Self {
        let split = |number: u64| [number as u32, (number >> 32) as u32];
        let [first, last] = [first, last].map(split);
        let words = [asid, u32::from(!tables_too), first[0], first[1], last[0], last[1]];
        Self::new(kind::AS_INVALIDATE, &words).in_context(ctx)
    }

    /// GET_CAPSET of the job stream.
    pub fn job_capset() -> Self {
        let words = [job_stream::CAPSET_ID, job_stream::CAPSET_VERSION];
        Self::new(kind::GET_CAPSET, &words).with_response_len(HEADER_LEN + job_stream::Capset::BYTES)
    }

    /// RESOURCE_CREATE_2D.
    pub fn create_2d(resource: u32, format: Format, width: u32, height: u32) -> Self {
        Self::new(kind::RESOURCE_CREATE_2D, &[resource, format as u32, width, height])
    }

    /// RESOURCE_UNREF.
    pub fn unref(resource: u32) -> Self {
        Self::new(kind::RESOURCE_UNREF, &[resource, 0])
    }

    /// RESOURCE_ATTACH_BACKING.
    pub fn attach_backing(resource: u32, entries: &[Segment]) -> Self {
        let mut words = vec![resource, u32::try_from(entries.len()).unwrap_or(u32::MAX)];
        words.extend(entries.iter().flat_map(Segment::words));
        Self::new(kind::RESOURCE_ATTACH_BACKING, &words)
    }

    /// RESOURCE_DETACH_BACKING.
    pub fn detach_backing(resource: u32) -> Self {
        Self::new(kind::RESOURCE_DETACH_BACKING, &[resource, 0])
    }

    /// TRANSFER_TO_HOST_2D of a rectangle, whose first pixel is `offset` bytes into the backing.
    pub fn transfer(resource: u32, rect: Rect, offset: u64) -> Self {
        let [x, y, width, height] = rect.words();
        let words = [x, y, width, height, offset as u32, (offset >> 32) as u32, resource, 0];
        Self::new(kind::TRANSFER_TO_HOST_2D, &words)
    }

    /// SET_SCANOUT; resource 0 switches the scanout off.
    pub fn set_scanout(scanout: u32, resource: u32, rect: Rect) -> Self {
        let [x, y, width, height] = rect.words();
        Self::new(kind::SET_SCANOUT, &[x, y, width, height, scanout, resource])
    }

    /// RESOURCE_FLUSH.
    pub fn flush(resource: u32, rect: Rect) -> Self {
        let [x, y, width, height] = rect.words();
        Self::new(kind::RESOURCE_FLUSH, &[x, y, width, height, resource, 0])
    }

    /// GET_DISPLAY_INFO.
    pub fn display_info() -> Self {
        Self::new(kind::GET_DISPLAY_INFO, &[]).with_response_len(HEADER_LEN + 16 * 24)
    }

    /// GET_EDID.
    pub fn edid(scanout: u32) -> Self {
        Self::new(kind::GET_EDID, &[scanout, 0]).with_response_len(HEADER_LEN + 8 + 1024)
    }

    /// GET_CAPSET_INFO.
    pub fn capset_info(index: u32) -> Self {
        Self::new(kind::GET_CAPSET_INFO, &[index, 0]).with_response_len(HEADER_LEN + 16)
    }

    /// UPDATE_CURSOR, for the cursor queue; resource 0 hides the cursor.
    pub fn update_cursor(scanout: u32, (x, y): (u32, u32), resource: u32, hot: (u32, u32)) -> Self {
        Self::new(kind::UPDATE_CURSOR, &[scanout, x, y, 0, resource, hot.0, hot.1, 0])
    }

    /// MOVE_CURSOR, for the cursor queue; resource 0 hides the cursor.
    pub fn move_cursor(scanout: u32, (x, y): (u32, u32), resource: u32) -> Self {
        Self::new(kind::MOVE_CURSOR, &[scanout, x, y, 0, resource, 0, 0, 0])
    }

    /// Header and body.
    pub fn bytes(&self) -> Vec<u8> {
        let fence = if self.fence.is_some() { FLAG_FENCE } else { 0 };
        let flags = fence | if self.ring.is_some() { FLAG_INFO_RING_IDX } else { 0 };
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.body.len());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(self.fence.unwrap_or(0).to_le_bytes());
        bytes.extend(self.ctx.to_le_bytes());
        bytes.extend([self.ring.unwrap_or(0), 0, 0, 0]);
        bytes.extend(&self.body);
        bytes
    }
}

/// A response, as it was found in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The type of the command that it answers.
    pub command: u32,
    /// Bytes that the device says it wrote.
    pub bytes: Vec<u8>,
    /// Whether the buffer behind those bytes still holds the poison it was given.
    pub rest_intact: bool,
    /// How many commands the driver saw completed before this one.
    pub order: u64,
}

impl Response {
    fn word(&self, at: usize) -> u32 {
        let bytes = self.bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    }

    /// Its type; 0 if there is none.
    pub fn kind(&self) -> u32 {
        self.word(0)
    }

    /// The fence that it carries back.
    pub fn fence(&self) -> Option<u64> {
        let id = u64::from(self.word(8)) | u64::from(self.word(12)) << 32;
        (self.word(4) & FLAG_FENCE != 0).then_some(id)
    }

    /// The ring that it carries back.
    pub fn ring(&self) -> Option<u8> {
        let ring = self.bytes.get(20).copied();
        ring.filter(|_| self.word(4) & FLAG_INFO_RING_IDX != 0)
    }

    /// Whether it reports success.
    pub fn is_ok(&self) -> bool {
        (kind::OK_NODATA..kind::ERR_UNSPEC).contains(&self.kind())
    }

    /// What follows the header.
    pub fn body(&self) -> &[u8] {
        self.bytes.get(HEADER_LEN..).unwrap_or_default()
    }

    /// A 32-bit word of the body.
    pub fn body_word(&self, index: usize) -> u32 {
        self.word(HEADER_LEN + 4 * index)
    }
}
