//! A range of a blob, read as its bytes arrive.

use bytes::Bytes;
use reqwest::StatusCode;

use super::{
    Error,
    endpoint_memory::ServedBy,
    response::{MAX_SKIPPED, Response},
};

/// Unverified bytes of a blob as they arrive. Counts as a request in flight until its end or its drop.
pub struct BlobStream {
    response: Response,
    served_by: ServedBy,
    /// Bytes to skip first, where the server sends more than the range.
    skip: u64,
    /// Bytes still expected.
    remaining: u64,
}

impl BlobStream {
    /// The bytes from the first to the last of the range, from the answer to a request for it.
    pub(super) fn new(response: Response, served_by: ServedBy, (first, last): (u64, u64)) -> Result<Self, Error> {
        let skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => response.skip_in_range((first, last))?,
            StatusCode::OK if first > MAX_SKIPPED => return Err(response.ranges_ignored(first)),
            StatusCode::OK => first,
            status => return Err(response.invalid(format!("status {status} to a range request"))),
        };
        Ok(Self {
            response,
            served_by,
            skip,
            remaining: (last - first).saturating_add(1),
        })
    }

    /// The endpoint that serves the bytes.
    pub fn served_by(&self) -> &ServedBy {
        &self.served_by
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// [`Error::Timeout`] if no bytes arrive in time, [`Error::Interrupted`] and [`Error::ShortBody`].
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        while self.remaining != 0 {
            let Some(mut bytes) = self.response.next().await? else {
                return Err(self.response.short_body(self.remaining, 0));
            };
            let skipped = self.skip.min(bytes.len() as u64);
            self.skip -= skipped;
            // Fits a `usize`, as `taken` below: the length of `bytes` bounds both.
            let bytes = bytes.split_off(skipped as usize);
            let taken = self.remaining.min(bytes.len() as u64);
            self.remaining -= taken;
            if self.remaining == 0 {
                self.response.complete();
            }
            if taken > 0 {
                return Ok(Some(bytes.slice(..taken as usize)));
            }
        }
        Ok(None)
    }
}
