//! Fuzzes `oci_archive` of src/fuzzing.rs.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nydus_store::fuzzing::run("oci_archive", data));
