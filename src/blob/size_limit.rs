//! How much disk space the cache may use: [`SizeLimit`], as the configuration gives it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, de::Error as _};

/// Smallest limit in bytes. Less does not hold what readers need at a time.
const MIN_LIMIT: u64 = 32 << 20;
/// A file system that others have filled takes at most all but this part of the limit away from the cache. With less,
/// every read would be a request to a registry.
const MIN_SHARE_OF_LIMIT: u64 = 10;

/// An amount of disk space: bytes, or a part of the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskShare {
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of the file system.
    Percent(u8),
}

/// The text is not a [`DiskShare`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not an amount of disk space; use a size such as \"100GB\" or \"50GiB\", or a percentage from 0% to 100%"
)]
pub struct InvalidDiskShare(String);

/// Limit of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizeLimit {
    /// The cache may use this much.
    pub limit: DiskShare,
    /// The cache leaves this much of the file system free, also if other programs fill it.
    pub min_free: DiskShare,
}

/// State of a file system, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct DiskSpace {
    /// Size.
    pub(super) total: u64,
    /// What unprivileged programs may still write.
    pub(super) available: u64,
}

impl FromStr for DiskShare {
    type Err = InvalidDiskShare;

    fn from_str(text: &str) -> Result<Self, InvalidDiskShare> {
        let invalid = || InvalidDiskShare(text.to_owned());
        if let Some(number) = text.strip_suffix('%') {
            let percent = number.trim().parse().ok().filter(|percent| *percent <= 100);
            return percent.map(Self::Percent).ok_or_else(invalid);
        }
        parse_size::parse_size(text).map(Self::Bytes).map_err(|_| invalid())
    }
}

impl fmt::Display for DiskShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{bytes}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl<'de> Deserialize<'de> for DiskShare {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl DiskShare {
    /// Deserializes an amount that can be a limit: not less than a cache needs.
    pub fn deserialize_limit<'de, D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        match Self::deserialize(from)? {
            Self::Bytes(..MIN_LIMIT) | Self::Percent(0) => Err(D::Error::custom(format!(
                "the limit is too small; use at least {}MiB or 1%",
                MIN_LIMIT >> 20
            ))),
            limit => Ok(limit),
        }
    }

    /// The amount in bytes, on a file system of `total` bytes.
    fn of(self, total: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => (u128::from(total) * u128::from(percent) / 100) as u64,
        }
    }
}

impl SizeLimit {
    /// No limit.
    pub const NONE: Self = Self {
        limit: DiskShare::Bytes(u64::MAX),
        min_free: DiskShare::Bytes(0),
    };

    /// The limit in bytes, for a cache that uses `used` bytes of a file system in this state.
    pub(super) fn effective(&self, used: u64, disk: DiskSpace) -> u64 {
        let limit = self.limit.of(disk.total);
        let room = used.saturating_add(disk.available);
        let room = room.saturating_sub(self.min_free.of(disk.total));
        room.clamp(limit / MIN_SHARE_OF_LIMIT, limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_percentages_are_parsed() {
        for (text, expected) in [
            ("100GB", DiskShare::Bytes(100_000_000_000)),
            ("50GiB", DiskShare::Bytes(50 << 30)),
            ("1.5 TB", DiskShare::Bytes(1_500_000_000_000)),
            ("64 MiB", DiskShare::Bytes(64 << 20)),
            ("80%", DiskShare::Percent(80)),
            ("0%", DiskShare::Percent(0)),
            ("100 %", DiskShare::Percent(100)),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in ["", "%", "101%", "-1%", "1.5%", "many", "10 apples", "-5GB"] {
            let error = text.parse::<DiskShare>().unwrap_err().to_string();
            assert!(error.contains("100GB") && error.contains(text), "{error}");
        }
    }

    #[test]
    fn limit_gives_way_to_other_programs_down_to_a_tenth() {
        let limit = SizeLimit {
            limit: DiskShare::Percent(50),
            min_free: DiskShare::Percent(20),
        };
        let effective = |used, available| limit.effective(used, DiskSpace { total: 1000, available });
        assert_eq!(effective(0, 1000), 500);
        assert_eq!(effective(500, 300), 500);
        // Others use 500.
        assert_eq!(effective(300, 200), 300);
        assert_eq!(effective(100, 150), 50);
        assert_eq!(effective(10, 0), 50);
        assert_eq!(
            SizeLimit::NONE.effective(
                10,
                DiskSpace {
                    total: 1000,
                    available: 0
                }
            ),
            u64::MAX / 10
        );
    }
}
