//! Blobs passed on as they come, for who reads them once and keeps none of them here.

use bytes::Bytes;
use reqwest::{Method, StatusCode, header};

use super::{
    Client, Error, Repository,
    attempts::Giver,
    client::Ask,
    response::{MAX_SKIPPED, Response},
};
use crate::digest::Digest;

/// The bytes of a blob as they come from the registry. They are not verified: whoever reads them whole can do that.
pub struct BlobStream {
    response: Response,
    giver: Giver,
    /// Bytes that come before those asked for, where a registry sends more than these.
    skip: u64,
    /// Bytes still due, as far as it is known.
    left: Option<u64>,
}

impl Client {
    /// The length of a blob.
    ///
    /// # Errors
    /// [`Error::NotFound`], and whatever can go wrong with a registry.
    pub async fn blob_size(&self, repository: &Repository, digest: &Digest) -> Result<u64, Error> {
        let mut ask = Ask::blob(repository, digest, None)?;
        ask.method = Method::HEAD;
        let (client, asked) = (self, &ask);
        self.bounded(&ask, self.request_timeout(), |at| async move {
            let response = client.exchange(asked, &at).await?;
            let size = response.header(header::CONTENT_LENGTH);
            size.and_then(|size| size.parse().ok())
                .ok_or_else(|| response.invalid("it has no length"))
        })
        .await
    }

    /// Opens a blob, or the bytes of it from the first to the last of `range`, for somebody else. What takes longer than
    /// [`super::Options::request_timeout`] is only what comes after the answer's headers. How long that is, is the reader's
    /// choice: so it does not count as a request under way ([`super::Options::max_requests_per_host`]), and whoever opens many
    /// bounds their number.
    ///
    /// # Errors
    /// As [`Client::blob_range`].
    pub async fn open_blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        range: Option<(u64, u64)>,
    ) -> Result<BlobStream, Error> {
        let ask = Ask::blob(repository, digest, range)?;
        let (client, asked) = (self, &ask);
        self.bounded(&ask, self.request_timeout(), |at| async move {
            let mut response = client.exchange(asked, &at).await?;
            response.hold(None);
            BlobStream::new(response, Giver::of(&at, digest), range)
        })
        .await
    }

    /// The same for a range whose reader takes the bytes as they come and waits for no other request meanwhile. It counts as a
    /// request under way until the stream has ended or is dropped; no more than half of them are for what nobody waits for yet
    /// (`is_ahead`, [`Client::most_ahead`]).
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
            BlobStream::new(response, Giver::of(&at, digest), Some(range))
        })
        .await
    }
}

impl BlobStream {
    fn new(response: Response, giver: Giver, range: Option<(u64, u64)>) -> Result<Self, Error> {
        let length = response.header(header::CONTENT_LENGTH);
        let length: Option<u64> = length.and_then(|length| length.parse().ok());
        let Some((first, last)) = range else {
            return Ok(Self {
                response,
                giver,
                skip: 0,
                left: length,
            });
        };
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
            left: Some((last - first).saturating_add(1)),
        })
    }

    /// Who gives the bytes.
    pub fn giver(&self) -> &Giver {
        &self.giver
    }

    /// How many bytes there are, if that is known.
    pub fn length(&self) -> Option<u64> {
        self.left
    }

    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// [`Error::Timeout`] after a silence, [`Error::Interrupted`] and [`Error::ShortBody`].
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        while self.left != Some(0) {
            let Some(mut bytes) = self.response.next().await? else {
                return match self.left {
                    Some(left) => Err(self.response.short(left, 0)),
                    None => Ok(None),
                };
            };
            let skipped = self.skip.min(bytes.len() as u64);
            self.skip -= skipped;
            // At most the length of `bytes`, like `skipped`.
            let bytes = bytes.split_off(skipped as usize);
            let taken = self.left.unwrap_or(u64::MAX).min(bytes.len() as u64);
            self.left = self.left.map(|left| left - taken);
            if self.left == Some(0) {
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
