//! An initramfs in the "newc" form of cpio (linux: Documentation/driver-api/early-userspace/buffer-format.rst).
//! Knows nothing of what is packed.

/// Magic number, then 13 fields of eight hexadecimal digits.
const MAGIC: &str = "070701";
const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;
const CONSOLE: u32 = 0o020_600;

/// An archive under construction.
#[derive(Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
}

impl Initramfs {
    /// An archive with /dev/console, without which an init has no output before it mounts /dev.
    pub fn new() -> Self {
        let mut archive = Self::default();
        archive.folder("dev");
        archive.entry("dev/console", CONSOLE, (5, 1), &[]);
        archive
    }

    /// Adds a folder; its parent must exist.
    pub fn folder(&mut self, path: &str) {
        self.entry(path, FOLDER, (0, 0), &[]);
    }

    /// Adds a file; its folder must exist.
    pub fn file(&mut self, path: &str, contents: &[u8]) {
        self.entry(path, FILE, (0, 0), contents);
    }

    /// Adds a program; its folder must exist.
    pub fn program(&mut self, path: &str, contents: &[u8]) {
        self.entry(path, PROGRAM, (0, 0), contents);
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.entries += 1;
        let links = if mode == FOLDER { 2 } else { 1 };
        let (size, name) = (contents.len() as u32, path.len() as u32 + 1);
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name, 0];
        self.bytes.extend_from_slice(MAGIC.as_bytes());
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_header_a_name_and_the_contents_each_padded_to_four_bytes() {
        let mut archive = Initramfs::default();
        archive.file("a", b"hello");
        assert_eq!(archive.bytes.len(), 112 + 8);
        assert_eq!(&archive.bytes[..22], b"07070100000001000081a4");
        assert_eq!(&archive.bytes[54..62], b"00000005", "the file's size");
        assert_eq!(&archive.bytes[94..102], b"00000002", "the name's size");
        assert_eq!(&archive.bytes[110..120], b"a\0hello\0\0\0");
    }

    #[test]
    fn the_archive_ends_with_the_trailer() {
        let bytes = Initramfs::new().finish();
        assert!(bytes.windows(11).any(|window| window == b"TRAILER!!!\0"));
        assert_eq!(bytes.len() % 4, 0);
    }
}
