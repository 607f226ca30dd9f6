//! Fuzzes `auth_file` of src/fuzzing.rs.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nydus_store::fuzzing::run("auth_file", data));
