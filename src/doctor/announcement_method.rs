//! How Podman and CRI-O announce pulls to the store, by version.

/// How a container engine announces pulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnnouncementMethod {
    /// Runs the `additional-layer-store-auth-helper` of registries.conf.
    Helper,
    /// Looks layers up by digest in the additional layer store.
    LayerStore,
    /// Does not announce pulls.
    None,
}

impl AnnouncementMethod {
    /// The method of a Podman version (major, minor).
    pub fn of_podman(version: (u32, u32)) -> Self {
        match version {
            (..=4, _) | (5, 0) => Self::LayerStore,
            (5, 1) => Self::None,
            _ => Self::Helper,
        }
    }

    /// The method of a CRI-O version (major, minor).
    pub fn of_crio(version: (u32, u32)) -> Self {
        match version {
            (0, _) | (1, ..=30) => Self::LayerStore,
            _ => Self::Helper,
        }
    }

    /// The description for findings.
    pub fn description(self) -> &'static str {
        match self {
            Self::Helper => "announces pulls by the auth helper",
            Self::LayerStore => "announces pulls by look-ups in the layer store",
            Self::None => "cannot announce pulls",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doors_by_version() {
        for (version, announcement_method) in [
            ((4, 3), AnnouncementMethod::LayerStore),
            ((5, 0), AnnouncementMethod::LayerStore),
            ((5, 1), AnnouncementMethod::None),
            ((5, 2), AnnouncementMethod::Helper),
            ((6, 0), AnnouncementMethod::Helper),
        ] {
            assert_eq!(
                AnnouncementMethod::of_podman(version),
                announcement_method,
                "{version:?}"
            );
        }
        for (version, announcement_method) in [
            ((1, 30), AnnouncementMethod::LayerStore),
            ((1, 31), AnnouncementMethod::Helper),
            ((2, 0), AnnouncementMethod::Helper),
        ] {
            assert_eq!(AnnouncementMethod::of_crio(version), announcement_method, "{version:?}");
        }
    }
}
