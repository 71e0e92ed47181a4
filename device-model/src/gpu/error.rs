//! Why a command is refused, and the one function that turns that into a response type. Knows numbers and names; knows
//! nothing of how the device reached its decision.
//!
//! Where virtio 1.3 (5.7.6.8) does not specify the error for a misuse, it is that of QEMU's virtio-gpu.

use crate::gpu::quota::OverQuota;
use crate::gpu::scanout::CURSOR_SIZE;
use crate::image::Rect;
use crate::jobs::error::InvalidMemory;
use crate::jobs::job::JobError;
use crate::wire::gpu::response;

/// Why a command of the guest is answered with an error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// The command is shorter than its header, its payload or its entries.
    #[error("Command has {found} bytes where {needed} are due")]
    Truncated {
        /// Bytes that this part of the command needs.
        needed: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// There is no such command on this queue with the negotiated features.
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
    /// Memory that the command names cannot be used by a job.
    #[error(transparent)]
    Memory(#[from] InvalidMemory),
    /// Context 0 means "none" and cannot be created.
    #[error("Context 0 cannot be created")]
    ContextZero,
    /// There is such a context already.
    #[error("Context {ctx} exists already")]
    ContextExists {
        /// Context.
        ctx: u32,
    },
    /// A context with a capability set other than that of the job stream.
    #[error("Context {ctx} cannot be created for context_init {init:#x}")]
    ContextInit {
        /// Context.
        ctx: u32,
        /// What the guest asked for: a capability set in the low byte.
        init: u32,
    },
    /// A ring was named without the feature for rings.
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
    /// A job of the context failed: it accepts no more jobs until it is destroyed.
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
    /// An address space cannot be created like this.
    #[error("Address space {asid} cannot have the root table {root:#x} and flags {flags:#x}")]
    BadAddressSpace {
        /// Address space.
        asid: u32,
        /// Flags that were requested.
        flags: u32,
        /// Root table that was requested.
        root: u64,
    },
    /// There is such an address space already.
    #[error("Address space {asid} exists already")]
    AddressSpaceExists {
        /// Address space.
        asid: u32,
    },
    /// There is no such range of addresses, or flag.
    #[error(
        "AS_INVALIDATE of address space {asid} with flags {flags:#x} has no range: {first:#x} to {last:#x}"
    )]
    BadFlush {
        /// Address space.
        asid: u32,
        /// Flags.
        flags: u32,
        /// First address.
        first: u64,
        /// Last address.
        last: u64,
    },
    /// The address space was created without FAULTS.
    #[error("Address space {asid} has no faults to fetch or to answer: it was created without FAULTS")]
    FaultsNotAnswered {
        /// Address space.
        asid: u32,
    },
    /// The fault was never fetched, or is answered already.
    #[error("Address space {asid} has no unanswered fault {id}")]
    NoSuchFault {
        /// Address space.
        asid: u32,
        /// The fault.
        id: u64,
    },
    /// A fault can be answered with REPLAY or FAIL.
    #[error("Fault {id} of address space {asid} cannot be answered with {action}")]
    BadFaultAnswer {
        /// Address space.
        asid: u32,
        /// The fault.
        id: u64,
        /// What was asked for.
        action: u32,
    },
    /// The address space has ended, and with it what waited for its faults.
    #[error("The address space has ended")]
    AddressSpaceEnded,
    /// The context has no such address space.
    #[error("Address space {asid} does not exist in this context")]
    NoSuchAddressSpace {
        /// Address space.
        asid: u32,
    },
    /// A job names memory of a resource that has no backing.
    #[error("Resource {id} of a job has no backing")]
    NothingBehind {
        /// Resource.
        id: u32,
    },
    /// The first job of a context sets its mode.
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
    /// 3D resources can only be buffers.
    #[error("Resource {id} would be more than a buffer (target {target})")]
    NoBuffer {
        /// Resource.
        id: u32,
        /// The target that was requested, by Gallium's numbers.
        target: u32,
    },
    /// Blobs of host memory are not supported.
    #[error(
        "Resource {id} cannot be a blob of memory {memory}, blob {blob}: only of guest memory (1), blob 0"
    )]
    NotGuestMemory {
        /// Resource.
        id: u32,
        /// The kind of memory that was requested: VIRTIO_GPU_BLOB_MEM_…
        memory: u32,
        /// The host's blob id that was requested.
        blob: u64,
    },
    /// A blob must have entries for all of its bytes.
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
    /// A transfer of bytes outside of the buffer.
    #[error("Bytes {x}+{width} do not lie in resource {id}")]
    BytesOutside {
        /// Resource.
        id: u32,
        /// First byte.
        x: u32,
        /// How many.
        width: u32,
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
    /// There is no scanout of this number, so it has no EDID.
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
    /// The cursor image has the wrong size.
    #[error("Cursor of {width}x{height} pixels: it has to be {CURSOR_SIZE}x{CURSOR_SIZE}")]
    CursorSize {
        /// Pixels in a row.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// The host has no memory for an image.
    #[error("The host has no memory for an image of {bytes} bytes")]
    NoMemory {
        /// Its size.
        bytes: u64,
    },
    /// The guest exceeded a quota.
    #[error(transparent)]
    OverQuota(#[from] OverQuota),
    /// The command's job failed.
    #[error("Job failed")]
    Job(#[from] JobError),
}

impl CommandError {
    /// The response type that tells the guest (virtio 1.3, 5.7.6.7).
    pub fn status(&self) -> u32 {
        match self {
            Self::Truncated { .. }
            | Self::NoEntries { .. }
            | Self::Memory(_)
            | Self::NoSuchFormat { .. }
            | Self::NoPixels { .. }
            | Self::NoEdid { .. }
            | Self::NoSuchCapset { .. }
            | Self::RectOutside { .. }
            | Self::ScanoutTooSmall { .. }
            | Self::ModeSettled { .. }
            | Self::ContextInit { .. }
            | Self::NoRings { .. }
            | Self::NoSuchRing { .. }
            | Self::Stream(_)
            | Self::NoBuffer { .. }
            | Self::NotGuestMemory { .. }
            | Self::BlobTooLarge { .. }
            | Self::BytesOutside { .. }
            | Self::BadAddressSpace { .. }
            | Self::BadFlush { .. }
            | Self::FaultsNotAnswered { .. }
            | Self::NoSuchFault { .. }
            | Self::BadFaultAnswer { .. }
            | Self::CursorSize { .. } => response::ERR_INVALID_PARAMETER,
            Self::ResourceZero
            | Self::ResourceExists { .. }
            | Self::NoSuchResource { .. }
            | Self::NotAttached { .. }
            | Self::NothingBehind { .. }
            | Self::AddressSpaceExists { .. }
            | Self::NoSuchAddressSpace { .. }
            | Self::AddressSpaceEnded
            | Self::NotAnImage { .. } => response::ERR_INVALID_RESOURCE_ID,
            Self::ContextZero
            | Self::ContextExists { .. }
            | Self::NoSuchContext { .. }
            | Self::ContextLost { .. } => response::ERR_INVALID_CONTEXT_ID,
            Self::NoSuchScanout { .. } => response::ERR_INVALID_SCANOUT_ID,
            Self::OverQuota(_) | Self::NoMemory { .. } => response::ERR_OUT_OF_MEMORY,
            Self::Unknown { .. }
            | Self::BlobNotShown
            | Self::NoBacking { .. }
            | Self::BackingExists { .. }
            | Self::Job(_) => response::ERR_UNSPEC,
        }
    }
}
