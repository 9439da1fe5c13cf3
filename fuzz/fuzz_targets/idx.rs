//! See [`pcae_fuzz::idx`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pcae_fuzz::idx(bytes));
