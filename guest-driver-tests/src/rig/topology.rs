//! Topologies: the `-readconfig` files of qemu-configs, with the rig's settings in their comments. Knows the files'
//! format and the device in them that is under test; knows nothing of running QEMU.

use crate::rig::error::{Doing, RigError};
use crate::rig::workspace;
use std::fs;
use std::path::Path;

/// A comment that starts with this gives words for the guest's command line.
const GUEST_KEY: &str = "guest:";
/// A comment that starts with this names modules that have to be loaded before the display's.
const MODULES_KEY: &str = "modules:";
/// A comment that starts with this gives the type of this topology's invalidations.
const MODE_KEY: &str = "invalidations:";

/// A comment that starts with this says which QEMU this topology needs, by the first number of its version.
const QEMU_KEY: &str = "qemu:";
/// A comment that starts with this says whether there is a screen: `none`, or nothing at all.
const DISPLAY_KEY: &str = "display:";

/// When the guest notifies its IOMMU that a mapping is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidations {
    /// Never: addresses are physical.
    None,
    /// At every unmap, before it returns: nothing may be in flight there.
    Strict,
    /// Later, and for the whole domain: anything may be in flight.
    Lazy,
}

/// A machine to run on.
#[derive(Clone, Debug)]
pub struct Topology {
    /// The file's name without its ending.
    pub name: String,
    /// The file's text.
    pub config: String,
    /// Words for the guest's command line.
    pub guest: String,
    /// Modules to load before the display's.
    pub modules: Vec<String>,
    /// What invalidations to expect.
    pub invalidations: Invalidations,
    /// The oldest QEMU that has the devices.
    pub qemu: u32,
    /// Whether there is a screen.
    pub has_display: bool,
}

impl Topology {
    /// All topologies, by name.
    pub fn all() -> Result<Vec<Self>, RigError> {
        let folder = workspace().join("qemu-configs");
        let entries = fs::read_dir(&folder).doing(format!("read {}", folder.display()))?;
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "cfg"));
        paths.sort();
        paths.iter().map(|path| Self::read(path)).collect()
    }

    /// The topology called `name`.
    pub fn named(name: &str) -> Result<Self, RigError> {
        let all = Self::all()?;
        let known: Vec<_> = all.iter().map(|topology| topology.name.clone()).collect();
        let found = all.into_iter().find(|topology| topology.name == name);
        found.ok_or_else(|| RigError::NoSuchTopology { name: name.to_owned(), known: known.join(", ") })
    }

    fn read(path: &Path) -> Result<Self, RigError> {
        let config = fs::read_to_string(path).doing(format!("read {}", path.display()))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Self::parse(name, config).map_err(|(line, text)| RigError::Topology {
            path: path.to_owned(),
            line,
            text,
        })
    }

    fn parse(name: String, config: String) -> Result<Self, (usize, String)> {
        let mut topology = Self {
            name,
            config: String::new(),
            guest: String::new(),
            modules: Vec::new(),
            invalidations: Invalidations::None,
            qemu: 0,
            has_display: true,
        };
        for (line, at) in config.lines().zip(1..) {
            let comment = line.strip_prefix('#').unwrap_or_default().trim();
            if let Some(words) = comment.strip_prefix(GUEST_KEY) {
                words.trim().clone_into(&mut topology.guest);
            } else if let Some(words) = comment.strip_prefix(MODULES_KEY) {
                topology.modules = words.split_whitespace().map(str::to_owned).collect();
            } else if let Some(word) = comment.strip_prefix(MODE_KEY) {
                topology.invalidations = match word.trim() {
                    "none" => Invalidations::None,
                    "strict" => Invalidations::Strict,
                    "lazy" => Invalidations::Lazy,
                    _ => return Err((at, line.to_owned())),
                };
            } else if let Some(number) = comment.strip_prefix(QEMU_KEY) {
                topology.qemu = number.trim().parse().map_err(|_| (at, line.to_owned()))?;
            } else if let Some(word) = comment.strip_prefix(DISPLAY_KEY) {
                topology.has_display = match word.trim() {
                    "none" => false,
                    _ => return Err((at, line.to_owned())),
                };
            }
        }
        topology.config = config;
        Ok(topology)
    }

    /// The machine as arguments of QEMU's: the file's sections, one `-machine`, `-object`, `-device` … each.
    pub fn command_line(&self, socket: &Path) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        for line in self.config.lines().map(str::trim) {
            if let Some(section) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                let (kind, id) = section.split_once(' ').unwrap_or((section, ""));
                words.push(if kind == "memory" { "-m".into() } else { format!("-{kind}") });
                let id = id.trim_matches('"');
                words.push(if id.is_empty() { String::new() } else { format!("id={id}") });
            } else if let Some((key, value)) = line.split_once('=').filter(|_| !line.starts_with('#'))
                && let Some(last) = words.last_mut()
            {
                let (key, value) = (key.trim(), value.trim().trim_matches('"'));
                // The first word of an option is its type: it goes without its key, and first.
                let is_kind = ["type", "qom-type", "driver", "backend", "size"].contains(&key);
                if key == "path" {
                    last.push_str(&format!(",path={}", socket.display()));
                } else if is_kind && !last.contains('=') {
                    *last = format!("{value}{last}");
                } else if is_kind && last.starts_with("id=") {
                    *last = format!("{value},{last}");
                } else {
                    last.push_str(&format!("{}{key}={value}", if last.is_empty() { "" } else { "," }));
                }
            }
        }
        words
    }

    /// Whether the guest has an IOMMU.
    pub fn has_iommu(&self) -> bool {
        self.invalidations != Invalidations::None
    }

    /// Whether the device translates addresses by itself (Address Translation Services).
    pub fn has_ats(&self) -> bool {
        self.config.contains("ats = \"on\"")
    }

    /// Whether all feature bits of the device reach the guest.
    pub fn has_all_features(&self) -> bool {
        self.config.contains("vhost-user-test-device-pci")
    }

    /// Whether the device is behind a root port, like one on a PCI Express slot.
    pub fn has_root_port(&self) -> bool {
        self.config.contains("pcie-root-port")
    }

    /// The same machine with this many MiB of memory.
    #[must_use]
    pub fn with_memory(&self, mib: u32) -> Self {
        let sized = |line: &str| match line.trim_start().starts_with("size = ") {
            true => format!("  size = \"{mib}M\"\n"),
            false => format!("{line}\n"),
        };
        Self { config: self.config.lines().map(sized).collect(), ..self.clone() }
    }

    /// The same machine without its memory assignment: the memory belongs to a NUMA node, which the variation
    /// defines.
    #[must_use]
    pub fn without_memory(&self) -> Self {
        let kept = self.config.lines().filter(|line| !line.trim_start().starts_with("memory-backend ="));
        Self { config: kept.map(|line| format!("{line}\n")).collect(), ..self.clone() }
    }

    /// The same machine with QEMU's own device instead of MirrorGPU, to compare with.
    pub fn reference_config(&self) -> String {
        let mut config = String::new();
        let mut section = "";
        for line in self.config.lines() {
            if line.starts_with('[') {
                section = line;
            }
            if section == r#"[chardev "gpu"]"# || line.trim_start().starts_with("chardev =") {
                continue;
            }
            config.push_str(&line.replace("vhost-user-gpu-pci", "virtio-gpu-pci"));
            config.push('\n');
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_says_what_the_rig_has_to_know() {
        let all = Topology::all().unwrap();
        let names: Vec<_> = all.iter().map(|topology| topology.name.as_str()).collect();
        let expected = [
            "intel-iommu-ats",
            "intel-iommu-lazy",
            "intel-iommu-strict",
            "no-iommu",
            "test-device",
            "virtio-iommu",
        ];
        assert_eq!(names, expected);
        let test_device = Topology::named("test-device").unwrap();
        assert_eq!((test_device.qemu, test_device.has_display), (11, false));
        let strict = Topology::named("intel-iommu-strict").unwrap();
        assert_eq!(strict.invalidations, Invalidations::Strict);
        assert_eq!(strict.guest, "intel_iommu=on iommu.strict=1");
        assert_eq!(Topology::named("virtio-iommu").unwrap().modules, ["virtio-iommu"]);
    }

    #[test]
    fn the_reference_has_the_same_machine_without_our_socket() {
        for topology in Topology::all().unwrap().into_iter().filter(|topology| topology.has_display) {
            let config = topology.reference_config();
            assert!(config.contains(r#"driver = "virtio-gpu-pci""#), "{config}");
            assert!(!config.contains("vhost-user") && !config.contains("chardev"), "{config}");
        }
    }

    #[test]
    fn more_memory_is_more_in_both_places_and_changes_nothing_else() {
        for topology in Topology::all().unwrap() {
            let (config, more) = (&topology.config, topology.with_memory(768).config);
            assert_eq!(more.matches(r#"size = "768M""#).count(), 2, "{more}");
            assert_eq!(&more.replace("768M", "512M"), config);
        }
    }

    #[test]
    fn a_machine_can_be_given_on_a_command_line() {
        let words = Topology::named("intel-iommu-strict").unwrap().command_line(Path::new("/s"));
        let expected = [
            "-machine",
            "q35,memory-backend=mem0",
            "-m",
            "512M",
            "-object",
            "memory-backend-memfd,id=mem0,size=512M,share=on",
            "-device",
            "intel-iommu,id=iommu",
            "-chardev",
            "socket,id=gpu,path=/s",
            "-device",
            "vhost-user-gpu-pci,id=gpu,chardev=gpu,iommu_platform=on",
        ];
        assert_eq!(words, expected);
    }

    #[test]
    fn an_unknown_word_for_the_rig_is_an_error() {
        let error = Topology::parse("x".into(), "\n# invalidations: some\n".into()).unwrap_err();
        assert_eq!(error, (2, "# invalidations: some".to_owned()));
        for line in ["# qemu: new", "# display: large"] {
            assert_eq!(Topology::parse("x".into(), line.into()).unwrap_err(), (1, line.to_owned()));
        }
    }
}
