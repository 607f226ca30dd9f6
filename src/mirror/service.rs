//! Who asks the mirror, what for, and the answer.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Request, State, connect_info::IntoMakeServiceWithConnectInfo},
    http::{HeaderMap, Method, StatusCode, header},
    response::Response,
};

use super::{
    annotate::{Annotated, annotate, put_first},
    answer::{self, Range, Refusal},
    peer::Peer,
    rafs_blobs::RafsBlobs,
    relay,
    target::{Scope, Target},
};
use crate::{
    config::MirrorConfig,
    digest::Digest,
    image::{
        manifest::{Document, Selection},
        reference::Reference,
        relay::{Kept, Tagged},
        resolve::Images,
    },
    registry::{self, Repository},
};

struct Service {
    images: Arc<Images>,
    scope: Scope,
    /// Who may ask.
    uids: Vec<u32>,
    rafs_blobs: RafsBlobs,
}

/// The mirror's service on `address`.
pub fn make(
    config: &MirrorConfig,
    address: SocketAddr,
    images: Arc<Images>,
) -> IntoMakeServiceWithConnectInfo<Router, Peer> {
    let mut uids = config.allow_uids.clone();
    uids.push(rustix::process::geteuid().as_raw());
    let service = Service {
        images,
        scope: Scope::new(address, &config.registries),
        uids,
        rafs_blobs: RafsBlobs::default(),
    };
    Router::new()
        .fallback(handle)
        .with_state(Arc::new(service))
        .into_make_service_with_connect_info()
}

async fn handle(
    State(service): State<Arc<Service>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let answer = match service.admit(&peer).await {
        Ok(()) => service.answer(&method, &path, request.headers()).await,
        Err(refusal) => Err(refusal),
    };
    match answer {
        Ok(response) => {
            tracing::debug!(%method, path, status = response.status().as_u16(), "mirror");
            response
        }
        Err(refusal) => {
            let status = refusal.status.as_u16();
            let path: String = path.chars().take(300).collect();
            tracing::debug!(%method, path, status, message = refusal.message, "mirror");
            refusal.respond()
        }
    }
}

impl Service {
    /// Lets in who may read with this host's credentials.
    async fn admit(&self, peer: &Peer) -> Result<(), Refusal> {
        let allowed = |uid: Option<u32>| uid.is_some_and(|uid| self.uids.contains(&uid));
        // Said once for each connection.
        let judge = |uid: Option<u32>| match uid {
            Some(uid) if !allowed(Some(uid)) => tracing::warn!(uid, "the mirror refuses a user"),
            Some(_) => {}
            None => tracing::warn!("the mirror refuses a connection, since it cannot tell whose it is"),
        };
        let uid = peer.uid(judge).await;
        if allowed(uid) {
            return Ok(());
        }
        let message = match uid {
            Some(uid) => format!(
                "user {uid} may not use this mirror; `allow_uids` in the table [mirror] of its configuration lists who \
                 may"
            ),
            None => "this mirror cannot tell which user asks".to_owned(),
        };
        Err(Refusal::new(StatusCode::FORBIDDEN, "DENIED", message))
    }

    async fn answer(&self, method: &Method, path: &str, headers: &HeaderMap) -> Result<Response, Refusal> {
        if !matches!(*method, Method::GET | Method::HEAD) {
            let message = "the mirror can only be read from";
            return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", message));
        }
        let target = Target::parse(path)?;
        if let Some(repository) = target.repository() {
            self.scope.check(&repository.registry)?;
        }
        match target {
            Target::Registry => Ok(answer::respond(StatusCode::OK, Some(0), Body::empty())),
            Target::Tag(reference) => self.tag(&reference).await,
            Target::Manifest(repository, digest) => self.manifest(&repository, &digest).await,
            Target::Blob(repository, digest) => {
                if let Some(image) = self
                    .rafs_blobs
                    .image_of(&repository, &digest)
                    .filter(|_| !may_copy(headers))
                {
                    return Err(no_layer(&image));
                }
                let range = Range::of(headers);
                match self.images.kept_blob(&digest).await {
                    Some(kept) => Ok(self.kept_blob(&digest, &kept, range, method == Method::HEAD)),
                    None => self.relay_blob(method, &repository, &digest, range).await,
                }
            }
        }
    }

    async fn tag(&self, reference: &Reference) -> Result<Response, Refusal> {
        match self.images.tagged(reference).await {
            Ok(Tagged::Nydus {
                manifest,
                bytes,
                media_type,
                index,
            }) => {
                let malformed = |error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "MANIFEST_INVALID", error);
                let repository = reference.repository();
                let mut made = annotate(&bytes, &manifest, &media_type).map_err(malformed)?;
                self.rafs_blobs.note(&repository, &manifest, made.digest);
                self.images.keep_made(&made.digest, &made.bytes).await;
                tracing::info!(%reference, digest = %made.digest, "the mirror gives a Nydus image's manifest");
                if let Some(index) = index {
                    // Who wants another platform than this machine's finds it there.
                    let whole = put_first(&index.bytes, &Digest::of(&bytes), &made).map_err(malformed)?;
                    made = whole.unwrap_or(made);
                    self.images.keep_made(&made.digest, &made.bytes).await;
                }
                Ok(respond_made(made))
            }
            Ok(Tagged::Other(given)) => Ok(respond_given(given)),
            Err(error) => Err(Refusal::image(&error)),
        }
    }

    async fn manifest(&self, repository: &Repository, digest: &Digest) -> Result<Response, Refusal> {
        let given = self.images.by_digest(repository, digest).await;
        let given = given.map_err(|error| Refusal::image(&error))?;
        if let Ok(Document::Image(manifest)) = Document::parse(&given.bytes, Selection::PreferNydus)
            && manifest.bootstrap.is_some()
            && let Ok(made) = annotate(&given.bytes, &manifest, &given.media_type)
        {
            // Not what was asked for; but whoever is told of it can ask for it.
            self.images.keep_made(&made.digest, &made.bytes).await;
            self.rafs_blobs.note(repository, &manifest, made.digest);
        }
        Ok(respond_given(given))
    }

    fn kept_blob(&self, digest: &Digest, kept: &Kept, range: Option<Range>, head: bool) -> Response {
        let size = match kept {
            Kept::Bytes(bytes) => bytes.len() as u64,
            Kept::File(part) => part.len(),
        };
        let part = match range {
            None => None,
            Some(range) => match range.within(size) {
                Some((first, last)) => Some((first, last, size)),
                None => return answer::no_such_range(size),
            },
        };
        let (start, end) = part.map_or((0, size), |(first, last, _)| (first, last + 1));
        let body = match kept {
            _ if head => Body::empty(),
            // Within the length of `bytes`, so they fit.
            Kept::Bytes(bytes) => Body::from(bytes.slice(start as usize..end as usize)),
            Kept::File(part) => relay::file(part.clone(), start, end, *digest, Arc::clone(&self.images)),
        };
        answer::blob(digest, Some(end - start), part, body)
    }

    async fn relay_blob(
        &self,
        method: &Method,
        repository: &Repository,
        digest: &Digest,
        range: Option<Range>,
    ) -> Result<Response, Refusal> {
        let client = self.images.client();
        let refusal = |error: registry::Error| Refusal::registry(&error, "BLOB_UNKNOWN");
        let whole = method == Method::GET && range.is_none();
        if whole {
            let blob = client.open_blob(repository, digest, None).await.map_err(refusal)?;
            return Ok(answer::blob(digest, blob.length(), None, relay::body(blob)));
        }
        let size = client.blob_size(repository, digest).await.map_err(refusal)?;
        let Some(range) = range.filter(|_| method == Method::GET) else {
            return Ok(answer::blob(digest, Some(size), None, Body::empty()));
        };
        let Some((first, last)) = range.within(size) else {
            return Ok(answer::no_such_range(size));
        };
        let blob = client.open_blob(repository, digest, Some((first, last))).await;
        let blob = blob.map_err(refusal)?;
        Ok(answer::blob(
            digest,
            blob.length(),
            Some((first, last, size)),
            relay::body(blob),
        ))
    }
}

/// Whether whoever asks may want the bytes of a layer that is none to Podman: to copy the image.
fn may_copy(headers: &HeaderMap) -> bool {
    let agent = headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok());
    agent.is_some_and(|agent| agent.starts_with("skopeo/"))
}

/// Podman shows this in the place of what it would make of a blob that is no tar.
fn no_layer(image: &Digest) -> Refusal {
    let message = format!(
        "this is part of a Nydus image, which Podman has to find in the nydus-store: pull the image by tag, or by the digest \
         {image}, because by any other Podman 5.1 and later do not look there; if it was so, see whether storage.conf names \
         the store, and what the log of nydus-store says"
    );
    Refusal::new(StatusCode::FORBIDDEN, "DENIED", message)
}

fn respond_made(made: Annotated) -> Response {
    answer::manifest(made.bytes, &made.digest, &made.media_type)
}

fn respond_given(given: registry::Manifest) -> Response {
    answer::manifest(given.bytes, &given.digest, &given.media_type)
}
