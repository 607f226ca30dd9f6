//! A blob from a registry or a file as the body of an answer.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::body::Body;
use bytes::Bytes;
use futures_core::Stream;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use crate::{
    blob::source::{Source as _, SourceError},
    digest::Digest,
    image::{oci_layout::FilePart, resolve::Images},
    registry::BlobStream,
    report::Report,
};

/// Pieces that may wait for the reader.
const AHEAD: usize = 4;

/// Bytes of a file that are read at a time.
const PIECE: u64 = 1 << 20;

struct Pieces<E>(mpsc::Receiver<Result<Bytes, E>>);

impl<E> Stream for Pieces<E> {
    type Item = Result<Bytes, E>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

/// A body that gives the blob as it comes. A failure breaks the connection, so that nobody takes a part for the whole.
pub fn body(mut blob: BlobStream) -> Body {
    let (sender, pieces) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        while let Some(piece) = blob.next().await.transpose() {
            if let Err(error) = &piece {
                tracing::warn!("the mirror cannot pass on a blob: {}", Report(error));
            }
            let failed = piece.is_err();
            // An error here means that the reader is gone.
            if sender.send(piece).await.is_err() || failed {
                break;
            }
        }
    });
    Body::from_stream(Pieces(pieces))
}

/// A body that gives the bytes of `part` from `start` to before `end`. If these are all, they are verified on the way: the last
/// of them are only given if all were right, and else the file is removed, so that the registry is asked the next time.
pub fn file(part: FilePart, start: u64, end: u64, digest: Digest, images: Arc<Images>) -> Body {
    let (sender, pieces) = mpsc::channel::<Result<Bytes, SourceError>>(AHEAD);
    tokio::spawn(async move {
        let whole = start == 0 && end == part.len();
        let (mut at, mut hash) = (start, Sha256::new());
        while at < end {
            let len = PIECE.min(end - at);
            let mut piece = part.read(at, len as usize).await.map(|given| given.bytes);
            at += len;
            if let (Ok(bytes), true) = (&piece, whole) {
                hash.update(bytes);
                if at == end && Digest::from_bytes(hash.clone().finalize().into()) != digest {
                    images.forget_damaged(&digest).await;
                    piece = Err(SourceError::of_range(std::io::Error::other(format!(
                        "{digest} is damaged"
                    ))));
                }
            }
            if let Err(error) = &piece {
                tracing::warn!(%error, "the mirror cannot pass on a blob");
            }
            let failed = piece.is_err();
            if sender.send(piece).await.is_err() || failed {
                break;
            }
        }
    });
    Body::from_stream(Pieces(pieces))
}
