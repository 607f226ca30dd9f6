//! Counts the requests to the registry and the bytes of its responses.

use std::{
    ops::Sub,
    time::{Duration, Instant},
};

use super::console::plural;
use crate::{
    fixtures::{BuiltImage, EmbeddedRegistry, registry::RequestKind},
    humanize::size,
};

/// A number of requests and of received bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    pub requests: u64,
    pub bytes: u64,
}

/// Reads the counters of a registry that serves one image.
pub struct Meter<'a> {
    registry: &'a EmbeddedRegistry,
    manifest_bytes: u64,
    image_bytes: u64,
}

impl<'a> Meter<'a> {
    pub fn new(registry: &'a EmbeddedRegistry, image: &BuiltImage) -> Self {
        let manifest = image.manifest.len() as u64;
        let blobs: u64 = image.blobs.iter().map(|blob| blob.size).sum();
        Self {
            registry,
            manifest_bytes: manifest,
            image_bytes: blobs + image.config.len() as u64 + manifest,
        }
    }

    /// Compressed size of the whole image: the bytes of a full pull.
    pub fn image_bytes(&self) -> u64 {
        self.image_bytes
    }

    /// Traffic since the registry's start.
    pub fn total(&self) -> Traffic {
        // The registry's counters cover blobs only; manifests are counted from its log.
        let manifests = |log: &[crate::fixtures::RequestInfo]| {
            let fetched = |request: &&crate::fixtures::RequestInfo| {
                request.kind == RequestKind::Manifest && request.method == "GET"
            };
            log.iter().filter(fetched).count() as u64
        };
        let blobs: u64 = self.registry.stats().values().map(|blob| blob.bytes).sum();
        Traffic {
            requests: self.registry.request_count(),
            bytes: blobs + self.manifest_bytes * manifests(&self.registry.log()),
        }
    }

    /// Traffic since the registry's start, read once it stops growing (after 2 s at most). The kernel's own read-ahead
    /// may outlast a read.
    pub fn total_when_idle(&self) -> Traffic {
        let start = Instant::now();
        let mut last = self.total();
        loop {
            std::thread::sleep(Duration::from_millis(20));
            let now = self.total();
            if now == last || start.elapsed() > Duration::from_secs(2) {
                return now;
            }
            last = now;
        }
    }
}

impl Sub for Traffic {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            requests: self.requests - before.requests,
            bytes: self.bytes - before.bytes,
        }
    }
}

impl std::fmt::Display for Traffic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in {}", size(self.bytes), plural(self.requests, "request"))
    }
}
