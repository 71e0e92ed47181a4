//! The modules that a guest loads: which files, in which order, with which parameters, including the user's own.
//! Knows files; knows nothing of what a module does.

use crate::rig::error::{Doing, RigError};
use crate::rig::initramfs::Initramfs;
use crate::rig::kbuild::Kbuild;
use crate::rig::kernel::{Kernel, module_name};
use crate::rig::module_source;
use crate::rig::options::Options;
use std::fs;
use std::path::{Path, PathBuf};

/// The kernel's own console would draw beside the agent. And not every IOMMU here can remap interrupts, but the
/// agent's driver uses none.
const PARAMETERS: [(&str, &str); 2] =
    [("drm_kms_helper", "fbdev_emulation=0"), ("vfio_iommu_type1", "allow_unsafe_interrupts=1")];

/// The user's own modules.
#[derive(Clone, Debug, Default)]
pub(crate) struct Own {
    /// Their files, in the order of loading.
    pub(crate) files: Vec<PathBuf>,
    /// Parameters that each is loaded with.
    pub(crate) parameters: String,
}

impl Own {
    /// Those that the options name; what is given as source is built.
    pub(crate) fn of(options: &Options, kernel: &Kernel) -> Result<Self, RigError> {
        let mut own = Self { files: options.module.clone(), parameters: options.module_parameters.clone() };
        own.build(&options.module_source, kernel, options)?;
        Ok(own)
    }

    /// Builds modules, and adds them.
    pub(crate) fn build(
        &mut self,
        sources: &[PathBuf],
        kernel: &Kernel,
        options: &Options,
    ) -> Result<(), RigError> {
        for source in sources {
            let kbuild = Kbuild::of(kernel, options.no_install)?;
            self.files.extend(module_source::build(source, &kbuild)?);
        }
        Ok(())
    }
}

/// Modules in the order of loading: files, with the parameters.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Modules(Vec<(PathBuf, String)>);

impl Modules {
    /// The modules `wanted` of a kernel with all that they need, then the user's `own`. One of these with the name of
    /// one of the kernel's replaces it.
    pub(crate) fn of(kernel: &Kernel, wanted: &[&str], own: &Own) -> Result<Self, RigError> {
        let mut files: Vec<PathBuf> = Vec::new();
        for module in wanted {
            add(&mut files, kernel.module_with_dependencies(module)?);
        }
        for file in &own.files {
            add(&mut files, kernel.dependencies_of(file)?);
            let name = module_name(file);
            match files.iter_mut().find(|known| module_name(known) == name) {
                Some(known) => known.clone_from(file),
                None => files.push(file.clone()),
            }
        }
        let with_parameters = |file: PathBuf| {
            let parameters = match own.files.contains(&file) {
                true if !own.parameters.is_empty() => own.parameters.clone(),
                _ => parameters(&file).to_owned(),
            };
            (file, parameters)
        };
        Ok(Self(files.into_iter().map(with_parameters).collect()))
    }

    /// Packs them into the folder `modules`, with the list that the agent reads.
    pub(crate) fn pack(&self, archive: &mut Initramfs) -> Result<(), RigError> {
        archive.folder("modules");
        let mut list = String::new();
        for (path, parameters) in &self.0 {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let bytes = fs::read(path).doing(format!("read the module {}", path.display()))?;
            list.push_str(&format!("{name} {parameters}\n"));
            archive.file(&format!("modules/{name}"), &bytes);
        }
        archive.file("modules/list", list.as_bytes());
        Ok(())
    }
}

/// Adds those that are not there yet.
fn add(files: &mut Vec<PathBuf>, more: Vec<PathBuf>) {
    for file in more {
        if !files.contains(&file) {
            files.push(file);
        }
    }
}

fn parameters(path: &Path) -> &'static str {
    let name = module_name(path).unwrap_or_default();
    PARAMETERS.iter().find(|(module, _)| *module == name).map_or("", |(_, words)| words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_of_ones_own_comes_last_or_in_the_place_of_a_stock_one() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &[u8]| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        image[0x300..0x306].copy_from_slice(b"6.12 x");
        let image = file("image", &image);
        file("modules.order", b"kernel/virtio-gpu.ko\nkernel/drm.ko\nkernel/vgem.ko\n");
        fs::create_dir(folder.path().join("kernel")).unwrap();
        let drm = file("kernel/drm.ko", b"\0depends=\0");
        let stock = file("kernel/virtio-gpu.ko", b"\0depends=drm\0");
        let vgem = file("kernel/vgem.ko", b"\0depends=drm\0");
        let (own, mine) = (file("virtio-gpu.ko", b"\0depends=drm\0"), file("mine.ko", b"\0depends=vgem\0"));
        let kernel = Kernel::open(&image, Some(folder.path())).unwrap();
        let files = |own: &[PathBuf]| {
            let own = Own { files: own.to_vec(), parameters: "bug=x".into() };
            let modules = Modules::of(&kernel, &["virtio-gpu"], &own).unwrap().0;
            let told = modules.iter().filter(|(_, parameters)| parameters == "bug=x").count();
            assert_eq!(told, own.files.len(), "only one's own are told");
            modules.into_iter().map(|(file, _)| file).collect::<Vec<_>>()
        };
        assert_eq!(files(&[]), [drm.clone(), stock.clone()]);
        assert_eq!(files(std::slice::from_ref(&own)), [drm.clone(), own]);
        assert_eq!(files(std::slice::from_ref(&mine)), [drm, stock, vgem, mine]);
    }
}
