//! Sources of images to seed, written with the transport names of skopeo.

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

/// The text is not a source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSource {
    /// The transport is unknown.
    #[error("invalid source `{0}`; use docker://REF, oci:DIR[:NAME] or oci-archive:FILE[:NAME]")]
    Transport(String),
    /// The text after `docker://` is not a reference.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// The source does not determine a name for the image.
    #[error("no image name in {source_name} ({found}); use --as REF to name the image for Podman")]
    Nameless {
        /// The source.
        source_name: String,
        /// What the source has instead.
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
        // As in skopeo, the path ends at the first colon.
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
    /// Opens the source and determines the image's name in it. Blocks.
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

    /// The image's name in a layout. It may be a mere tag; only a complete reference is a name for Podman.
    fn name_of(&self, name: Option<String>) -> Result<Reference, InvalidSource> {
        let nameless = |found: String| InvalidSource::Nameless {
            source_name: self.to_string(),
            found,
        };
        let name = name.ok_or_else(|| nameless("no name".to_owned()))?;
        let host = name.split_once('/').map(|(host, _)| host);
        let is_whole = host.is_some_and(|host| host.contains(['.', ':']) || host == "localhost");
        match name.parse() {
            Ok(reference) if is_whole => Ok(reference),
            _ => Err(nameless(format!("its name is `{name}`"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_have_the_syntax_of_skopeo() {
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
    fn only_a_complete_reference_is_a_name() {
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
