//! What Podman's and CRI-O's own storage needs of the published layers.
//!
//! Their storage is a store of containers/storage too: its `layers.json`, `images.json` and `containers.json` tell which
//! layers images and containers are made of.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};

use super::{database::LayerRow, error::StoreError};

/// containers/storage's default for root.
const DEFAULT: &str = "/var/lib/containers/storage";
/// Where root's graph root is configured.
const STORAGE_CONF: [&str; 2] = ["/etc/containers/storage.conf", "/usr/share/containers/storage.conf"];

/// The graph roots of a host: that of storage.conf, which is read each time, and those that the configuration adds.
#[derive(Debug, Clone)]
pub struct GraphRoots {
    configured: Vec<PathBuf>,
}

/// What the graph roots need.
#[derive(Debug, Default)]
pub struct Needs {
    /// Published layers that an image or a container needs.
    pub layers: BTreeSet<String>,
    /// Layers of containers by the published layer they are made on, with their graph root.
    containers: HashMap<String, (String, PathBuf)>,
}

#[derive(Deserialize)]
struct Layer {
    id: String,
    #[serde(default)]
    parent: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Image {
    #[serde(default)]
    layer: String,
    #[serde(default)]
    mapped_layers: Vec<String>,
}

#[derive(Deserialize)]
struct Container {
    #[serde(default)]
    layer: String,
}

impl GraphRoots {
    /// With those that the configuration adds.
    pub fn new(configured: &[PathBuf]) -> Self {
        Self {
            configured: configured.to_vec(),
        }
    }

    /// Finds out what they need of the layers `published`. Blocks.
    pub fn needs(&self, published: &BTreeMap<String, LayerRow>) -> Result<Needs, StoreError> {
        let mut needs = Needs::default();
        needs.add(&usual()?, published)?;
        for root in &self.configured {
            // One that is not mounted tells nothing.
            root.metadata().map_err(unreadable(root))?;
            needs.add(root, published)?;
        }
        Ok(needs)
    }
}

/// `storage.graphroot` of storage.conf, or else containers/storage's default.
fn usual() -> Result<PathBuf, StoreError> {
    let Some(path) = STORAGE_CONF.iter().map(Path::new).find(|path| path.exists()) else {
        return Ok(DEFAULT.into());
    };
    let text = fs::read_to_string(path).map_err(unreadable(path))?;
    let parsed: Result<toml::Table, _> = text.parse();
    let table = parsed.map_err(|error| unreadable(path)(io::Error::other(error)))?;
    let root = table.get("storage").and_then(|storage| storage.get("graphroot"));
    Ok(root.and_then(|root| root.as_str()).unwrap_or(DEFAULT).into())
}

fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::GraphRoot {
        path: path.to_owned(),
        source,
    }
}

impl Needs {
    fn add(&mut self, root: &Path, published: &BTreeMap<String, LayerRow>) -> Result<(), StoreError> {
        // In this order: what is made meanwhile has its layers in what is read last.
        let mut containers: Vec<Container> = read(&root.join("overlay-containers/containers.json"))?;
        containers.extend(read::<Container>(
            &root.join("overlay-containers/volatile-containers.json"),
        )?);
        let images: Vec<Image> = read(&root.join("overlay-images/images.json"))?;
        let mut layers: Vec<Layer> = read(&root.join("overlay-layers/layers.json"))?;
        layers.extend(read::<Layer>(&root.join("overlay-layers/volatile-layers.json"))?);
        let parents: HashMap<_, _> = layers
            .iter()
            .map(|layer| (layer.id.as_str(), layer.parent.as_str()))
            .collect();
        // The lowest published layer that a layer of the graph root stands on.
        let stands_on = |layer: &str| {
            let mut at = layer.to_owned();
            // Bounded, should a damaged file make a circle.
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
        for needed in tops.chain(own).filter_map(|layer| stands_on(layer)) {
            self.need(&needed, published);
        }
        for container in containers {
            if let Some(needed) = stands_on(&container.layer) {
                self.need(&needed, published);
                self.containers.insert(needed, (container.layer, root.to_owned()));
            }
        }
        Ok(())
    }

    /// Adds a layer and those below it.
    fn need(&mut self, layer: &str, published: &BTreeMap<String, LayerRow>) {
        let mut next = Some(layer);
        while let Some(layer) = next
            && self.layers.insert(layer.to_owned())
        {
            next = published.get(layer).and_then(|row| row.parent.as_deref());
        }
    }

    /// The layer of a container whose file system is made on the published layer, and the graph root it is in.
    pub fn container_on(&self, layer: &str) -> Option<&(String, PathBuf)> {
        self.containers.get(layer)
    }
}

/// A list in a file; an empty one if there is no file.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, StoreError> {
    match fs::read(path) {
        Ok(bytes) if bytes.is_empty() => Ok(Vec::new()),
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| unreadable(path)(error.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(unreadable(path)(error)),
    }
}
