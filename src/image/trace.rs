//! Traces: the order in which an image's chunks were first needed. The next start from an empty cache prefetches them.
//!
//! A trace is the file `<root>/traces/<digest of the image's manifest>.trace`, with one JSON document a line. The
//! header is `{"nydus-store-trace":1,"image":"sha256:…"}`. Parts follow in order of need: `{"blob":"<blob
//! id>","chunks":[7,8,9]}`. A part lists chunk numbers of one blob, and in `unused` how many consecutive starts did not
//! need them, if not 0. A trace is only a hint: chunks that the image does not have are ignored.

use std::{
    collections::HashSet,
    fs,
    io::{self, BufRead as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    atomic_file,
    digest::Digest,
    disk_usage::{self, StoredFile},
};

/// Ending of a trace's file name.
const ENDING: &str = ".trace";
/// Version of the format.
const VERSION: u32 = 1;
/// Largest trace that is read, in bytes.
const MAX_TRACE_BYTES: u64 = 16 << 20;
/// Maximum number of chunks in a trace.
pub const MAX_TRACE_CHUNKS: usize = 1 << 16;
/// Number of consecutive starts without a chunk after which the chunk is dropped.
const MAX_UNUSED_STARTS: u32 = 4;

/// Chunks in the order in which they were needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// Digest of the image's manifest.
    pub image: Digest,
    /// Parts in order of need.
    pub parts: Vec<TracePart>,
}

/// Chunks of one blob that were needed in succession.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TracePart {
    /// Id of the blob.
    pub blob: String,
    /// Numbers of the chunks in the blob.
    pub chunks: Vec<u32>,
    /// Number of consecutive starts that did not need the chunks.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unused: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TraceHeader {
    #[serde(rename = "nydus-store-trace")]
    version: u32,
    image: Digest,
}

/// Why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read.
    #[error("cannot read the trace: {0}")]
    Io(#[from] io::Error),
    /// The trace is longer than allowed.
    #[error("not a trace: longer than {} MiB or more than {MAX_TRACE_CHUNKS} chunks", MAX_TRACE_BYTES >> 20)]
    TooLong,
    /// A line is malformed.
    #[error("not a trace: line {line}: {reason}")]
    Malformed {
        /// Number of the line, from 1 on.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
}

impl Trace {
    /// Reads a trace.
    pub fn read(from: impl io::Read) -> Result<Self, TraceError> {
        let mut limited = from.take(MAX_TRACE_BYTES + 1);
        let (mut image, mut parts, mut chunks) = (None, Vec::<TracePart>::new(), 0);
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
                let header: TraceHeader = serde_json::from_slice(&text).map_err(wrong)?;
                if header.version != VERSION {
                    return Err(malformed(format!("unknown version {}", header.version)));
                }
                image = Some(header.image);
                continue;
            }
            let part: TracePart = serde_json::from_slice(&text).map_err(wrong)?;
            Digest::from_hex(&part.blob).map_err(|_| malformed("`blob` is not a blob id".to_owned()))?;
            chunks += part.chunks.len();
            parts.push(part);
        }
        drop(reader);
        if limited.limit() == 0 || chunks > MAX_TRACE_CHUNKS {
            return Err(TraceError::TooLong);
        }
        let missing = || TraceError::Malformed {
            line: 1,
            reason: "no header".to_owned(),
        };
        let image = image.ok_or_else(missing)?;
        Ok(Self { image, parts })
    }

    /// Writes the trace.
    pub fn write(&self, mut to: impl io::Write) -> io::Result<()> {
        let header = TraceHeader {
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

    /// Total number of chunks.
    pub fn chunks(&self) -> usize {
        self.parts.iter().map(|part| part.chunks.len()).sum()
    }

    /// Counts one more start that needed none of the chunks, and drops those that were not needed for too long.
    pub fn aged(mut self) -> Self {
        for part in &mut self.parts {
            part.unused = part.unused.saturating_add(1);
        }
        self.parts.retain(|part| part.unused < MAX_UNUSED_STARTS);
        self
    }

    /// Appends those chunks of `others` that the trace does not contain.
    pub fn append_missing(mut self, others: Self) -> Self {
        let mut known: HashSet<(String, u32)> = HashSet::new();
        for part in &self.parts {
            known.extend(part.chunks.iter().map(|chunk| (part.blob.clone(), *chunk)));
        }
        let mut left = MAX_TRACE_CHUNKS.saturating_sub(self.chunks());
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
    /// Opens `dir`, and creates it for its owner alone if it is missing.
    pub fn open(dir: &Path) -> io::Result<Self> {
        atomic_file::make_private_dir(dir)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// Removes unfinished files of a process that was killed.
    pub fn remove_unfinished(&self) -> io::Result<()> {
        atomic_file::remove_unfinished(&self.dir)
    }

    /// Disk space of the traces, in bytes.
    pub fn disk_usage(&self) -> io::Result<u64> {
        disk_usage::of_dir(&self.dir)
    }

    /// The trace of an image, if there is one.
    pub fn get(&self, image: &Digest) -> Result<Option<Trace>, TraceError> {
        match fs::File::open(self.path(image)) {
            Ok(file) => Trace::read(file).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Stores a trace; replaces an earlier one.
    pub fn put(&self, trace: &Trace) -> io::Result<()> {
        let mut bytes = Vec::new();
        trace.write(&mut bytes)?;
        atomic_file::write_atomically(&self.path(&trace.image), &bytes)
    }

    /// The images that have a trace.
    pub fn images(&self) -> io::Result<Vec<Digest>> {
        let mut images: Vec<_> = self.files()?.into_iter().map(|file| file.digest).collect();
        images.sort();
        Ok(images)
    }

    /// The files of all traces.
    pub fn files(&self) -> io::Result<Vec<StoredFile>> {
        disk_usage::stored_files(&self.dir, ENDING)
    }

    /// Removes the trace of an image.
    pub fn remove(&self, image: &Digest) -> io::Result<()> {
        match fs::remove_file(self.path(image)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn path(&self, image: &Digest) -> PathBuf {
        self.dir.join(format!("{}{ENDING}", image.hex()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(blob: u8, chunks: &[u32], unused: u32) -> TracePart {
        TracePart {
            blob: Digest::of(&[blob]).hex(),
            chunks: chunks.to_vec(),
            unused,
        }
    }

    fn trace(parts: &[TracePart]) -> Trace {
        Trace {
            image: Digest::of(b"image"),
            parts: parts.to_vec(),
        }
    }

    fn read(text: &str) -> Result<Trace, TraceError> {
        Trace::read(text.as_bytes())
    }

    #[test]
    fn stored_trace_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let traces = Traces::open(dir.path()).unwrap();
        let kept = trace(&[part(1, &[5, 6, 2], 0), part(2, &[1], 3), part(1, &[0], 0)]);
        assert_eq!(traces.get(&kept.image).unwrap(), None);
        traces.put(&kept).unwrap();
        assert_eq!(traces.get(&kept.image).unwrap(), Some(kept.clone()));
        assert_eq!(traces.images().unwrap(), [kept.image]);
    }

    #[test]
    fn chunks_that_no_recent_start_needed_are_dropped() {
        let mut known = trace(&[part(1, &[1, 2, 3], 0)]);
        for start in 1..=MAX_UNUSED_STARTS {
            known = trace(&[part(1, &[2, 9], 0)]).append_missing(known.aged());
            assert_eq!(known.parts[0], part(1, &[2, 9], 0));
            let rest = (start < MAX_UNUSED_STARTS).then(|| part(1, &[1, 3], start));
            assert_eq!(known.parts.get(1), rest.as_ref());
        }
    }

    #[test]
    fn malformed_trace_is_rejected_with_its_line() {
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
