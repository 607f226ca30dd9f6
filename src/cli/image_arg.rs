//! What `REF|BOOTSTRAP` on the command line stands for.

use std::{fs, os::unix::fs::FileTypeExt as _, path::Path};

use anyhow::Context as _;

use crate::image::reference::Reference;

/// An image in a registry, or the file of a bootstrap.
pub(super) enum ImageArg<'a> {
    Bootstrap(&'a Path),
    Reference(Reference),
}

impl<'a> ImageArg<'a> {
    /// A file of that name is a bootstrap; what is written like a path can be nothing else.
    pub(super) fn new(text: &'a str) -> anyhow::Result<Self> {
        let path = Path::new(text);
        let is_path = text.starts_with(['/', '.']);
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => return Ok(Self::Bootstrap(path)),
            Ok(metadata) if is_path => anyhow::bail!(
                "{text} is {}, not a bootstrap: name the file image.boot of an image",
                kind(metadata.file_type())
            ),
            Err(error) if is_path => return Err(error).with_context(|| format!("cannot find the bootstrap {text}")),
            _ => {}
        }
        let reference = text.parse().context("it is neither a file nor the name of an image")?;
        Ok(Self::Reference(reference))
    }
}

fn kind(file_type: fs::FileType) -> &'static str {
    if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a named pipe"
    } else if file_type.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}
