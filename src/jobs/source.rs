//! Where images are seeded from, as people write it: transports are named as skopeo names them.

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use super::absolute;
use crate::image::{
    error::ImageError,
    oci_layout::OciLayout,
    reference::{InvalidReference, Reference},
    seed::Seed,
};

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SeedSource {
    /// `docker://REF`
    Docker(String),
    /// `oci:DIR[:NAME]`
    Oci(PathBuf, Option<String>),
    /// `oci-archive:FILE[:NAME]`
    OciArchive(PathBuf, Option<String>),
}

/// The text names no source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSource {
    /// None of the transports.
    #[error("`{0}` is not a source: write docker://REF, oci:DIR[:NAME] or oci-archive:FILE[:NAME]")]
    Transport(String),
    /// Not a reference after `docker://`.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// Nothing to note the image under.
    #[error("{source_name} does not say under which name Podman is to find the image ({found}): say so with --as REF")]
    Nameless {
        /// The source.
        source_name: String,
        /// What there is instead of a name.
        found: String,
    },
}

impl FromStr for SeedSource {
    type Err = InvalidSource;

    fn from_str(text: &str) -> Result<Self, InvalidSource> {
        let invalid = || InvalidSource::Transport(text.to_owned());
        if let Some(reference) = text.strip_prefix("docker://") {
            reference.parse::<Reference>()?;
            return Ok(Self::Docker(reference.to_owned()));
        }
        let (transport, rest) = text.split_once(':').ok_or_else(invalid)?;
        // Like skopeo: what is before the first colon is the path.
        let (path, name) = rest
            .split_once(':')
            .map_or((rest, None), |(path, name)| (path, Some(name)));
        if path.is_empty() || name == Some("") {
            return Err(invalid());
        }
        let (path, name) = (absolute(path.into()), name.map(str::to_owned));
        match transport {
            "oci" => Ok(Self::Oci(path, name)),
            "oci-archive" => Ok(Self::OciArchive(path, name)),
            _ => Err(invalid()),
        }
    }
}

impl fmt::Display for SeedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (transport, path, name) = match self {
            Self::Docker(reference) => return write!(f, "docker://{reference}"),
            Self::Oci(path, name) => ("oci", path, name),
            Self::OciArchive(path, name) => ("oci-archive", path, name),
        };
        write!(f, "{transport}:{}", path.display())?;
        name.as_ref().map_or(Ok(()), |name| write!(f, ":{name}"))
    }
}

impl SeedSource {
    /// Opens it, and finds the name it has by itself. Blocks.
    pub(super) fn open(&self) -> Result<(Seed, Result<Reference, InvalidSource>), ImageError> {
        let (layout, name) = match self {
            Self::Docker(reference) => {
                let reference: Reference = reference.parse()?;
                return Ok((Seed::Registry(reference.clone()), Ok(reference)));
            }
            Self::Oci(path, name) => (OciLayout::open_dir(path), name),
            Self::OciArchive(path, name) => (OciLayout::open_archive(path), name),
        };
        let layout = layout.map_err(Arc::new)?;
        let (top, name) = layout.find(name.as_deref()).map_err(Arc::new)?;
        Ok((Seed::Layout(Arc::new(layout), top), self.name_of(name)))
    }

    /// An image's name in a layout may be a mere tag; only a whole reference tells what Podman calls it.
    fn name_of(&self, name: Option<String>) -> Result<Reference, InvalidSource> {
        let nameless = |found: String| InvalidSource::Nameless {
            source_name: self.to_string(),
            found,
        };
        let name = name.ok_or_else(|| nameless("it has no name there".to_owned()))?;
        let host = name.split_once('/').map(|(host, _)| host);
        let is_whole = host.is_some_and(|host| host.contains(['.', ':']) || host == "localhost");
        match name.parse() {
            Ok(reference) if is_whole => Ok(reference),
            _ => Err(nameless(format!("its name there is `{name}`"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_as_skopeo_writes_them() {
        for text in [
            "docker://registry.example:5000/a/b:v1",
            "oci:/srv/layout",
            "oci:/srv/layout:registry.example:5000/a/b:v1",
            "oci-archive:/srv/a.tar",
            "oci-archive:/srv/a.tar:latest",
        ] {
            assert_eq!(text.parse::<SeedSource>().unwrap().to_string(), text);
        }
        let relative: SeedSource = "oci:layout".parse().unwrap();
        assert!(matches!(relative, SeedSource::Oci(path, None) if path.is_absolute()));
        for text in [
            "",
            "registry.example/a",
            "docker:a",
            "docker://UPPER",
            "oci:",
            "oci::v1",
            "oci:dir:",
            "dir:/x",
        ] {
            assert!(text.parse::<SeedSource>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_a_whole_reference_is_a_name() {
        let source: SeedSource = "oci:/srv/layout".parse().unwrap();
        for name in ["registry.example/a:v1", "localhost/a", "127.0.0.1:5000/a/b:1"] {
            assert!(source.name_of(Some(name.to_owned())).is_ok(), "{name}");
        }
        for name in [None, Some("latest"), Some("team/app:v1")] {
            let error = source.name_of(name.map(str::to_owned)).unwrap_err();
            assert!(error.to_string().contains("--as REF"), "{error}");
        }
    }
}
