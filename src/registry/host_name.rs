//! Host names in URLs and in configuration, and how far a host is trusted by its name.

use std::net::IpAddr;

use reqwest::Url;

/// How far a host is trusted without proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Trust {
    /// Verified TLS only.
    Strict,
    /// Listed as insecure: unverified TLS or plain HTTP will do.
    Insecure,
    /// This machine's loopback: as `Insecure`, and never through a proxy.
    Loopback,
}

impl Trust {
    /// The trust in the host of `url`. `insecure` lists hosts as `host[:port]`.
    pub(super) fn of(url: &Url, insecure: &[String]) -> Self {
        let host = url.host_str().unwrap_or_default();
        if is_loopback(host) {
            return Self::Loopback;
        }
        let with_port = url.port_or_known_default().map(|port| format!("{host}:{port}"));
        let is_listed = |entry: &String| {
            (url.port().is_none() && entry.eq_ignore_ascii_case(host))
                || with_port.as_ref().is_some_and(|name| entry.eq_ignore_ascii_case(name))
        };
        if insecure.iter().any(is_listed) {
            Self::Insecure
        } else {
            Self::Strict
        }
    }
}

/// The host that serves the API of `registry`. Only Docker Hub's differs from its name.
pub(super) fn api_host(registry: &str) -> &str {
    match registry {
        "docker.io" | "index.docker.io" => "registry-1.docker.io",
        other => other,
    }
}

/// `host[:port]` of `url`.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port()
        .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// The name that registries.conf, certs.d and the configuration use for the host of `url`.
pub(super) fn config_name(url: &Url) -> String {
    match authority(url) {
        hub if hub == api_host("docker.io") => "docker.io".to_owned(),
        name => name,
    }
}

/// A configured `host[:port]` in the form of [`config_name`]: lower case, without HTTPS's default port.
pub(super) fn normalized(name: &str) -> String {
    let name = name.to_ascii_lowercase();
    name.strip_suffix(":443").map_or_else(|| name.clone(), str::to_owned)
}

/// `url` for messages: without user, password, query and fragment, which may hold secrets.
pub(super) fn redacted(url: &Url) -> String {
    format!("{}://{}{}", url.scheme(), authority(url), url.path())
}

/// `url` without user and password, which would become credentials of the request; `None` if it is not HTTP(S).
pub(super) fn without_user_info(mut url: Url) -> Option<Url> {
    let is_http = matches!(url.scheme(), "http" | "https");
    (is_http && url.set_username("").is_ok() && url.set_password(None).is_ok()).then_some(url)
}

/// Scheme, host and port: requests to one origin may share credentials.
pub(super) fn origin(url: &Url) -> (&str, Option<&str>, Option<u16>) {
    (url.scheme(), url.host_str(), url.port_or_known_default())
}

/// Whether `host` is a loopback address or `localhost`, the name that RFC 6761 reserves for it.
pub(super) fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || address.parse().is_ok_and(|ip: IpAddr| ip.to_canonical().is_loopback())
}

/// Whether `host` may mean this machine, in any spelling. Broader than [`is_loopback`]: it serves to refuse, not to
/// trust.
fn is_this_machine(host: &str) -> bool {
    let host = host.trim_end_matches('.');
    let address = host.trim_start_matches('[').trim_end_matches(']');
    let is_unspecified = address
        .parse()
        .is_ok_and(|ip: IpAddr| ip.to_canonical().is_unspecified());
    is_unspecified || is_loopback(host) || host.ends_with(".localhost")
}

/// Names the target, for a message, if another host (`from`) leads to this machine (`to`).
pub(super) fn leads_to_this_machine(from: &Url, to: &Url) -> Option<String> {
    let is_here = |url: &Url| is_this_machine(url.host_str().unwrap_or_default());
    (is_here(to) && !is_here(from)).then(|| format!("{}, which is this machine", authority(to)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trust(url: &str, insecure: &[&str]) -> Trust {
        let insecure: Vec<_> = insecure.iter().map(ToString::to_string).collect();
        Trust::of(&Url::parse(url).unwrap(), &insecure)
    }

    #[test]
    fn only_loopback_and_listed_hosts_are_relaxed() {
        for url in [
            "http://127.0.0.1:5000/",
            "https://127.8.0.1",
            "http://[::1]:80/",
            "http://LOCALHOST:1/",
        ] {
            assert_eq!(trust(url, &[]), Trust::Loopback, "{url}");
        }
        for url in [
            "https://127.0.0.1.example/",
            "https://localhost.example/",
            "http://10.0.0.1/",
            "https://128.0.0.1",
        ] {
            assert_eq!(trust(url, &["example", "10.0.0.1:5000"]), Trust::Strict, "{url}");
        }
        assert_eq!(trust("https://r.example/", &["R.example"]), Trust::Insecure);
        assert_eq!(trust("https://r.example/", &["r.example:443"]), Trust::Insecure);
        assert_eq!(trust("https://r.example:5000/", &["r.example:5000"]), Trust::Insecure);
        assert_eq!(trust("https://r.example:5000/", &["r.example"]), Trust::Strict);
    }

    #[test]
    fn redacted_urls_hold_no_secrets() {
        let url = Url::parse("https://user:secret@r.example:1/v2/a?sig=secret#secret").unwrap();
        assert_eq!(redacted(&url), "https://r.example:1/v2/a");
        assert_eq!(
            without_user_info(url).unwrap().as_str(),
            "https://r.example:1/v2/a?sig=secret#secret"
        );
    }
}
