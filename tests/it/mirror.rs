//! The mirror as Podman sees it, and as others do.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::process::CommandExt as _,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use nydus_store::{
    digest::Digest,
    fixtures::{
        self, BuildOptions, Conversion, Fault, ImageIndex, ImageOptions, LayerSource, NydusMark,
        image::MEDIA_TYPE_INDEX,
    },
};
use serde_json::{Value, json};

use crate::common::{Lab, Sample, Serve};

mod fuzz;
mod handed_over;

const CONFIG: &str = "[mirror]\nlisten = \"127.0.0.1:0\"\n";
const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";

/// An answer of the mirror.
pub struct Reply {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
        let head = std::str::from_utf8(&bytes[..end]).unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let header = |line: &str| {
            let (name, value) = line.split_once(": ").unwrap();
            (name.to_ascii_lowercase(), value.to_owned())
        };
        Self {
            status,
            headers: lines.map(header).collect(),
            body: bytes[end + 4..].to_vec(),
        }
    }

    fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(header, _)| header == name);
        found.map(|(_, value)| value.as_str()).unwrap_or_default()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// Status and code of an error.
    fn error(&self) -> (u16, String) {
        assert_eq!(self.header("content-type"), "application/json");
        let code = self.json()["errors"][0]["code"].as_str().unwrap().to_owned();
        (self.status, code)
    }

    /// Panics unless the headers are those of the body.
    fn is_consistent(&self) {
        assert_eq!(self.status, 200);
        assert_eq!(self.header("docker-content-digest"), Digest::of(&self.body).to_string());
        assert_eq!(self.header("content-length"), self.body.len().to_string());
    }
}

/// Sends bytes and reads until the other side closes.
fn exchange(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(40))).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    // A refusal may close the connection before everything was read.
    stream.read_to_end(&mut answer).ok();
    answer
}

/// Asks the mirror.
pub fn ask(address: SocketAddr, method: &str, path: &str, more: &str) -> Reply {
    let request = format!("{method} {path} HTTP/1.1\r\nHost: mirror\r\nConnection: close\r\n{more}\r\n");
    Reply::parse(&exchange(address, request.as_bytes()))
}

/// A lab whose daemon has a mirror.
struct Site(Lab);

impl Site {
    fn new() -> Self {
        Self(Lab::new(CONFIG))
    }

    fn path(&self, repository: &str, rest: &str) -> String {
        format!("/v2/{}/{repository}/{rest}", self.0.registry.addr())
    }

    fn get(&self, repository: &str, rest: &str) -> Reply {
        self.request("GET", repository, rest, "")
    }

    /// The manifest that the index gives first.
    fn first_of(&self, repository: &str) -> Reply {
        let index = self.get(repository, "manifests/1").json();
        let digest = index["manifests"][0]["digest"].as_str().unwrap();
        let reply = self.get(repository, &format!("manifests/{digest}"));
        reply.is_consistent();
        reply
    }

    fn request(&self, method: &str, repository: &str, rest: &str, more: &str) -> Reply {
        ask(self.0.serve.mirror(), method, &self.path(repository, rest), more)
    }
}

/// What the mirror calls each layer.
fn toc_digests(manifest: &Value) -> Vec<Option<String>> {
    let layers = manifest["layers"].as_array().unwrap();
    let toc = |layer: &Value| layer["annotations"][TOC_DIGEST].as_str().map(str::to_owned);
    layers.iter().map(toc).collect()
}

/// The manifest without what the mirror has added.
fn without_toc_digests(mut manifest: Value) -> Value {
    for layer in manifest["layers"].as_array_mut().unwrap() {
        layer["annotations"].as_object_mut().unwrap().remove(TOC_DIGEST);
    }
    manifest
}

#[test]
fn a_nydus_manifest_gets_a_toc_digest_on_every_layer() {
    let (site, sample) = (Site::new(), Sample::new(1));
    site.0.add(&sample, "app");
    assert_eq!(ask(site.0.serve.mirror(), "GET", "/v2/", "").status, 200);
    let reply = site.get("app", "manifests/1");
    reply.is_consistent();
    assert_eq!(reply.header("content-type"), sample.image.manifest_media_type);
    let (given, original): (Value, Value) = (reply.json(), serde_json::from_slice(&sample.image.manifest).unwrap());
    assert!(toc_digests(&given).iter().all(Option::is_some), "{given}");
    assert_eq!(without_toc_digests(given), original);
    // Once more by the digest that was given.
    let again = site.get("app", &format!("manifests/{}", Digest::of(&reply.body)));
    again.is_consistent();
    assert_eq!(again.body, reply.body);
    // And by its own, unchanged.
    let own = site.get("app", &format!("manifests/{}", sample.image.manifest_digest()));
    own.is_consistent();
    assert_eq!(own.body, sample.image.manifest);
    // HEAD says the same without a body.
    let head = site.request("HEAD", "app", "manifests/1", "");
    assert!(head.body.is_empty());
    for name in ["docker-content-digest", "content-length", "content-type"] {
        assert_eq!(head.header(name), reply.header(name), "{name}");
    }
}

#[test]
fn the_store_has_layers_under_both_names() {
    let (site, sample) = (Site::new(), Sample::new(2));
    let by_digest = site.0.add(&sample, "app");
    let manifest = site.get("app", "manifests/1").json();
    let diff_ids: Vec<_> = sample.image.blobs.iter().map(|blob| blob.diff_id).collect();
    for (position, toc) in toc_digests(&manifest).into_iter().enumerate() {
        let toc: Digest = toc.unwrap().parse().unwrap();
        let layer = site.0.layer("app", toc);
        assert!(layer.is_there());
        let other = site.0.layer("app", sample.image.blobs[position].digest).info().unwrap();
        let expected = json!({
            "diff-size": other["diff-size"], "compression": other["compression"], "toc-digest": toc,
            "flags": {"expected-layer-diffid": diff_ids[position]},
        });
        assert_eq!(layer.info().unwrap(), expected);
        let blob = std::fs::read(layer.blob()).unwrap();
        assert_eq!(Digest::of(&blob), sample.image.blobs[position].digest);
        if sample.image.blobs[position].digest == sample.key() {
            layer.add_use();
            sample.check(&layer);
            // The other name shows the same, and lives a life of its own.
            sample.check(&by_digest);
            assert_eq!(
                by_digest.info().unwrap()["compressed-diff-digest"],
                sample.key().to_string()
            );
            layer.release();
            sample.check(&by_digest);
        }
    }
}

#[test]
fn an_index_gets_its_nydus_manifest_first() {
    let (site, sample) = (Site::new(), Sample::new(3));
    let options = ImageOptions::default();
    let plain = fixtures::plain_image(
        &[LayerSource::Dir(sample.tree.clone())],
        &options,
        &sample.dir().join("plain"),
    )
    .unwrap();
    for (name, mark) in [
        ("features", NydusMark::OsFeatures),
        ("artifact", NydusMark::ArtifactType),
    ] {
        let index = ImageIndex::new(&[(&plain, NydusMark::None), (&sample.image, mark)]).unwrap();
        site.0.registry.add_index(&index, name, "1").unwrap();
        let reply = site.get(name, "manifests/1");
        reply.is_consistent();
        assert_eq!(reply.header("content-type"), MEDIA_TYPE_INDEX);
        let entries = reply.json()["manifests"].as_array().unwrap().clone();
        assert_eq!(entries[1]["digest"], plain.manifest_digest().to_string());
        let given = site.first_of(name);
        assert_eq!(entries[0]["size"], given.body.len());
        let original: Value = serde_json::from_slice(&sample.image.manifest).unwrap();
        assert_eq!(without_toc_digests(given.json()), original);
        let by_digest = site.get(name, &format!("manifests/{}", index.digest()));
        assert_eq!(by_digest.body, index.index);
    }
    // Without a Nydus image there is nothing to add.
    let index = ImageIndex::new(&[(&plain, NydusMark::None)]).unwrap();
    site.0.registry.add_index(&index, "plain-index", "1").unwrap();
    let reply = site.get("plain-index", "manifests/1");
    reply.is_consistent();
    assert_eq!(
        (reply.header("content-type"), &reply.body),
        (MEDIA_TYPE_INDEX, &index.index)
    );
    site.0.registry.add_image(&plain, "plain", "1").unwrap();
    let reply = site.get("plain", "manifests/1");
    reply.is_consistent();
    assert_eq!(reply.body, plain.manifest);
}

/// Beside an ordinary image of the same layers, only a TOC digest says which image is meant.
#[test]
fn original_layers_in_an_index_are_served_by_toc_digest() {
    let (site, dir) = (Site::new(), tempfile::tempdir().unwrap());
    let tree = dir.path().join("tree");
    fixtures::demo_tree(&tree, 10, 4).unwrap();
    let tar = dir.path().join("layer.tar.gz");
    fixtures::tar_of(&tree, &tar, true).unwrap();
    let options = BuildOptions {
        conversion: Conversion::Zran,
        ..BuildOptions::default()
    };
    let layers = [LayerSource::Tar(tar)];
    let image = fixtures::build(&layers, &options, &dir.path().join("nydus")).unwrap();
    let plain = fixtures::plain_image(&layers, &ImageOptions::default(), &dir.path().join("plain")).unwrap();
    let index = ImageIndex::new(&[(&plain, NydusMark::None), (&image, NydusMark::OsFeatures)]).unwrap();
    site.0.registry.add_index(&index, "both", "1").unwrap();
    let bootstrap = image.bootstrap_blob().unwrap().digest;
    assert!(!site.0.layer("both", bootstrap).is_there());
    let toc = toc_digests(&site.first_of("both").json()).pop().unwrap();
    let layer = site.0.layer("both", toc.unwrap().parse().unwrap());
    assert!(layer.is_there(), "{}", site.0.serve.log());
    assert!(layer.diff().read_dir().unwrap().next().is_some());
}

#[test]
fn blobs_are_passed_on() {
    let (site, sample) = (Site::new(), Sample::new(5));
    site.0.add(&sample, "app");
    let (data, digest) = (sample.data_bytes(), sample.data());
    let rest = format!("blobs/{digest}");
    let whole = site.get("app", &rest);
    whole.is_consistent();
    assert_eq!(whole.body, data);
    assert_eq!(
        site.get("app", &format!("blobs/{}", sample.image.config_digest())).body,
        sample.image.config
    );
    let head = site.request("HEAD", "app", &rest, "");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(head.header("content-length"), data.len().to_string());
    parts(&site, &rest, &data);
    // What the store has on disk is not asked for again.
    assert!(site.0.layer("app", sample.key()).is_there());
    let bootstrap = std::fs::read(&sample.image.bootstrap_blob().unwrap().path).unwrap();
    let before = site.0.registry.request_count();
    let rest = format!("blobs/{}", sample.key());
    assert_eq!(site.get("app", &rest).body, bootstrap);
    parts(&site, &rest, &bootstrap);
    assert_eq!(site.0.registry.request_count(), before);
}

fn parts(site: &Site, rest: &str, whole: &[u8]) {
    let len = whole.len();
    for (range, from, to) in [
        ("0-0".to_owned(), 0, 1),
        ("10-99".to_owned(), 10, 100),
        (format!("{}-", len - 7), len - 7, len),
        ("-5".to_owned(), len - 5, len),
        (format!("5-{}", len * 2), 5, len),
    ] {
        let reply = site.request("GET", "app", rest, &format!("Range: bytes={range}\r\n"));
        assert_eq!(reply.status, 206, "{range}");
        let expected = format!("bytes {from}-{}/{len}", to - 1);
        assert_eq!(reply.header("content-range"), expected);
        assert_eq!(reply.header("content-length"), (to - from).to_string());
        assert!(reply.body == whole[from..to], "{range}");
    }
    let reply = site.request("GET", "app", rest, &format!("Range: bytes={len}-\r\n"));
    assert_eq!(
        (reply.status, reply.header("content-range")),
        (416, &*format!("bytes */{len}"))
    );
}

#[test]
fn a_blob_that_breaks_off_is_not_given_for_whole() {
    let (site, sample) = (Site::new(), Sample::new(6));
    site.0.add(&sample, "app");
    site.0.fault("app", |_| Fault::Truncate(500_000));
    let path = site.path("app", &format!("blobs/{}", sample.data()));
    let request = format!("GET {path} HTTP/1.1\r\nHost: mirror\r\nConnection: close\r\n\r\n");
    let answer = exchange(site.0.serve.mirror(), request.as_bytes());
    assert!(answer.len() < sample.data_bytes().len());
    assert!(site.0.serve.is_running());
}

#[test]
fn what_registries_refuse_is_refused() {
    let (site, sample) = (Site::new(), Sample::new(7));
    site.0.add(&sample, "app");
    let unknown = Digest::of(b"unknown");
    for (rest, code) in [
        ("manifests/2".to_owned(), "MANIFEST_UNKNOWN"),
        (format!("manifests/{unknown}"), "MANIFEST_UNKNOWN"),
        (format!("blobs/{unknown}"), "BLOB_UNKNOWN"),
    ] {
        assert_eq!(site.get("app", &rest).error(), (404, code.to_owned()), "{rest}");
    }
    for (status, expected) in [(401, 401), (403, 403), (429, 429), (500, 502), (418, 502)] {
        let repository = format!("status-{status}");
        site.0.fault(&repository, move |_| Fault::Status(status));
        let reply = site.get(&repository, "manifests/1");
        assert_eq!(reply.error().0, expected, "{status}");
    }
    let closed = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .unwrap()
        .local_addr()
        .unwrap();
    let reply = ask(
        site.0.serve.mirror(),
        "GET",
        &format!("/v2/{closed}/app/manifests/1"),
        "",
    );
    assert_eq!(reply.error().0, 502);
}

/// Podman asks for a RAFS blob only if it has not found the image in the store.
#[test]
fn who_wants_rafs_blobs_as_layers_is_told_what_to_do() {
    let (site, sample) = (Site::new(), Sample::new(10));
    site.0.add(&sample, "app");
    let rest = format!("blobs/{}", sample.data());
    for selector in ["1".to_owned(), sample.image.manifest_digest().to_string()] {
        assert_eq!(site.get("app", &format!("manifests/{selector}")).status, 200);
        let ask = |agent| site.request("GET", "app", &rest, &format!("User-Agent: {agent}\r\n"));
        let refused = ask("containers/5.34.2 (github.com/containers/image)");
        assert_eq!(refused.error(), (403, "DENIED".to_owned()));
        assert!(
            refused.json()["errors"][0]["message"]
                .as_str()
                .unwrap()
                .contains("by tag")
        );
        // It copies images.
        assert_eq!(ask("skopeo/1.18.0").body, sample.data_bytes());
    }
    // A tar is a layer to anybody.
    let bootstrap = site.get("app", &format!("blobs/{}", sample.key()));
    assert_eq!(bootstrap.status, 200);
}

#[test]
fn without_its_registry_a_known_tag_is_answered() {
    let (site, sample) = (Site::new(), Sample::new(8));
    let layer = site.0.add(&sample, "app");
    let before = site.get("app", "manifests/1");
    sample.check(&layer);
    site.0.registry.set_fault(Some(Arc::new(|_| Fault::Status(503))));
    let from = site.0.serve.log().len();
    let after = site.get("app", "manifests/1");
    after.is_consistent();
    assert_eq!(after.body, before.body);
    site.0
        .assert_logged(from, &["last known manifest", &site.0.reference("app")]);
    let config = site.get("app", &format!("blobs/{}", sample.image.config_digest()));
    assert_eq!(config.body, sample.image.config);
    for toc in toc_digests(&after.json()) {
        assert!(site.0.layer("app", toc.unwrap().parse().unwrap()).is_there());
    }
    assert_eq!(site.get("other", "manifests/1").error().0, 502);
}

#[test]
fn others_are_refused() {
    let (site, sample) = (Site::new(), Sample::new(9));
    site.0.add(&sample, "app");
    let from = site.0.serve.log().len();
    let reply = as_nobody(site.0.serve.mirror(), &site.path("app", "manifests/1"));
    assert_eq!(reply.error(), (403, "DENIED".to_owned()));
    assert!(reply.json()["errors"][0]["message"].as_str().unwrap().contains("65534"));
    site.0.assert_logged(from, &["refuses", "uid=65534"]);
    let requests = site.0.registry.request_count();
    assert_eq!(requests, 0, "nothing was asked on behalf of somebody else");
    let serve = Serve::with_config(&format!("{CONFIG}allow_uids = [65534]\n"));
    assert_eq!(as_nobody(serve.mirror(), &site.path("app", "manifests/1")).status, 200);
}

/// Asks as another user, with bash's own means.
fn as_nobody(mirror: SocketAddr, path: &str) -> Reply {
    let script = format!(
        "exec 3<>/dev/tcp/{}/{}; printf 'GET {path} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n' >&3; cat <&3",
        mirror.ip(),
        mirror.port()
    );
    let mut command = Command::new("bash");
    command.args(["-c", &script]).current_dir("/").uid(65534).gid(65534);
    Reply::parse(&command.output().unwrap().stdout)
}

#[test]
fn it_speaks_for_no_other_registries_than_it_should() {
    let (lab, sample) = (
        Lab::new(&format!("{CONFIG}registries = [\"registry.example\"]\n")),
        Sample::new(10),
    );
    lab.add(&sample, "app");
    let path = format!("/v2/{}/app/manifests/1", lab.registry.addr());
    assert_eq!(
        ask(lab.serve.mirror(), "GET", &path, "").error(),
        (403, "DENIED".to_owned())
    );
    assert_eq!(lab.registry.request_count(), 0);
    let site = Site::new();
    let port = site.0.serve.mirror().port();
    for host in ["127.0.0.1", "localhost", "127.1", "127.0.0.2", "a.localhost"] {
        let path = format!("/v2/{host}:{port}/app/manifests/1");
        assert_eq!(ask(site.0.serve.mirror(), "GET", &path, "").error().0, 403, "{host}");
    }
}

#[test]
fn hostile_requests_do_no_harm() {
    let site = Site::new();
    let mirror = site.0.serve.mirror();
    let host = site.0.registry.addr();
    for path in [
        "/".to_owned(),
        "//".to_owned(),
        "/v2/../../../../etc/passwd".to_owned(),
        format!("/v2/{host}/../app/manifests/1"),
        format!("/v2/{host}/%2e%2e/manifests/1"),
        format!("/v2/{host}/a%2fb/manifests/1"),
        format!("/v2/{host}/a%00b/manifests/1"),
        format!("/v2/{host}/app/manifests/sha256:zz"),
        format!("/v2/{host}/app/manifests/{}", "x".repeat(5000)),
        format!("/v2/{host}/app/blobs/sha256:{}", "A".repeat(64)),
        format!("/v2/{host}/{}/manifests/1", "a/".repeat(10_000)),
        format!("/v2/{host}/app/tags/list"),
        "/v2/team/app/manifests/1".to_owned(),
    ] {
        let reply = ask(mirror, "GET", &path, "");
        assert!((400..500).contains(&reply.status), "{path}: {}", reply.status);
    }
    let path = site.path("app", "manifests/1");
    for method in ["PUT", "POST", "DELETE", "PATCH", "OPTIONS"] {
        let reply = ask(mirror, method, &path, "Content-Length: 3\r\n\r\nabc");
        assert_eq!(reply.status, 405, "{method}");
    }
    assert_eq!(site.0.registry.request_count(), 0);
    // A greeting over TLS, as Podman tries it first, and rubbish: over at once.
    let start = Instant::now();
    exchange(
        mirror,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 and 500 bytes more\r\n\r\n",
    );
    exchange(mirror, &[0xff; 100_000]);
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(ask(mirror, "GET", "/v2/", "").status, 200);
    assert!(!site.0.serve.log().contains("panicked"));
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = taken.local_addr().unwrap();
    let serve = Serve::prepare(&format!("[mirror]\nlisten = \"{address}\"\n"));
    let output = serve.command().output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    for words in [&address.to_string(), "`listen`", "[mirror]", "enabled = false"] {
        assert!(error.contains(words), "{error}");
    }
}
