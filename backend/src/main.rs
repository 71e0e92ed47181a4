//! The MirrorGPU back-end.

use mirrorgpu::args::Args;
use mirrorgpu::capabilities::CAPABILITIES;

fn main() {
    let args = Args::from_command_line();
    if args.print_capabilities {
        println!("{}", CAPABILITIES.json());
    }
}
