//! Adds TOC digests to the manifest of a Nydus image, and puts that into an index.

use bytes::Bytes;

use super::json::Json;
use crate::{
    digest::Digest,
    image::manifest::{Layer, Manifest},
};

/// By this annotation Podman 5.1 and later look a layer up.
const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Docker's media types and OCI's for the same things.
const TYPES: [(&str, &str); 5] = [
    (DOCKER_MANIFEST, OCI_MANIFEST),
    (
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.index.v1+json",
    ),
    (
        "application/vnd.docker.container.image.v1+json",
        "application/vnd.oci.image.config.v1+json",
    ),
    (
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.oci.image.layer.v1.tar+gzip",
    ),
    (
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.oci.image.layer.v1.tar",
    ),
];

/// A manifest that the mirror has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Annotated {
    /// Its bytes.
    pub bytes: Bytes,
    /// Their digest.
    pub digest: Digest,
    /// The media type.
    pub media_type: String,
}

/// The manifest with the annotation on every layer that the store gives. Ordinary layers, which somebody has put above
/// the bootstrap, are pulled the ordinary way, and a TOC digest would be a lie there.
///
/// Nothing else is changed, with one exception: layers of Docker's manifests have no annotations to Podman, so that such
/// a manifest is made one of OCI's.
pub fn annotate(bytes: &[u8], manifest: &Manifest, media_type: &str) -> Result<Annotated, serde_json::Error> {
    let mut document: Json = serde_json::from_slice(bytes)?;
    if let Some(layers) = document.get_mut("layers") {
        for (entry, layer) in layers.elements_mut().iter_mut().zip(manifest.nydus_layers()) {
            mark(entry, layer);
        }
    }
    let docker = media_type == DOCKER_MANIFEST;
    if docker {
        make_oci(&mut document);
    }
    let bytes = serde_json::to_vec(&document)?;
    Ok(Annotated {
        digest: Digest::of(&bytes),
        bytes: bytes.into(),
        media_type: if docker { OCI_MANIFEST } else { media_type }.to_owned(),
    })
}

/// The index with `made` in the place of the manifest `of`, and before all others: Podman takes the first that is for the
/// platform it wants. A list of Docker's becomes an index of OCI's, as what is in it. `None` if the manifest is not in it.
pub fn put_first(index: &[u8], of: &Digest, made: &Annotated) -> Result<Option<Annotated>, serde_json::Error> {
    let mut document: Json = serde_json::from_slice(index)?;
    let mut found = false;
    translate(&mut document);
    if let Some(entries) = document.get_mut("manifests") {
        let entries = entries.elements_mut();
        let of = Json::String(of.to_string());
        let place = entries
            .iter_mut()
            .position(|entry| entry.get_mut("digest") == Some(&mut of.clone()));
        if let Some(place) = place {
            let entry = &mut entries[place];
            entry.set("mediaType", Json::String(made.media_type.clone()));
            entry.set("digest", Json::String(made.digest.to_string()));
            entry.set("size", Json::Number(made.bytes.len().into()));
            // The manifest itself may be in there.
            entry.remove("data");
            found = true;
            entries[..=place].rotate_right(1);
        }
    }
    if !found {
        return Ok(None);
    }
    let bytes = serde_json::to_vec(&document)?;
    Ok(Some(Annotated {
        digest: Digest::of(&bytes),
        media_type: crate::image::manifest::media_type(&bytes),
        bytes: bytes.into(),
    }))
}

fn mark(entry: &mut Json, layer: &Layer) {
    let digest = Json::String(layer.toc_digest().to_string());
    match entry.get_mut("annotations") {
        Some(annotations @ Json::Object(_)) => annotations.set(TOC_DIGEST, digest),
        _ => entry.set("annotations", Json::Object(vec![(TOC_DIGEST.to_owned(), digest)])),
    }
}

fn make_oci(document: &mut Json) {
    translate(document);
    if let Some(config) = document.get_mut("config") {
        translate(config);
    }
    if let Some(layers) = document.get_mut("layers") {
        layers.elements_mut().iter_mut().for_each(translate);
    }
}

fn translate(described: &mut Json) {
    let Some(media_type) = described.get_mut("mediaType") else {
        return;
    };
    let known = TYPES.iter().find(|(docker, _)| media_type.as_text() == Some(*docker));
    if let Some((_, oci)) = known {
        *media_type = Json::String((*oci).to_owned());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::image::manifest::{Document, Selection};

    fn parse(bytes: &[u8]) -> Manifest {
        match Document::parse(bytes, Selection::PreferNydus).unwrap() {
            Document::Image(manifest) => manifest,
            Document::Index(_) => panic!("an index"),
        }
    }

    fn digest(name: &str) -> String {
        Digest::of(name.as_bytes()).to_string()
    }

    /// Without the annotations that were added.
    fn stripped(mut document: Value) -> Value {
        for layer in document["layers"].as_array_mut().unwrap() {
            let layer = layer.as_object_mut().unwrap();
            if let Some(annotations) = layer.get_mut("annotations") {
                annotations.as_object_mut().unwrap().remove(TOC_DIGEST);
                if annotations.as_object().unwrap().is_empty() {
                    layer.remove("annotations");
                }
            }
        }
        document
    }

    #[test]
    fn only_the_annotation_is_added() {
        let text = format!(
            r#"{{"zebra": {{"b": 1, "a": [2.5, null]}}, "schemaVersion": 2, "config": {{
                "mediaType": "application/vnd.oci.image.config.v1+json", "digest": "{config}", "size": 3}},
               "layers": [
                {{"size": 1, "digest": "{data}", "mediaType": "application/vnd.oci.image.layer.nydus.blob.v1"}},
                {{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": "{boot}", "size": 2,
                  "annotations": {{"x": "y", "containerd.io/snapshot/nydus-bootstrap": "true"}}, "unknown": true}},
                {{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": "{upper}", "size": 2}}],
               "annotations": {{"k": "v"}}, "mediaType": "{OCI_MANIFEST}"}}"#,
            config = digest("config"),
            data = digest("data"),
            boot = digest("boot"),
            upper = digest("upper"),
        );
        let manifest = parse(text.as_bytes());
        let made = annotate(text.as_bytes(), &manifest, OCI_MANIFEST).unwrap();
        assert_eq!(made.digest, Digest::of(&made.bytes));
        assert_eq!(made.media_type, OCI_MANIFEST);
        let (before, after): (Value, Value) = (
            serde_json::from_str(&text).unwrap(),
            serde_json::from_slice(&made.bytes).unwrap(),
        );
        for (position, layer) in manifest.nydus_layers().iter().enumerate() {
            let toc = layer.toc_digest().to_string();
            assert_eq!(after["layers"][position]["annotations"][TOC_DIGEST], toc);
        }
        assert_eq!(after["layers"][2], before["layers"][2]);
        assert_eq!(stripped(after), before);
        // The order of the keys too.
        let text = String::from_utf8(made.bytes.to_vec()).unwrap();
        let places: Vec<_> = ["zebra", "schemaVersion", "config", "layers", "\"k\""]
            .iter()
            .map(|key| text.find(key).unwrap())
            .collect();
        assert!(places.is_sorted(), "{text}");
    }

    #[test]
    fn an_index_begins_with_what_was_made() {
        let entry = |name: &str, architecture: &str| {
            json!({
                "mediaType": DOCKER_MANIFEST, "digest": digest(name), "size": 1, "more": name,
                "platform": {"architecture": architecture, "os": "linux"},
            })
        };
        let entries = [entry("other", "vax"), entry("plain", "amd64"), entry("nydus", "amd64")];
        let made = Annotated {
            bytes: "made".into(),
            digest: Digest::of(b"made"),
            media_type: OCI_MANIFEST.to_owned(),
        };
        let index = json!({"schemaVersion": 2, "mediaType": TYPES[1].0, "manifests": entries});
        let given = put_first(index.to_string().as_bytes(), &Digest::of(b"nydus"), &made)
            .unwrap()
            .unwrap();
        let mut first = entries[2].clone();
        first["mediaType"] = json!(OCI_MANIFEST);
        first["digest"] = json!(made.digest);
        first["size"] = json!(4);
        let expected =
            json!({"schemaVersion": 2, "mediaType": TYPES[1].1, "manifests": [first, entries[0], entries[1]]});
        assert_eq!(serde_json::from_slice::<Value>(&given.bytes).unwrap(), expected);
        assert_eq!(
            (given.digest, given.media_type.as_str()),
            (Digest::of(&given.bytes), TYPES[1].1)
        );
    }

    #[test]
    fn a_manifest_of_dockers_becomes_one_of_ocis() {
        let document = json!({
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": {"mediaType": TYPES[2].0, "digest": digest("config"), "size": 3},
            "layers": [{
                "mediaType": TYPES[3].0, "digest": digest("boot"), "size": 2,
                "annotations": {"containerd.io/snapshot/nydus-bootstrap": "true"},
            }],
        });
        let bytes = serde_json::to_vec(&document).unwrap();
        let made = annotate(&bytes, &parse(&bytes), DOCKER_MANIFEST).unwrap();
        let after: Value = serde_json::from_slice(&made.bytes).unwrap();
        assert_eq!(made.media_type, OCI_MANIFEST);
        assert_eq!(after["mediaType"], OCI_MANIFEST);
        assert_eq!(after["config"]["mediaType"], TYPES[2].1);
        assert_eq!(after["layers"][0]["mediaType"], TYPES[3].1);
        assert_eq!(after["layers"][0]["digest"], digest("boot"));
    }
}
