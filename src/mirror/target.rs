//! What a path asks for, and whether the mirror speaks for its registry.

use std::net::SocketAddr;

use axum::http::StatusCode;

use super::answer::Refusal;
use crate::{
    digest::Digest,
    image::reference::Reference,
    registry::{Repository, is_own_mirror},
};

/// Longer than any path that a registry takes.
const MAX_PATH: usize = 1024;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `/v2/`: whether this is a registry.
    Registry,
    /// What a tag names.
    Tag(Reference),
    /// A manifest or an index by its digest.
    Manifest(Repository, Digest),
    /// A blob.
    Blob(Repository, Digest),
}

/// Which registries are spoken for.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The mirror's own address.
    own: SocketAddr,
    /// `host[:port]` in lower case, or `*.domain`; all registries if there is none.
    allowed: Vec<String>,
}

impl Target {
    /// Reads a path as it came, without resolving escapes: no valid name needs one.
    pub fn parse(path: &str) -> Result<Self, Refusal> {
        if matches!(path, "/v2" | "/v2/") {
            return Ok(Self::Registry);
        }
        if path.len() > MAX_PATH {
            return Err(invalid_name("the path is too long"));
        }
        let Some(rest) = path.strip_prefix("/v2/") else {
            return Err(unsupported());
        };
        // A digest or a tag, the kind of thing, and before them the registry and the repository.
        let mut parts = rest.rsplitn(3, '/');
        let (Some(selector), Some(kind), Some(name)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(unsupported());
        };
        let name = &with_port(name);
        match kind {
            "manifests" if selector.contains(':') => {
                digest(selector).and_then(|digest| Ok(Self::Manifest(repository(name)?, digest)))
            }
            "manifests" => {
                repository(name)?;
                let reference = reference(&format!("{name}:{selector}"))?;
                // A text that is read as something else, such as a short name.
                if reference.selector() != selector {
                    return Err(invalid_name("this is no tag"));
                }
                Ok(Self::Tag(reference))
            }
            "blobs" => digest(selector).and_then(|digest| Ok(Self::Blob(repository(name)?, digest))),
            _ => Err(unsupported()),
        }
    }

    /// The repository that is asked for something.
    pub fn repository(&self) -> Option<Repository> {
        match self {
            Self::Registry => None,
            Self::Tag(reference) => Some(reference.repository()),
            Self::Manifest(repository, _) | Self::Blob(repository, _) => Some(repository.clone()),
        }
    }
}

/// Where the mirror on `listen` has what begins with `prefix` (`host[:port]` and perhaps a path), as Podman wants it
/// written. A host's name is the same in capitals, but there are none in a path.
pub fn location(listen: SocketAddr, prefix: &str) -> String {
    let (registry, path) = prefix.split_once('/').unwrap_or((prefix, ""));
    let registry = registry.to_ascii_lowercase().replace(':', "_");
    let slash = if path.is_empty() { "" } else { "/" };
    format!("{listen}/{registry}{slash}{path}")
}

/// The repository's name with a port that is written `registry.example_5000` put right. Podman takes no colon in the
/// path of a mirror, and no host has an underscore in its name.
fn with_port(name: &str) -> String {
    let (registry, path) = name.split_once('/').unwrap_or((name, ""));
    match registry.rsplit_once('_') {
        Some((host, port)) if port.parse::<u16>().is_ok() => format!("{host}:{port}/{path}"),
        _ => name.to_owned(),
    }
}

/// `registry.example[:5000]/team/app`, with the registry's name in full.
fn repository(text: &str) -> Result<Repository, Refusal> {
    let (registry, _) = text.split_once('/').unwrap_or_default();
    if !(registry.contains(['.', ':']) || registry == "localhost") {
        return Err(invalid_name(
            "the repository's name must begin with its registry, as in /v2/registry.example/team/app/…",
        ));
    }
    let repository = reference(text)?.repository();
    if repository.registry == registry || registry == "index.docker.io" {
        Ok(repository)
    } else {
        Err(invalid_name("this is no name of a repository"))
    }
}

fn reference(text: &str) -> Result<Reference, Refusal> {
    text.parse()
        .map_err(|error: crate::image::reference::InvalidReference| invalid_name(error.to_string()))
}

fn digest(text: &str) -> Result<Digest, Refusal> {
    text.parse()
        .map_err(|error: crate::digest::InvalidDigest| Refusal::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", error))
}

fn invalid_name(message: impl ToString) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "NAME_INVALID", message)
}

fn unsupported() -> Refusal {
    Refusal::new(
        StatusCode::NOT_FOUND,
        "UNSUPPORTED",
        "the mirror gives manifests and blobs, as /v2/<registry>/<repository>/manifests/… and …/blobs/…",
    )
}

impl Scope {
    /// The scope of a mirror that listens on `own`.
    pub fn new(own: SocketAddr, allowed: &[String]) -> Self {
        Self {
            own,
            allowed: allowed.iter().map(|registry| registry.to_ascii_lowercase()).collect(),
        }
    }

    /// Refuses what is asked of the mirror itself as a registry, or of a registry that is not spoken for.
    pub fn check(&self, registry: &str) -> Result<(), Refusal> {
        let denied = |message| Err(Refusal::new(StatusCode::FORBIDDEN, "DENIED", message));
        if self.is_own(registry) {
            return denied(format!("{registry} is this mirror itself, and no registry"));
        }
        let name = registry.to_ascii_lowercase();
        let allows = |allowed: &String| match allowed.strip_prefix('*') {
            Some(domain) => domain.starts_with('.') && name.len() > domain.len() && name.ends_with(domain),
            None => *allowed == name,
        };
        if self.allowed.is_empty() || self.allowed.iter().any(allows) {
            Ok(())
        } else {
            denied(format!(
                "the mirror does not speak for {registry}: `registries` in the table [mirror] of its configuration \
                 does not list it"
            ))
        }
    }

    /// Whether requests to that registry would come back to the mirror.
    fn is_own(&self, registry: &str) -> bool {
        is_own_mirror(self.own, registry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_read_again() {
        let listen = "127.0.0.1:5055".parse().unwrap();
        for (prefix, expected) in [
            ("r.example", "127.0.0.1:5055/r.example"),
            ("R.example:5000/team", "127.0.0.1:5055/r.example_5000/team"),
        ] {
            let location = location(listen, prefix);
            assert_eq!(location, expected);
            let (_, name) = location.split_once('/').unwrap();
            assert_eq!(
                with_port(&format!("{name}/app")),
                format!("{}/app", prefix.to_ascii_lowercase())
            );
        }
    }

    #[test]
    fn ports_are_written_as_podman_takes_them() {
        assert_eq!(
            with_port("registry.example_5000/team/app"),
            "registry.example:5000/team/app"
        );
        for other in [
            "registry.example/team/app",
            "r.example:5000/app",
            "r.example/app_5000",
            "x_y/app",
            "127.0.0.1_99999/a",
        ] {
            assert_eq!(with_port(other), other);
        }
    }

    #[test]
    fn paths_are_read() {
        let digest = Digest::of(b"x");
        let repository = Repository::new("127.0.0.1:5000", "team/manifests/app");
        let at = |rest: &str| Target::parse(&format!("/v2/127.0.0.1:5000/team/manifests/app/{rest}"));
        assert_eq!(Target::parse("/v2/"), Ok(Target::Registry));
        assert_eq!(
            at(&format!("manifests/{digest}")),
            Ok(Target::Manifest(repository.clone(), digest))
        );
        assert_eq!(at(&format!("blobs/{digest}")), Ok(Target::Blob(repository, digest)));
        let tag = "127.0.0.1:5000/team/manifests/app:v1.2".parse().unwrap();
        assert_eq!(at("manifests/v1.2"), Ok(Target::Tag(tag)));
        let hub = Target::parse("/v2/docker.io/library/alpine/manifests/3").unwrap();
        assert_eq!(hub, Target::Tag("alpine:3".parse().unwrap()));
    }

    #[test]
    fn hostile_paths_are_refused() {
        let digest = Digest::of(b"x");
        let long = "a/".repeat(400);
        for path in [
            "/",
            "/v1/",
            "/v2//",
            "/v2/manifests/1",
            "/v2/r.example/manifests/1",
            "/v2/team/app/manifests/1",
            "/v2/../../etc/passwd",
            "/v2/r.example/../app/manifests/1",
            "/v2/r.example//app/manifests/1",
            "/v2/r.example/a%2fb/manifests/1",
            "/v2/r.example/%2e%2e/manifests/1",
            "/v2/r.example/a?b/manifests/1",
            "/v2/r.example/App/manifests/1",
            "/v2/r.example/a:b/manifests/1",
            "/v2/r.example/app/manifests/",
            "/v2/r.example/app/manifests/..",
            "/v2/r.example/app/manifests/1@sha256:00",
            "/v2/r.example/app/manifests/sha256:00",
            "/v2/r.example/app/manifests/sha512:00",
            "/v2/user@r.example/app/manifests/1",
            "/v2/r.example:99999999/app/blobs/latest",
            "/v2/r.example/app/blobs/../x",
            "/v2/r.example/app/tags/list",
            &format!("/v2/r.example/app/blobs/{}", digest.to_string().to_uppercase()),
            &format!("/v2/r.example/{long}/manifests/1"),
            &format!("/v2/r.example/{}/manifests/1", "a".repeat(100_000)),
            &format!("/v2/r.example/app/manifests/{}", "a".repeat(200)),
        ] {
            assert!(Target::parse(path).is_err(), "{path}");
        }
    }

    #[test]
    fn the_mirror_is_no_registry() {
        let scope = Scope::new("127.0.0.1:5055".parse().unwrap(), &[]);
        for own in [
            "127.0.0.1:5055",
            "127.1:5055",
            "127.9.9.9:5055",
            "0.0.0.0:5055",
            "localhost:5055",
            "LocalHost.:5055",
            "mirror.localhost:5055",
            "[::1]:5055",
            "[::ffff:127.0.0.1]:5055",
            "0x7f000001:5055",
        ] {
            assert!(scope.check(own).is_err(), "{own}");
        }
        for other in ["127.0.0.1:5000", "localhost", "r.example:5055", "10.0.0.1:5055"] {
            assert_eq!(scope.check(other), Ok(()), "{other}");
        }
    }

    #[test]
    fn only_listed_registries_are_spoken_for() {
        let allowed = ["R.example:5000".to_owned(), "*.corp.example".to_owned()];
        let scope = Scope::new("127.0.0.1:5055".parse().unwrap(), &allowed);
        for (registry, ok) in [
            ("r.example:5000", true),
            ("r.example", false),
            ("a.corp.example", true),
            ("a.b.corp.example", true),
            ("corp.example", false),
            ("xcorp.example", false),
        ] {
            assert_eq!(scope.check(registry).is_ok(), ok, "{registry}");
        }
    }
}
