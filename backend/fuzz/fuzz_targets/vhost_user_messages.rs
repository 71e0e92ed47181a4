//! Messages of a front-end, and what the device IOTLB's mean to misses and mirror.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mirrorgpu_fuzz::vhost_user_messages::run(bytes));
