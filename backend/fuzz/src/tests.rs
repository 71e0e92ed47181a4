//! Replays the seeds, so that `cargo test` says whether the targets still hold without a fuzzer.

use std::path::Path;

use super::*;

fn replay(target: &str, run: fn(&[u8]), seeds: Vec<(String, Vec<u8>)>) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    for (name, bytes) in seeds {
        assert_eq!(
            std::fs::read(directory.join(&name)).ok(),
            Some(bytes),
            "{target}/{name} is not what is built"
        );
    }
    for file in std::fs::read_dir(directory).unwrap() {
        run(&std::fs::read(file.unwrap().path()).unwrap());
    }
}

#[test]
fn seeds_of_control_lines_hold_and_are_those_that_are_built() {
    replay("control_lines", control_lines::run, control_lines::seeds());
}

#[test]
fn seeds_of_ring_contents_hold_and_are_those_that_are_built() {
    replay("ring_contents", ring_contents::run, ring_contents::seeds());
}

#[test]
fn seeds_of_vhost_user_messages_hold_and_are_those_that_are_built() {
    replay("vhost_user_messages", vhost_user_messages::run, vhost_user_messages::seeds());
}
