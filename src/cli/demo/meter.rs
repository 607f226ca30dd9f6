//! Counts what the registry is asked for.

use std::{
    ops::Sub,
    time::{Duration, Instant},
};

use super::console::plural;
use crate::{
    fixtures::{BuiltImage, EmbeddedRegistry, registry::RequestKind},
    humanize::size,
};

/// Requests, and the bytes that they brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    pub requests: u64,
    pub bytes: u64,
}

/// Reads the counters of the registry that serves one image.
pub struct Meter<'a> {
    registry: &'a EmbeddedRegistry,
    manifest: u64,
    whole: u64,
}

impl<'a> Meter<'a> {
    pub fn new(registry: &'a EmbeddedRegistry, image: &BuiltImage) -> Self {
        let manifest = image.manifest.len() as u64;
        let blobs: u64 = image.blobs.iter().map(|blob| blob.size).sum();
        Self {
            registry,
            manifest,
            whole: blobs + image.config.len() as u64 + manifest,
        }
    }

    /// What a full pull fetches: the whole image, compressed as it is in the registry.
    pub fn whole(&self) -> u64 {
        self.whole
    }

    /// Everything until now.
    pub fn total(&self) -> Traffic {
        // The registry counts the bytes of blobs only.
        let manifests = |log: &[crate::fixtures::RequestInfo]| {
            let fetched = |request: &&crate::fixtures::RequestInfo| {
                request.kind == RequestKind::Manifest && request.method == "GET"
            };
            log.iter().filter(fetched).count() as u64
        };
        let blobs: u64 = self.registry.stats().values().map(|blob| blob.bytes).sum();
        Traffic {
            requests: self.registry.request_count(),
            bytes: blobs + self.manifest * manifests(&self.registry.log()),
        }
    }

    /// Everything until now, when nothing more comes: the kernel reads ahead by itself.
    pub fn settled(&self) -> Traffic {
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
