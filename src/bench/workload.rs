//! [`Workload`]: an image's units, ordered and merged into requests.

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    path::{Path, PathBuf},
    str::FromStr,
};

use super::order::FetchOrder;
use crate::{
    blob::{error::ReadError, steps::Units},
    digest::Digest,
    image::{
        loaded::LoadedImage,
        trace::{Trace, TraceError, TracePart},
    },
};

/// Maximum gap between two units of one request, in bytes. The gap is fetched too, as when the whole image is
/// downloaded.
const MAX_GAP_BYTES: u64 = 64 << 10;
/// Minimum of [`RequestSize::UpTo`], in bytes.
const MIN_REQUEST_BYTES: u64 = 4 << 10;
/// Maximum of [`RequestSize::UpTo`], in bytes.
pub const MAX_REQUEST_BYTES: u64 = 64 << 20;

/// The size of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestSize {
    /// One unit, as for a cache miss.
    Chunk,
    /// Adjacent units of up to this many compressed bytes. A longer unit is a request of its own.
    UpTo(u64),
}

/// The text is not a request size.
#[derive(Debug, thiserror::Error)]
#[error("invalid request size `{0}`: expected `chunk` or a size from 4K to 64M")]
pub struct InvalidRequestSize(String);

impl FromStr for RequestSize {
    type Err = InvalidRequestSize;

    fn from_str(text: &str) -> Result<Self, InvalidRequestSize> {
        if text == "chunk" {
            return Ok(Self::Chunk);
        }
        match parse_size(text) {
            Some(size @ MIN_REQUEST_BYTES..=MAX_REQUEST_BYTES) => Ok(Self::UpTo(size)),
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

/// Parses a number of bytes: `4096`, `64K`, `1M`, `2G` (powers of 1024).
pub fn parse_size(text: &str) -> Option<u64> {
    let (number, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The position of a unit in the image's blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredUnit {
    /// Index of the blob.
    pub blob: usize,
    /// Index of the unit in the blob.
    pub unit: usize,
    /// Offset of its compressed bytes in the blob.
    pub start: u64,
    /// End offset.
    pub end: u64,
}

/// A range of a blob to fetch in one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchRequest {
    /// Index of the blob.
    pub blob: usize,
    /// Start offset in the blob.
    pub start: u64,
    /// End offset.
    pub end: u64,
    /// Indices of the units in the range.
    pub units: Vec<usize>,
}

impl FetchRequest {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }
}

/// The blobs and units of an image.
pub struct Workload {
    /// Digest of the image's manifest.
    pub image: Digest,
    /// Digest and units of each blob.
    pub blobs: Vec<(Digest, Units)>,
}

/// The workload cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// A blob meta cannot be loaded.
    #[error("cannot locate the chunks: {0}")]
    Units(#[from] ReadError),
    /// The bootstrap's blob table has an invalid id.
    #[error("invalid blob id `{0}`")]
    BlobId(String),
    /// The trace cannot be read.
    #[error("{}: {source}", file.display())]
    Trace {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: TraceError,
    },
    /// No chunk of the trace belongs to the image.
    #[error("the trace has no chunk of this image: it is a trace of {0}")]
    ForeignTrace(Digest),
    /// The image has no data.
    #[error("the image has no data to fetch")]
    Empty,
}

impl Workload {
    /// The workload of `image`. Fetches blob metas that are not in the bootstrap layer.
    ///
    /// # Errors
    /// If a blob meta cannot be loaded, or a blob id is invalid.
    pub async fn from_image(image: &LoadedImage) -> Result<Self, WorkloadError> {
        let mut blobs = Vec::new();
        for blob in image.contents.blobs() {
            let id = &blob.layout().id;
            let digest = Digest::from_hex(id).map_err(|_| WorkloadError::BlobId(id.clone()))?;
            blobs.push((digest, Units::load(blob.fetcher()).await?));
        }
        let image = image.digest;
        Ok(Self { image, blobs })
    }

    /// All requests of the given size, in the given order.
    ///
    /// # Errors
    /// If the trace cannot be read or is foreign, or if the image has no data.
    pub fn requests(
        &self,
        size: RequestSize,
        order: &FetchOrder,
        seed: u64,
    ) -> Result<Vec<FetchRequest>, WorkloadError> {
        let requests = match order {
            FetchOrder::Seq => merge(self.stored_units(), size),
            FetchOrder::Random => shuffled(merge(self.stored_units(), size), seed),
            FetchOrder::Trace(file) => merge(self.traced(&read_trace(file)?)?.into_iter(), size),
        };
        match requests.is_empty() {
            true => Err(WorkloadError::Empty),
            false => Ok(requests),
        }
    }

    /// All units, by blob and offset.
    fn stored_units(&self) -> impl Iterator<Item = StoredUnit> {
        let of_blob =
            |(blob, (_, units)): (usize, &'_ (Digest, Units))| (0..units.all().len()).map(move |unit| (blob, unit));
        self.blobs
            .iter()
            .enumerate()
            .flat_map(of_blob)
            .map(|(blob, unit)| self.stored_unit(blob, unit))
    }

    fn stored_unit(&self, blob: usize, unit: usize) -> StoredUnit {
        let plan = &self.blobs[blob].1.all()[unit].extent;
        StoredUnit {
            blob,
            unit,
            start: plan.compressed_offset,
            end: plan.compressed_end(),
        }
    }

    /// The units of a trace's chunks, each once. Skips chunks that the image does not have.
    fn traced(&self, trace: &Trace) -> Result<Vec<StoredUnit>, WorkloadError> {
        let blobs = self.blobs.iter().enumerate();
        let blobs: HashMap<&str, usize> = blobs.map(|(at, (_, units))| (units.layout().id.as_str(), at)).collect();
        let mut seen = std::collections::HashSet::new();
        let of_part = |part: &TracePart| {
            let blob = blobs.get(part.blob.as_str()).copied();
            let place = move |chunk: &u32| Some((blob?, self.blobs[blob?].1.of_chunk(*chunk)?));
            part.chunks.iter().filter_map(place).collect::<Vec<_>>()
        };
        let places = trace.parts.iter().flat_map(of_part);
        let stored_units: Vec<_> = places
            .filter(|place| seen.insert(*place))
            .map(|(blob, unit)| self.stored_unit(blob, unit))
            .collect();
        if stored_units.is_empty() {
            return Err(WorkloadError::ForeignTrace(trace.image));
        }
        if trace.image != self.image {
            tracing::warn!(manifest = %self.image, traced = %trace.image, "using trace of another image");
        }
        Ok(stored_units)
    }
}

fn read_trace(file: &Path) -> Result<Trace, WorkloadError> {
    let opened = File::open(file).map_err(TraceError::from);
    opened.and_then(Trace::read).map_err(|source| WorkloadError::Trace {
        file: file.to_owned(),
        source,
    })
}

/// Merges consecutive units that are adjacent in a blob into requests, in the given order.
fn merge(stored_units: impl Iterator<Item = StoredUnit>, size: RequestSize) -> Vec<FetchRequest> {
    let most = match size {
        RequestSize::Chunk => 0,
        RequestSize::UpTo(most) => most,
    };
    let mut requests: Vec<FetchRequest> = Vec::new();
    for stored_unit in stored_units {
        match requests.last_mut() {
            Some(last)
                if last.blob == stored_unit.blob
                    && stored_unit.start >= last.end
                    && stored_unit.start - last.end <= MAX_GAP_BYTES
                    && stored_unit.end - last.start <= most =>
            {
                last.end = stored_unit.end;
                last.units.push(stored_unit.unit);
            }
            _ => requests.push(FetchRequest {
                blob: stored_unit.blob,
                start: stored_unit.start,
                end: stored_unit.end,
                units: vec![stored_unit.unit],
            }),
        }
    }
    requests
}

fn shuffled(mut requests: Vec<FetchRequest>, seed: u64) -> Vec<FetchRequest> {
    fastrand::Rng::with_seed(seed).shuffle(&mut requests);
    requests
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored_unit(blob: usize, unit: usize, start: u64, end: u64) -> StoredUnit {
        StoredUnit { blob, unit, start, end }
    }

    fn units(requests: &[FetchRequest]) -> Vec<Vec<usize>> {
        requests.iter().map(|request| request.units.clone()).collect()
    }

    #[test]
    fn request_sizes_are_parsed_and_displayed() {
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
    fn adjacent_units_are_merged_up_to_the_size() {
        let k = |n: u64| n << 10;
        let stored_units = [
            stored_unit(0, 0, 0, k(20)),
            stored_unit(0, 1, k(20), k(40)),
            stored_unit(0, 2, k(41), k(60)),
            stored_unit(0, 3, k(60), k(70)),
            stored_unit(0, 4, k(500), k(501)),
            stored_unit(0, 5, k(501), k(900)),
            stored_unit(1, 0, k(900), k(901)),
        ];
        let merged = |size| merge(stored_units.into_iter(), size);
        assert_eq!(merged(RequestSize::Chunk).len(), stored_units.len());
        let requests = merged(RequestSize::UpTo(k(64)));
        assert_eq!(units(&requests), [vec![0, 1, 2], vec![3], vec![4], vec![5], vec![0]]);
        assert_eq!(
            (requests[0].start, requests[0].len()),
            (0, k(60)),
            "the gap is fetched too"
        );
        let requests = merged(RequestSize::UpTo(1 << 20));
        assert_eq!(units(&requests), [vec![0, 1, 2, 3], vec![4, 5], vec![0]]);
        // In reverse order, no unit follows its predecessor.
        let backwards = merge(stored_units.into_iter().rev(), RequestSize::UpTo(1 << 20));
        assert_eq!(backwards.len(), stored_units.len());
    }

    #[test]
    fn seed_determines_the_order() {
        let all = || {
            merge(
                (0..100).map(|n| stored_unit(0, n, n as u64 * 10, n as u64 * 10 + 10)),
                RequestSize::Chunk,
            )
        };
        let (one, repeat, other) = (shuffled(all(), 1), shuffled(all(), 1), shuffled(all(), 2));
        assert_eq!(one, repeat);
        assert!(one != other && one != all());
        let mut sorted = one;
        sorted.sort_by_key(|request| request.start);
        assert_eq!(sorted, all());
    }
}
