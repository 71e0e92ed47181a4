//! What a tool says on the control socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mirrorgpu_fuzz::control_lines::run(bytes));
