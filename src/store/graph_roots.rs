//! Which published layers Podman's and CRI-O's own storage requires.
//!
//! Their storage (the graph root) is a store of containers/storage too. Its `layers.json`, `images.json` and
//! `containers.json` tell which layers its images and containers consist of.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};

use super::{database::LayerRow, error::StoreError};

/// Default of containers/storage for root.
const DEFAULT_GRAPH_ROOT: &str = "/var/lib/containers/storage";
/// Configuration files that name root's graph root, in order of precedence.
const STORAGE_CONF: [&str; 2] = ["/etc/containers/storage.conf", "/usr/share/containers/storage.conf"];

/// The graph roots of a host: that of storage.conf, which is read each time, and those of the configuration.
#[derive(Debug, Clone)]
pub struct GraphRoots {
    configured: Vec<PathBuf>,
}

/// Published layers that the graph roots require.
#[derive(Debug, Default)]
pub struct RequiredLayers {
    /// Layers that an image or a container requires, with all layers below.
    pub layers: BTreeSet<String>,
    /// Layer of a container and its graph root, by the published layer below it.
    containers: HashMap<String, (String, PathBuf)>,
}

#[derive(Deserialize)]
struct GraphLayer {
    id: String,
    #[serde(default)]
    parent: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct GraphImage {
    #[serde(default)]
    layer: String,
    #[serde(default)]
    mapped_layers: Vec<String>,
}

#[derive(Deserialize)]
struct GraphContainer {
    #[serde(default)]
    layer: String,
}

impl GraphRoots {
    /// Adds the graph roots of the configuration to that of storage.conf.
    pub fn new(configured: &[PathBuf]) -> Self {
        Self {
            configured: configured.to_vec(),
        }
    }

    /// Determines which layers of `published` are required. Blocks.
    pub fn required_layers(&self, published: &BTreeMap<String, LayerRow>) -> Result<RequiredLayers, StoreError> {
        let mut required = RequiredLayers::default();
        required.add(&storage_conf_graph_root()?, published)?;
        for root in &self.configured {
            // Fails for a graph root that is not mounted: its records cannot be seen.
            root.metadata().map_err(read_error(root))?;
            required.add(root, published)?;
        }
        Ok(required)
    }
}

/// `storage.graphroot` of storage.conf, or containers/storage's default.
fn storage_conf_graph_root() -> Result<PathBuf, StoreError> {
    let Some(path) = STORAGE_CONF.iter().map(Path::new).find(|path| path.exists()) else {
        return Ok(DEFAULT_GRAPH_ROOT.into());
    };
    let text = fs::read_to_string(path).map_err(read_error(path))?;
    let parsed: Result<toml::Table, _> = text.parse();
    let table = parsed.map_err(|error| read_error(path)(io::Error::other(error)))?;
    let root = table.get("storage").and_then(|storage| storage.get("graphroot"));
    Ok(root.and_then(|root| root.as_str()).unwrap_or(DEFAULT_GRAPH_ROOT).into())
}

fn read_error(path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::GraphRoot {
        path: path.to_owned(),
        source,
    }
}

impl RequiredLayers {
    fn add(&mut self, root: &Path, published: &BTreeMap<String, LayerRow>) -> Result<(), StoreError> {
        // This order is safe: the layers of a container or image that is created meanwhile are in the file read last.
        let mut containers: Vec<GraphContainer> = read_list(&root.join("overlay-containers/containers.json"))?;
        containers.extend(read_list::<GraphContainer>(
            &root.join("overlay-containers/volatile-containers.json"),
        )?);
        let images: Vec<GraphImage> = read_list(&root.join("overlay-images/images.json"))?;
        let mut layers: Vec<GraphLayer> = read_list(&root.join("overlay-layers/layers.json"))?;
        layers.extend(read_list::<GraphLayer>(
            &root.join("overlay-layers/volatile-layers.json"),
        )?);
        let parents: HashMap<_, _> = layers
            .iter()
            .map(|layer| (layer.id.as_str(), layer.parent.as_str()))
            .collect();
        // The nearest published layer at or below a layer of the graph root.
        let nearest_published = |layer: &str| {
            let mut at = layer.to_owned();
            // Bounded, because a damaged file may contain a cycle.
            for _ in 0..=parents.len() {
                if published.contains_key(&at) {
                    return Some(at);
                }
                at = (*parents.get(at.as_str())?).to_owned();
            }
            None
        };
        let tops = images
            .iter()
            .flat_map(|image| image.mapped_layers.iter().chain([&image.layer]));
        let own = layers.iter().map(|layer| &layer.id);
        for needed in tops.chain(own).filter_map(|layer| nearest_published(layer)) {
            self.require(&needed, published);
        }
        for container in containers {
            if let Some(needed) = nearest_published(&container.layer) {
                self.require(&needed, published);
                self.containers.insert(needed, (container.layer, root.to_owned()));
            }
        }
        Ok(())
    }

    /// Adds a layer and all layers below it.
    fn require(&mut self, layer: &str, published: &BTreeMap<String, LayerRow>) {
        let mut next = Some(layer);
        while let Some(layer) = next
            && self.layers.insert(layer.to_owned())
        {
            next = published.get(layer).and_then(|row| row.parent.as_deref());
        }
    }

    /// The container layer that stands on the published layer, and its graph root.
    pub fn container_on(&self, layer: &str) -> Option<&(String, PathBuf)> {
        self.containers.get(layer)
    }
}

/// Reads a JSON list; a missing or empty file is an empty list.
fn read_list<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, StoreError> {
    match fs::read(path) {
        Ok(bytes) if bytes.is_empty() => Ok(Vec::new()),
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| read_error(path)(error.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(read_error(path)(error)),
    }
}
