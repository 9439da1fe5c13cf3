//! See [`pcae_fuzz::checkpoint`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pcae_fuzz::checkpoint(bytes));
