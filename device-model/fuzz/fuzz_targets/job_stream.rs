//! Job streams: bytes to the verifier, the device and an engine, compared with the naive interpreter.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| device_model_fuzz::job_stream::run(bytes));
