//! The store without a mount: what the kernel would ask, asked directly.

use std::sync::Arc;

use super::*;
use crate::{
    config::Config,
    fixtures::{self, BuildOptions, BuiltImage, EmbeddedRegistry, LayerSource},
    image::resolve::Images,
    registry::Client,
    vfs::ROOT,
};

struct Setup {
    store: Store,
    image: BuiltImage,
    reference: String,
    registry: EmbeddedRegistry,
    dir: tempfile::TempDir,
}

fn setup() -> Setup {
    let dir = tempfile::tempdir().unwrap();
    fixtures::demo_tree(&dir.path().join("tree"), 20, 3).unwrap();
    let layers = [LayerSource::Dir(dir.path().join("tree"))];
    let image = fixtures::build(&layers, &BuildOptions::default(), &dir.path().join("out")).unwrap();
    let registry = EmbeddedRegistry::start().unwrap();
    registry.add_image(&image, "team/app", "1").unwrap();
    let reference = registry.reference("team/app", "1");
    let config = Config::default();
    let client = Client::new(config.registry_options()).unwrap();
    let images = Images::open(&dir.path().join("root"), client, config.limits()).unwrap();
    Setup {
        store: Store::new(Arc::new(images)),
        image,
        reference,
        registry,
        dir,
    }
}

async fn lookup(store: &Store, parent: NodeId, name: &str) -> Result<Attr, Errno> {
    let entry = match store.lookup(parent, name.as_bytes(), 0) {
        Answer::Now(entry) => entry,
        Answer::Later(entry) => entry.await,
    };
    entry?.attr.ok_or(Errno::NOENT)
}

async fn read(store: &Store, node: NodeId, len: usize) -> Vec<u8> {
    let mut buffer = vec![0; len];
    match store.read(node, 0, &mut buffer) {
        ReadAnswer::Now(got) => buffer[..got.unwrap()].to_vec(),
        ReadAnswer::Later(bytes) => bytes.await.unwrap(),
    }
}

#[tokio::test]
async fn a_layer_lives_as_long_as_somebody_counts_on_it() {
    let Setup {
        store,
        image,
        reference,
        registry: _registry,
        dir: _dir,
    } = setup();
    let digest = image.bootstrap_blob().unwrap().digest.to_string();
    let name = BASE64.encode(&reference);
    let parent = lookup(&store, ROOT, &name).await.unwrap();
    let layer = lookup(&store, parent.node, &digest).await.unwrap();
    let diff = lookup(&store, layer.node, "diff").await.unwrap();
    assert_eq!(store.create(layer.node, USE), Errno::NOENT);
    assert_eq!(store.create(layer.node, USE), Errno::NOENT);
    assert_eq!(store.counts(), (1, 2));
    // The kernel forgets: the uses keep the layer.
    store.forget(diff.node, 1);
    store.forget(layer.node, 1);
    assert_eq!(store.counts(), (1, 2));
    assert_eq!(store.rmdir(parent.node, digest.as_bytes()), Errno::NOENT);
    // A container still uses the tree when the last use is taken back: the kernel's knowledge keeps it.
    let layer = lookup(&store, parent.node, &digest).await.unwrap();
    let diff = lookup(&store, layer.node, "diff").await.unwrap();
    assert_eq!(store.rmdir(parent.node, digest.as_bytes()), Errno::NOENT);
    assert_eq!(store.counts(), (1, 0));
    assert!(store.attr(diff.node).is_ok());
    store.forget(diff.node, 1);
    store.forget(layer.node, 1);
    assert_eq!(store.counts(), (0, 0));
    assert_eq!(store.attr(diff.node), Err(Errno::STALE));
}

#[tokio::test]
async fn nodes_of_a_later_instance_are_others() {
    let Setup {
        store,
        image,
        reference,
        registry: _registry,
        dir: _dir,
    } = setup();
    let digest = image.bootstrap_blob().unwrap().digest.to_string();
    let parent = lookup(&store, ROOT, &BASE64.encode(&reference)).await.unwrap();
    let mut roots = Vec::new();
    for _ in 0..2 {
        let layer = lookup(&store, parent.node, &digest).await.unwrap();
        let diff = lookup(&store, layer.node, "diff").await.unwrap();
        roots.push(diff.node);
        store.forget(diff.node, 1);
        store.forget(layer.node, 1);
    }
    assert_ne!(roots[0], roots[1]);
}

#[tokio::test]
async fn what_is_no_layer_is_not_there() {
    let Setup {
        store,
        reference,
        registry,
        dir: _dir,
        ..
    } = setup();
    assert_eq!(lookup(&store, ROOT, "no base64!").await, Err(Errno::NOENT));
    assert_eq!(
        lookup(&store, ROOT, &BASE64.encode("no reference!")).await,
        Err(Errno::NOENT)
    );
    let parent = lookup(&store, ROOT, &BASE64.encode(&reference)).await.unwrap();
    let other = Digest::of(b"other").to_string();
    assert_eq!(lookup(&store, parent.node, &other).await, Err(Errno::NOENT));
    let asked = registry.request_count();
    assert_eq!(lookup(&store, parent.node, &other).await, Err(Errno::NOENT));
    assert_eq!(registry.request_count(), asked, "the answer is remembered");
    assert_eq!(store.create(parent.node, USE), Errno::ROFS);
    assert_eq!(store.rmdir(ROOT, b"x"), Errno::ROFS);
}

#[tokio::test]
async fn info_and_blob_are_the_layers() {
    let Setup {
        store,
        image,
        reference,
        registry: _registry,
        dir: _dir,
    } = setup();
    let parent = lookup(&store, ROOT, &BASE64.encode(&reference)).await.unwrap();
    for blob in &image.blobs {
        let layer = lookup(&store, parent.node, &blob.digest.to_string()).await.unwrap();
        let info = lookup(&store, layer.node, "info").await.unwrap();
        let info: serde_json::Value =
            serde_json::from_slice(&read(&store, info.node, info.size as usize).await).unwrap();
        assert_eq!(info["compressed-diff-digest"], blob.digest.to_string());
        assert_eq!(info["diff-digest"], blob.diff_id.to_string());
        assert_eq!(info["compressed-size"], blob.size);
        let raw = lookup(&store, layer.node, "blob").await.unwrap();
        assert_eq!(
            read(&store, raw.node, raw.size as usize).await,
            std::fs::read(&blob.path).unwrap()
        );
    }
}
