//! Commands of both queues, with engines, a display and resets around them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| device_model_fuzz::gpu_commands::run(bytes));
