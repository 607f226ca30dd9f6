//! The blob cache: gives the bytes of chunks, from disk where they are, else fetched, verified and kept.
//!
//! A [`layout::BlobLayout`] is what one image's bootstrap says of a blob. [`cache::BlobCache`] holds what is on disk,
//! one [`cache::CachedBlob`] for each blob, shared by the images that use it. A [`reader::BlobReader`] joins the two
//! with a [`source::Source`] for one image: asked for a chunk, it answers from disk, or joins or starts the *flight*
//! that fetches the [`unit`] of stored bytes the chunk lies in. Whoever waits is answered from memory as soon as the
//! unit is verified; the disk only serves later readers, so that a full disk slows but does not fail.
//!
//! Nothing that was not hashed in this process, against a digest from the bootstrap, is ever handed out.

pub mod atomic_bit_set;
pub mod bulk;
pub mod cache;
mod chunk_journal;
mod chunk_order;
pub mod codec;
pub mod download_all;
pub mod error;
pub mod fetcher;
pub mod layout;
mod link_estimator;
pub mod meta;
mod prefetcher;
pub mod reader;
pub mod scheduler;
pub mod shared;
mod singleflight;
pub mod source;
mod span;
pub mod steps;
pub mod unit;
mod unit_map;
pub mod verify;

#[cfg(test)]
mod tests;
