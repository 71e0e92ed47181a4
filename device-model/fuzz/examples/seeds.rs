//! Writes the seeds of the corpora: `cargo run --example seeds`, once something of the inputs' form has changed.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let all = [
        ("job_stream", device_model_fuzz::job_stream::seeds()),
        ("gpu_commands", device_model_fuzz::gpu_commands::seeds()),
        ("mirror_operations", device_model_fuzz::mirror_operations::seeds()),
        ("session_core", device_model_fuzz::session_core::seeds()),
    ];
    for (target, seeds) in all {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
        std::fs::create_dir_all(&directory)?;
        for (name, bytes) in seeds {
            std::fs::write(directory.join(name), bytes)?;
        }
    }
    Ok(())
}
