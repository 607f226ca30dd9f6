//! What is remembered of endpoints, per blob: which lack it, served corrupt bytes of it, or ignore ranges.

use std::time::Duration;

use super::{endpoints::Endpoint, repository::BlobLocation, request::RegistryRequest};
use crate::{digest::Digest, ttl_cache::TtlCache};

/// Most blobs remembered of each kind.
const MAX_BLOBS: usize = 4096;
/// How long a mirror is not asked for a blob that it lacks.
const MISSING_TTL: Duration = Duration::from_secs(60);
/// How long a mirror is not asked for a blob of which it served corrupt bytes.
const CORRUPT_TTL: Duration = Duration::from_secs(600);
/// How long it is remembered that an endpoint ignores ranges of a blob.
const RANGES_IGNORED_TTL: Duration = MISSING_TTL;

/// What earlier answers tell about endpoints.
pub(super) struct EndpointMemory {
    missing: TtlCache<BlobLocation, ()>,
    corrupt: TtlCache<BlobLocation, ()>,
    /// Mirrors are remembered by their own repository, the registry by the image's.
    ranges_ignored: TtlCache<BlobLocation, ()>,
}

/// The endpoint that served bytes of a blob, to be named if they turn out corrupt
/// ([`Client::report_corrupt`](super::Client::report_corrupt)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServedBy {
    pub(super) blob: BlobLocation,
    pub(super) is_mirror: bool,
}

impl ServedBy {
    pub(super) fn new(endpoint: &Endpoint, digest: &Digest) -> Self {
        Self {
            blob: (endpoint.repository.clone(), *digest),
            is_mirror: endpoint.is_mirror,
        }
    }
}

impl EndpointMemory {
    pub(super) fn new() -> Self {
        Self {
            missing: TtlCache::new(MAX_BLOBS, MISSING_TTL),
            corrupt: TtlCache::new(MAX_BLOBS, CORRUPT_TTL),
            ranges_ignored: TtlCache::new(MAX_BLOBS, RANGES_IGNORED_TTL),
        }
    }

    /// Remembers that a mirror did not serve `blob`.
    pub(super) fn record_missing(&self, blob: BlobLocation) {
        self.missing.insert(blob, ());
    }

    /// Remembers that a mirror served corrupt bytes of `blob`. Returns whether that is new.
    pub(super) fn record_corrupt(&self, blob: BlobLocation) -> bool {
        let is_new = self.corrupt.get(&blob).is_none();
        self.corrupt.insert(blob, ());
        is_new
    }

    /// Remembers whether `endpoint` ignored the range of `request`. A mirror may do so only while it fetches the blob.
    pub(super) fn record_ranges(&self, request: &RegistryRequest<'_>, endpoint: &Endpoint, is_ignored: bool) {
        let (Some(there), Some(of_image)) = (
            request.blob_at(&endpoint.repository),
            request.blob_at(request.repository),
        ) else {
            return;
        };
        if is_ignored {
            let blob = if endpoint.is_mirror { there } else { of_image };
            self.ranges_ignored.insert(blob, ());
        } else {
            self.ranges_ignored.remove(&there);
            self.ranges_ignored.remove(&of_image);
        }
    }

    /// Whether requests for ranges of `blob` were recently answered with the whole blob.
    pub(super) fn are_ranges_ignored(&self, blob: &BlobLocation) -> bool {
        self.ranges_ignored.get(blob).is_some()
    }

    /// Whether a mirror is not to be asked for `blob`.
    pub(super) fn is_excluded(&self, blob: &BlobLocation) -> bool {
        self.missing.get(blob).is_some() || self.corrupt.get(blob).is_some()
    }
}
