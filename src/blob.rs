//! The blob cache.

pub mod layout;
