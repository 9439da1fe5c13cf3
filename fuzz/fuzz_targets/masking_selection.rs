//! See [`pcae_fuzz::masking_selection`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pcae_fuzz::masking_selection(bytes));
