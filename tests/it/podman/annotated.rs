//! Images whose TOC digests are in the registry itself: skopeo has copied there what the mirror gives.

use nydus_store::fixtures::{Conversion, ImageIndex, NydusMark};

use super::*;

on_both!(
    without_the_mirror_by_tag_and_by_digest,
    an_index_without_the_mirror,
    the_mirror_changes_nothing_more,
    original_layers_are_still_pulled_where_there_is_no_store,
);

/// Copies an image of the lab's registry, as its mirror gives it, to another tag of its repository; the new name.
fn publish(lab: &Lab, repository: &str) -> String {
    let registry = lab.registry.host().replace(':', "_");
    let mut skopeo = Command::new("skopeo");
    skopeo.args(["copy", "--all", "--src-tls-verify=false", "--dest-tls-verify=false"]);
    skopeo.arg(format!("docker://{}/{registry}/{repository}:1", lab.serve.mirror()));
    let ready = lab.registry.reference(repository, "ready");
    output(skopeo.arg(format!("docker://{ready}")));
    ready
}

/// The digest of what is ready: in the registry, and as the mirror gives it.
async fn digests(lab: &Lab, repository: &str) -> [String; 2] {
    let mirror = format!("http://{}/v2/{}/{repository}", lab.serve.mirror(), lab.registry.host());
    let registry = format!("{}/v2/{repository}", lab.registry.url());
    [digest(&registry).await, digest(&mirror).await]
}

async fn digest(repository: &str) -> String {
    let url = format!("{repository}/manifests/ready");
    let accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json";
    let request = reqwest::Client::new().get(url).header("Accept", accept).send();
    let answer = request.await.unwrap().error_for_status().unwrap();
    answer.headers()["docker-content-digest"].to_str().unwrap().to_owned()
}

/// A Podman that uses the lab's store, but not its mirror.
fn without_mirror(lab: &Lab) -> Podman {
    Podman::with_layer_store(lab.release, Some(&lab.serve.store()), lab.registry.host(), None)
}

async fn without_the_mirror_by_tag_and_by_digest(release: Release) {
    let (lab, _, built) = Lab::with_image(release).await;
    // Nothing but manifests is sent: the blobs are there.
    let before = lab.accesses().len();
    let ready = publish(&lab, "base");
    let sent = lab.accesses().split_off(before);
    assert!(!sent.iter().any(|access| access.method == "PATCH"), "{sent:#?}");
    let [digest, _] = digests(&lab, "base").await;
    assert_ne!(digest, built.manifest_digest().to_string());
    let podman = without_mirror(&lab);
    for image in [ready, format!("{}/base@{digest}", lab.registry.host())] {
        let used = lab.logged(USED);
        assert_eq!(sh(&podman, &[], &image, "cat /data/hello"), "hello", "{image}");
        assert!(lab.logged(USED) > used, "{image}");
        podman.run(&["rmi", &image]);
    }
}

async fn an_index_without_the_mirror(release: Release) {
    let lab = Lab::start(release);
    let layers = [lab.layer(runnable_tree)];
    let (plain, lazy) = (lab.build_plain(&layers), lab.build(&layers, &BuildOptions::default()));
    let index = ImageIndex::new(&[(&plain, NydusMark::None), (&lazy, NydusMark::OsFeatures)]).unwrap();
    index.push(&lab.registry.url(), "index", "1").await.unwrap();
    let ready = publish(&lab, "index");
    let podman = without_mirror(&lab);
    assert_eq!(sh(&podman, &[], &ready, "cat /data/hello"), "hello");
    assert!(lab.logged(USED) > 0);
    let [in_registry, in_mirror] = digests(&lab, "index").await;
    assert_eq!(in_registry, in_mirror);
}

/// So an image has one digest, wherever Podman gets it from.
async fn the_mirror_changes_nothing_more(release: Release) {
    let (lab, ..) = Lab::with_image(release).await;
    let ready = publish(&lab, "base");
    assert_eq!(lab.sh(&ready, "cat /data/hello"), "hello");
    let shown = lab.podman.run(&["image", "inspect", "--format", "{{.Digest}}", &ready]);
    assert_eq!(digests(&lab, "base").await, [&*shown, &*shown]);
    lab.podman.run(&["rmi", &ready]);
    let used = lab.logged(USED);
    let by_digest = format!("{}/base@{shown}", lab.registry.host());
    assert_eq!(lab.sh(&by_digest, "cat /data/hello"), "hello");
    assert!(lab.logged(USED) > used);
}

/// Podman takes the TOC digest for one of eStargz, which it does not use unless it is told to.
async fn original_layers_are_still_pulled_where_there_is_no_store(release: Release) {
    let lab = Lab::start(release);
    let options = BuildOptions {
        conversion: Conversion::Zran,
        ..BuildOptions::default()
    };
    let built = lab.build(&[lab.layer(runnable_tree)], &options);
    lab.push(&built, "zran", "1").await;
    let ready = publish(&lab, "zran");
    let podman = Podman::with_layer_store(release, None, lab.registry.host(), None);
    assert_eq!(sh(&podman, &[], &ready, "cat /data/hello"), "hello");
    assert_eq!(lab.logged(USED), 0);
    let podman = without_mirror(&lab);
    assert_eq!(sh(&podman, &[], &ready, "cat /data/hello"), "hello");
    assert!(lab.logged(USED) > 0);
}
