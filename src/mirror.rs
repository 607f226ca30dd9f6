//! The mirror: a small registry on loopback, by which Podman 5.1 and later find Nydus layers in the store.
//!
//! From Podman 5.1 on, a layer is looked up in an additional layer store only if its manifest gives a TOC digest, which
//! Nydus images do not. With `127.0.0.1:5055/<registry>` set up as the mirror of `<registry>`, Podman reads manifests
//! here, where the annotation is added. Everything else is passed on byte for byte.
//!
//! - [`service`]: who asks, what is asked for, and the answers to it;
//! - [`peer`]: who owns the other end of a connection, since the mirror reads with the host's credentials;
//! - [`target`]: paths, and which registries are spoken for;
//! - [`annotate`]: the annotation, by way of [`json`], which keeps the order of keys;
//!   [`rafs_blobs`]: what nobody can use as a layer;
//! - [`answer`]: statuses, headers and error bodies; [`relay`]: the bodies of blobs;
//! - [`probe`]: whether a mirror answers.

use std::{
    net::{SocketAddr, TcpListener},
    os::fd::FromRawFd as _,
    sync::Arc,
};

use anyhow::Context as _;
use tokio::{runtime::Handle, task::JoinHandle};

use crate::{config::MirrorConfig, image::resolve::Images};

mod annotate;
mod answer;
mod json;
pub mod peer;
pub mod probe;
mod rafs_blobs;
mod relay;
mod service;
mod target;

pub use target::location;

/// Why a mirror of this configuration would not speak for `registry`, if so.
pub fn refusal(config: &MirrorConfig, registry: &str) -> Option<String> {
    let scope = target::Scope::new(config.listen, &config.registries);
    scope.check(registry).err().map(|refusal| refusal.message)
}

/// A port that is held for the mirror, but not answered yet.
pub struct Bound {
    listener: TcpListener,
    address: SocketAddr,
}

/// A running mirror; it stops when dropped.
pub struct Mirror {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Bound {
    /// Takes the mirror's port; nothing if the mirror is turned off.
    pub fn take(config: &MirrorConfig) -> anyhow::Result<Option<Self>> {
        if !config.enabled {
            return Ok(None);
        }
        let wanted = config.listen;
        let listener = match handed_over()? {
            Some(listener) => listener,
            None => TcpListener::bind(wanted).with_context(|| {
                format!(
                    "the mirror cannot listen on {wanted}: choose another address with `listen` in the table [mirror] of \
                     the configuration, or turn the mirror off there with `enabled = false`"
                )
            })?,
        };
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        anyhow::ensure!(
            address == wanted || wanted.port() == 0 && address.ip() == wanted.ip(),
            "systemd's socket listens on {address}, but the configuration says {wanted}: change `ListenStream` or `listen`"
        );
        Ok(Some(Self { listener, address }))
    }

    /// Where it will answer.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Starts to answer.
    pub fn serve(self, config: &MirrorConfig, images: Arc<Images>, runtime: &Handle) -> anyhow::Result<Mirror> {
        let Self { listener, address } = self;
        let _inside = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener).context("cannot start the mirror")?;
        let service = service::make(config, address, images);
        let task = runtime.spawn(async move {
            if let Err(error) = axum::serve(listener, service).await {
                tracing::error!(%error, "the mirror has stopped");
            }
        });
        tracing::info!(mirror = %address, "the mirror listens");
        Ok(Mirror { address, task })
    }
}

/// The socket that systemd has made, if it has: it holds the port while the daemon does not run, so that nobody else on the
/// host can answer in the mirror's name.
fn handed_over() -> anyhow::Result<Option<TcpListener>> {
    let mut handed = sd_notify::listen_fds().context("systemd hands over no usable socket")?;
    let Some(socket) = handed.next() else {
        return Ok(None);
    };
    let open = std::fs::read_link(format!("/proc/self/fd/{socket}"));
    let is_socket = open.is_ok_and(|what| what.as_os_str().as_encoded_bytes().starts_with(b"socket:"));
    anyhow::ensure!(
        is_socket,
        "$LISTEN_FDS promises a socket, but descriptor {socket} is none"
    );
    // SAFETY: it is open, and systemd has opened it for this process alone (sd_listen_fds(3)). It is taken here once: there is
    // one mirror.
    Ok(Some(unsafe { TcpListener::from_raw_fd(socket) }))
}

impl Mirror {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.task.abort();
    }
}
