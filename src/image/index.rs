//! Selects an index's manifest for this machine.
//!
//! The rules are those of containers/image (`internal/manifest/oci_index.go` and `pkg/platform/platform_matcher.go`),
//! so that this program and Podman agree on an image.

use std::{cmp::Reverse, fs, sync::OnceLock};

use super::{
    descriptor::{Descriptor, IndexJson, Platform},
    manifest::{ManifestError, Selection},
};
use crate::digest::Digest;

const NYDUS_OS_FEATURE: &str = "nydus.remoteimage.v1";
const NYDUS_ARTIFACT_TYPE: &str = "application/vnd.nydus.image.manifest.v1+json";
/// Marks an entry with layers compressed by zstd. containers/image prefers it since 5.29 (Podman 4.8).
const ZSTD_ANNOTATION: &str = "io.github.containers.compression.zstd";
const HOST_OS: &str = "linux";

/// The selected entry of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selected {
    /// Digest of the entry's manifest.
    pub manifest: Digest,
    /// Whether the index marks this manifest as a Nydus image's.
    pub is_nydus: bool,
    /// Whether the index marks any manifest for this machine as a Nydus image's.
    pub has_nydus: bool,
}

/// The platforms that this machine can run, the best one first.
struct HostPlatform {
    architecture: &'static str,
    variants: &'static [&'static str],
}

/// Sort key of an entry for this machine; the lowest one is preferred.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct EntryRank {
    is_not_nydus: bool,
    /// Position in the list of platforms; entries without a platform come last.
    platform: usize,
    is_zstd: Reverse<bool>,
    position: usize,
}

/// Selects the entry for this machine.
pub(super) fn select(index: &IndexJson, selection: Selection) -> Result<Selected, ManifestError> {
    select_for(&HostPlatform::here(), index, selection)
}

fn select_for(host: &HostPlatform, index: &IndexJson, selection: Selection) -> Result<Selected, ManifestError> {
    let entries = index.manifests.as_deref().unwrap_or_default();
    let rank = |(position, entry): (usize, &Descriptor)| {
        let platform = match &entry.platform {
            Some(platform) => host.position(platform)?,
            None => usize::MAX,
        };
        let is_preferred = selection == Selection::PreferNydus && is_nydus(entry);
        Some(EntryRank {
            is_not_nydus: !is_preferred,
            platform,
            is_zstd: Reverse(entry.annotation(ZSTD_ANNOTATION) == Some("true")),
            position,
        })
    };
    let mut ranks: Vec<_> = entries.iter().enumerate().filter_map(rank).collect();
    ranks.sort_unstable();
    let best = ranks.first().ok_or(ManifestError::NoPlatform {
        os: HOST_OS,
        architecture: host.architecture,
    })?;
    let manifest = entries[best.position].digest()?;
    let marked = || {
        ranks
            .iter()
            .map(|rank| &entries[rank.position])
            .filter(|entry| is_nydus(entry))
    };
    Ok(Selected {
        manifest,
        // A manifest may be listed twice and marked only once.
        is_nydus: marked().any(|entry| entry.digest() == Ok(manifest)),
        has_nydus: marked().next().is_some(),
    })
}

impl HostPlatform {
    fn here() -> Self {
        static CPU: OnceLock<String> = OnceLock::new();
        let cpu_info = || fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let architecture = architecture();
        let variants: &[_] = match architecture {
            "arm64" => &["v8", ""],
            "arm" => arm_variants(CPU.get_or_init(cpu_info)),
            _ => &[""],
        };
        Self { architecture, variants }
    }

    fn position(&self, platform: &Platform) -> Option<usize> {
        let is = |said: &Option<String>, host: &str| said.as_deref().unwrap_or_default() == host;
        let fits = is(&platform.os, HOST_OS) && is(&platform.architecture, self.architecture);
        let position = || self.variants.iter().position(|variant| is(&platform.variant, variant));
        fits.then(position).flatten()
    }
}

/// This machine's architecture in the terms of Go and OCI.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// The variants that a 32-bit ARM processor can run. `cpu_info` is the content of `/proc/cpuinfo`.
fn arm_variants(cpu_info: &str) -> &'static [&'static str] {
    const ALL: &[&str] = &["v8", "v7", "v6", "v5", ""];
    let field = |name: &str| {
        let mut lines = cpu_info.lines().filter_map(|line| line.split_once(':'));
        let line = lines.find(|(key, _)| key.trim().eq_ignore_ascii_case(name));
        line.map_or("", |(_, value)| value.trim())
    };
    let said = field("cpu architecture").trim_start_matches(['v', 'V']);
    // The first Raspberry Pi reports 7, but is a v6.
    let is_6 = field("model name").to_ascii_lowercase().starts_with("armv6-compatible");
    match said.bytes().next() {
        Some(b'8' | b'a' | b'A') => ALL,
        Some(b'6') => &ALL[2..],
        Some(b'7') if is_6 => &ALL[2..],
        Some(b'5') => &ALL[3..],
        _ => &ALL[1..],
    }
}

/// Whether the index marks the entry as a Nydus image's manifest.
fn is_nydus(entry: &Descriptor) -> bool {
    let features = entry
        .platform
        .as_ref()
        .and_then(|platform| platform.os_features.as_ref());
    let by_feature = features.is_some_and(|all| all.iter().any(|feature| feature == NYDUS_OS_FEATURE));
    by_feature || entry.artifact_type.as_deref() == Some(NYDUS_ARTIFACT_TYPE)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const AMD64: HostPlatform = HostPlatform {
        architecture: "amd64",
        variants: &[""],
    };
    const ARM64: HostPlatform = HostPlatform {
        architecture: "arm64",
        variants: &["v8", ""],
    };

    /// An entry called `name`. `platform` is an architecture, optionally followed by a slash and a variant.
    fn entry(name: &str, platform: &str) -> Value {
        let (architecture, variant) = platform.split_once('/').unwrap_or((platform, ""));
        let mut entry = json!({
            "digest": Digest::of(name.as_bytes()), "size": 1,
            "platform": {"os": "linux", "architecture": architecture},
        });
        if !variant.is_empty() {
            entry["platform"]["variant"] = json!(variant);
        }
        entry
    }

    fn marked(mut entry: Value) -> Value {
        entry["platform"]["os.features"] = json!([NYDUS_OS_FEATURE]);
        entry
    }

    fn select_from(host: &HostPlatform, entries: &[&Value], selection: Selection) -> Result<Selected, ManifestError> {
        let index = serde_json::from_value(json!({ "manifests": entries })).unwrap();
        select_for(host, &index, selection)
    }

    #[track_caller]
    fn assert_selects(host: &HostPlatform, entries: &[&Value], selection: Selection, expected: &str) -> Selected {
        let selected = select_from(host, entries, selection).unwrap();
        assert_eq!(selected.manifest, Digest::of(expected.as_bytes()), "not {expected}");
        selected
    }

    #[test]
    fn nydus_manifest_is_preferred_only_if_requested() {
        let (plain, by_feature) = (entry("plain", "amd64"), marked(entry("feature", "amd64")));
        let mut by_artifact = entry("artifact", "amd64");
        by_artifact["artifactType"] = json!(NYDUS_ARTIFACT_TYPE);
        let foreign = marked(entry("foreign", "vax"));
        for nydus in [("feature", &by_feature), ("artifact", &by_artifact)] {
            let entries = [&foreign, &plain, nydus.1];
            let selected = assert_selects(&AMD64, &entries, Selection::PreferNydus, nydus.0);
            assert!(selected.is_nydus && selected.has_nydus);
            let selected = assert_selects(&AMD64, &entries, Selection::LikePodman, "plain");
            assert!(!selected.is_nydus && selected.has_nydus);
        }
        let selected = assert_selects(&AMD64, &[&foreign, &plain], Selection::PreferNydus, "plain");
        assert!(
            !selected.is_nydus && !selected.has_nydus,
            "what is marked is for another machine"
        );
    }

    #[test]
    fn variants_are_those_of_containers_image() {
        let (v3, amd64) = (entry("v3", "amd64/v3"), entry("amd64", "amd64"));
        let (v8, arm64) = (entry("v8", "arm64/v8"), entry("arm64", "arm64"));
        for selection in [Selection::LikePodman, Selection::PreferNydus] {
            assert_selects(&AMD64, &[&v3, &amd64, &arm64], selection, "amd64");
            assert_selects(&ARM64, &[&arm64, &amd64, &v8], selection, "v8");
            assert_selects(&ARM64, &[&amd64, &arm64], selection, "arm64");
            assert!(select_from(&AMD64, &[&v3, &arm64], selection).is_err());
        }
        // The rule about variants applies among Nydus manifests, but does not take precedence over the mark.
        let (v3, better) = (marked(v3), marked(entry("better", "amd64")));
        assert_selects(&AMD64, &[&v3, &amd64], Selection::PreferNydus, "amd64");
        assert_selects(&AMD64, &[&v3, &amd64, &better], Selection::PreferNydus, "better");
    }

    #[test]
    fn zstd_is_preferred_on_the_same_platform_only() {
        let (gzip, v8) = (entry("gzip", "arm64"), entry("v8", "arm64/v8"));
        let mut zstd = entry("zstd", "arm64");
        zstd["annotations"] = json!({ZSTD_ANNOTATION: "true", "other": null});
        assert_selects(&ARM64, &[&gzip, &zstd], Selection::LikePodman, "zstd");
        assert_selects(&ARM64, &[&gzip, &zstd, &v8], Selection::LikePodman, "v8");
        zstd["annotations"] = json!({ZSTD_ANNOTATION: "yes"});
        assert_selects(&ARM64, &[&gzip, &zstd], Selection::LikePodman, "gzip");
    }

    #[test]
    fn entry_without_platform_is_the_last_resort() {
        let (mut bare, amd64) = (entry("bare", ""), entry("amd64", "amd64"));
        bare["platform"] = Value::Null;
        for selection in [Selection::LikePodman, Selection::PreferNydus] {
            assert_selects(&AMD64, &[&bare, &amd64], selection, "amd64");
            assert_selects(&ARM64, &[&bare, &amd64], selection, "bare");
        }
    }

    #[test]
    fn incomplete_entries_do_not_spoil_an_index() {
        let amd64 = entry("amd64", "amd64");
        let no_architecture = json!({"digest": "sha256:x", "platform": {"os": "linux", "os.features": null}});
        let entries = [&no_architecture, &json!({"platform": {}}), &amd64];
        assert_selects(&AMD64, &entries, Selection::LikePodman, "amd64");
        assert!(select_from(&AMD64, &[&no_architecture], Selection::LikePodman).is_err());
        assert!(select_from(&AMD64, &[], Selection::LikePodman).is_err());
        assert!(select_from(&AMD64, &[&json!({"size": 1})], Selection::LikePodman).is_err());
    }

    #[test]
    fn manifest_listed_twice_is_marked_by_either_entry() {
        let (plain, nydus) = (entry("image", "amd64"), marked(entry("image", "amd64")));
        for entries in [[&plain, &nydus], [&nydus, &plain], [&nydus, &nydus]] {
            for selection in [Selection::LikePodman, Selection::PreferNydus] {
                assert!(assert_selects(&AMD64, &entries, selection, "image").is_nydus);
            }
        }
    }

    #[test]
    fn arm_variants_start_at_the_processors_own() {
        let first = |cpu_info| arm_variants(cpu_info)[0];
        assert_eq!(first("model name\t: ARMv7\nCPU architecture: 7\n"), "v7");
        assert_eq!(
            first("model name\t: ARMv6-compatible rev 7\nCPU architecture: 7\n"),
            "v6"
        );
        assert_eq!(first("CPU architecture: 8\n"), "v8");
        assert_eq!(first("CPU architecture: AArch64\n"), "v8");
        assert_eq!(first("CPU architecture: 5TEJ\n"), "v5");
        assert_eq!(first(""), "v7");
    }
}
