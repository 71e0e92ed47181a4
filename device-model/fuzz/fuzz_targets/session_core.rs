//! Messages, answers, pins, sections and time, into the session core.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| device_model_fuzz::session_core::run(bytes));
