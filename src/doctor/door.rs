//! By which door a pull is announced to the store, which depends on the version.

/// How an engine announces a pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// It runs the program that registries.conf names as `additional-layer-store-auth-helper`.
    Helper,
    /// It looks layers up in the additional layer store by their digests.
    LayerStore,
    /// It does neither.
    None,
}

impl Door {
    /// That of a version of Podman.
    pub fn of_podman(version: (u32, u32)) -> Self {
        match version {
            (..=4, _) | (5, 0) => Self::LayerStore,
            (5, 1) => Self::None,
            _ => Self::Helper,
        }
    }

    /// That of a version of CRI-O.
    pub fn of_crio(version: (u32, u32)) -> Self {
        match version {
            (0, _) | (1, ..=30) => Self::LayerStore,
            _ => Self::Helper,
        }
    }

    /// What is said of it after a version.
    pub fn words(self) -> &'static str {
        match self {
            Self::Helper => "it announces pulls by the auth helper",
            Self::LayerStore => "it announces pulls by look-ups in the layer store",
            Self::None => "it cannot announce pulls",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doors_by_version() {
        for (version, door) in [
            ((4, 3), Door::LayerStore),
            ((5, 0), Door::LayerStore),
            ((5, 1), Door::None),
            ((5, 2), Door::Helper),
            ((6, 0), Door::Helper),
        ] {
            assert_eq!(Door::of_podman(version), door, "{version:?}");
        }
        for (version, door) in [
            ((1, 30), Door::LayerStore),
            ((1, 31), Door::Helper),
            ((2, 0), Door::Helper),
        ] {
            assert_eq!(Door::of_crio(version), door, "{version:?}");
        }
    }
}
