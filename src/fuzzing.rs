//! Entry points for fuzzing: one function for each parser that reads bytes from outside.
//!
//! `fuzz/` drives them with libFuzzer. The tests below drive them with mutations of the same seeds, which requires
//! neither a fuzzer nor another toolchain. A target must return for every input: a panic or a hang is a finding.

#![expect(clippy::expect_used, reason = "a panic is how a target reports")]

use std::{
    fs::{self, File},
    path::Path,
    sync::OnceLock,
};

use anyhow::Context as _;
use nydus_rafs::metadata::RafsVersion;
use nydus_utils::compress;

use crate::{
    blob::{codec, layout::BlobLayout, meta::BlobMeta, unit::UnitMap},
    digest::Digest,
    fixtures::{self, BuildOptions, BuiltImage, Conversion, LayerSource},
    image::{
        bootstrap,
        manifest::{Document, Selection},
        oci_layout::OciLayout,
        trace::Trace,
    },
    jobs::{Job, announcement::Logins},
    rafs::{FileKind, Tree},
    registries_conf, registry,
};

/// A fuzz target.
pub struct Target {
    /// Name of the target in `fuzz/fuzz_targets` and of its corpus in `fuzz/corpus`.
    pub name: &'static str,
    /// Parses one input.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    target("auth_file", registry::fuzz_auth_file),
    target("blob_meta", blob_meta),
    target("bootstrap_tar", bootstrap_tar),
    target("challenge", registry::fuzz_challenge),
    target("chunk", chunk),
    target("control", control),
    target("image_config", image_config),
    target("manifest", manifest),
    target("oci_archive", oci_archive),
    target("rafs_v5", rafs),
    target("rafs_v6", rafs),
    target("registries_conf", registries),
    target("trace", trace),
];

const fn target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run }
}

/// Parses `data` as the target `name` does.
///
/// # Panics
/// No target has that name, or the parser is wrong.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.expect("the name is a target's").run)(data);
}

/// Uncompressed bytes of a bootstrap layer or chunk that a target unpacks.
const LIMIT: u64 = 1 << 20;

fn manifest(data: &[u8]) {
    for selection in [Selection::LikePodman, Selection::PreferNydus] {
        if let Ok(Document::Image(manifest)) = Document::parse(data, selection) {
            manifest.nydus_layers();
            manifest.has_original_layers();
        }
    }
}

fn image_config(data: &[u8]) {
    if let Ok(Document::Image(manifest)) = Document::parse(&sample().native.manifest, Selection::LikePodman) {
        manifest.diff_ids(data).ok();
    }
}

fn bootstrap_tar(data: &[u8]) {
    let (dir, file) = written(data);
    let layer = File::open(file).expect("the file was just written");
    bootstrap::unpack(layer, Digest::of(data), LIMIT, dir.path()).ok();
}

fn rafs(data: &[u8]) {
    let (_dir, file) = written(data);
    if let Ok(tree) = Tree::load(&file) {
        read_everything(&tree);
    }
}

/// Reads everything that the FUSE handlers may read, and checks that it is consistent.
pub(crate) fn read_everything(tree: &Tree) {
    for ino in 0..tree.len() {
        let inode = tree.inode(ino).expect("all numbers below the length are inodes");
        assert!(FileKind::of_mode(inode.mode).is_some());
        for entry in tree.entries(ino) {
            assert_eq!(tree.lookup(ino, tree.name(entry)), Some(entry.ino));
            assert!(entry.ino < tree.len());
        }
        assert_eq!(tree.target(ino).is_some(), inode.kind() == FileKind::Symlink);
        for (name, value) in tree.xattrs(ino) {
            assert_eq!(tree.xattr(ino, name), Some(value));
        }
        let sizes = tree.chunks(ino).iter().map(|at| {
            let blob = &tree.blobs()[usize::from(at.blob)];
            u64::from(blob.chunks[at.chunk as usize].uncompressed_size)
        });
        let size: u64 = sizes.sum();
        assert_eq!(
            size,
            if inode.kind() == FileKind::Regular {
                inode.size
            } else {
                0
            }
        );
    }
}

fn blob_meta(data: &[u8]) {
    for layout in &sample().packed {
        let parsed = [
            BlobMeta::from_file(layout, data.to_owned()),
            BlobMeta::from_blob(layout, data),
        ];
        for meta in parsed.into_iter().flatten() {
            if let Ok(map) = UnitMap::packed(meta, layout) {
                for position in 0..layout.chunks.len() {
                    map.unit(layout, position).ok();
                }
            }
        }
    }
}

/// The first byte chooses the compressor, the next two the expected length.
fn chunk(data: &[u8]) {
    use compress::Algorithm::{GZip, Lz4Block, None, Zstd};
    let Some(([compressor, low, high], stored)) = data.split_first_chunk() else {
        return;
    };
    let compressor = [None, GZip, Lz4Block, Zstd][usize::from(compressor % 4)];
    let len = usize::from(u16::from_le_bytes([*low, *high]));
    if let Ok(plain) = codec::decompress(compressor, stored, len) {
        assert_eq!(plain.len(), len);
    }
}

fn control(data: &[u8]) {
    serde_json::from_slice::<Job>(data).ok();
    serde_json::from_slice::<Vec<Digest>>(data).ok();
    if let Ok(logins) = Logins::read(data) {
        logins.images().for_each(drop);
    }
}

fn registries(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let path = Path::new("registries.conf");
        registries_conf::parse_entries(path, text).ok();
        registries_conf::parse_auth_helper(path, text).ok();
    }
}

fn oci_archive(data: &[u8]) {
    let (_dir, file) = written(data);
    if let Ok(archive) = OciLayout::open_archive(&file)
        && let Ok((digest, _)) = archive.find(None)
    {
        archive.read(&digest, LIMIT).ok();
    }
}

fn trace(data: &[u8]) {
    if let Ok(trace) = Trace::read(data) {
        let mut written = Vec::new();
        trace.write(&mut written).expect("a vector takes all bytes");
        assert_eq!(Trace::read(written.as_slice()).ok().as_ref(), Some(&trace));
    }
}

/// A file with these bytes, in a directory of its own.
fn written(data: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let file = dir.path().join("input");
    fs::write(&file, data).expect("a temporary file can be written");
    (dir, file)
}

/// Images that seeds are taken from.
struct Sample {
    _dir: tempfile::TempDir,
    native: BuiltImage,
    images: Vec<(RafsVersion, BuiltImage)>,
    /// Blobs that need a blob meta.
    packed: Vec<BlobLayout>,
    metas: Vec<Vec<u8>>,
}

fn sample() -> &'static Sample {
    static SAMPLE: OnceLock<Sample> = OnceLock::new();
    SAMPLE.get_or_init(|| Sample::build().expect("the fixtures can be built"))
}

impl Sample {
    fn build() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let tree = dir.path().join("tree");
        fixtures::demo_tree(&tree, 12, 7)?;
        let tar = dir.path().join("layer.tar.gz");
        fixtures::tar_of(&tree, &tar, true)?;
        let build = |name: &str, layer: &Path, options: BuildOptions| {
            let layer = if layer.is_dir() {
                LayerSource::Dir(layer.into())
            } else {
                LayerSource::Tar(layer.into())
            };
            fixtures::build(&[layer], &options, &dir.path().join(name))
        };
        let defaults = || BuildOptions {
            chunk_size: 4096,
            ..BuildOptions::default()
        };
        let batch = build(
            "batch",
            &tree,
            BuildOptions {
                chunk_size: 1 << 16,
                batch_size: 1 << 16,
                ..BuildOptions::default()
            },
        )?;
        let zran = build(
            "zran",
            &tar,
            BuildOptions {
                conversion: Conversion::Zran,
                ..defaults()
            },
        )?;
        let old = build(
            "v5",
            &tree,
            BuildOptions {
                version: RafsVersion::V5,
                ..defaults()
            },
        )?;
        let native = build("v6", &tree, defaults())?;
        let (mut packed, mut metas) = (Vec::new(), Vec::new());
        for image in [&batch, &zran] {
            let layer = image.bootstrap_blob()?;
            let unpacked = bootstrap::unpack(File::open(&layer.path)?, layer.diff_id, u64::MAX, dir.path())?;
            for blob in Tree::load(&unpacked.bootstrap)?.blobs() {
                metas.push(fs::read(unpacked.metas.get(&blob.id).context("no blob meta")?)?);
                packed.push(BlobLayout::clone(blob));
            }
        }
        let images = vec![
            (RafsVersion::V5, old),
            (RafsVersion::V6, native.clone()),
            (RafsVersion::V6, batch),
            (RafsVersion::V6, zran),
        ];
        Ok(Self {
            _dir: dir,
            native,
            images,
            packed,
            metas,
        })
    }
}

/// Valid inputs for the target `name`, made by the fixtures.
///
/// # Errors
/// An image of the fixtures cannot be read.
pub fn seeds(name: &str) -> anyhow::Result<Vec<Vec<u8>>> {
    let sample = sample();
    let bootstraps = |version| -> anyhow::Result<Vec<Vec<u8>>> {
        let images = sample.images.iter().filter(|(built, _)| *built == version);
        images
            .map(|(_, image)| Ok(fs::read(image.bootstrap_path()?)?))
            .collect()
    };
    let texts = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_owned()).collect();
    Ok(match name {
        "auth_file" => texts(&[
            r#"{"auths":{"r.example/a":{"auth":"bWU6c2VjcmV0"},"r.example":{"identitytoken":"t"}},"credsStore":"pass"}"#,
            r#"{"auths":{"https://index.docker.io/v1/":{"auth":"bWU6"}},"credHelpers":{"r.example":"secretservice"}}"#,
        ]),
        "blob_meta" => sample.metas.clone(),
        "bootstrap_tar" => {
            let layers = sample.images.iter().map(|(_, image)| image.bootstrap_blob());
            layers
                .map(|layer| Ok(fs::read(&layer?.path)?))
                .collect::<anyhow::Result<_>>()?
        }
        "challenge" => texts(&[
            r#"Bearer realm="https://auth.example/token",service="r.example",scope="repository:a/b:pull""#,
            r#"Basic realm="a \"quoted\" realm", Bearer realm=x, error="insufficient_scope""#,
        ]),
        "chunk" => {
            use compress::Algorithm::{GZip, Lz4Block, None, Zstd};
            let plain = "chunk ".repeat(100);
            let seed = |(number, algorithm): (u8, _)| -> anyhow::Result<Vec<u8>> {
                let (stored, _) = compress::compress(plain.as_bytes(), algorithm)?;
                let len = (plain.len() as u16).to_le_bytes();
                Ok([&[number, len[0], len[1]], stored.as_ref()].concat())
            };
            (0..)
                .zip([None, GZip, Lz4Block, Zstd])
                .map(seed)
                .collect::<anyhow::Result<_>>()?
        }
        "control" => texts(&[
            r#"{"preseed":[{"source":"docker://r.example/a:1","names":["b"]}]}"#,
            r#"{"verify":{"references":["r.example/a:1"],"repair":true}}"#,
            r#"{"r.example/a:1":{"username":"me","password":"secret","identityToken":""},"r.example/b":{}}"#,
            r#"["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]"#,
        ]),
        "image_config" => sample.images.iter().map(|(_, image)| image.config.clone()).collect(),
        "manifest" => {
            let index = fixtures::ImageIndex::new(&[(&sample.native, fixtures::NydusMark::OsFeatures)])?;
            let images = sample.images.iter().map(|(_, image)| image.manifest.clone());
            images.chain([index.index]).collect()
        }
        "oci_archive" => {
            let dir = tempfile::tempdir()?;
            let (layout, archive) = (dir.path().join("layout"), dir.path().join("archive.tar"));
            sample.native.write_oci_layout(&layout, "1")?;
            fixtures::tar_of(&layout, &archive, false)?;
            vec![fs::read(archive)?]
        }
        "rafs_v5" => bootstraps(RafsVersion::V5)?,
        "rafs_v6" => bootstraps(RafsVersion::V6)?,
        "registries_conf" => texts(&[
            "additional-layer-store-auth-helper = \"nydus-store\"\n[[registry]]\nprefix = \"*.example\"\nlocation = \
             \"r.example/a\"\ninsecure = true\n[[registry.mirror]]\nlocation = \"m.example\"\npull-from-mirror = \
             \"digest-only\"\n",
            "[registries.insecure]\nregistries = ['a.example']\n[registries.block]\nregistries = ['b.example']\n",
        ]),
        "trace" => texts(&[
            "{\"nydus-store-trace\":1,\"image\":\"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\"}\n\
             {\"blob\":\"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\",\"chunks\":[1,2,7]}\n",
        ]),
        _ => anyhow::bail!("there is no target {name}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::content::Random;

    /// Inputs for each target; `NYDUS_FUZZ_ROUNDS` sets another number.
    const ROUNDS: u64 = 300;

    /// Overwrites, inserts, removes and repeats a few bytes.
    fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
        for _ in 0..=random.below(4) {
            let at = random.below(bytes.len().max(1) as u64) as usize;
            let len = (1 + random.below(16) as usize).min(bytes.len() - at.min(bytes.len()));
            match random.below(6) {
                0 => bytes
                    .iter_mut()
                    .skip(at)
                    .take(1)
                    .for_each(|byte| *byte ^= 1 << random.below(8)),
                1 => bytes.iter_mut().skip(at).take(len).for_each(|byte| *byte = 0xff),
                2 => bytes.iter_mut().skip(at).take(len).for_each(|byte| *byte = 0),
                3 => bytes.insert(at, random.number() as u8),
                4 => drop(bytes.drain(at..at + len)),
                _ => {
                    let part = bytes[at..at + len].to_vec();
                    bytes.splice(at..at, part);
                }
            }
        }
        if random.below(20) == 0 {
            bytes.truncate(random.below(bytes.len() as u64 + 1) as usize);
        }
    }

    #[test]
    fn every_target_survives_mutated_seeds() {
        let rounds = std::env::var("NYDUS_FUZZ_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap());
        for target in TARGETS {
            let (seeds, mut random) = (seeds(target.name).unwrap(), Random::new(rounds));
            assert!(!seeds.is_empty(), "{}", target.name);
            seeds.iter().for_each(|seed| (target.run)(seed));
            for _ in 0..rounds {
                let mut input = seeds[random.below(seeds.len() as u64) as usize].clone();
                mutate(&mut input, &mut random);
                (target.run)(&input);
            }
        }
    }

    #[test]
    fn every_target_has_a_program_in_the_fuzz_crate() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
        let mut programs: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        programs.sort();
        let names: Vec<_> = programs
            .iter()
            .map(|path| path.file_stem().unwrap().to_str().unwrap())
            .collect();
        assert_eq!(names, TARGETS.iter().map(|target| target.name).collect::<Vec<_>>());
    }
}
