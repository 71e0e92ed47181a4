//! `mirrorgpu-vm qemu-args`: what one's own launcher has to give QEMU and the back-end.

use guest_driver_tests::rig::error::RigError;
use guest_driver_tests::rig::topology::Topology;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What `qemu-args` understands.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Topology to print arguments for: the name of a file in qemu-configs, without .cfg.
    #[arg(long, value_name = "NAME", default_value = "intel-iommu-strict")]
    topology: String,
    /// UNIX socket on which the back-end listens, and to which QEMU connects.
    #[arg(long, value_name = "PATH", default_value = "/tmp/mirrorgpu.sock")]
    socket: PathBuf,
    /// Print only the arguments of QEMU, each on a line of its own.
    #[arg(long)]
    plain: bool,
}

/// Prints them.
pub(crate) fn run(arguments: &Arguments) -> Result<u8, RigError> {
    let topology = Topology::named(&arguments.topology)?;
    let qemu = topology.command_line(&arguments.socket);
    let text = if arguments.plain {
        qemu.iter().map(|word| format!("{word}\n")).collect()
    } else {
        explained(&topology, &arguments.socket, &qemu)
    };
    match io::stdout().write_all(text.as_bytes()) {
        // The reader has seen enough (`| head`).
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(RigError::Io { what: "print the arguments".to_owned(), source: error })
        }
        _ => Ok(0),
    }
}

fn explained(topology: &Topology, socket: &Path, qemu: &[String]) -> String {
    let words: Vec<_> = qemu.iter().map(|word| quoted(word)).collect();
    let modules: Vec<_> = topology.modules.iter().map(String::as_str).chain(["virtio-gpu"]).collect();
    let socket = socket.display().to_string();
    format!(
        "# The back-end, first:\nmirrorgpu --socket-path {} --control-socket {}\n\n\
         # QEMU {} or newer, with these among its arguments:\n{}\n\n\
         # The guest's kernel, on its command line; without KVM also no_timer_check, or it may panic on a busy host:\n{}\n\n\
         # Modules, built in or loaded in this order:\n{}\n",
        quoted(&socket),
        quoted(&format!("{socket}.control")),
        topology.qemu.max(10),
        words.join(" \\\n  "),
        topology.guest,
        modules.join(" "),
    )
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "-_=,./:".contains(character);
    if word.chars().all(is_plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_with_a_space_in_its_path_is_one_word_everywhere() {
        let socket = Path::new("/tmp/my sockets/gpu.sock");
        let topology = Topology::named("intel-iommu-strict").unwrap();
        let text = explained(&topology, socket, &topology.command_line(socket));
        let bare = text.lines().filter(|line| line.contains("my sockets"));
        assert_eq!(bare.clone().count(), 2, "{text}");
        for line in bare {
            // Between quotes, every time.
            assert!(line.split('\'').step_by(2).all(|outside| !outside.contains("my sockets")), "{line}");
        }
    }
}
