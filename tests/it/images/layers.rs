//! Images of several layers: entries that upper layers add, replace and hide.

use std::{
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use nydus_builder::WhiteoutSpec;
use nydus_rafs::metadata::RafsVersion;
use nydus_store::fixtures::{BuildOptions, Conversion, LayerSource, TreeSpec, ZranManifest, make_tree, tar_of};
use rustix::fs::{CWD, FileType, Mode, XattrFlags};

use super::ImageSite;
use crate::common::output;

const OPAQUE: &str = ".wh..wh..opq";

/// Writes files and their parent directories. The content is the path and `mark`.
fn write_files(dir: &Path, mark: &str, paths: &[&str]) {
    for path in paths {
        let at = dir.join(path);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::write(at, format!("{path} {mark}")).unwrap();
    }
}

/// Makes three layers that add, replace and hide each other's entries, with OCI whiteouts. nydus-builder cannot merge
/// RAFS v5 bootstraps in which another kind of entry replaces a directory, so v5 omits that case.
fn layers(site: &ImageSite, version: RafsVersion) -> Vec<PathBuf> {
    let place = |number| site.path(&format!("layer-{version:?}-{number}"));
    let layers: Vec<_> = (0..3).map(place).collect();
    let spec = TreeSpec {
        chunk_size: 0x10000,
        ..TreeSpec::for_tar()
    };
    make_tree(&layers[0], &spec).unwrap();
    write_files(
        &layers[0],
        "0",
        &[
            "gone",
            "kept",
            "opaque/a",
            "opaque/b/c",
            "dir/gone",
            "dir/kept",
            "gone-dir/x/y",
            "file-to-dir",
            "dir-to-file/x",
            "link-to-dir/x",
            "back",
            "twice",
            "deep/1/2/3/gone",
            "deep/1/2/3/kept",
            "opaque-later/low",
        ],
    );
    write_files(&layers[0], "0", &["pair-a"]);
    fs::hard_link(layers[0].join("pair-a"), layers[0].join("pair-b")).unwrap();
    fs::hard_link(layers[0].join("pair-a"), layers[0].join("pair-c")).unwrap();
    write_files(
        &layers[1],
        "1",
        &[
            ".wh.gone",
            "opaque/b/new",
            "dir/.wh.gone",
            "dir/new",
            ".wh.gone-dir",
            "file-to-dir/inside",
            ".wh.back",
            "twice",
            "deep/1/2/3/.wh.gone",
            "files/.wh.small",
            "links/.wh.hard",
            "opaque-later/middle",
            "pair-a",
            "new-pair-a",
            "a-directory-of-its-own/x",
        ],
    );
    write_files(&layers[1], "", &[&format!("opaque/{OPAQUE}")]);
    if version.is_v6() {
        write_files(&layers[1], "1", &["dir-to-file"]);
        std::os::unix::fs::symlink("dir", layers[1].join("link-to-dir")).unwrap();
    }
    fs::hard_link(layers[1].join("new-pair-a"), layers[1].join("new-pair-b")).unwrap();
    // Shares chunks with the lower layer.
    fs::copy(layers[0].join("files/chunks"), layers[1].join("files/chunks-once-more")).unwrap();
    write_files(
        &layers[2],
        "2",
        &[
            "back",
            "twice",
            "gone-dir/again",
            "opaque-later/high",
            ".wh.new-pair-a",
            "opaque/.wh.b",
        ],
    );
    write_files(&layers[2], "", &[&format!("opaque-later/{OPAQUE}")]);
    layers
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let entries = walkdir::WalkDir::new(dir).min_depth(1).contents_first(true);
    entries.into_iter().map(|entry| entry.unwrap().into_path()).collect()
}

fn is_real_dir(path: &Path) -> bool {
    path.is_dir() && !path.is_symlink()
}

fn remove(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}

/// Unpacks a layer over `target` (OCI image-spec, layer.md).
fn apply(layer: &Path, target: &Path) {
    fs::create_dir_all(target).unwrap();
    for path in walk(layer) {
        let relative = path.strip_prefix(layer).unwrap();
        let (parent, name) = (target.join(relative.parent().unwrap()), relative.file_name().unwrap());
        let replaced = target.join(relative);
        if name == OPAQUE {
            if let Ok(children) = fs::read_dir(&parent) {
                children.for_each(|child| remove(&child.unwrap().path()));
            }
        } else if let Some(hidden) = name.as_bytes().strip_prefix(b".wh.") {
            remove(&parent.join(std::ffi::OsStr::from_bytes(hidden)));
        } else if !is_real_dir(&path) || !is_real_dir(&replaced) {
            remove(&replaced);
        }
    }
    let copy = "tar -C \"$0\" --xattrs --xattrs-include='*' --exclude='.wh.*' -cf - . |
                tar -C \"$1\" --numeric-owner --xattrs --xattrs-include='*' -xpf -";
    output(
        std::process::Command::new("sh")
            .args(["-ec", copy])
            .arg(layer)
            .arg(target),
    );
}

/// Copies a layer and converts its OCI whiteouts to overlayfs whiteouts.
fn to_overlay(layer: &Path, target: &Path) {
    output(std::process::Command::new("cp").arg("-a").arg(layer).arg(target));
    for path in walk(target) {
        let (parent, name) = (path.parent().unwrap(), path.file_name().unwrap().as_bytes());
        let times = modified_time(parent);
        if name == OPAQUE.as_bytes() {
            fs::remove_file(&path).unwrap();
            rustix::fs::setxattr(parent, "trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
        } else if let Some(hidden) = name.strip_prefix(b".wh.") {
            fs::remove_file(&path).unwrap();
            let hidden = parent.join(std::ffi::OsStr::from_bytes(hidden));
            rustix::fs::mknodat(CWD, &hidden, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        }
        fs::File::open(parent).unwrap().set_modified(times).unwrap();
    }
}

fn modified_time(path: &Path) -> std::time::SystemTime {
    fs::metadata(path).unwrap().modified().unwrap()
}

/// Truncates modification times to seconds, because tars keep no fractions.
fn round_times(dir: &Path) {
    for path in walk(dir) {
        let old = fs::symlink_metadata(&path).unwrap();
        if std::os::unix::fs::MetadataExt::mtime_nsec(&old) == 0 {
            continue;
        }
        let time = rustix::fs::Timespec {
            tv_sec: std::os::unix::fs::MetadataExt::mtime(&old),
            tv_nsec: 0,
        };
        let times = rustix::fs::Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(CWD, &path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

#[test]
fn upper_layers_add_replace_and_hide() {
    let site = ImageSite::new();
    for version in [RafsVersion::V5, RafsVersion::V6] {
        let layers = layers(&site, version);
        layers.iter().for_each(|layer| round_times(layer));
        let expected = site.path(&format!("expected-{version:?}"));
        layers.iter().for_each(|layer| apply(layer, &expected));
        for (name, layers, options) in variants(&layers, version) {
            let served = site.serve_image(&format!("{name}-{version:?}").to_lowercase(), &layers, &options);
            served.assert_layers();
            served.assert_equals(&expected);
        }
    }
}

/// The layers in every form that the builder accepts.
fn variants(layers: &[PathBuf], version: RafsVersion) -> Vec<(&'static str, Vec<LayerSource>, BuildOptions)> {
    let of = |kind: &dyn Fn(&PathBuf) -> LayerSource| layers.iter().map(kind).collect::<Vec<_>>();
    let tars = of(&|layer| {
        let tar = layer.with_extension("tar.gz");
        tar_of(layer, &tar, true).unwrap();
        LayerSource::Tar(tar)
    });
    let overlays = of(&|layer| {
        let target = layer.with_extension("overlay");
        to_overlay(layer, &target);
        LayerSource::Dir(target)
    });
    let options = || BuildOptions {
        version,
        chunk_size: 0x10000,
        ..BuildOptions::default()
    };
    let overlay = BuildOptions {
        whiteouts: WhiteoutSpec::Overlayfs,
        ..options()
    };
    let mut variants = vec![
        ("dirs", of(&|layer| LayerSource::Dir(layer.clone())), options()),
        ("tars", tars.clone(), options()),
        ("overlay", overlays, overlay),
    ];
    if version.is_v6() {
        let zran = |zran_manifest| BuildOptions {
            conversion: Conversion::Zran,
            zran_manifest,
            ..options()
        };
        variants.push(("zran-original", tars.clone(), zran(ZranManifest::Original)));
        variants.push(("zran-reference", tars, zran(ZranManifest::Reference)));
    }
    variants
}
