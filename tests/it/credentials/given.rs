//! Credentials that only one pull is given (`--creds`, as CRI-O does for a pod): which places Podman and its family send
//! them to, and what comes of a pull with them.

use nydus_store::fixtures::{self, LayerSource};

use super::{
    podman::{Host, hello},
    *,
};
use crate::common::{Podman, Release};

/// A registry's mirror that wants a password for all, and gives nothing.
struct Demanding {
    address: String,
    /// What each request for a manifest proved itself with.
    seen: Arc<Mutex<Vec<Option<String>>>>,
}

impl Demanding {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen: Arc<Mutex<Vec<Option<String>>>> = Arc::default();
        let log = Arc::clone(&seen);
        let app = axum::Router::new().fallback(move |request: Request| {
            if request.uri().path().contains("/manifests/") {
                let proof = request.headers().get(header::AUTHORIZATION);
                let proof = proof.map(|value| value.to_str().unwrap().trim_start_matches("Basic "));
                let plain = |proof| String::from_utf8(BASE64.decode(proof).unwrap()).unwrap();
                log.lock().push(proof.map(plain));
            }
            let challenge = [(header::WWW_AUTHENTICATE, "Basic realm=\"mirror\"")];
            async move { (StatusCode::UNAUTHORIZED, challenge) }
        });
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, seen }
    }

    /// What requests since the last call have proved themselves with.
    fn seen(&self) -> Vec<Option<String>> {
        std::mem::take(&mut *self.seen.lock())
    }
}

/// Why the mirror does not ask for a password. What a pull is given is for the registry's own host, and no mirror gets it;
/// what a file has for the mirror's host it gets for whatever registry, and cannot tell for which it was meant.
#[tokio::test(flavor = "multi_thread")]
async fn no_mirror_is_sent_what_a_pull_is_given() {
    let site = Site::new("other").await;
    let layers = [LayerSource::Dir(site.sample.tree.clone())];
    let plain = fixtures::plain_image(&layers, &Default::default(), &site.path("plain")).unwrap();
    plain.push(&site.open.url(), "plain", "1").await.unwrap();
    let (registry, mirror) = (site.private(), Demanding::start().await);
    let image = registry.reference("plain", "1");
    let creds = format!("{USER}:{PASSWORD}");
    let (nothing, known) = ([Some(":".to_owned())], [Some(creds.clone())]);
    for release in [Release::Four, Release::Five] {
        let podman = Podman::with_layer_store(release, None, registry.host(), Some(&mirror.address));
        podman.run(&["pull", "--creds", &creds, &image]);
        assert_eq!(mirror.seen(), nothing, "{release:?}");
        podman.run(&["rmi", &image]);

        let file = podman.dir().join("auth.json");
        for (key, expected) in [
            (registry.host().to_owned(), &nothing),
            (mirror.address.clone(), &known),
            (
                format!("{}/{}", mirror.address, registry.host().replace(':', "_")),
                &known,
            ),
        ] {
            fs::write(&file, json!({"auths": {key.clone(): password()}}).to_string()).unwrap();
            let pull = ["pull", "--authfile", file.to_str().unwrap(), &image];
            podman.command(&pull).output().unwrap();
            assert_eq!(mirror.seen(), *expected, "{release:?} {key}");
            podman.command(&["rmi", &image]).output().unwrap();
        }
    }

    let podman = Podman::with_layer_store(Release::Four, None, registry.host(), Some(&mirror.address));
    let mut skopeo = podman.program("skopeo");
    let registries = podman.dir().join("registries.conf");
    skopeo
        .arg("--registries-conf")
        .arg(registries)
        .args(["inspect", "--creds"]);
    output(skopeo.args([&creds, &format!("docker://{image}")]));
    assert_eq!(mirror.seen(), nothing);
    let mut buildah = podman.program("buildah");
    output(buildah.args(["pull", "--creds", &creds, &image]));
    assert_eq!(mirror.seen(), nothing);
    output(podman.program("buildah").args(["rmi", &image]));
}

/// Copies the lazy image, as the mirror gives it, to another tag, in the name of who may write to the registry.
fn publish(host: &Host) {
    let (open, mirror) = (host.open.host().replace(':', "_"), host.serve.mirror());
    let mut skopeo = Command::new("skopeo");
    skopeo.args(["copy", "--all", "--src-tls-verify=false", "--dest-tls-verify=false"]);
    skopeo.arg(format!("docker://{mirror}/{open}/team/lazy:1"));
    output(skopeo.arg(format!("docker://{}", host.open.reference("team/lazy", "ready"))));
}

/// A Podman that hands over what it is given.
fn handing_over(host: &Host) -> Podman {
    let podman = host.podman(Release::Five, &["--auth-helper"]);
    fs::copy(BINARY, podman.outside("/usr/local/bin/nydus-store")).unwrap();
    podman
}

/// The registry's own manifest leads Podman to the store, and by then Podman has handed over what it was given. So the first
/// pull is lazy, of a private image that nobody has logged in for, by tag and by digest.
async fn the_first_pull_is_lazy(host: &Host) {
    publish(host);
    let (podman, ready) = (handing_over(host), host.registry.reference("team/lazy", "ready"));
    let wrong = podman.fails(&["pull", "--creds", &format!("{USER}:wrong"), &ready]);
    assert!(wrong.contains("unauthorized") && !wrong.contains("wrong"), "{wrong}");
    assert!(!host.serve.log().contains("handed over credentials"));

    let creds = format!("{USER}:{PASSWORD}");
    podman.run(&["pull", "--creds", &creds, &ready]);
    assert_eq!(hello(&podman, &ready), "hello");
    let used = host.used();
    assert!(used > 0);
    let digest = podman.run(&["image", "inspect", "--format", "{{.Digest}}", &ready]);
    podman.run(&["rmi", &ready]);
    let by_digest = format!("{}/team/lazy@{digest}", host.registry.host());
    podman.run(&["pull", "--creds", &creds, &by_digest]);
    assert_eq!(hello(&podman, &by_digest), "hello");
    assert!(host.used() > used);
    assert!(!host.serve.log().contains(PASSWORD));

    // A repository of the same name elsewhere is asked without them.
    let other = Demanding::start().await;
    let url = format!(
        "http://{}/v2/{}/team/lazy/manifests/1",
        host.serve.mirror(),
        other.address
    );
    let refused = reqwest::get(url).await.unwrap();
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    let seen = other.seen();
    assert!(!seen.is_empty() && seen.iter().all(Option::is_none), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_pull_of_an_image_with_annotations_is_lazy() {
    the_first_pull_is_lazy(&Host::start().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_pull_of_an_image_with_annotations_is_lazy_by_a_token_too() {
    let mut host = Host::start().await;
    let tokens = TokenServer::start(host.dir.path()).await;
    host.registry = host.open.twin(&tokens.config(host.dir.path()), "");
    the_first_pull_is_lazy(&host).await;
    let asked = tokens.asked();
    assert!(
        asked.iter().all(|asked| asked.scope == "repository:team/lazy:pull"),
        "{asked:?}"
    );
}

/// The mirror asks nobody for a password, so that nobody sends it one.
#[tokio::test(flavor = "multi_thread")]
async fn the_mirror_wants_no_password() {
    let serve = Serve::with_config("[mirror]\nlisten = \"127.0.0.1:0\"\n");
    let mirror = serve.mirror();
    let ping = reqwest::get(format!("http://{mirror}/v2/")).await.unwrap();
    assert_eq!(ping.status(), StatusCode::OK);
    assert!(!ping.headers().contains_key(header::WWW_AUTHENTICATE));
    let podman = Podman::of(Release::Four, None, "127.0.0.1:1");
    let (file, mirror) = (podman.dir().join("auth.json"), mirror.to_string());
    let login = ["login", "--tls-verify=false", "-u", USER, "-p", "any", "--authfile"];
    podman.run(&[&login[..], &[file.to_str().unwrap(), &mirror]].concat());
}
