//! Settings of single hosts from the configuration: headers, a proxy, a health check.

use std::{collections::BTreeMap, fmt, str::FromStr};

use reqwest::{
    Url,
    header::{self, HeaderName, HeaderValue},
};
use serde::Deserialize;

use super::host_name::authority;

/// Placeholder in header values for the registry in the image's name.
const REGISTRY_PLACEHOLDER: &str = "{registry}";
/// Headers that the client sets itself.
const RESERVED_HEADERS: [HeaderName; 6] = [
    header::ACCEPT,
    header::ACCEPT_ENCODING,
    header::AUTHORIZATION,
    header::CONTENT_LENGTH,
    header::HOST,
    header::RANGE,
];

/// `[[registry.host]]`: settings of one host.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostSettings {
    /// `host[:port]`, as in registries.conf and image names.
    pub name: String,
    /// Headers of every request to this host.
    #[serde(default)]
    pub headers: HostHeaders,
    /// The proxy for this host, even if it is on loopback.
    #[serde(default)]
    pub proxy: Option<Proxy>,
    /// A URL that answers with status 2xx while the host, or its proxy, is healthy.
    #[serde(default)]
    pub health_check: Option<HealthCheckUrl>,
}

/// Headers by name. `Debug` hides their values, which may be secrets.
#[derive(Clone, Default, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>")]
pub struct HostHeaders(Vec<(HeaderName, String)>);

/// The URL of a proxy. It may hold a user name and password, which are never shown.
#[derive(Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Proxy(Url);

/// The URL of a health check.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct HealthCheckUrl(Url);

impl HostHeaders {
    /// The headers of a request for an image whose name has `registry`.
    pub(super) fn for_registry(&self, registry: &str) -> impl Iterator<Item = (&HeaderName, HeaderValue)> {
        // Values were validated on parsing, and a registry's name keeps them valid.
        self.0.iter().filter_map(move |(name, value)| {
            let mut value = HeaderValue::from_str(&value.replace(REGISTRY_PLACEHOLDER, registry)).ok()?;
            value.set_sensitive(true);
            Some((name, value))
        })
    }
}

impl TryFrom<BTreeMap<String, String>> for HostHeaders {
    type Error = String;

    fn try_from(headers: BTreeMap<String, String>) -> Result<Self, String> {
        let header = |(name, value): (String, String)| {
            let parsed = HeaderName::from_str(&name).map_err(|_| format!("`{name}` is not a header name"))?;
            if RESERVED_HEADERS.contains(&parsed) {
                return Err(format!("header `{name}` is set by nydus-store itself"));
            }
            if HeaderValue::from_str(&value).is_err() {
                return Err(format!("header `{name}` has an invalid value"));
            }
            Ok((parsed, value))
        };
        headers.into_iter().map(header).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Debug for HostHeaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

/// Parses an HTTP(S) URL with a host.
fn http_url(text: &str, what: &str) -> Result<Url, String> {
    match Url::parse(text) {
        Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Ok(url),
        _ => Err(format!("invalid {what}: expected http://host:port")),
    }
}

impl Proxy {
    /// `host[:port]`.
    pub fn authority(&self) -> String {
        authority(&self.0)
    }

    pub(super) fn url(&self) -> &Url {
        &self.0
    }
}

impl TryFrom<String> for Proxy {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        http_url(&text, "proxy").map(Self)
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.authority())
    }
}

impl HealthCheckUrl {
    pub(super) fn url(&self) -> &Url {
        &self.0
    }
}

impl TryFrom<String> for HealthCheckUrl {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        http_url(&text, "health check").map(Self)
    }
}

impl fmt::Debug for HealthCheckUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&authority(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<HostSettings, String> {
        toml::from_str(&format!("name = \"r.example\"\n{text}")).map_err(|error| error.to_string())
    }

    #[test]
    fn header_values_may_name_the_registry_and_are_hidden_from_debug() {
        let settings = parse("headers = { X-Registry = \"https://{registry}\", X-Key = \"secret\" }").unwrap();
        let headers: Vec<_> = settings.headers.for_registry("r.example:5000").collect();
        assert!(headers.iter().any(|(name, value)| name.as_str() == "x-registry"
            && value == "https://r.example:5000"
            && value.is_sensitive()));
        assert!(!format!("{settings:?}").contains("secret"));
    }

    #[test]
    fn invalid_settings_are_refused() {
        for (text, expected) in [
            ("headers = { Authorization = \"x\" }", "set by nydus-store itself"),
            ("headers = { \"a b\" = \"x\" }", "not a header name"),
            ("headers = { X-A = \"a\\nb\" }", "invalid value"),
            ("proxy = \"p:1\"", "http://host:port"),
            ("health_check = \"/healthy\"", "http://host:port"),
            ("mirror = true", "unknown field"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(expected), "{text}: {message}");
        }
        let proxy = parse("proxy = \"http://user:secret@p.example:1\"")
            .unwrap()
            .proxy
            .unwrap();
        assert_eq!(format!("{proxy:?}"), "p.example:1");
    }
}
