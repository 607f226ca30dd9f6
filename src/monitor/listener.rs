//! [`MetricsListener`]: serves the metrics by HTTP on a loopback address, to a Prometheus that cannot use the control
//! socket.
//!
//! Every user of the host can connect. So each connection is for one request, and number and time of connections are
//! limited.

use std::{
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
    sync::Semaphore,
    task::JoinHandle,
};

use super::Monitor;

/// Most connections at a time. Further ones wait.
const MAX_CONNECTIONS: usize = 8;
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

async fn accept(listener: TcpListener, routes: Router) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Never closed, so that the loop does not end.
    while let Ok(permit) = Arc::clone(&connections).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => {
                let routes = routes.clone();
                tokio::spawn(async move {
                    let _permit = permit;
                    // A client that is too slow, or breaks off, gets nothing.
                    let _ = tokio::time::timeout(CONNECTION_TIMEOUT, answer(stream, routes)).await;
                });
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
    server.keep_alive(false);
    server.serve_connection(TokioIo::new(stream), service).await
}

#[cfg(test)]
mod tests {
    use super::LoopbackAddress;

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
