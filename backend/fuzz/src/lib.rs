//! Fuzz targets of the back-end, as functions of bytes: [`control_lines`], [`ring_contents`] and
//! [`vhost_user_messages`]. Each decodes its input, plays it and asserts what has to hold; a panic is a find. Knows the
//! parts of the back-end from outside; knows nothing of the fuzzer that calls it.

pub mod control_lines;
mod iotlb_session;
mod raw_messages;
pub mod ring_contents;
pub mod vhost_user_messages;
