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
fn seeds_of_job_streams_hold_and_are_those_that_are_built() {
    replay("job_stream", job_stream::run, job_stream::seeds());
}

#[test]
fn seeds_of_gpu_commands_hold_and_are_those_that_are_built() {
    replay("gpu_commands", gpu_commands::run, gpu_commands::seeds());
}

#[test]
fn seeds_of_mirror_operations_hold_and_are_those_that_are_built() {
    replay("mirror_operations", mirror_operations::run, mirror_operations::seeds());
}
