//! Ranges of blobs whose bytes are read as they come.

use bytes::Bytes;
use reqwest::StatusCode;

use super::{
    Client, Error, Repository,
    client::Ask,
    failover::ServedBy,
    response::{MAX_SKIPPED, Response},
};
use crate::digest::Digest;

/// Bytes of a blob as they come from the registry, not verified.
pub struct BlobStream {
    response: Response,
    giver: ServedBy,
    /// Bytes that come before those asked for, where a registry sends more than these.
    skip: u64,
    /// Bytes still due.
    left: u64,
}

impl Client {
    /// Opens the bytes of a blob from the first to the last of `range`, for a reader that takes them as they come and
    /// waits for no other request meanwhile. It counts as a request under way until the stream has ended or is dropped;
    /// no more than half of them are for what nobody waits for yet (`is_ahead`, [`Client::most_ahead`]).
    ///
    /// # Errors
    /// As [`Client::blob_range`].
    pub async fn open_range(
        &self,
        repository: &Repository,
        digest: &Digest,
        range: (u64, u64),
        is_ahead: bool,
    ) -> Result<BlobStream, Error> {
        let mut ask = Ask::blob(repository, digest, Some(range))?;
        ask.is_ahead = is_ahead;
        let (client, asked) = (self, &ask);
        self.bounded(&ask, self.request_timeout(), |at| async move {
            let response = client.exchange(asked, &at).await?;
            BlobStream::new(response, ServedBy::of(&at, digest), range)
        })
        .await
    }
}

impl BlobStream {
    fn new(response: Response, giver: ServedBy, (first, last): (u64, u64)) -> Result<Self, Error> {
        let skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => response.skip_in_part((first, last))?,
            StatusCode::OK if first > MAX_SKIPPED => return Err(response.ranges_ignored(first)),
            StatusCode::OK => first,
            _ => return Err(response.invalid("other bytes than those asked for")),
        };
        Ok(Self {
            response,
            giver,
            skip,
            left: (last - first).saturating_add(1),
        })
    }

    /// Who gives the bytes.
    pub fn giver(&self) -> &ServedBy {
        &self.giver
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// [`Error::Timeout`] after a silence, [`Error::Interrupted`] and [`Error::ShortBody`].
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        while self.left != 0 {
            let Some(mut bytes) = self.response.next().await? else {
                return Err(self.response.short(self.left, 0));
            };
            let skipped = self.skip.min(bytes.len() as u64);
            self.skip -= skipped;
            // At most the length of `bytes`, like `skipped`.
            let bytes = bytes.split_off(skipped as usize);
            let taken = self.left.min(bytes.len() as u64);
            self.left -= taken;
            if self.left == 0 {
                self.response.done();
                self.response.hold(None);
            }
            if taken > 0 {
                return Ok(Some(bytes.slice(..taken as usize)));
            }
        }
        Ok(None)
    }
}
