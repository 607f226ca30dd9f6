//! Decompression and verification of chunks.

use std::{cell::RefCell, io::Read};

use nydus_utils::{compress, digest};
use sha2::{Digest as _, Sha256};

/// The stored bytes do not decompress to the length that the image states.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{algorithm} data does not decompress to {expected} bytes: {reason}")]
pub struct DecompressError {
    algorithm: compress::Algorithm,
    expected: usize,
    reason: String,
}

/// Decompresses `stored` into exactly `len` bytes.
///
/// Allocates at most `len` bytes for the result, whatever `stored` says.
pub fn decompress(algorithm: compress::Algorithm, stored: &[u8], len: usize) -> Result<Vec<u8>, DecompressError> {
    let mut plain = vec![0; len];
    let outcome = match algorithm {
        compress::Algorithm::None => copy_exact(stored, &mut plain),
        compress::Algorithm::Lz4Block => {
            lz4_flex::block::decompress_into(stored, &mut plain).map_err(|e| e.to_string())
        }
        compress::Algorithm::GZip => gunzip(stored, &mut plain),
        compress::Algorithm::Zstd => unzstd(stored, &mut plain),
    };
    match outcome {
        Ok(got) if got == len => Ok(plain),
        Ok(got) => Err(format!("got {got} bytes")),
        Err(reason) => Err(reason),
    }
    .map_err(|reason| DecompressError {
        algorithm,
        expected: len,
        reason,
    })
}

/// Whether `plain` hashes to `expected`.
pub fn matches(algorithm: digest::Algorithm, plain: &[u8], expected: &[u8; 32]) -> bool {
    match algorithm {
        digest::Algorithm::Blake3 => blake3::hash(plain) == *expected,
        digest::Algorithm::Sha256 => Sha256::digest(plain).as_slice() == expected,
    }
}

fn copy_exact(stored: &[u8], plain: &mut [u8]) -> Result<usize, String> {
    if stored.len() == plain.len() {
        plain.copy_from_slice(stored);
    }
    Ok(stored.len())
}

fn gunzip(stored: &[u8], plain: &mut [u8]) -> Result<usize, String> {
    let mut decoder = flate2::bufread::GzDecoder::new(stored);
    decoder.read_exact(plain).map_err(|e| e.to_string())?;
    Ok(plain.len())
}

fn unzstd(stored: &[u8], plain: &mut [u8]) -> Result<usize, String> {
    thread_local! {
        // Creating a context takes longer than decompressing a small chunk.
        static CONTEXT: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    }
    CONTEXT.with_borrow_mut(|context| {
        let decompressor = match context {
            Some(decompressor) => decompressor,
            None => context.insert(zstd::bulk::Decompressor::new().map_err(|e| e.to_string())?),
        };
        decompressor
            .decompress_to_buffer(stored, plain)
            .map_err(|e| e.to_string())
    })
}

#[cfg(test)]
mod tests {
    use compress::Algorithm::{GZip, Lz4Block, None, Zstd};

    use super::*;

    #[test]
    fn every_compressor_of_the_builder_round_trips() {
        let plain: Vec<u8> = (0..100_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        for algorithm in [None, Lz4Block, GZip, Zstd] {
            let (stored, _) = compress::compress(&plain, algorithm).unwrap();
            assert_eq!(
                decompress(algorithm, &stored, plain.len()).as_deref(),
                Ok(&plain[..]),
                "{algorithm}"
            );
        }
    }

    #[test]
    fn a_wrong_length_or_garbage_is_an_error() {
        let plain = vec![7; 5000];
        for algorithm in [None, Lz4Block, GZip, Zstd] {
            let (stored, _) = compress::compress(&plain, algorithm).unwrap();
            assert!(
                decompress(algorithm, &stored, plain.len() + 1).is_err(),
                "{algorithm} longer"
            );
            assert!(
                decompress(algorithm, &stored[..stored.len() / 2], plain.len()).is_err(),
                "{algorithm} truncated"
            );
            assert!(
                decompress(algorithm, b"garbage", plain.len()).is_err(),
                "{algorithm} garbage"
            );
        }
    }

    #[test]
    fn both_digest_algorithms_are_supported() {
        assert!(matches(digest::Algorithm::Sha256, b"x", &Sha256::digest(b"x").into()));
        assert!(matches(digest::Algorithm::Blake3, b"x", blake3::hash(b"x").as_bytes()));
        assert!(!matches(digest::Algorithm::Blake3, b"y", blake3::hash(b"x").as_bytes()));
    }
}
