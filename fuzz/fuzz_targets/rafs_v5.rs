//! Fuzzes `rafs_v5` of src/fuzzing.rs.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nydus_store::fuzzing::run("rafs_v5", data));
