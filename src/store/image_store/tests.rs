use std::fs;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

fn layer(text: &str) -> NewLayer {
    NewLayer {
        digest: digest(text),
        size: 10,
        diff_id: digest(text),
        diff_size: 20,
        compression: 0,
    }
}

/// The layers of an image: data blobs that others may share, and its own bootstrap.
fn publication(data: &[&str], name: &str) -> Publication {
    let bootstrap = format!("bootstrap {name}");
    let layers = data.iter().copied().chain([bootstrap.as_str()]);
    Publication {
        layers: layers.map(layer).collect(),
        manifest: digest(name),
        inodes: 100,
        source: format!("r.example/{name}:1"),
    }
}

fn image(name: &str, names: &[&str]) -> NewImage {
    NewImage {
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        ordinary_manifest: format!("manifest {name}"),
        config: format!("config {name}"),
        registry_manifest: name.to_owned(),
        is_pinned: false,
    }
}

struct TestStore {
    dir: tempfile::TempDir,
    graph_root: PathBuf,
}

impl TestStore {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let graph_root = dir.path().join("graph");
        fs::create_dir(&graph_root).unwrap();
        Self { dir, graph_root }
    }

    fn open(&self) -> ImageStore {
        ImageStore::open(&self.dir.path().join("root"), std::slice::from_ref(&self.graph_root)).unwrap()
    }

    /// Writes one of the graph root's lists.
    fn list(&self, file: &str, list: &Value) {
        let path = self.graph_root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, list.to_string()).unwrap();
    }
}

/// Reads a list that the store wrote for containers/storage.
fn records(path: PathBuf) -> Vec<Value> {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn layer_ids_are_those_of_containers_image() {
    let (one, two) = (digest("one"), digest("two"));
    let chained = hex::encode(Sha256::digest(format!("{}+{}", one.hex(), two.hex())));
    assert_eq!(layer_ids([one, two]), [one.hex(), chained]);
}

#[test]
fn published_layers_keep_their_node_ids_after_a_restart() {
    let setup = TestStore::new();
    let store = setup.open();
    let top = store.publish(&publication(&["data"], "a")).unwrap();
    store.publish(&publication(&["data"], "b")).unwrap();
    let (published, layers) = (store.published(), fs::read(store.layout().layers_json()).unwrap());
    drop(store);
    let store = setup.open();
    assert_eq!(store.published(), published);
    assert_eq!(fs::read(store.layout().layers_json()).unwrap(), layers);
    assert_eq!(published.layers.len(), 3, "the data blob is shared");
    let layer = store.layer(&top).unwrap();
    assert_eq!(store.layer_of_node(layer.first_node + 50), Some(Arc::clone(&layer)));
    assert_eq!(store.layer_of_link(&layer.link), Some(layer));
}

#[test]
fn node_ids_of_withdrawn_layers_are_not_reused() {
    let setup = TestStore::new();
    let store = setup.open();
    let name = "r.example/a:1";
    store
        .publish_image(&publication(&["data"], "a"), image("a", &[name]))
        .unwrap();
    let first = store.layers().last().unwrap().first_node;
    store.remove_name(name).unwrap();
    assert_eq!(store.layers(), []);
    let top = store.publish(&publication(&["other"], "b")).unwrap();
    assert!(store.layer(&top).unwrap().first_node > first);
}

#[test]
fn layers_required_by_a_graph_root_are_kept() {
    let setup = TestStore::new();
    let store = setup.open();
    let (name, publication) = ("r.example/a:1", publication(&["data"], "a"));
    store.publish_image(&publication, image("a", &[name])).unwrap();
    let top = layer_ids(publication.layers.iter().map(|layer| layer.diff_id))
        .pop()
        .unwrap();
    // A built image on top, with a container.
    setup.list(
        "overlay-layers/layers.json",
        &json!([{"id": "built", "parent": top}, {"id": "rw", "parent": "built"}]),
    );
    setup.list(
        "overlay-images/images.json",
        &json!([{"id": "image", "layer": "built"}]),
    );
    setup.list(
        "overlay-containers/containers.json",
        &json!([{"id": "container", "layer": "rw"}]),
    );
    assert!(matches!(store.remove_name(name), Err(StoreError::InUse { .. })));
    setup.list("overlay-containers/containers.json", &json!([]));
    store.remove_name(name).unwrap();
    assert_eq!(store.published().images.len(), 0);
    assert_eq!(store.layers().len(), 2, "the built image needs them");
    // Without the built image, nothing requires the layers.
    setup.list("overlay-layers/layers.json", &json!([]));
    setup.list("overlay-images/images.json", &json!([]));
    store.publish_image(&publication, image("a", &[name])).unwrap();
    store.remove_name(name).unwrap();
    assert_eq!(store.layers(), []);
}

#[test]
fn nothing_is_withdrawn_while_a_graph_root_cannot_be_read() {
    let setup = TestStore::new();
    let store = setup.open();
    let name = "r.example/a:1";
    store
        .publish_image(&publication(&["data"], "a"), image("a", &[name]))
        .unwrap();
    fs::remove_dir(&setup.graph_root).unwrap();
    assert!(matches!(store.remove_name(name), Err(StoreError::GraphRoot { .. })));
    fs::create_dir(&setup.graph_root).unwrap();
    setup.list("overlay-images/images.json", &json!({"no": "list"}));
    assert!(matches!(store.remove_name(name), Err(StoreError::GraphRoot { .. })));
    assert_eq!((store.layers().len(), store.published().images.len()), (2, 1));
}

#[test]
fn announced_layers_are_kept_while_the_pull_may_continue() {
    let setup = TestStore::new();
    let store = setup.open();
    let (name, publication) = ("r.example/a:1", publication(&["data"], "a"));
    store.publish_image(&publication, image("a", &[name])).unwrap();
    store.publish(&publication).unwrap();
    drop(store);
    let store = setup.open();
    store.remove_name(name).unwrap();
    assert_eq!(store.layers().len(), 2);
}

#[test]
fn contradictory_layers_are_refused() {
    let setup = TestStore::new();
    let store = setup.open();
    store.publish(&publication(&[], "a")).unwrap();
    // Claims the bootstrap of another image as a data blob.
    let lying = publication(&["bootstrap a"], "b");
    assert!(matches!(store.publish(&lying), Err(StoreError::Conflict(_))));
    // Claims an ordinary layer as a data blob.
    let mut lying = publication(&["data"], "c");
    lying.layers[0].diff_id = digest("its tar");
    assert!(matches!(store.publish(&lying), Err(StoreError::NotDataBlob(_))));
    // A claimed data blob turns out to be a bootstrap.
    store.publish(&publication(&["bootstrap d"], "e")).unwrap();
    let top = store.publish(&publication(&[], "d")).unwrap();
    assert!(store.layer(&top).unwrap().tree.is_some());
}

#[test]
fn records_that_could_not_be_written_are_written_with_the_next_change() {
    let setup = TestStore::new();
    let store = setup.open();
    let path = store.layout().layers_json();
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let publication = publication(&["data"], "a");
    assert!(matches!(store.publish(&publication), Err(StoreError::Write { .. })));
    fs::remove_dir(&path).unwrap();
    // Publishes the same again: the database does not change, but the records lack it.
    store.publish(&publication).unwrap();
    assert_eq!(records(path).len(), 2);
}

#[test]
fn sizes_above_i64_max_are_clamped_for_containers_storage() {
    let setup = TestStore::new();
    let store = setup.open();
    let mut publication = publication(&["data"], "a");
    publication.layers[0].size = u64::MAX;
    store.publish(&publication).unwrap();
    let records = records(store.layout().layers_json());
    assert!(
        records
            .iter()
            .all(|record| record["compressed-size"].as_i64().is_some())
    );
}

#[derive(Debug, Clone)]
enum Step {
    Pull { image: usize, tag: usize },
    Remove { tag: usize },
    Announce { image: usize },
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..4usize, 0..3usize).prop_map(|(image, tag)| Step::Pull { image, tag }),
        (0..3usize).prop_map(|tag| Step::Remove { tag }),
        (0..4usize).prop_map(|image| Step::Announce { image }),
        Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Names follow a model, records match what is published, and no two layers share a node id.
    #[test]
    fn records_match_the_model_after_any_sequence_of_changes(steps in prop::collection::vec(step(), 1..16)) {
        let setup = TestStore::new();
        let mut store = setup.open();
        let data = [&["x"][..], &["x", "y"], &["y"], &[]];
        let mut model = BTreeMap::new();
        for step in steps {
            match step {
                Step::Pull { image: number, tag } => {
                    let name = number.to_string();
                    let tag = format!("r.example/known:{tag}");
                    store.publish_image(&publication(data[number], &name), image(&name, &[&tag])).unwrap();
                    model.insert(tag, name);
                }
                Step::Remove { tag } => {
                    let tag = format!("r.example/known:{tag}");
                    prop_assert_eq!(store.remove_name(&tag).is_ok(), model.remove(&tag).is_some());
                }
                Step::Announce { image } => {
                    store.publish(&publication(data[image], &image.to_string())).unwrap();
                }
                Step::Reopen => {
                    drop(store);
                    store = setup.open();
                }
            }
            let published = store.published();
            let mut names = BTreeMap::new();
            for record in records(store.layout().images_json()) {
                prop_assert!(published.layers.contains_key(record["layer"].as_str().unwrap()));
                for name in record["names"].as_array().unwrap() {
                    let row = &published.images[record["id"].as_str().unwrap()];
                    names.insert(name.as_str().unwrap().to_owned(), row.registry_manifest.clone());
                }
            }
            prop_assert_eq!(&names, &model);
            let layers = records(store.layout().layers_json());
            prop_assert_eq!(layers.len(), published.layers.len());
            for record in layers {
                let parent = record["parent"].as_str();
                prop_assert!(parent.is_none_or(|parent| published.layers.contains_key(parent)));
            }
            let mut free = 0;
            for layer in store.layers() {
                prop_assert!(layer.first_node >= free);
                free = layer.first_node + layer.node_count();
            }
        }
    }
}

#[test]
fn unneeded_layers_are_withdrawn_after_their_pull() {
    let test = TestStore::new();
    let store = test.open();
    let pulled = store.publish(&publication(&["shared", "a"], "a")).unwrap();
    let used = store.publish(&publication(&["shared", "b"], "b")).unwrap();
    store
        .publish_image(&publication(&["c"], "c"), image("c", &["r.example/c:1"]))
        .unwrap();
    test.list("overlay-images/images.json", &json!([{"id": "i", "layer": used}]));
    let none = |_: &TreeRow| false;
    let withdraw = |min_age, is_spared: &dyn Fn(&TreeRow) -> bool, dry_run| {
        let done = store.withdraw_unneeded(min_age, is_spared, dry_run);
        done.map(|(count, published)| (count, published.layers.len())).unwrap()
    };
    // The pull may still be running.
    assert_eq!(withdraw(PULL_GRACE, &none, false), (0, 7));
    assert_eq!(withdraw(Duration::ZERO, &none, true), (2, 5));
    let spared = |tree: &TreeRow| tree.manifest == digest("a");
    assert_eq!(withdraw(Duration::ZERO, &spared, false), (0, 7));
    assert!(store.layer(&pulled).is_some());
    assert_eq!(withdraw(Duration::ZERO, &none, false), (2, 5));
    assert!(store.layer(&pulled).is_none() && store.layer(&used).is_some());
    assert_eq!(records(store.layout().layers_json()).len(), 5);
    assert_eq!(test_reopened_layers(store, &test), 5);
}

fn test_reopened_layers(store: ImageStore, test: &TestStore) -> usize {
    drop(store);
    test.open().published().layers.len()
}

#[test]
fn pin_is_set_and_cleared_by_name() {
    let test = TestStore::new();
    let store = test.open();
    let id = store
        .publish_image(&publication(&["a"], "a"), image("a", &["r.example/a:1"]))
        .unwrap();
    let is_pinned = |store: &ImageStore| store.published().images[&id].is_pinned;
    assert_eq!(store.set_pinned("r.example/a:1", true).unwrap(), id);
    drop(store);
    let store = test.open();
    assert!(is_pinned(&store));
    store.set_pinned("r.example/a:1", false).unwrap();
    assert!(!is_pinned(&store));
    assert!(matches!(
        store.set_pinned("r.example/b:1", true),
        Err(StoreError::UnknownName(_))
    ));
}
