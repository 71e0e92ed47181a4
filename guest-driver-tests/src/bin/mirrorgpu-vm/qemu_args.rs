//! `mirrorgpu-vm qemu-args`: what one's own launcher has to give QEMU and the back-end.

use guest_driver_tests::rig::error::RigError;
use guest_driver_tests::rig::topology::Topology;
use std::path::PathBuf;

/// What `qemu-args` understands.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The machine (a file's name in qemu-configs, without its ending)
    #[arg(long, value_name = "NAME", default_value = "intel-iommu-strict")]
    topology: String,
    /// The socket that both meet at
    #[arg(long, value_name = "PATH", default_value = "/tmp/mirrorgpu.sock")]
    socket: PathBuf,
    /// Only QEMU's arguments, one a line
    #[arg(long)]
    plain: bool,
}

/// Prints them.
pub(crate) fn run(arguments: &Arguments) -> Result<u8, RigError> {
    let topology = Topology::named(&arguments.topology)?;
    let socket = arguments.socket.display();
    let qemu = topology.command_line(&arguments.socket);
    if arguments.plain {
        qemu.iter().for_each(|word| println!("{word}"));
        return Ok(0);
    }
    let quoted: Vec<_> = qemu.iter().map(|word| quoted(word)).collect();
    println!("# The back-end, first:\nmirrorgpu --socket-path {socket} --control-socket {socket}.control\n");
    println!(
        "# QEMU {} or newer, with these among its arguments:\n{}\n",
        topology.qemu.max(10),
        quoted.join(" \\\n  ")
    );
    println!("# The guest's kernel, on its command line:\n{}\n", topology.guest);
    let modules: Vec<_> = topology.modules.iter().map(String::as_str).chain(["virtio-gpu"]).collect();
    println!("# Modules, built in or loaded in this order:\n{}", modules.join(" "));
    Ok(0)
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "-_=,./:".contains(character);
    if word.chars().all(is_plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}
