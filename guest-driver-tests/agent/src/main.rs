//! The agent: the only program in the rig's guest, and its /init. It loads the modules that it was packed with, takes
//! the screen through KMS, runs jobs, and does what the rig asks for over the second serial port. Made of system (what
//! an init does), port (lines in and out), screen (KMS), drm_jobs and drm_rings (jobs through the stock driver, whose
//! ioctls are virtgpu), vfio_jobs (jobs through a driver of our own, which is vfio), storm (what both do with jobs in
//! flight), operations (what the rig wants of that driver, one by one), stock (scenarios with the stock driver), program
//! (programs that were packed with it), and commands. A second kernel is loaded and entered by second_kernel. Instead of the rig, a person may
//! have the guest (console). Unsafe code: system, second_kernel, console, port, program, mapping, virtgpu, stock/process and
//! vfio/container. It draws, compares bytes,
//! counts and reports.

mod commands;
mod console;
mod drm_jobs;
mod drm_rings;
mod error;
mod mapping;
mod operations;
mod port;
mod program;
mod screen;
mod second_kernel;
mod stock;
mod storm;
mod system;
mod vfio;
mod vfio_jobs;
mod virtgpu;

use commands::Agent;
use error::AgentError;
use guest_agent::protocol::Event;
use port::Port;

fn main() {
    if let Err(error) = run() {
        // PANIC: an init that ends takes the kernel with it; the rig shows the console, which ends with this line.
        panic!("The agent cannot go on: {error}");
    }
}

fn run() -> Result<(), AgentError> {
    system::mount_all()?;
    let loaded = system::load_modules("/modules");
    console::serve()?;
    let mut port = Port::open("/dev/ttyS1")?;
    match loaded.and_then(|()| system::wait_for_display()) {
        Ok(()) => port.send(&Event::Ready { kernel: system::kernel_release()? })?,
        Err(error) => port.send(&error.event())?,
    }
    Agent::new(port).serve()
}
