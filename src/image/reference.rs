//! Image references as users write them for Podman.

use std::{fmt, str::FromStr, sync::Arc};

use crate::{digest::Digest, registry::Repository};

/// A complete reference: registry, repository, and a tag, a digest or both.
///
/// Short forms are completed as in Docker: `alpine` is `docker.io/library/alpine:latest`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference(oci_spec::distribution::Reference);

/// The text is not a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not an image reference ({cause}); write it like registry.example/team/image:tag")]
pub struct InvalidReference {
    text: String,
    cause: Arc<oci_spec::distribution::ParseError>,
}

impl Reference {
    /// The repository of the image.
    pub fn repository(&self) -> Repository {
        Repository {
            registry: self.0.registry().to_owned(),
            name: self.0.repository().to_owned(),
        }
    }

    /// What to request from the registry: the digest if there is one, else the tag.
    pub fn selector(&self) -> &str {
        self.0.digest().or(self.0.tag()).unwrap_or("latest")
    }

    /// The digest, if there is one with a supported algorithm.
    pub fn digest(&self) -> Option<Digest> {
        self.0.digest()?.parse().ok()
    }

    /// Whether the reference has a digest, so that its meaning never changes.
    pub fn is_by_digest(&self) -> bool {
        self.0.digest().is_some()
    }
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        text.parse().map(Self).map_err(|cause| InvalidReference {
            text: text.chars().take(300).collect(),
            cause: Arc::new(cause),
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.whole())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_parsed_like_podman_does() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for (text, repository, selector) in [
            ("docker.io/library/alpine:3", "docker.io/library/alpine", "3"),
            ("alpine", "docker.io/library/alpine", "latest"),
            ("127.0.0.1:5000/a/b/c:v1", "127.0.0.1:5000/a/b/c", "v1"),
            ("localhost:5000/img", "localhost:5000/img", "latest"),
            (&format!("quay.io/x/y@{digest}"), "quay.io/x/y", &digest),
            (&format!("quay.io/x/y:v2@{digest}"), "quay.io/x/y", &digest),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(
                (reference.repository().to_string().as_str(), reference.selector()),
                (repository, selector)
            );
        }
    }

    #[test]
    fn invalid_references_are_rejected_with_an_example() {
        for text in ["", "quay.io/UPPER", "a b", "quay.io/x@sha256:00", "../../etc/passwd"] {
            let error = text.parse::<Reference>().unwrap_err();
            assert!(error.to_string().contains("registry.example"), "{error}");
        }
    }
}
