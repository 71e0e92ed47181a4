//! From bytes to commands: the table of all commands. Knows numbers, names, payloads and queues; checks nothing else.
//!
//! A new command is one row here, a payload in `payload.rs`, and a handler in `crate::gpu::device`.

use job_stream::{AsAnswerFault, AsCreate, AsDestroy, AsFetchFault, AsInvalidate};

use crate::gpu::error::CommandError;
use crate::gpu::payload::{MemEntries, Payload, header};
use crate::gpu::request::{
    AttachBacking, ContextResource, CreateBlob, CreateBuffer, CreateContext, CreateResource, Flush,
    GetCapset, GetCapsetInfo, GetEdid, Header, Nothing, OfAddressSpace, OfContext, OfResource, SetScanout,
    Submit, TransferBuffer, TransferToHost, UpdateCursor,
};
use crate::wire::gpu::command as number;

/// The queues of the device (virtio 1.3, 5.7.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceQueue {
    Control,
    Cursor,
}

/// The table: number and name, variant and payload, queue, handler of `Device`. `$user!` gets it row by row.
macro_rules! command_table {
    ($user:ident) => {
        $user! {
            GET_DISPLAY_INFO        DisplayInfo(Nothing)                        Control display_info;
            GET_EDID                GetEdid(GetEdid)                            Control edid;
            RESOURCE_CREATE_2D      CreateResource(CreateResource)              Control create;
            RESOURCE_UNREF          Unref(OfResource)                           Control unref;
            RESOURCE_ATTACH_BACKING Attach(AttachBacking<MemEntries<'a>>)       Control attach;
            RESOURCE_DETACH_BACKING Detach(OfResource)                          Control detach;
            SET_SCANOUT             SetScanout(SetScanout)                      Control set_scanout;
            TRANSFER_TO_HOST_2D     Transfer(TransferToHost)                    Control transfer;
            RESOURCE_FLUSH          Flush(Flush)                                Control flush;
            RESOURCE_CREATE_BLOB    CreateBlob(CreateBlob<MemEntries<'a>>)      Control create_blob;
            SET_SCANOUT_BLOB        SetScanoutBlob(Nothing)                     Control set_scanout_blob;
            GET_CAPSET_INFO         CapsetInfo(GetCapsetInfo)                   Control capset_info;
            GET_CAPSET              Capset(GetCapset)                           Control capset;
            CTX_CREATE              CreateContext(CreateContext)                Control create_context;
            CTX_DESTROY             DestroyContext(OfContext)                   Control destroy_context;
            CTX_ATTACH_RESOURCE     AttachToContext(ContextResource)            Control attach_to_context;
            CTX_DETACH_RESOURCE     DetachFromContext(ContextResource)          Control detach_from_context;
            RESOURCE_CREATE_3D      CreateBuffer(CreateBuffer)                  Control create_buffer;
            TRANSFER_TO_HOST_3D     TransferToBuffer(TransferBuffer)            Control transfer_buffer;
            TRANSFER_FROM_HOST_3D   TransferFromBuffer(TransferBuffer)          Control transfer_buffer;
            SUBMIT_3D               Submit(Submit<'a>)                          Control submit;
            AS_CREATE               CreateAddressSpace(OfAddressSpace<AsCreate>)   Control create_address_space;
            AS_DESTROY              DestroyAddressSpace(OfAddressSpace<AsDestroy>) Control destroy_address_space;
            AS_INVALIDATE           InvalidateAddressSpace(OfAddressSpace<AsInvalidate>) Control invalidate_address_space;
            AS_FETCH_FAULT          FetchFault(OfAddressSpace<AsFetchFault>)    Control fetch_fault;
            AS_ANSWER_FAULT         AnswerFault(OfAddressSpace<AsAnswerFault>)  Control answer_fault;
            UPDATE_CURSOR           UpdateCursor(UpdateCursor)                  Cursor  update_cursor;
            MOVE_CURSOR             MoveCursor(UpdateCursor)                    Cursor  move_cursor;
        }
    };
}
pub(crate) use command_table;

macro_rules! define_commands {
    ($($name:ident $variant:ident($payload:ty) $queue:ident $handler:ident;)*) => {
        /// A command with its payload.
        #[derive(Debug)]
        pub(crate) enum Command<'a> {
            $($variant($payload),)*
        }

        impl<'a> Command<'a> {
            /// Parses the payload of a command of `queue` from the bytes after its header.
            fn parse(queue: DeviceQueue, header: &Header, body: &'a [u8]) -> Result<Self, CommandError> {
                match (queue, header.kind) {
                    $((DeviceQueue::$queue, number::$name) => {
                        Ok(Self::$variant(<$payload as Payload<'a>>::parse(header, body)?))
                    })*
                    _ => Err(CommandError::Unknown { kind: header.kind }),
                }
            }
        }

        /// The name of command `kind`, for logs.
        pub fn command_name(kind: u32) -> &'static str {
            match kind {
                $(number::$name => stringify!($name),)*
                _ => "unknown command",
            }
        }
    };
}
command_table!(define_commands);

/// Decodes a command from `queue`. Without a complete header there is no fence to return either.
pub(crate) fn decode(
    queue: DeviceQueue,
    bytes: &[u8],
) -> (Option<Header>, Result<Command<'_>, CommandError>) {
    match header(bytes) {
        Ok((header, body)) => (Some(header), Command::parse(queue, &header, body)),
        Err(error) => (None, Err(error)),
    }
}
