//! A kernel image with its modules: its release, and which modules a driver needs, in the order of loading. Knows
//! nothing of where the image comes from.

use crate::rig::error::{Doing, RigError};
use lzma_rust2::XzReader;
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Offset of the boot protocol's magic number, and of the pointer to the version (linux: arch/x86/boot.rst).
const BOOT_MAGIC: (usize, &[u8]) = (0x202, b"HdrS");
const VERSION_POINTER: usize = 0x20e;
const VERSION_BASE: usize = 0x200;
/// The list of all modules.
const LIST: &str = "modules.order";
/// Names that a module file may have.
const SUFFIXES: [&str; 4] = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"];
const SECTION_OF_DEPENDENCIES: &[u8] = b"\0depends=";

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The compressed image.
    pub image: PathBuf,
    /// Its release, as `uname -r` says it.
    pub release: String,
    modules: PathBuf,
}

impl Kernel {
    /// The kernel `image`, with the modules under `modules`, or where the system installs them.
    pub fn open(image: &Path, modules: Option<&Path>) -> Result<Self, RigError> {
        let bytes = fs::read(image).doing(format!("read the kernel {}", image.display()))?;
        let release = release_of(&bytes).ok_or_else(|| RigError::NotAKernel(image.to_owned()))?;
        let installed = || Path::new("/lib/modules").join(&release);
        let modules = modules.map_or_else(installed, Path::to_owned);
        if !modules.join(LIST).is_file() {
            return Err(RigError::NoModules { release, modules });
        }
        Ok(Self { image: image.to_owned(), release, modules })
    }

    /// The files of `module` and of all that it needs, in the order of loading; none for what is built in.
    pub fn module_with_dependencies(&self, module: &str) -> Result<Vec<PathBuf>, RigError> {
        let files = self.module_files()?;
        if !self.has_module(module) {
            let (release, modules) = (self.release.clone(), self.modules.clone());
            return Err(RigError::NoModule { module: module.to_owned(), release, modules });
        }
        let mut order = Vec::new();
        visit(&canonical(module), &files, &mut order)?;
        Ok(order)
    }

    /// The modules of this kernel that the module in `file`, which is not part of its tree, needs, in the order of
    /// loading.
    pub fn dependencies_of(&self, file: &Path) -> Result<Vec<PathBuf>, RigError> {
        let files = self.module_files()?;
        let mut order = Vec::new();
        for dependency in dependencies(file)? {
            visit(&dependency, &files, &mut order)?;
        }
        Ok(order)
    }

    /// Whether it has this module, or the built-in code that the module consists of.
    pub fn has_module(&self, module: &str) -> bool {
        let is_file = |files: BTreeMap<String, PathBuf>| files.contains_key(&canonical(module));
        self.module_files().is_ok_and(is_file) || self.is_builtin(module) || self.is_switched_on(module)
    }

    /// Whether its configuration has `=y` for what is called like the module. What can only be built in, as udmabuf is, is
    /// no module, and does not stand in modules.builtin.
    fn is_switched_on(&self, module: &str) -> bool {
        self.option(&canonical(module).to_uppercase()).as_deref() == Some("y")
    }

    /// The value of the option `CONFIG_name` in its configuration, if that is known and sets it.
    pub fn option(&self, name: &str) -> Option<String> {
        let beside = self.image.with_file_name(format!("config-{}", self.release));
        let config =
            [self.modules.join("config"), beside].iter().find_map(|path| fs::read_to_string(path).ok())?;
        option(&config, name).map(str::to_owned)
    }

    /// The folder of its modules.
    pub fn modules(&self) -> &Path {
        &self.modules
    }

    fn is_builtin(&self, module: &str) -> bool {
        let list = fs::read_to_string(self.modules.join("modules.builtin")).unwrap_or_default();
        list.lines().any(|line| module_name(Path::new(line)) == Some(canonical(module)))
    }

    /// All modules by name. The kernel's package lists them in modules.order (depmod has not run on an unpacked one,
    /// so there is no modules.dep), without the suffix of their compression.
    fn module_files(&self) -> Result<BTreeMap<String, PathBuf>, RigError> {
        let list = self.modules.join(LIST);
        let lines = fs::read_to_string(&list).doing(format!("read {}", list.display()))?;
        let named = |line: &str| Some((module_name(Path::new(line))?, self.modules.join(line)));
        Ok(lines.lines().filter_map(named).collect())
    }
}

/// Adds the dependencies of `module`, then itself. Those that are not files are built in.
fn visit(module: &str, files: &BTreeMap<String, PathBuf>, order: &mut Vec<PathBuf>) -> Result<(), RigError> {
    let Some(listed) = files.get(module) else { return Ok(()) };
    let path = with_suffix(listed)?;
    if order.contains(&path) {
        return Ok(());
    }
    for dependency in dependencies(&path)? {
        visit(&dependency, files, order)?;
    }
    order.push(path);
    Ok(())
}

/// The existing file for a listed module: as it is, or with the suffix of a compression.
fn with_suffix(listed: &Path) -> Result<PathBuf, RigError> {
    let stem = listed.with_extension("");
    let candidates = SUFFIXES.map(|suffix| PathBuf::from(format!("{}{suffix}", stem.display())));
    let found = candidates.into_iter().find(|path| path.is_file());
    found.ok_or_else(|| RigError::BadModule {
        path: listed.to_owned(),
        why: "it is listed, but not there".into(),
    })
}

/// The modules that the one at `path` needs, as its own .modinfo says.
fn dependencies(path: &Path) -> Result<Vec<String>, RigError> {
    let bytes = fs::read(path).doing(format!("read {}", path.display()))?;
    let bad = |why: String| RigError::BadModule { path: path.to_owned(), why };
    let elf = match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => bytes,
        Some("xz") => {
            let mut elf = Vec::new();
            let mut reader = XzReader::new(bytes.as_slice(), false);
            reader.read_to_end(&mut elf).map_err(|error| bad(error.to_string()))?;
            elf
        }
        _ => return Err(bad("only plain and xz-compressed modules are understood".into())),
    };
    let names = find(&elf, SECTION_OF_DEPENDENCIES).ok_or_else(|| bad("it names no dependencies".into()))?;
    Ok(names.split(',').filter(|name| !name.is_empty()).map(canonical).collect())
}

/// The text after `key`, up to the next NUL.
fn find<'a>(bytes: &'a [u8], key: &[u8]) -> Option<&'a str> {
    let start = bytes.windows(key.len()).position(|window| window == key)? + key.len();
    text_at(bytes, start)
}

fn text_at(bytes: &[u8], start: usize) -> Option<&str> {
    let rest = bytes.get(start..)?;
    let end = rest.iter().position(|&byte| byte == 0)?;
    std::str::from_utf8(rest.get(..end)?).ok()
}

/// The release that the image's header names: "6.12.95+deb12-amd64 (…) #1 …" up to the first space.
fn release_of(image: &[u8]) -> Option<String> {
    let (at, magic) = BOOT_MAGIC;
    if image.get(at..at + magic.len())? != magic {
        return None;
    }
    let pointer = image.get(VERSION_POINTER..VERSION_POINTER + 2)?;
    let offset = usize::from(u16::from_le_bytes(pointer.try_into().ok()?));
    let version = text_at(image, VERSION_BASE + offset)?;
    version.split(' ').next().map(str::to_owned)
}

/// The value of an option in a kernel's configuration.
fn option<'a>(config: &'a str, name: &str) -> Option<&'a str> {
    config.lines().find_map(|line| line.strip_prefix("CONFIG_")?.strip_prefix(name)?.strip_prefix('='))
}

/// The name of a module's file, with dashes and underscores made one.
pub(crate) fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    Some(canonical(file.split(".ko").next()?))
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image_with(version: &str) -> Vec<u8> {
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        image[0x300..0x300 + version.len()].copy_from_slice(version.as_bytes());
        image
    }

    #[test]
    fn the_release_is_read_from_the_image() {
        let image = image_with("6.12.1-amd64 (builder) #1 SMP");
        assert_eq!(release_of(&image).as_deref(), Some("6.12.1-amd64"));
        assert_eq!(release_of(b"not a kernel"), None);
    }

    #[test]
    fn modules_come_after_what_they_need_and_built_in_ones_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &[u8]| fs::write(folder.path().join(name), text).unwrap();
        file("modules.order", b"virtio-gpu.ko\ndrm.ko\nhelper.ko\n");
        file("modules.builtin", b"kernel/virtio_pci.ko\n");
        file("virtio-gpu.ko", b"\0depends=helper,drm,built_in\0");
        file("helper.ko", b"\0depends=drm\0");
        file("drm.ko", b"\0depends=\0");
        file("image", &image_with("6.12 x"));
        let kernel = Kernel::open(&folder.path().join("image"), Some(folder.path())).unwrap();
        let files = kernel.module_with_dependencies("virtio_gpu").unwrap();
        let names: Vec<_> = files.iter().filter_map(|path| module_name(path)).collect();
        assert_eq!(names, ["drm", "helper", "virtio_gpu"]);
        assert!(kernel.module_with_dependencies("virtio-pci").unwrap().is_empty());
        let has = ["drm", "virtio-gpu", "virtio-pci", "nouveau"].map(|module| kernel.has_module(module));
        assert_eq!(has, [true, true, true, false]);
        let error = kernel.module_with_dependencies("nouveau").unwrap_err();
        assert!(matches!(error, RigError::NoModule { module, .. } if module == "nouveau"));
    }

    #[test]
    fn what_can_only_be_built_in_is_found_in_the_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &[u8]| fs::write(folder.path().join(name), text).unwrap();
        file("modules.order", b"");
        file("vmlinuz", &image_with("7.3 x"));
        let config = b"CONFIG_UDMABUF_X=m\nCONFIG_UDMABUF=y\n# CONFIG_VGEM is not set\nCONFIG_TTM=m\n";
        let has = || {
            let kernel = Kernel::open(&folder.path().join("vmlinuz"), Some(folder.path())).unwrap();
            assert!(kernel.module_with_dependencies("udmabuf").map_or(true, |files| files.is_empty()));
            ["udmabuf", "vgem", "ttm"].map(|module| kernel.has_module(module))
        };
        assert_eq!(has(), [false, false, false]);
        // Older packages have the configuration beside the image, newer ones beside the modules.
        for name in ["config-7.3", "config"] {
            file(name, config);
            assert_eq!(has(), [true, false, false]);
            fs::remove_file(folder.path().join(name)).unwrap();
        }
        assert_eq!(option("CONFIG_A=y\nCONFIG_AB=\"x\"\n", "AB"), Some("\"x\""));
    }

    /// The output of `xz --check=crc32`, with which Linux compresses modules, for a module that needs two others.
    const COMPRESSED: &[u8] = &[
        0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x01, 0x69, 0x22, 0xde, 0x36, 0x02, 0x00, 0x21, 0x01, 0x16,
        0x00, 0x00, 0x00, 0x74, 0x2f, 0xe5, 0xa3, 0x01, 0x00, 0x2f, 0x7f, 0x45, 0x4c, 0x46, 0x2e, 0x2e, 0x6c,
        0x69, 0x63, 0x65, 0x6e, 0x73, 0x65, 0x3d, 0x47, 0x50, 0x4c, 0x00, 0x64, 0x65, 0x70, 0x65, 0x6e, 0x64,
        0x73, 0x3d, 0x76, 0x69, 0x72, 0x74, 0x69, 0x6f, 0x2c, 0x64, 0x72, 0x6d, 0x2d, 0x6b, 0x6d, 0x73, 0x00,
        0x6e, 0x61, 0x6d, 0x65, 0x3d, 0x78, 0x00, 0x00, 0xab, 0x19, 0xbd, 0x3d, 0x00, 0x01, 0x44, 0x30, 0x86,
        0x0f, 0x4a, 0x92, 0x90, 0x42, 0x99, 0x0d, 0x01, 0x00, 0x00, 0x00, 0x00, 0x01, 0x59, 0x5a,
    ];

    #[test]
    fn a_compressed_module_says_what_it_needs_and_a_broken_one_why_it_cannot() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.ko.xz");
        fs::write(&path, COMPRESSED).unwrap();
        assert_eq!(dependencies(&path).unwrap(), ["virtio", "drm_kms"]);
        fs::write(&path, &COMPRESSED[..COMPRESSED.len() / 2]).unwrap();
        assert!(matches!(dependencies(&path), Err(RigError::BadModule { .. })));
    }
}
