//! The device's answers as the driver's own tracepoint has them: what each says, and in which order they came. Knows
//! tracefs; knows nothing of why something was asked.

use crate::error::{AgentError, Doing};
use crate::system;
use std::fs;

const FOLDER: &str = "/sys/kernel/tracing";
const ENABLE: &str = "/sys/kernel/tracing/events/virtio_gpu/virtio_gpu_cmd_response/enable";
const TRACE: &str = "/sys/kernel/tracing/trace";
/// Of the flags of a command: it has a fence.
const FENCED: u64 = 1;
/// Types of answers begin here; what is below was never answered.
const FIRST: u64 = 0x1100;

/// An answer to a command with a fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Response {
    /// What it says.
    pub(super) kind: u32,
    /// Of which fence.
    pub(super) fence: u64,
}

/// The tracepoint, which is on until this is dropped.
pub(super) struct Responses(());

impl Responses {
    /// Forgets what there was, and turns the tracepoint on.
    pub(super) fn listen() -> Result<Self, AgentError> {
        if fs::metadata(TRACE).is_err() {
            system::mount_tracing()?;
        }
        fs::write(TRACE, "").doing(format!("empty the trace of {FOLDER}"))?;
        fs::write(ENABLE, "1").doing(format!("turn {ENABLE} on"))?;
        Ok(Self(()))
    }

    /// The answers to commands with fences so far, the first one first.
    pub(super) fn fenced(&self) -> Result<Vec<Response>, AgentError> {
        let text = fs::read_to_string(TRACE).doing(format!("read {TRACE}"))?;
        Ok(text.lines().filter_map(parse).collect())
    }
}

impl Drop for Responses {
    fn drop(&mut self) {
        // A tracepoint that stays on costs time and nothing else.
        let _ = fs::write(ENABLE, "0");
    }
}

fn parse(line: &str) -> Option<Response> {
    let (_, words) = line.split_once("virtio_gpu_cmd_response: ")?;
    let value = |key: &str| {
        let word = words.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))?;
        match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => word.parse().ok(),
        }
    };
    let kind = value("type")?;
    let is_ours = value("flags")? & FENCED != 0 && kind >= FIRST;
    is_ours.then_some(Response { kind: kind as u32, fence: value("fence_id")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_with_a_fence_is_found_in_the_trace() {
        let line = |flags| {
            format!(
                " kworker/0:1-9 [000] d..2. 3.2: virtio_gpu_cmd_response: vdev=0 vq=0 name=control type=0x1203 \
                 flags={flags} fence_id=17 ctx_id=2 num_free=64 seqno=40"
            )
        };
        assert_eq!(parse(&line("0x1")), Some(Response { kind: 0x1203, fence: 17 }));
        assert_eq!(parse(&line("0x3")), Some(Response { kind: 0x1203, fence: 17 }));
        assert_eq!(parse(&line("0x0")), None);
        assert_eq!(parse("# tracer: nop"), None);
    }
}
