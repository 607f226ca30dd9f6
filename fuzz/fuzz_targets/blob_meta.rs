//! Fuzzes `blob_meta` of src/fuzzing.rs.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nydus_store::fuzzing::run("blob_meta", data));
