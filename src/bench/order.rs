//! In which order an image's chunks are fetched.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::Deserialize;

use crate::digest::Digest;

/// The longest trace that is read, in bytes.
const MAX_TRACE: u64 = 16 << 20;
/// The version of the trace's form that is read here.
const TRACE_VERSION: u32 = 1;

/// An order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// As they lie in the blobs.
    Seq,
    /// Shuffled.
    Random,
    /// As a trace of the image's use says.
    Trace(PathBuf),
}

/// Not an order.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is none of seq, random and trace:FILE")]
pub struct InvalidOrder(String);

impl FromStr for Order {
    type Err = InvalidOrder;

    fn from_str(text: &str) -> Result<Self, InvalidOrder> {
        match (text, text.strip_prefix("trace:")) {
            ("seq", _) => Ok(Self::Seq),
            ("random", _) => Ok(Self::Random),
            (_, Some(file)) if !file.is_empty() => Ok(Self::Trace(file.into())),
            _ => Err(InvalidOrder(text.to_owned())),
        }
    }
}

impl std::fmt::Display for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Seq => f.write_str("seq"),
            Self::Random => f.write_str("random"),
            Self::Trace(file) => write!(f, "trace:{}", file.display()),
        }
    }
}

/// The order in which an image's chunks were first needed.
///
/// As a file it is JSON, one object a line: `{"nydus-store-trace":1,"image":"sha256:…"}`, then parts in order of need,
/// `{"blob":"<id>","chunks":[7,8,9]}`.
#[derive(Debug, PartialEq, Eq)]
pub struct Trace {
    /// Digest of the manifest of the image that was used.
    pub image: Digest,
    /// In order of need.
    pub parts: Vec<Part>,
}

/// Chunks of one blob that were needed one after the other.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct Part {
    /// The blob's id.
    pub blob: String,
    /// Numbers of the chunks in the blob.
    pub chunks: Vec<u32>,
}

/// A trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read.
    #[error("cannot read the trace {file}: {source}")]
    Io {
        /// Which.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line is not what it should be.
    #[error("{file}, line {line}: {reason}")]
    Malformed {
        /// Which.
        file: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
}

#[derive(Deserialize)]
struct Header {
    #[serde(rename = "nydus-store-trace")]
    version: u32,
    image: Digest,
}

impl Trace {
    /// Reads a trace from a file.
    ///
    /// # Errors
    /// If it cannot be read, or is not a trace.
    pub fn read(file: &Path) -> Result<Self, TraceError> {
        let io = |source| TraceError::Io {
            file: file.to_owned(),
            source,
        };
        let mut lines = BufReader::new(File::open(file).map_err(io)?.take(MAX_TRACE)).lines();
        let malformed = |line: usize, reason: String| TraceError::Malformed {
            file: file.to_owned(),
            line,
            reason,
        };
        let header = lines.next().transpose().map_err(io)?.unwrap_or_default();
        let header: Header = serde_json::from_str(&header).map_err(|_| malformed(1, "it is not a trace".to_owned()))?;
        if header.version != TRACE_VERSION {
            let reason = format!("a trace of version {}, which is not known here", header.version);
            return Err(malformed(1, reason));
        }
        let mut parts = Vec::new();
        for (number, line) in lines.enumerate() {
            let line = line.map_err(io)?;
            parts.push(serde_json::from_str(&line).map_err(|error| malformed(number + 2, error.to_string()))?);
        }
        let image = header.image;
        Ok(Self { image, parts })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Trace, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Trace::read(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn orders() {
        for text in ["seq", "random", "trace:/a/b"] {
            assert_eq!(text.parse::<Order>().unwrap().to_string(), text);
        }
        for text in ["", "trace:", "trace", "Seq"] {
            assert!(text.parse::<Order>().is_err(), "{text}");
        }
    }

    #[test]
    fn traces() {
        let image = Digest::of(b"image");
        let header = format!("{{\"nydus-store-trace\":1,\"image\":\"{image}\"}}\n");
        let lines = "{\"blob\":\"ab\",\"chunks\":[7,3]}\n{\"blob\":\"cd\",\"chunks\":[0],\"unused\":1}\n";
        let trace = read(&format!("{header}{lines}")).unwrap();
        let parts: Vec<_> = trace.parts.iter().map(|part| (&*part.blob, &*part.chunks)).collect();
        assert_eq!((trace.image, parts), (image, vec![("ab", &[7, 3][..]), ("cd", &[0])]));
        assert!(read("").unwrap_err().contains("line 1"));
        assert!(read(&header.replace(":1,", ":2,")).unwrap_err().contains("version 2"));
        assert!(read(&format!("{header}{{}}\n")).unwrap_err().contains("line 2"));
        assert!(
            Trace::read(Path::new("/nowhere"))
                .unwrap_err()
                .to_string()
                .contains("/nowhere")
        );
    }
}
