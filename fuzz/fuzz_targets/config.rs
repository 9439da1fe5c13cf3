//! See [`pcae_fuzz::config`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pcae_fuzz::config(bytes));
