//! Traces: the order in which an image's chunks were first needed, so that the next start from an empty cache can fetch them
//! beforehand.
//!
//! A trace is a file, `<root>/traces/<digest of the image's manifest>.trace`, of a JSON document a line: a header,
//! `{"nydus-store-trace":1,"image":"sha256:…"}`, then parts in order of need, `{"blob":"<blob id>","chunks":[7,8,9]}`. A part
//! has the numbers of chunks of one blob, and in `unused` how many starts in a row did without them, where not 0. It is only a hint:
//! what it names and the image does not have is passed over.

use std::{
    collections::HashSet,
    fs,
    io::{self, BufRead as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{atomic_file, digest::Digest};

/// The version of the format.
const VERSION: u32 = 1;
/// The longest trace that is read, in bytes.
const LONGEST: u64 = 16 << 20;
/// The most chunks that a trace holds.
pub const MOST_CHUNKS: usize = 1 << 16;
/// After so many starts that did without a chunk it is left out.
const FORGOTTEN_AFTER: u32 = 4;

/// In which order chunks were needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// Digest of the image's manifest.
    pub image: Digest,
    /// In order of need.
    pub parts: Vec<Part>,
}

/// Chunks of one blob that were needed one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The blob's id.
    pub blob: String,
    /// Numbers of the chunks in the blob.
    pub chunks: Vec<u32>,
    /// How many starts in a row did without them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unused: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    #[serde(rename = "nydus-store-trace")]
    version: u32,
    image: Digest,
}

/// A trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read.
    #[error("cannot read the trace: {0}")]
    Io(#[from] io::Error),
    /// It is longer than a trace can be.
    #[error("it is no trace: longer than {} MiB, or of more than {MOST_CHUNKS} chunks", LONGEST >> 20)]
    TooLong,
    /// A line is not what it should be.
    #[error("it is no trace: line {line}: {reason}")]
    Malformed {
        /// The line, from 1 on.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
}

impl Trace {
    /// Reads a trace.
    pub fn read(from: impl io::Read) -> Result<Self, TraceError> {
        let mut limited = from.take(LONGEST + 1);
        let (mut image, mut parts, mut chunks) = (None, Vec::<Part>::new(), 0);
        let mut reader = io::BufReader::new(&mut limited);
        let (mut text, mut line) = (Vec::new(), 0);
        loop {
            text.clear();
            if reader.read_until(b'\n', &mut text)? == 0 {
                break;
            }
            line += 1;
            let malformed = |reason: String| TraceError::Malformed { line, reason };
            let wrong = |error: serde_json::Error| malformed(error.to_string());
            if image.is_none() {
                let header: Header = serde_json::from_slice(&text).map_err(wrong)?;
                if header.version != VERSION {
                    return Err(malformed(format!("version {} is not known here", header.version)));
                }
                image = Some(header.image);
                continue;
            }
            let part: Part = serde_json::from_slice(&text).map_err(wrong)?;
            Digest::from_hex(&part.blob).map_err(|_| malformed("`blob` is not the id of a blob".to_owned()))?;
            chunks += part.chunks.len();
            parts.push(part);
        }
        drop(reader);
        if limited.limit() == 0 || chunks > MOST_CHUNKS {
            return Err(TraceError::TooLong);
        }
        let missing = || TraceError::Malformed {
            line: 1,
            reason: "there is no header".to_owned(),
        };
        let image = image.ok_or_else(missing)?;
        Ok(Self { image, parts })
    }

    /// Writes the trace.
    pub fn write(&self, mut to: impl io::Write) -> io::Result<()> {
        let header = Header {
            version: VERSION,
            image: self.image,
        };
        serde_json::to_writer(&mut to, &header)?;
        to.write_all(b"\n")?;
        for part in &self.parts {
            serde_json::to_writer(&mut to, part)?;
            to.write_all(b"\n")?;
        }
        to.flush()
    }

    /// Number of chunks.
    pub fn chunks(&self) -> usize {
        self.parts.iter().map(|part| part.chunks.len()).sum()
    }

    /// What another start is to know of it: what was not needed again and again is left out.
    pub fn aged(mut self) -> Self {
        for part in &mut self.parts {
            part.unused = part.unused.saturating_add(1);
        }
        self.parts.retain(|part| part.unused < FORGOTTEN_AFTER);
        self
    }

    /// A trace with what others have and it has not after it.
    pub fn and_then(mut self, others: Self) -> Self {
        let mut known: HashSet<(String, u32)> = HashSet::new();
        for part in &self.parts {
            known.extend(part.chunks.iter().map(|chunk| (part.blob.clone(), *chunk)));
        }
        let mut left = MOST_CHUNKS.saturating_sub(self.chunks());
        for mut part in others.parts {
            part.chunks.retain(|chunk| known.insert((part.blob.clone(), *chunk)));
            part.chunks.truncate(left);
            left -= part.chunks.len();
            if !part.chunks.is_empty() {
                self.parts.push(part);
            }
        }
        self
    }
}

/// The traces of a root.
#[derive(Debug)]
pub struct Traces {
    dir: PathBuf,
}

impl Traces {
    /// Those in `dir`, which is made, for its owner alone, if it is missing.
    pub fn open(dir: &Path) -> io::Result<Self> {
        atomic_file::make_private_dir(dir)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Removes what a process that was killed has left half-written.
    pub fn remove_unfinished(&self) -> io::Result<()> {
        atomic_file::remove_unfinished(&self.dir)
    }

    /// The trace of an image, if there is one.
    pub fn get(&self, image: &Digest) -> Result<Option<Trace>, TraceError> {
        match fs::File::open(self.path(image)) {
            Ok(file) => Trace::read(file).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Keeps a trace, in the place of an earlier one.
    pub fn put(&self, trace: &Trace) -> io::Result<()> {
        let mut bytes = Vec::new();
        trace.write(&mut bytes)?;
        atomic_file::write_atomically(&self.path(&trace.image), &bytes)
    }

    /// The images that there are traces of.
    pub fn images(&self) -> io::Result<Vec<Digest>> {
        let mut images = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let hex = name.to_str().and_then(|name| name.strip_suffix(".trace"));
            images.extend(hex.and_then(|hex| Digest::from_hex(hex).ok()));
        }
        images.sort();
        Ok(images)
    }

    fn path(&self, image: &Digest) -> PathBuf {
        self.dir.join(format!("{}.trace", image.hex()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(blob: u8, chunks: &[u32], unused: u32) -> Part {
        Part {
            blob: Digest::of(&[blob]).hex(),
            chunks: chunks.to_vec(),
            unused,
        }
    }

    fn trace(parts: &[Part]) -> Trace {
        Trace {
            image: Digest::of(b"image"),
            parts: parts.to_vec(),
        }
    }

    fn read(text: &str) -> Result<Trace, TraceError> {
        Trace::read(text.as_bytes())
    }

    #[test]
    fn what_is_kept_is_what_was_given() {
        let dir = tempfile::tempdir().unwrap();
        let traces = Traces::open(dir.path()).unwrap();
        let kept = trace(&[part(1, &[5, 6, 2], 0), part(2, &[1], 3), part(1, &[0], 0)]);
        assert_eq!(traces.get(&kept.image).unwrap(), None);
        traces.put(&kept).unwrap();
        assert_eq!(traces.get(&kept.image).unwrap(), Some(kept.clone()));
        assert_eq!(traces.images().unwrap(), [kept.image]);
    }

    #[test]
    fn what_is_not_needed_any_more_is_forgotten() {
        let mut known = trace(&[part(1, &[1, 2, 3], 0)]);
        for start in 1..=FORGOTTEN_AFTER {
            known = trace(&[part(1, &[2, 9], 0)]).and_then(known.aged());
            assert_eq!(known.parts[0], part(1, &[2, 9], 0));
            let rest = (start < FORGOTTEN_AFTER).then(|| part(1, &[1, 3], start));
            assert_eq!(known.parts.get(1), rest.as_ref());
        }
    }

    #[test]
    fn what_is_no_trace_says_where() {
        let header = format!(r#"{{"nydus-store-trace":1,"image":"{}"}}"#, Digest::of(b""));
        assert!(read(&header).unwrap().parts.is_empty());
        for (text, line) in [
            ("", 1),
            ("{}", 1),
            (r#"{"nydus-store-trace":1,"image":"sha256:../.."}"#, 1),
            (&header.replace(":1,", ":2,"), 1),
            (&format!("{header}\n{{\"blob\":\"../x\",\"chunks\":[1]}}"), 2),
            (&format!("{header}\n\n"), 2),
            (
                &format!("{header}\n{{\"blob\":\"{}\",\"chunks\":[-1]}}", "ab".repeat(32)),
                2,
            ),
        ] {
            let error = read(text).unwrap_err();
            assert!(
                matches!(error, TraceError::Malformed { line: at, .. } if at == line),
                "{text}: {error}"
            );
        }
        let long = format!(
            "{header}\n{}",
            format!("{{\"blob\":\"{}\",\"chunks\":[1]}}\n", "ab".repeat(32)).repeat(1 << 17)
        );
        assert!(matches!(read(&long), Err(TraceError::TooLong)));
        let endless = io::Read::chain(header.as_bytes(), io::repeat(b' '));
        assert!(Trace::read(endless).is_err());
    }
}
