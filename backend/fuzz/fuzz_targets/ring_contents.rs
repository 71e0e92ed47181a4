//! Descriptor tables, rings and indirect tables of a driver that keeps to nothing.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mirrorgpu_fuzz::ring_contents::run(bytes));
