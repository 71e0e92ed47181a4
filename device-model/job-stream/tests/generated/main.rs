//! What is generated from the table of packets is what stands in the repository: the manual's tables and the C
//! header. `UPDATE_GENERATED=1 cargo test -p job-stream --test generated` writes both anew. And what stands there is
//! right: the manual's examples decode to what they say, and C programs build the same words as the Rust builder.

mod c_program;
mod check;
mod header;
mod manual;
