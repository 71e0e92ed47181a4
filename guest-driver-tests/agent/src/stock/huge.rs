//! A job on a buffer that is larger than any table of translations would like. Knows bytes; knows nothing of how they are
//! mapped.

use super::client::{LIMIT, PAGE};
use crate::error::AgentError;
use crate::virtgpu::{Buffer, RenderNode, Submission};
use guest_agent::stock_words::Huge;
use job_stream::{At, Crc32c, Space, Stream};

const MIB: usize = 1 << 20;
const POISON: u8 = 0x5a;
const PATTERN: u32 = 0x600d_f111;
/// Bytes at both ends that the job leaves alone: not a multiple of a page.
const EDGE: usize = 0x1234;

/// Has a job fill a buffer of so many MiB but for its edges, and sum all of it up.
pub(super) fn run(mib: u32) -> Result<Huge, AgentError> {
    let bytes = mib as usize * MIB;
    let (node, ring) = RenderNode::open_best(1)?;
    let (buffer, small) = (node.create_buffer(bytes)?, node.create_buffer(PAGE)?);
    buffer.write(&vec![POISON; bytes]);
    let within = (bytes - 2 * EDGE) as u64;
    let at = |buffer: &Buffer, offset| At::new(Space::resource(buffer.resource()), offset);
    let filled = Stream::new().fill(at(&buffer, EDGE as u64).range(within), PATTERN);
    let words = filled.barrier().checksum(at(&buffer, 0).range(bytes as u64), at(&small, 0)).finish();
    let handles = [buffer.handle(), small.handle()];
    let fence =
        node.submit_job(&Submission { words: &words, handles: &handles, ring, ..Submission::default() })?;
    if !fence.is_signalled(LIMIT)? {
        return Err(AgentError::Late {
            what: "the end of a job on a large buffer".into(),
            seconds: LIMIT.as_secs(),
        });
    }
    look(&buffer, bytes, small.word(0))
}

/// What is there now, looked at piece by piece: the guest's memory is not large.
fn look(buffer: &Buffer, bytes: usize, sum: u32) -> Result<Huge, AgentError> {
    let mut huge = Huge { bytes: (bytes - 2 * EDGE) as u64, ..Huge::default() };
    let mut crc = Crc32c::default();
    let mut piece = vec![0; MIB];
    for start in (0..bytes).step_by(MIB) {
        buffer.read(start, &mut piece);
        crc.update(&piece);
        for (at, word) in (start..).step_by(4).zip(piece.chunks(4)) {
            let is_within = at >= EDGE && at < bytes - EDGE;
            huge.filled += if is_within && word == PATTERN.to_le_bytes() { 4 } else { 0 };
            huge.poison += if !is_within && word == [POISON; 4] { 4 } else { 0 };
        }
    }
    huge.checksum = crc.value() == sum;
    Ok(huge)
}
