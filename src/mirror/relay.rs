//! A registry's blob as the body of an answer.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::Body;
use bytes::Bytes;
use futures_core::Stream;
use tokio::sync::mpsc;

use crate::{
    registry::{BlobStream, Error},
    report::Report,
};

/// Pieces that may wait for the reader.
const AHEAD: usize = 4;

struct Pieces(mpsc::Receiver<Result<Bytes, Error>>);

impl Stream for Pieces {
    type Item = Result<Bytes, Error>;

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
