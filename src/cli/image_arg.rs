//! Parses the argument `REF|BOOTSTRAP`.

use std::{fs, os::unix::fs::FileTypeExt as _, path::Path};

use anyhow::Context as _;

use crate::image::reference::Reference;

/// An image in a registry, or a bootstrap file.
pub(super) enum ImageArg<'a> {
    Bootstrap(&'a Path),
    Reference(Reference),
}

impl<'a> ImageArg<'a> {
    /// Takes the name of an existing file as a bootstrap, any other text as a reference. Text that starts with `/` or
    /// `.` must be a file.
    pub(super) fn new(text: &'a str) -> anyhow::Result<Self> {
        let path = Path::new(text);
        let is_path = text.starts_with(['/', '.']);
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => return Ok(Self::Bootstrap(path)),
            Ok(metadata) if is_path => anyhow::bail!(
                "{text} is {}, not a bootstrap: pass the image's file image.boot",
                kind(metadata.file_type())
            ),
            Err(error) if is_path => return Err(error).with_context(|| format!("cannot access bootstrap {text}")),
            _ => {}
        }
        let reference = text.parse().context("neither a file nor an image reference")?;
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
