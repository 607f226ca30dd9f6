//! Fuzzes `control` of src/fuzzing.rs.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nydus_store::fuzzing::run("control", data));
