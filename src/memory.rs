//! Settings of the C library's allocator, so that a daemon that runs for years does not keep what it once needed.
//!
//! By default, glibc has up to eight arenas a core, and returns little of what is freed: chunks are decoded on many
//! threads, each with memory of its own that stays after it. Measured with `benches/podman_run`: 122 MiB resident after
//! 20 images were read whole, and about half of that with these settings, at the same throughput.

/// Number of arenas: enough that the threads that decode chunks seldom wait for one another.
const ARENAS: i32 = 2;
/// Free memory at the end of the heap that is kept, in bytes. Smaller values cost page faults.
const TRIM_THRESHOLD: i32 = 1 << 20;
/// Length from which on memory is mapped for itself, in bytes, and returned when it is freed. Longer than most chunks:
/// mapping costs more than copying.
const MMAP_THRESHOLD: i32 = 4 << 20;

/// Limits the memory that is kept after it was freed. To be called once, before threads are started.
pub fn limit_retained_memory() {
    for (parameter, value) in [
        (libc::M_ARENA_MAX, ARENAS),
        (libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD),
        (libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD),
    ] {
        #[expect(unsafe_code, reason = "the allocator has no other interface")]
        // SAFETY: mallopt(3) takes two numbers, and refuses those that it does not know.
        unsafe {
            libc::mallopt(parameter, value);
        }
    }
}

/// Returns free memory to the system. Takes milliseconds; to be called after much was freed.
pub fn return_free_memory() {
    #[expect(unsafe_code, reason = "the allocator has no other interface")]
    // SAFETY: malloc_trim(3) may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
