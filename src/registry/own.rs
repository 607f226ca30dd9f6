//! This host's own mirror, which is never asked by us: what it does not have, it asks for here.

use std::net::{IpAddr, SocketAddr};

use reqwest::Url;

/// Whether requests to `registry`, `host[:port]`, would come to the mirror that listens on `own`.
pub fn is_own_mirror(own: SocketAddr, registry: &str) -> bool {
    // The parser of URLs knows every way to write an address.
    Url::parse(&format!("https://{registry}/")).is_ok_and(|url| is_own(own, &url))
}

/// Whether requests to the host of `url` would come to the mirror that listens on `own`.
pub(super) fn is_own(own: SocketAddr, url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_end_matches('.');
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let same_port = match url.port() {
        Some(port) => port == own.port(),
        // 443 said or not said; then HTTP's port may be tried too.
        None => matches!(own.port(), 443 | 80),
    };
    let same_host = match host.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
        Ok(ip) => ip.is_loopback() || ip.is_unspecified() || ip == own.ip().to_canonical(),
        Err(_) => host == "localhost" || host.ends_with(".localhost"),
    };
    same_port && same_host
}
