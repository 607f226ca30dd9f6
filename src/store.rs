//! Image store: what containers/storage reads about images that were not downloaded.
//!
//! `<root>/store` is an additional image store. Its records are plain files ([`records`]), written from a transactional
//! [`database`]. Its `overlay/` is a FUSE file system ([`overlay_fs`]). [`image_store`] holds what is published,
//! [`publication`] derives it from a loaded image, and [`announcer`] publishes an image when a pull of it begins.
//! `<root>/layers` is an additional layer store ([`layer_store`]), through which older versions announce pulls.

pub mod announcer;
pub mod database;
pub mod error;
pub mod graph_roots;
pub mod image_store;
pub mod image_view;
pub mod layer_index;
pub mod layer_store;
pub mod layout;
pub mod node_ids;
pub mod overlay_fs;
pub mod publication;
pub mod records;
pub mod reserve;
pub mod single_image_fs;
