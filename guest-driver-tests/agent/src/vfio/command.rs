//! The few commands of virtio-gpu that jobs need (virtio 1.3, 5.7.6), as bytes. Knows nothing of rings.

/// The answer to a command that says no more than that it was carried out.
pub(crate) const OK: u32 = 0x1100;

const CTX_CREATE: u32 = 0x200;
const CTX_DESTROY: u32 = 0x201;
const CTX_ATTACH_RESOURCE: u32 = 0x202;
const RESOURCE_CREATE_3D: u32 = 0x204;
const SUBMIT_3D: u32 = 0x207;
const RESOURCE_UNREF: u32 = 0x102;
const RESOURCE_ATTACH_BACKING: u32 = 0x106;
const FENCE: u32 = 1;

/// A command.
pub(crate) struct Command {
    kind: u32,
    context: u32,
    fence: Option<u64>,
    body: Vec<u32>,
}

impl Command {
    fn new(kind: u32, context: u32, body: Vec<u32>) -> Self {
        Self { kind, context, fence: None, body }
    }

    /// Makes a context.
    pub(crate) fn create_context(context: u32) -> Self {
        Self::new(CTX_CREATE, context, vec![0; 18])
    }

    /// Ends a context.
    pub(crate) fn destroy_context(context: u32) -> Self {
        Self::new(CTX_DESTROY, context, Vec::new())
    }

    /// Makes a linear buffer of `bytes`: target 0, and one of everything else.
    pub(crate) fn create_buffer(resource: u32, bytes: u32) -> Self {
        Self::new(RESOURCE_CREATE_3D, 0, vec![resource, 0, 64, 16, bytes, 1, 1, 1, 0, 0, 0, 0])
    }

    /// Puts memory behind a buffer: one range of I/O addresses.
    pub(crate) fn attach_backing(resource: u32, iova: u64, bytes: u32) -> Self {
        let body = vec![resource, 1, iova as u32, (iova >> 32) as u32, bytes, 0];
        Self::new(RESOURCE_ATTACH_BACKING, 0, body)
    }

    /// Lets the jobs of a context name a buffer.
    pub(crate) fn attach_to_context(context: u32, resource: u32) -> Self {
        Self::new(CTX_ATTACH_RESOURCE, context, vec![resource, 0])
    }

    /// Ends a buffer; answered when no job uses it any more.
    pub(crate) fn unref(resource: u32) -> Self {
        Self::new(RESOURCE_UNREF, 0, vec![resource, 0])
    }

    /// A job. It is answered when it has ended: the answer is its fence.
    pub(crate) fn submit(context: u32, fence: u64, words: &[u32]) -> Self {
        let mut body = vec![words.len() as u32 * 4, 0];
        body.extend(words);
        Self { fence: Some(fence), ..Self::new(SUBMIT_3D, context, body) }
    }

    /// Its type.
    pub(crate) fn kind(&self) -> u32 {
        self.kind
    }

    /// Header and body.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let fence = self.fence.unwrap_or(0);
        let flags = if self.fence.is_some() { FENCE } else { 0 };
        let header = [self.kind, flags, fence as u32, (fence >> 32) as u32, self.context, 0];
        header.iter().chain(&self.body).flat_map(|word| word.to_le_bytes()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_its_header_with_fence_and_context_its_length_and_its_words() {
        let words: Vec<u32> = Command::submit(3, 1 << 32 | 9, &[0xa, 0xb])
            .bytes()
            .chunks(4)
            .map(|word| word.try_into().map(u32::from_le_bytes).unwrap())
            .collect();
        assert_eq!(words, [0x207, 1, 9, 1, 3, 0, 8, 0, 0xa, 0xb]);
        let words = Command::attach_backing(7, 0x1_2345_6000, 0x1000).bytes();
        assert_eq!(words[..24], [&0x106_u32.to_le_bytes()[..], &[0; 20]].concat());
        assert_eq!(words[32..40], 0x1_2345_6000_u64.to_le_bytes());
    }
}
