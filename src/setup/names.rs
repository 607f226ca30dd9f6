//! How registries are named on the command line.

use std::{fmt, str::FromStr};

use super::Error;

/// A registry, or all below a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pattern {
    /// `host[:port]`
    Registry(String),
    /// `*.domain`: here with the point, but without the star.
    Domain(String),
}

impl FromStr for Pattern {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |reason| {
            let name = text.to_owned();
            Err(Error::Name { name, reason })
        };
        if text.contains("://") {
            return wrong("write it without the scheme, as in names of images");
        }
        if text.contains('/') {
            return wrong("write the registry alone, without a path");
        }
        if text.contains('[') {
            return wrong("Podman takes no IPv6 address in a mirror's path: give the registry a name");
        }
        let (name, port) = match text.split_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (text, None),
        };
        if port.is_some_and(|port| port.parse::<u16>().is_err()) {
            return wrong("the port is no number from 0 to 65535");
        }
        if let Some(domain) = name.strip_prefix('*') {
            if port.is_some() || !domain.strip_prefix('.').is_some_and(is_host) {
                return wrong("write a domain as *.example.com, without a port");
            }
            return Ok(Self::Domain(domain.to_owned()));
        }
        if !is_host(name) {
            return wrong("this is no name of a host");
        }
        if !text.contains(['.', ':']) && text != "localhost" {
            return wrong("in names of images, a registry has a point or a port in it");
        }
        Ok(Self::Registry(match text {
            "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
            other => other.to_owned(),
        }))
    }
}

/// Whether it is a host's name that can be part of a mirror's path.
fn is_host(name: &str) -> bool {
    let is_label = |label: &str| {
        let within = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !label.is_empty() && label.bytes().all(within) && !label.starts_with('-') && !label.ends_with('-')
    };
    name.split('.').all(is_label)
}

impl Pattern {
    /// Whether it stands for that registry.
    pub fn matches(&self, registry: &str) -> bool {
        match self {
            Self::Registry(name) => name == registry,
            Self::Domain(domain) => {
                let host = registry.split(':').next().unwrap_or_default();
                host.len() > domain.len() && host.ends_with(domain.as_str())
            }
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(name) => f.write_str(name),
            Self::Domain(domain) => write!(f, "*{domain}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_registries() {
        for name in [
            "docker.io",
            "r.example:5000",
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "*.example.com",
        ] {
            assert_eq!(name.parse::<Pattern>().unwrap().to_string(), name);
        }
        assert_eq!("index.docker.io".parse::<Pattern>().unwrap().to_string(), "docker.io");
        for name in [
            "",
            "alpine",
            "https://r.example",
            "r.example/team",
            "r.example:port",
            "r.example:5000:1",
            "[::1]:5000",
            "*",
            "*example",
            "a.*.example",
            "*.example:5000",
            "r_x.example",
            "r..example",
            "-r.example",
            "r.example\"",
        ] {
            assert!(name.parse::<Pattern>().is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_below_a_domain() {
        let domain: Pattern = "*.x.example".parse().unwrap();
        assert!(domain.matches("a.x.example") && domain.matches("a.b.x.example:5000"));
        assert!(!domain.matches("x.example") && !domain.matches("ax.example"));
    }
}
