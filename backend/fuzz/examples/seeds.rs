//! Writes the seeds of the corpora: `cargo run --example seeds`, once something of the inputs' form has changed.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let all = [
        ("control_lines", mirrorgpu_fuzz::control_lines::seeds()),
        ("ring_contents", mirrorgpu_fuzz::ring_contents::seeds()),
        ("vhost_user_messages", mirrorgpu_fuzz::vhost_user_messages::seeds()),
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
