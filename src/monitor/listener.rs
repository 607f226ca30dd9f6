//! [`MetricsListener`]: serves the metrics by HTTP on a loopback address, to a Prometheus that cannot use the control
//! socket.
//!
//! Every user of the host can connect. So each connection is for one request, and number and time of connections are
//! limited. A new one replaces the oldest if there are too many: else connections without a request would keep
//! Prometheus out.

use std::{
    collections::VecDeque,
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use serde::Deserialize;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Handle,
    task::{AbortHandle, JoinHandle, JoinSet},
};

use super::Monitor;

/// Most connections at a time. Many more than Prometheus needs, so that an answer is complete before as many others
/// connect.
const MAX_CONNECTIONS: usize = 128;
/// Most bytes of a request, and of an answer that waits to be sent.
const MAX_BUFFER_BYTES: usize = 16 << 10;
/// Longest time of a connection.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a connection could not be accepted, such as when no descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Address and port on loopback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "SocketAddr")]
pub struct LoopbackAddress(SocketAddr);

/// A listener in service, until it is dropped.
pub struct MetricsListener(JoinHandle<()>);

impl TryFrom<SocketAddr> for LoopbackAddress {
    type Error = String;

    fn try_from(address: SocketAddr) -> Result<Self, String> {
        let ip: IpAddr = address.ip().to_canonical();
        match ip.is_loopback() {
            true => Ok(Self(address)),
            false => Err(format!(
                "{ip} is no loopback address: metrics are served without authentication"
            )),
        }
    }
}

impl fmt::Display for LoopbackAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl MetricsListener {
    /// Serves the metrics of `monitor` at `address`.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn serve(
        LoopbackAddress(address): LoopbackAddress,
        monitor: &Arc<Monitor>,
        runtime: &Handle,
    ) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let _inside = runtime.enter();
        let listener = TcpListener::from_std(listener)?;
        Ok(Self(runtime.spawn(accept(listener, monitor.metrics_routes()))))
    }
}

impl Drop for MetricsListener {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Connections in service, until they are dropped.
#[derive(Default)]
struct Connections {
    tasks: JoinSet<()>,
    /// Handles of the tasks, oldest first.
    handles: VecDeque<AbortHandle>,
}

impl Connections {
    /// Serves one more, and closes the oldest if they are too many.
    fn add(&mut self, connection: impl Future<Output = ()> + Send + 'static) {
        while self.tasks.try_join_next().is_some() {}
        self.handles.retain(|handle| !handle.is_finished());
        if self.handles.len() >= MAX_CONNECTIONS
            && let Some(oldest) = self.handles.pop_front()
        {
            oldest.abort();
        }
        self.handles.push_back(self.tasks.spawn(connection));
    }
}

async fn accept(listener: TcpListener, routes: Router) {
    let mut connections = Connections::default();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let answered = tokio::time::timeout(CONNECTION_TIMEOUT, answer(stream, routes.clone()));
                // A client that is too slow, or breaks off, gets nothing.
                connections.add(async move { _ = answered.await });
            }
            Err(error) => {
                tracing::debug!(%error, "failed to accept metrics connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn answer(stream: TcpStream, routes: Router) -> hyper::Result<()> {
    let service = TowerToHyperService::new(routes);
    let mut server = http1::Builder::new();
    server.keep_alive(false).max_buf_size(MAX_BUFFER_BYTES);
    server.serve_connection(TokioIo::new(stream), service).await
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::{Connections, LoopbackAddress, MAX_CONNECTIONS};

    #[tokio::test]
    async fn new_connection_replaces_the_oldest() {
        let mut connections = Connections::default();
        for _ in 0..=MAX_CONNECTIONS {
            connections.add(pending());
        }
        assert_eq!(connections.handles.len(), MAX_CONNECTIONS);
        let replaced = connections.tasks.join_next().await.unwrap();
        assert!(replaced.unwrap_err().is_cancelled());
        assert_eq!(connections.tasks.len(), MAX_CONNECTIONS);
    }

    #[test]
    fn only_loopback_addresses_are_accepted() {
        #[derive(Debug, serde::Deserialize)]
        struct Section {
            #[serde(rename = "listen")]
            _listen: LoopbackAddress,
        }
        let parse = |address: &str| toml::from_str::<Section>(&format!("listen = \"{address}\""));
        for address in ["127.0.0.1:9250", "127.1.2.3:1", "[::1]:9250", "[::ffff:127.0.0.1]:9250"] {
            assert!(parse(address).is_ok(), "{address}");
        }
        for address in ["0.0.0.0:9250", "[::]:9250", "192.0.2.1:9250"] {
            let error = parse(address).unwrap_err().to_string();
            assert!(error.contains("is no loopback address"), "{error}");
        }
        assert!(parse("127.0.0.1").is_err() && parse("localhost:9250").is_err());
    }
}
