//! The MirrorGPU process: sockets, threads, timers, memory maps and the command line around `device-model`, which is
//! the device itself.

pub mod allocator;
pub mod args;
pub mod capabilities;
pub mod control;
pub mod display;
pub mod engines;
pub mod error;
pub mod fault_injection;
pub mod front_end_check;
pub mod limits;
pub mod listener;
pub mod queues;
pub mod record_dir;
pub mod records;
pub mod sandbox;
pub mod server;
pub mod session;
pub mod signals;
pub mod telemetry;
pub mod thread_kind;
pub mod threads;
mod units;
pub mod vhost_user;
pub mod wake;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use device_model::testing::folders::circles;

    #[test]
    fn no_top_level_module_of_this_crate_is_in_a_circle() {
        assert_eq!(circles(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")), Vec::<String>::new());
    }
}
