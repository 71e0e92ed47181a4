//! Fuzz targets of the device model, as functions of bytes: [`job_stream`], [`gpu_commands`], [`mirror_operations`] and
//! [`session_core`]. Each decodes its input ([`input`]), plays it and asserts what has to hold; a panic is a find. Knows the device from outside; knows
//! nothing of the fuzzer that calls it.

pub mod gpu_commands;
pub mod input;
pub mod job_stream;
pub mod mirror_operations;
pub mod session_core;
