//! What the configuration says of single hosts: headers, a proxy, a health check.

use std::{collections::BTreeMap, fmt, str::FromStr};

use reqwest::{
    Url,
    header::{self, HeaderName, HeaderValue},
};
use serde::Deserialize;

use super::transport::authority;

/// Stands for the registry that an image is named by, in a header's value.
const REGISTRY: &str = "{registry}";
/// Headers that requests have anyway.
const OWN: [HeaderName; 6] = [
    header::ACCEPT,
    header::ACCEPT_ENCODING,
    header::AUTHORIZATION,
    header::CONTENT_LENGTH,
    header::HOST,
    header::RANGE,
];

/// `[[registry.host]]`: what is different for one host.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostSettings {
    /// `host[:port]`, as registries.conf and names of images write it.
    pub name: String,
    /// Sent with every request to that host.
    #[serde(default)]
    pub headers: Headers,
    /// The proxy for that host, on loopback too.
    #[serde(default)]
    pub proxy: Option<Proxy>,
    /// An address that answers with a status of 2xx as long as the host, or its proxy, is well.
    #[serde(default)]
    pub health_check: Option<Check>,
}

/// Headers by name. Their values may be secrets, so that `Debug` shows none.
#[derive(Clone, Default, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>")]
pub struct Headers(Vec<(HeaderName, String)>);

/// The address of a proxy, perhaps with a user's name and password, which are never shown.
#[derive(Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Proxy(Url);

/// The address of a health check.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Check(Url);

impl Headers {
    /// The headers of a request for an image that is named by `registry`.
    pub(super) fn of(&self, registry: &str) -> impl Iterator<Item = (&HeaderName, HeaderValue)> {
        // Whether a value is valid has been seen to; with a registry's name in it, it stays so.
        self.0.iter().filter_map(move |(name, value)| {
            let mut value = HeaderValue::from_str(&value.replace(REGISTRY, registry)).ok()?;
            value.set_sensitive(true);
            Some((name, value))
        })
    }
}

impl TryFrom<BTreeMap<String, String>> for Headers {
    type Error = String;

    fn try_from(given: BTreeMap<String, String>) -> Result<Self, String> {
        let header = |(name, value): (String, String)| {
            let parsed = HeaderName::from_str(&name).map_err(|_| format!("`{name}` is no name of a header"))?;
            if OWN.contains(&parsed) {
                return Err(format!("the header `{name}` cannot be set: nydus-store sets it itself"));
            }
            if HeaderValue::from_str(&value).is_err() {
                return Err(format!("the header `{name}` has a value that cannot be sent"));
            }
            Ok((parsed, value))
        };
        given.into_iter().map(header).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

/// An address of HTTP with a host.
fn url(text: &str, what: &str) -> Result<Url, String> {
    match Url::parse(text) {
        Ok(url) if matches!(url.scheme(), "http" | "https") && url.has_host() => Ok(url),
        _ => Err(format!("write {what} as http://host:port")),
    }
}

impl Proxy {
    /// `host[:port]`
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
        url(&text, "the proxy").map(Self)
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.authority())
    }
}

impl Check {
    pub(super) fn url(&self) -> &Url {
        &self.0
    }
}

impl TryFrom<String> for Check {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        url(&text, "the health check").map(Self)
    }
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&authority(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<HostSettings, String> {
        toml::from_str(&format!("name = \"r.example\"\n{text}")).map_err(|error| error.to_string())
    }

    #[test]
    fn headers_may_name_the_registry_and_are_not_shown() {
        let settings = parsed("headers = { X-Registry = \"https://{registry}\", X-Key = \"secret\" }").unwrap();
        let headers: Vec<_> = settings.headers.of("r.example:5000").collect();
        assert!(headers.iter().any(|(name, value)| name.as_str() == "x-registry"
            && value == "https://r.example:5000"
            && value.is_sensitive()));
        assert!(!format!("{settings:?}").contains("secret"));
    }

    #[test]
    fn what_cannot_be_set() {
        for (text, expected) in [
            ("headers = { Authorization = \"x\" }", "sets it itself"),
            ("headers = { \"a b\" = \"x\" }", "no name of a header"),
            ("headers = { X-A = \"a\\nb\" }", "cannot be sent"),
            ("proxy = \"p:1\"", "http://host:port"),
            ("health_check = \"/healthy\"", "http://host:port"),
            ("mirror = true", "unknown field"),
        ] {
            let message = parsed(text).unwrap_err();
            assert!(message.contains(expected), "{text}: {message}");
        }
        let proxy = parsed("proxy = \"http://user:secret@p.example:1\"")
            .unwrap()
            .proxy
            .unwrap();
        assert_eq!(format!("{proxy:?}"), "p.example:1");
    }
}
