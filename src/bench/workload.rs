//! What is to be fetched of an image: its units, put in an order and merged into requests.

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    path::{Path, PathBuf},
    str::FromStr,
};

use super::order::Order;
use crate::{
    blob::{error::ReadError, steps::Units},
    digest::Digest,
    image::{
        loaded::LoadedImage,
        trace::{Trace, TraceError, TracePart},
    },
};

/// Stored bytes between two units that are rather fetched for nothing than asked around; as when the cache is filled.
const GAP: u64 = 64 << 10;
/// The least that units are merged up to, in bytes.
const MIN_REQUEST: u64 = 4 << 10;
/// The most, in bytes.
pub const MAX_REQUEST: u64 = 64 << 20;

/// How much is asked for at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestSize {
    /// One unit, as a reader's miss does.
    Chunk,
    /// Neighbouring units, up to so many stored bytes; a unit that is longer by itself.
    UpTo(u64),
}

/// Not a size of requests.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is neither `chunk` nor a size from 4K to 64M")]
pub struct InvalidRequestSize(String);

impl FromStr for RequestSize {
    type Err = InvalidRequestSize;

    fn from_str(text: &str) -> Result<Self, InvalidRequestSize> {
        if text == "chunk" {
            return Ok(Self::Chunk);
        }
        match parse_size(text) {
            Some(size @ MIN_REQUEST..=MAX_REQUEST) => Ok(Self::UpTo(size)),
            _ => Err(InvalidRequestSize(text.to_owned())),
        }
    }
}

impl fmt::Display for RequestSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chunk => f.write_str("chunk"),
            Self::UpTo(size) if size % (1 << 20) == 0 => write!(f, "{}M", size >> 20),
            Self::UpTo(size) if size % (1 << 10) == 0 => write!(f, "{}K", size >> 10),
            Self::UpTo(size) => write!(f, "{size}"),
        }
    }
}

/// A number of bytes: `4096`, `64K`, `1M`, `2G` (powers of 1024).
pub fn parse_size(text: &str) -> Option<u64> {
    let (number, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// A unit among all of the image's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Position of the blob.
    pub blob: usize,
    /// Position of the unit in the blob.
    pub unit: usize,
    /// Where its stored bytes start in the blob.
    pub start: u64,
    /// Where they end.
    pub end: u64,
}

/// Stored bytes that are asked for at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Position of the blob.
    pub blob: usize,
    /// Where the bytes start in the blob.
    pub start: u64,
    /// Where they end.
    pub end: u64,
    /// Positions of the units in them.
    pub units: Vec<usize>,
}

impl Request {
    /// How many bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether there are none, which is never so.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The data of an image.
pub struct Workload {
    /// Digest of the image's manifest.
    pub image: Digest,
    /// Each blob, with its digest.
    pub blobs: Vec<(Digest, Units)>,
}

/// The image's chunks cannot be put in order.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// Where its chunks are cannot be found out.
    #[error("cannot find out where the chunks are: {0}")]
    Units(#[from] ReadError),
    /// The bootstrap's blob table is wrong.
    #[error("`{0}` is no blob's id")]
    BlobId(String),
    /// The trace cannot be read.
    #[error("{}: {source}", file.display())]
    Trace {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: TraceError,
    },
    /// The trace has nothing that could be fetched.
    #[error("no chunk of the trace is in the image: it is a trace of {0}")]
    ForeignTrace(Digest),
    /// The image has no data.
    #[error("the image has no data to fetch")]
    Empty,
}

impl Workload {
    /// The data of that image. Blob metas are fetched, if they are not in the bootstrap layer.
    ///
    /// # Errors
    /// If a blob meta cannot be had.
    pub async fn of(image: &LoadedImage) -> Result<Self, WorkloadError> {
        let mut blobs = Vec::new();
        for blob in image.contents.blobs() {
            let id = &blob.layout().id;
            let digest = Digest::from_hex(id).map_err(|_| WorkloadError::BlobId(id.clone()))?;
            blobs.push((digest, Units::load(blob.fetcher()).await?));
        }
        let image = image.digest;
        Ok(Self { image, blobs })
    }

    /// All of it, as requests of that size in that order.
    ///
    /// # Errors
    /// Of reading a trace; and if there is nothing to fetch.
    pub fn requests(&self, size: RequestSize, order: &Order, seed: u64) -> Result<Vec<Request>, WorkloadError> {
        let requests = match order {
            Order::Seq => merge(self.pieces(), size),
            Order::Random => shuffled(merge(self.pieces(), size), seed),
            Order::Trace(file) => merge(self.traced(&read_trace(file)?)?.into_iter(), size),
        };
        match requests.is_empty() {
            true => Err(WorkloadError::Empty),
            false => Ok(requests),
        }
    }

    /// All units, in the order in which they lie in the blobs.
    fn pieces(&self) -> impl Iterator<Item = Piece> {
        let of_blob =
            |(blob, (_, units)): (usize, &'_ (Digest, Units))| (0..units.all().len()).map(move |unit| (blob, unit));
        self.blobs
            .iter()
            .enumerate()
            .flat_map(of_blob)
            .map(|(blob, unit)| self.piece(blob, unit))
    }

    fn piece(&self, blob: usize, unit: usize) -> Piece {
        let plan = &self.blobs[blob].1.all()[unit].unit;
        Piece {
            blob,
            unit,
            start: plan.compressed_offset,
            end: plan.compressed_end(),
        }
    }

    /// The units of a trace's chunks, each once. What the image does not have is left out.
    fn traced(&self, trace: &Trace) -> Result<Vec<Piece>, WorkloadError> {
        let blobs = self.blobs.iter().enumerate();
        let blobs: HashMap<&str, usize> = blobs.map(|(at, (_, units))| (units.layout().id.as_str(), at)).collect();
        let mut seen = std::collections::HashSet::new();
        let of_part = |part: &TracePart| {
            let blob = blobs.get(part.blob.as_str()).copied();
            let place = move |chunk: &u32| Some((blob?, self.blobs[blob?].1.of_chunk(*chunk)?));
            part.chunks.iter().filter_map(place).collect::<Vec<_>>()
        };
        let places = trace.parts.iter().flat_map(of_part);
        let pieces: Vec<_> = places
            .filter(|place| seen.insert(*place))
            .map(|(blob, unit)| self.piece(blob, unit))
            .collect();
        if pieces.is_empty() {
            return Err(WorkloadError::ForeignTrace(trace.image));
        }
        if trace.image != self.image {
            tracing::warn!(trace = %trace.image, image = %self.image, "the trace is of another image");
        }
        Ok(pieces)
    }
}

fn read_trace(file: &Path) -> Result<Trace, WorkloadError> {
    let opened = File::open(file).map_err(TraceError::from);
    opened.and_then(Trace::read).map_err(|source| WorkloadError::Trace {
        file: file.to_owned(),
        source,
    })
}

/// Requests for `pieces` in their order. Those that come one after the other and lie so are asked for together.
fn merge(pieces: impl Iterator<Item = Piece>, size: RequestSize) -> Vec<Request> {
    let most = match size {
        RequestSize::Chunk => 0,
        RequestSize::UpTo(most) => most,
    };
    let mut requests: Vec<Request> = Vec::new();
    for piece in pieces {
        match requests.last_mut() {
            Some(last)
                if last.blob == piece.blob
                    && piece.start >= last.end
                    && piece.start - last.end <= GAP
                    && piece.end - last.start <= most =>
            {
                last.end = piece.end;
                last.units.push(piece.unit);
            }
            _ => requests.push(Request {
                blob: piece.blob,
                start: piece.start,
                end: piece.end,
                units: vec![piece.unit],
            }),
        }
    }
    requests
}

fn shuffled(mut requests: Vec<Request>, seed: u64) -> Vec<Request> {
    fastrand::Rng::with_seed(seed).shuffle(&mut requests);
    requests
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(blob: usize, unit: usize, start: u64, end: u64) -> Piece {
        Piece { blob, unit, start, end }
    }

    fn units(requests: &[Request]) -> Vec<Vec<usize>> {
        requests.iter().map(|request| request.units.clone()).collect()
    }

    #[test]
    fn sizes() {
        for (text, size) in [
            ("chunk", RequestSize::Chunk),
            ("64K", RequestSize::UpTo(64 << 10)),
            ("1M", RequestSize::UpTo(1 << 20)),
            ("5000", RequestSize::UpTo(5000)),
        ] {
            assert_eq!(text.parse::<RequestSize>().unwrap(), size);
            assert_eq!(size.to_string(), text);
        }
        for text in ["", "K", "1K", "65M", "-1", "1T", "chunks", "99999999999999999999G"] {
            assert!(text.parse::<RequestSize>().is_err(), "{text}");
        }
        assert_eq!((parse_size("2G"), parse_size("17")), (Some(2 << 30), Some(17)));
    }

    #[test]
    fn neighbours_are_merged_up_to_the_size() {
        let k = |n: u64| n << 10;
        let pieces = [
            piece(0, 0, 0, k(20)),
            piece(0, 1, k(20), k(40)),
            piece(0, 2, k(41), k(60)),
            piece(0, 3, k(60), k(70)),
            piece(0, 4, k(500), k(501)),
            piece(0, 5, k(501), k(900)),
            piece(1, 0, k(900), k(901)),
        ];
        let merged = |size| merge(pieces.into_iter(), size);
        assert_eq!(merged(RequestSize::Chunk).len(), pieces.len());
        let requests = merged(RequestSize::UpTo(k(64)));
        assert_eq!(units(&requests), [vec![0, 1, 2], vec![3], vec![4], vec![5], vec![0]]);
        assert_eq!(
            (requests[0].start, requests[0].len()),
            (0, k(60)),
            "the gap is fetched too"
        );
        let requests = merged(RequestSize::UpTo(1 << 20));
        assert_eq!(units(&requests), [vec![0, 1, 2, 3], vec![4, 5], vec![0]]);
        // Backwards nothing follows on the other.
        let backwards = merge(pieces.into_iter().rev(), RequestSize::UpTo(1 << 20));
        assert_eq!(backwards.len(), pieces.len());
    }

    #[test]
    fn a_seed_gives_one_order() {
        let all = || {
            merge(
                (0..100).map(|n| piece(0, n, n as u64 * 10, n as u64 * 10 + 10)),
                RequestSize::Chunk,
            )
        };
        let (one, again, other) = (shuffled(all(), 1), shuffled(all(), 1), shuffled(all(), 2));
        assert_eq!(one, again);
        assert!(one != other && one != all());
        let mut sorted = one;
        sorted.sort_by_key(|request| request.start);
        assert_eq!(sorted, all());
    }
}
