//! The blob cache: gives the bytes of chunks, from disk where they are, else fetched, verified and kept.
//!
//! A [`layout::BlobLayout`] is what one image's bootstrap says of a blob. [`cache::BlobCache`] holds what is on disk,
//! one [`cache::CachedBlob`] for each blob, shared by the images that use it. A [`reader::BlobReader`] joins the two
//! with a [`source::Source`] for one image: asked for a chunk, it answers from disk, or joins or starts the *flight*
//! that fetches the [`unit`] of stored bytes the chunk lies in. Whoever waits is answered from memory as soon as the
//! unit is verified; the disk only serves later readers, so that a full disk slows but does not fail.
//!
//! Nothing that was not hashed in this process, against a digest from the bootstrap, is ever handed out.

mod ahead;
pub mod bits;
mod bring;
pub mod bulk;
pub mod cache;
mod claims;
pub mod codec;
pub mod error;
pub mod fetching;
pub mod fill;
mod flight;
pub mod layout;
pub mod meta;
mod neighbours;
mod pace;
mod plans;
pub mod reader;
pub mod source;
mod span;
pub mod steps;
pub mod unit;

#[cfg(test)]
mod tests;
