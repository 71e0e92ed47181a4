//! Mappings and invalidations, compared with the list of all that happened.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| device_model_fuzz::mirror_operations::run(bytes));
