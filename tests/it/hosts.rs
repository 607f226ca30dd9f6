//! Host settings shared with Podman: mirrors in registries.conf, certificates, proxy variables.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use nydus_store::fixtures::{EmbeddedRegistry, Fault, RequestInfo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};

use crate::common::{DockerRegistry, Lab, Sample, Serve, StoreLayer, wait_until};

/// A registries.conf with these mirrors for `registry`.
fn registries_conf(registry: &str, mirrors: &[&str]) -> String {
    let mut text = format!("[[registry]]\nlocation = \"{registry}\"\n");
    for mirror in mirrors {
        text.push_str(&format!("[[registry.mirror]]\nlocation = \"{mirror}\"\n"));
    }
    text
}

/// Starts a daemon with this registries.conf.
fn serve(config: &str, registries: &str) -> Serve {
    let mut serve = Serve::prepare(config);
    let conf = serve.config_path().with_file_name("registries.conf");
    fs::write(&conf, registries).unwrap();
    serve.launch_with(|command| {
        command.env("CONTAINERS_REGISTRIES_CONF", &conf);
    });
    serve
}

fn layer(serve: &Serve, registry: &DockerRegistry, sample: &Sample, repository: &str) -> StoreLayer {
    serve.layer(&registry.reference(repository, "1"), &sample.bootstrap_digest())
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_mirror_is_skipped_until_it_recovers() {
    let [registry, mut first, second] = [(); 3].map(|()| DockerRegistry::start());
    let (before, after) = (Sample::new(1), Sample::new(2));
    for place in [&registry, &first, &second] {
        before.image.push(&place.url(), "team/before", "1").await.unwrap();
        after.image.push(&place.url(), "team/after", "1").await.unwrap();
    }
    let reads = |place: &DockerRegistry| place.blob_reads();
    let pushed = [reads(&registry), reads(&first), reads(&second)];
    first.stop();
    let conf = registries_conf(registry.host(), &[first.host(), second.host()]);
    let serve = serve("[images]\nnegative_ttl = 0\n[registry]\ncircuit_max_pause = 1\n", &conf);
    before.check(&layer(&serve, &registry, &before, "team/before"));
    let of_second = reads(&second) - pushed[2];
    assert!(of_second > 2, "{of_second}");
    assert_eq!(reads(&registry), pushed[0]);
    assert!(
        serve.log().contains("opened circuit: host does not answer"),
        "{}",
        serve.log()
    );

    first.restart("");
    // Requests trigger the probe of an open circuit; until it succeeds, they use the second mirror.
    wait_until("the first mirror is back", || {
        assert!(!layer(&serve, &registry, &after, "team/none").pull_publishes());
        serve.log().contains("answers again").then_some(())
    });
    after.check(&layer(&serve, &registry, &after, "team/after"));
    assert!(reads(&first) > pushed[1] + 2);
    assert_eq!((reads(&registry), reads(&second)), (pushed[0], pushed[2] + of_second));
}

/// A changed registries.conf takes effect while running. A malformed one is logged and ignored.
#[test]
fn changed_registries_conf_is_reloaded() {
    let lab = Lab::with_daemon(Serve::prepare(""));
    let (one, two) = (Sample::new(1), Sample::new(2));
    lab.registry.add_image(&one.image, "real/one", "1").unwrap();
    lab.registry.add_image(&two.image, "real/two", "1").unwrap();
    let place = lab.registry.addr();
    let moved = format!("[[registry]]\nprefix = \"moved.test\"\nlocation = \"{place}/real\"\n");
    let serve = serve("[images]\nnegative_ttl = 0\n", &moved);
    let conf = serve.config_path().with_file_name("registries.conf");
    one.check(&serve.layer("moved.test/one:1", &one.bootstrap_digest()));
    fs::write(&conf, "[[registry]\n").unwrap();
    thread::sleep(Duration::from_millis(1100));
    two.check(&serve.layer("moved.test/two:1", &two.bootstrap_digest()));
    let log = serve.log();
    assert!(log.contains("registries.conf: TOML parse error at line 1"), "{log}");
    fs::write(&conf, format!("{moved}blocked = true\n")).unwrap();
    thread::sleep(Duration::from_millis(1100));
    assert!(
        !serve
            .layer("moved.test/three:1", &two.bootstrap_digest())
            .pull_publishes()
    );
    assert!(
        serve.log().contains("is blocked by the entry for moved.test"),
        "{}",
        serve.log()
    );
}

/// The mirror serves correct manifests and corrupt data.
#[test]
fn corrupt_data_of_a_mirror_is_fetched_from_the_registry() {
    let lab = Lab::with_daemon(Serve::prepare(""));
    let sample = Sample::new(3);
    for repository in ["app", "bad/app"] {
        lab.registry.add_image(&sample.image, repository, "1").unwrap();
    }
    let data = sample.data_digest().to_string();
    lab.fault("bad", move |request| match request.path.contains(&data) {
        true => Fault::FlipByte(3),
        false => Fault::None,
    });
    let place = lab.registry.addr().to_string();
    let serve = serve("", &registries_conf(&place, &[&format!("{place}/bad")]));
    sample.check(&serve.layer(&lab.reference("app"), &sample.bootstrap_digest()));
    let log = serve.log();
    assert!(log.contains("received corrupt bytes from mirror"), "{log}");
    let data = format!("/v2/bad/app/blobs/{}", sample.data_digest());
    let damaged = lab.registry.log().iter().filter(|request| request.path == data).count();
    assert!(damaged < 20, "{damaged}");
}

/// Concurrent readers get data from both mirrors at once; one mirror corrupts it.
#[test]
fn only_the_mirror_that_served_corrupt_bytes_is_blamed() {
    let [registry, lying, honest] = [(); 3].map(|()| EmbeddedRegistry::start().unwrap());
    let names: Vec<_> = (0..12).map(|number| format!("file{number:02}")).collect();
    let files: Vec<_> = names.iter().map(|name| (name.as_str(), 150_000)).collect();
    let samples: Vec<_> = (10..16)
        .map(|seed| Sample::of(&files, seed, &Sample::options()))
        .collect();
    for (number, sample) in samples.iter().enumerate() {
        for place in [&registry, &lying, &honest] {
            place.add_image(&sample.image, &format!("app{number}"), "1").unwrap();
        }
    }
    let data: Vec<_> = samples.iter().map(Sample::data_digest).collect();
    let of_data = move |request: &RequestInfo| request.digest.is_some_and(|digest| data.contains(&digest));
    let (asked, is_wanted) = (AtomicUsize::new(0), of_data.clone());
    lying.set_fault(Some(Arc::new(move |request| match is_wanted(request) {
        // Every second request fails, so that the other mirror serves some data.
        true if asked.fetch_add(1, Ordering::Relaxed) % 2 == 1 => Fault::Status(503),
        true => Fault::FlipByte(3),
        false => Fault::None,
    })));
    let mirrors = [&lying, &honest].map(|mirror| mirror.addr().to_string());
    let serve = serve(
        "[fetch]\nread_ahead = false\n",
        &registries_conf(&registry.addr().to_string(), &[&mirrors[0], &mirrors[1]]),
    );
    for (number, sample) in samples.iter().enumerate() {
        let layer = serve.layer(
            &registry.reference(&format!("app{number}"), "1"),
            &sample.bootstrap_digest(),
        );
        assert!(layer.pull_publishes());
        thread::scope(|scope| {
            for name in &names {
                let (sample, layer) = (&sample, &layer);
                scope.spawn(move || assert!(fs::read(layer.diff().join(name)).unwrap() == sample.content(name)));
            }
        });
    }
    let of_data = |place: &EmbeddedRegistry| place.log().iter().filter(|request| of_data(request)).count();
    assert!(of_data(&honest) > 0);
    assert_eq!(of_data(&registry), 0, "the honest mirror stays in use");
    let log = serve.log();
    let blamed = |place: &str| {
        let of_place = |line: &&str| line.contains("received corrupt bytes from mirror") && line.contains(place);
        log.lines().filter(of_place).count()
    };
    assert!(
        blamed(&mirrors[0]) >= samples.len() && blamed(&mirrors[1]) == 0,
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn private_ca_and_client_certificate_are_used() {
    let mut registry = DockerRegistry::start();
    let sample = Sample::new(4);
    sample.image.push(&registry.url(), "team/app", "1").await.unwrap();
    let home = tempfile::tempdir().unwrap();
    let certs = home.path().join(".config/containers/certs.d").join(registry.host());
    fs::create_dir_all(&certs).unwrap();
    let of_server = write_certificates(home.path(), &certs);
    registry.restart(&of_server);

    let mut serve = Serve::prepare("[images]\nnegative_ttl = 0\n");
    serve.launch_with(|command| {
        command.env("HOME", home.path());
    });
    let layer = layer(&serve, &registry, &sample, "team/app");
    let key = fs::read(certs.join("client.key")).unwrap();
    fs::remove_file(certs.join("client.key")).unwrap();
    assert!(!layer.pull_publishes());
    assert!(
        serve.log().contains("client.cert: key of the same name"),
        "{}",
        serve.log()
    );
    fs::write(certs.join("client.key"), key).unwrap();
    thread::sleep(Duration::from_millis(1100));
    sample.check(&layer);
}

/// Creates a CA, a client certificate in `certs` and a server certificate in `dir`; returns the registry's TLS
/// settings.
fn write_certificates(dir: &Path, certs: &Path) -> String {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let write = |usage, certificate: &Path, key: &Path| {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages = vec![usage];
        let pair = KeyPair::generate().unwrap();
        fs::write(certificate, params.signed_by(&pair, &authority).unwrap().pem()).unwrap();
        fs::write(key, pair.serialize_pem()).unwrap();
    };
    let (certificate, key, ca) = (dir.join("server.pem"), dir.join("server-key.pem"), certs.join("ca.crt"));
    fs::write(&ca, authority.pem()).unwrap();
    write(ExtendedKeyUsagePurpose::ServerAuth, &certificate, &key);
    write(
        ExtendedKeyUsagePurpose::ClientAuth,
        &certs.join("client.cert"),
        &certs.join("client.key"),
    );
    format!(
        ", tls: {{certificate: {}, key: {}, clientcas: [{}]}}",
        certificate.display(),
        key.display(),
        ca.display()
    )
}

/// A registry also answers requests in proxy form, so it can act as the proxy.
#[test]
fn proxy_of_the_environment_is_used() {
    let lab = Lab::with_daemon(Serve::prepare(""));
    let sample = Sample::new(5);
    lab.registry.add_image(&sample.image, "team/app", "1").unwrap();
    let mut serve = Serve::prepare("[registry]\ninsecure = [\"registry.test\"]\n");
    serve.launch_with(|command| {
        for name in ["HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"] {
            command.env(name, lab.registry.url());
        }
        command.env("NO_PROXY", "other.test").env("no_proxy", "other.test");
    });
    sample.check(&serve.layer("registry.test/team/app:1", &sample.bootstrap_digest()));
    assert!(
        !serve
            .layer("other.test/team/app:1", &sample.bootstrap_digest())
            .pull_publishes()
    );
}
