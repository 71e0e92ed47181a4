//! Why a command is refused, and the one function that says so in the guest's words. Knows numbers and names;
//! knows nothing of how the device came to its judgement.
//!
//! Where virtio 1.3 (5.7.6.8) does not say which error a misuse gets, it is the one of QEMU's own virtio-gpu.

use crate::addr::RangeError;
use crate::gpu::quota::OverQuota;
use crate::gpu::scanout::{CURSOR_SIZE, Rect};
use crate::jobs::job::JobError;
use crate::wire::gpu::response;

/// Why a command of the guest is answered with an error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// The command ends before its header, its payload or its entries do.
    #[error("Command has {found} bytes where {needed} are due")]
    Truncated {
        /// Bytes that this part of the command takes.
        needed: u64,
        /// Bytes that are there.
        found: u64,
    },
    /// No command of this device has this number, on this queue and with the features that were negotiated.
    #[error("Command {kind:#x} is not known here")]
    Unknown {
        /// The number.
        kind: u32,
    },
    /// Resource 0 means "none" and cannot be created.
    #[error("Resource 0 cannot be created")]
    ResourceZero,
    /// There is such a resource already.
    #[error("Resource {id} exists already")]
    ResourceExists {
        /// Resource.
        id: u32,
    },
    /// There is no such resource.
    #[error("Resource {id} does not exist")]
    NoSuchResource {
        /// Resource.
        id: u32,
    },
    /// The resource has no backing.
    #[error("Resource {id} has no backing")]
    NoBacking {
        /// Resource.
        id: u32,
    },
    /// The resource has a backing already, and keeps it.
    #[error("Resource {id} has a backing already")]
    BackingExists {
        /// Resource.
        id: u32,
    },
    /// A backing of no entries.
    #[error("Backing for resource {id} has no entries")]
    NoEntries {
        /// Resource.
        id: u32,
    },
    /// An entry of a backing is empty or wraps.
    #[error("Entry {index} of a backing is no range")]
    BadEntry {
        /// Which one, from 0.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: RangeError,
    },
    /// Context 0 means "none" and cannot be created.
    #[error("Context 0 cannot be created")]
    ContextZero,
    /// There is such a context already.
    #[error("Context {ctx} exists already")]
    ContextExists {
        /// Context.
        ctx: u32,
    },
    /// A context that speaks another capability set than that of the job stream.
    #[error("Context {ctx} cannot be created for context_init {init:#x}")]
    ContextInit {
        /// Context.
        ctx: u32,
        /// What the guest asked for: a capability set in the low byte.
        init: u32,
    },
    /// A ring was named without the feature that there are rings.
    #[error("Ring {ring} is named without VIRTIO_GPU_F_CONTEXT_INIT")]
    NoRings {
        /// Ring.
        ring: u8,
    },
    /// There is no such ring.
    #[error("Ring {ring} does not exist: a context has {}", crate::gpu::device::RINGS)]
    NoSuchRing {
        /// Ring.
        ring: u8,
    },
    /// There is no such context.
    #[error("Context {ctx} does not exist")]
    NoSuchContext {
        /// Context.
        ctx: u32,
    },
    /// A job of the context failed: it takes no more until it is destroyed.
    #[error("Context {ctx} is lost: a job of it failed")]
    ContextLost {
        /// Context.
        ctx: u32,
    },
    /// A job may use only what is attached to its context.
    #[error("Resource {id} is not attached to context {ctx}")]
    NotAttached {
        /// Resource.
        id: u32,
        /// Context.
        ctx: u32,
    },
    /// A job names memory of a resource that has no backing.
    #[error("Resource {id} of a job has no backing")]
    NothingBehind {
        /// Resource.
        id: u32,
    },
    /// The mode of a context is settled by its first job.
    #[error("Context {ctx} has the mode {settled}, and a job asks for {wanted}")]
    ModeSettled {
        /// Context.
        ctx: u32,
        /// The mode of the context.
        settled: job_stream::Mode,
        /// The mode that the job asks for.
        wanted: job_stream::Mode,
    },
    /// The job stream breaks a rule of its manual.
    #[error("{0}")]
    Stream(job_stream::StreamError),
    /// 3D resources are buffers here, and nothing else.
    #[error("Resource {id} would be more than a buffer (target {target})")]
    NoBuffer {
        /// Resource.
        id: u32,
        /// What it was to be, by Gallium's numbers.
        target: u32,
    },
    /// Blobs of the host's memory are not for this device.
    #[error(
        "Resource {id} cannot be a blob of memory {memory}, blob {blob}: only of guest memory (1), blob 0"
    )]
    NotGuestMemory {
        /// Resource.
        id: u32,
        /// Whose memory it was to be: VIRTIO_GPU_BLOB_MEM_…
        memory: u32,
        /// What of the host it was to stand for.
        blob: u64,
    },
    /// A blob has entries for all of its bytes.
    #[error("Resource {id} would be a blob of {size:#x} bytes with entries for {backed:#x}")]
    BlobTooLarge {
        /// Resource.
        id: u32,
        /// Bytes of the blob.
        size: u64,
        /// Bytes of its entries.
        backed: u64,
    },
    /// Only images of the host can be shown.
    #[error("A blob cannot be shown: transfer its pixels to a 2D resource")]
    BlobNotShown,
    /// A command for images names a buffer.
    #[error("Resource {id} is a buffer, not an image")]
    NotAnImage {
        /// Resource.
        id: u32,
    },
    /// A transfer of bytes that the buffer does not have.
    #[error("Bytes {x}+{width} do not lie in resource {id}")]
    BytesOutside {
        /// Resource.
        id: u32,
        /// First byte.
        x: u32,
        /// How many.
        width: u32,
    },
    /// An operand of a job does not lie in its resource.
    #[error("Packet {packet}, {field}: {range} lies outside of the {bytes:#x} bytes of its resource")]
    OperandOutside {
        /// Packet, counted from 0.
        packet: usize,
        /// Field that names it.
        field: &'static str,
        /// Bytes that it names.
        range: job_stream::Range,
        /// How long the resource is.
        bytes: u64,
    },
    /// A value does not lie in one aligned piece of the backing.
    #[error("Packet {packet}, {field}: {range} is split, or not aligned, by the backing of its resource")]
    OperandSplit {
        /// Packet, counted from 0.
        packet: usize,
        /// Field that names it.
        field: &'static str,
        /// Bytes that it names.
        range: job_stream::Range,
    },
    /// There is no such pixel format.
    #[error("Format {format} does not exist")]
    NoSuchFormat {
        /// Number of the format.
        format: u32,
    },
    /// An image needs pixels.
    #[error("Image of {width}x{height} has no pixels")]
    NoPixels {
        /// Pixels in a row.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// There is no such scanout.
    #[error("Scanout {scanout} does not exist: there are {scanouts}")]
    NoSuchScanout {
        /// Scanout, from 0.
        scanout: u32,
        /// How many there are.
        scanouts: u32,
    },
    /// There is no such scanout to give an EDID of.
    #[error("Scanout {scanout} has no EDID: there are {scanouts} scanouts")]
    NoEdid {
        /// Scanout, from 0.
        scanout: u32,
        /// How many there are.
        scanouts: u32,
    },
    /// There is no such capability set.
    #[error("Capability set {capset} does not exist")]
    NoSuchCapset {
        /// Index or id.
        capset: u32,
    },
    /// The rect reaches beyond its image.
    #[error("Rect {rect} lies outside of an image of {width}x{height}")]
    RectOutside {
        /// Rect.
        rect: Rect,
        /// Pixels in a row of the image.
        width: u32,
        /// Rows of the image.
        height: u32,
    },
    /// A scanout is at least [`MIN_SCANOUT`](crate::gpu::device::MIN_SCANOUT) pixels wide and high.
    #[error("Rect {rect} is too small for a scanout")]
    ScanoutTooSmall {
        /// Rect.
        rect: Rect,
    },
    /// The rows of a transfer would end past 2^64 - 1 bytes in the backing.
    #[error("Transfer from offset {offset:#x} of a backing wraps")]
    OffsetWraps {
        /// Offset in the backing.
        offset: u64,
    },
    /// A cursor has another size.
    #[error("Cursor of {width}x{height} pixels: it has to be {CURSOR_SIZE}x{CURSOR_SIZE}")]
    CursorSize {
        /// Pixels in a row.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// The guest has taken all that it may.
    #[error(transparent)]
    OverQuota(#[from] OverQuota),
    /// The job of the command did not come to its end.
    #[error("Job failed")]
    Job(#[from] JobError),
}

impl CommandError {
    /// The response type that tells the guest (virtio 1.3, 5.7.6.7).
    pub fn status(&self) -> u32 {
        match self {
            Self::Truncated { .. }
            | Self::NoEntries { .. }
            | Self::BadEntry { .. }
            | Self::NoSuchFormat { .. }
            | Self::NoPixels { .. }
            | Self::NoEdid { .. }
            | Self::NoSuchCapset { .. }
            | Self::RectOutside { .. }
            | Self::ScanoutTooSmall { .. }
            | Self::OffsetWraps { .. }
            | Self::ModeSettled { .. }
            | Self::ContextInit { .. }
            | Self::NoRings { .. }
            | Self::NoSuchRing { .. }
            | Self::Stream(_)
            | Self::NoBuffer { .. }
            | Self::NotGuestMemory { .. }
            | Self::BlobTooLarge { .. }
            | Self::BytesOutside { .. }
            | Self::OperandOutside { .. }
            | Self::OperandSplit { .. }
            | Self::CursorSize { .. } => response::ERR_INVALID_PARAMETER,
            Self::ResourceZero
            | Self::ResourceExists { .. }
            | Self::NoSuchResource { .. }
            | Self::NotAttached { .. }
            | Self::NothingBehind { .. }
            | Self::NotAnImage { .. } => response::ERR_INVALID_RESOURCE_ID,
            Self::ContextZero
            | Self::ContextExists { .. }
            | Self::NoSuchContext { .. }
            | Self::ContextLost { .. } => response::ERR_INVALID_CONTEXT_ID,
            Self::NoSuchScanout { .. } => response::ERR_INVALID_SCANOUT_ID,
            Self::OverQuota(_) => response::ERR_OUT_OF_MEMORY,
            Self::Unknown { .. }
            | Self::BlobNotShown
            | Self::NoBacking { .. }
            | Self::BackingExists { .. }
            | Self::Job(_) => response::ERR_UNSPEC,
        }
    }
}
