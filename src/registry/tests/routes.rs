//! Remembered redirects, proxies, headers and health checks.

use super::*;
use crate::registry::HostSettings;

async fn read(client: &Client, repository: &Repository) -> Result<bytes::Bytes, Error> {
    client.blob_range(repository, &any_digest(), 3, 4).await
}

#[tokio::test]
async fn redirect_is_reused_until_it_expires() {
    let storage = Server::start(|seen, count| {
        assert_eq!(seen.authorization(), "");
        match (seen.uri.contains("sig=0"), count) {
            (true, 3..) => status(403),
            _ => ranged(seen, &data()),
        }
    })
    .await;
    let target = storage.address;
    let registry = Server::start(move |_, count| redirected(format!("http://{target}/blob?sig={count}"))).await;
    let client = client();
    for _ in 0..3 {
        assert_eq!(read(&client, &registry.repository()).await.unwrap(), data()[3..7]);
    }
    assert_eq!((registry.count(), storage.count()), (1, 3));
    // It has expired, is refused once, and replaced.
    for _ in 0..2 {
        assert_eq!(read(&client, &registry.repository()).await.unwrap(), data()[3..7]);
    }
    assert_eq!((registry.count(), storage.count()), (2, 6));
    assert!(storage.log()[4].uri.ends_with("sig=1"));
    // A report of corrupt bytes forgets it.
    let (_, served_by) = client
        .blob_range_with_origin(&registry.repository(), &any_digest(), 3, 4)
        .await
        .unwrap();
    client.report_corrupt(&served_by);
    read(&client, &registry.repository()).await.unwrap();
    assert_eq!(registry.count(), 3);
}

#[tokio::test]
async fn unreachable_redirect_target_is_replaced() {
    let (socket, gone) = failures::reserved_port();
    let storage = Server::start(|seen, _| ranged(seen, &data())).await;
    let (first, second) = (gone.registry.clone(), storage.address.to_string());
    let listener = socket.listen(16).unwrap();
    let app = axum::Router::new().fallback(|| async {
        (
            StatusCode::PARTIAL_CONTENT,
            [(header::CONTENT_RANGE, "bytes 3-6/9"), (header::CONNECTION, "close")],
            "gone",
        )
    });
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let served = axum::serve(listener, app).with_graceful_shutdown(async { stopped.await.unwrap_or_default() });
    let served = tokio::spawn(served.into_future());
    let registry = Server::start(move |_, count| {
        let target = if count == 0 { &first } else { &second };
        redirected(format!("http://{target}/blob"))
    })
    .await;
    let client = client();
    assert_eq!(read(&client, &registry.repository()).await.unwrap(), "gone");
    stop.send(()).unwrap();
    served.await.unwrap().unwrap();
    assert_eq!(read(&client, &registry.repository()).await.unwrap(), data()[3..7]);
    assert_eq!(registry.count(), 2);
}

/// A redirect target has a circuit of its own.
#[tokio::test]
async fn dead_redirect_target_does_not_open_the_circuit_of_the_registry() {
    let (_socket, dead) = failures::reserved_port();
    let target = dead.registry.clone();
    let registry = Server::start(move |seen, _| match seen.uri.contains("manifests") {
        true => manifest("x/y", "{}"),
        false => redirected(format!("http://{target}/blob")),
    })
    .await;
    let client = client_with(Options {
        retries: 0,
        circuit_failures: 2,
        circuit_pause: Duration::from_secs(600),
        circuit_max_pause: Duration::from_secs(600),
        ..Options::default()
    });
    let client = client.with_patience(Duration::ZERO);
    let repository = registry.repository();
    for count in 0..6 {
        let error = read(&client, &repository).await.unwrap_err();
        let is_open = matches!(&error, Error::CircuitOpen { host, .. } if *host == dead.registry);
        assert_eq!(is_open, count >= 2, "{error:?}");
        client.manifest(&repository, "1").await.unwrap();
    }
}

#[tokio::test]
async fn busy_redirect_target_is_not_asked_twice_and_stays_remembered() {
    let storage = Server::start(|seen, count| match count {
        0 => ranged(seen, &data()),
        1 => (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")]).into_response(),
        _ => ranged(seen, &data()),
    })
    .await;
    let target = storage.address;
    let registry = Server::start(move |_, _| redirected(format!("http://{target}/blob"))).await;
    let (client, repository) = (client(), registry.repository());
    for _ in 0..2 {
        assert_eq!(read(&client, &repository).await.unwrap(), data()[3..7]);
    }
    assert_eq!(
        (registry.count(), storage.count()),
        (1, 3),
        "the redirect is still remembered"
    );
}

fn settings(text: &str) -> Vec<HostSettings> {
    vec![toml::from_str(text).unwrap()]
}

/// A proxy that refuses tunnels, and answers other requests itself.
async fn proxy() -> Server {
    Server::start(|seen, _| match seen.method {
        Method::CONNECT => status(403),
        _ => ranged(seen, &data()),
    })
    .await
}

fn forwarded(proxy: &Server) -> Vec<String> {
    let log = proxy.log();
    log.iter()
        .filter(|seen| seen.method != Method::CONNECT)
        .map(|seen| seen.uri.clone())
        .collect()
}

#[tokio::test]
async fn configured_proxy_is_used_except_for_loopback() {
    let (proxy, local) = (proxy().await, Server::start(|seen, _| ranged(seen, &data())).await);
    let options = |no_proxy: &[&str]| Options {
        proxy: format!("http://{}", proxy.address).try_into().ok(),
        no_proxy: Some(no_proxy.iter().map(ToString::to_string).collect()),
        insecure: vec!["registry.test".into()],
        retries: 0,
        ..Options::default()
    };
    let client = client_with(options(&["other.test"]));
    let repository = Repository::new("registry.test", "org/image");
    assert_eq!(read(&client, &repository).await.unwrap(), data()[3..7]);
    assert!(forwarded(&proxy)[0].starts_with("http://registry.test/v2/org/image/blobs/"));
    read(&client, &local.repository()).await.unwrap();
    assert_eq!(forwarded(&proxy).len(), 1, "loopback is reached without the proxy");
    let client = client_with(options(&["registry.test"])).with_patience(Duration::ZERO);
    assert!(matches!(
        read(&client, &repository).await,
        Err(Error::Unreachable { .. })
    ));
    assert_eq!(forwarded(&proxy).len(), 1);
    // TLS needs a tunnel.
    let strict = Repository::new("strict.test", "org/image");
    let tunnels = proxy.count();
    let client = client_with(options(&[])).with_patience(Duration::ZERO);
    assert!(read(&client, &strict).await.is_err());
    assert_eq!(proxy.log()[tunnels].method, Method::CONNECT);
}

#[tokio::test]
async fn proxy_of_a_host_is_bypassed_while_its_health_check_fails() {
    let healthy = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let state = healthy.clone();
    let check = Server::start(move |_, _| status(if state.load(Ordering::SeqCst) { 200 } else { 503 })).await;
    let (proxy, registry) = (proxy().await, Server::start(|seen, _| ranged(seen, &data())).await);
    let text = format!(
        "name = \"{}\"\nproxy = \"http://{}\"\nhealth_check = \"http://{}/healthy\"\nheaders = {{ X-P2P = \"true\" }}\n",
        registry.address, proxy.address, check.address
    );
    let options = || Options {
        hosts: settings(&text),
        ..Options::default()
    };
    let client = client_with(options());
    for _ in 0..3 {
        read(&client, &registry.repository()).await.unwrap();
    }
    // The check is repeated when the proxy refuses the tunnel for TLS.
    assert_eq!((forwarded(&proxy).len(), registry.count(), check.count()), (3, 0, 2));
    assert!(
        proxy
            .log()
            .iter()
            .all(|seen| seen.method == Method::CONNECT || seen.headers["x-p2p"] == "true")
    );
    healthy.store(false, Ordering::SeqCst);
    read(&client_with(options()), &registry.repository()).await.unwrap();
    assert_eq!((forwarded(&proxy).len(), registry.count(), check.count()), (3, 1, 3));
}

#[tokio::test]
async fn mirror_gets_its_headers_and_is_skipped_while_unhealthy() {
    let mirror = Server::start(|seen, _| match seen.uri.as_str() {
        "/healthy" => status(200),
        _ => ranged(seen, &data()),
    })
    .await;
    let registry = Server::start(|seen, _| ranged(seen, &data())).await;
    let repository = registry.repository();
    let (_dir, files) = mirrors::mirrored(&repository, &[mirror.address.to_string()]);
    let options = |check: &str| Options {
        registries_conf: Some(files.clone()),
        hosts: settings(&format!(
            "name = \"{0}\"\nhealth_check = \"http://{0}{check}\"\n[headers]\nX-Dragonfly-Registry = \"http://{{registry}}\"\n",
            mirror.address
        )),
        ..Options::default()
    };
    read(&client_with(options("/healthy")), &repository).await.unwrap();
    let request = mirror
        .log()
        .into_iter()
        .find(|seen| seen.uri.starts_with("/v2/"))
        .unwrap();
    assert_eq!(
        request.headers["x-dragonfly-registry"],
        format!("http://{}", repository.registry)
    );
    assert_eq!(registry.count(), 0);

    let unhealthy = Server::start(|_, _| status(500)).await;
    let client = client_with(Options {
        hosts: settings(&format!(
            "name = \"{}\"\nhealth_check = \"http://{}/healthy\"\n",
            mirror.address, unhealthy.address
        )),
        ..options("/healthy")
    });
    let before = mirror.count();
    for _ in 0..5 {
        read(&client, &repository).await.unwrap();
    }
    assert_eq!((mirror.count(), registry.count(), unhealthy.count()), (before, 5, 1));
    assert!(
        registry
            .log()
            .iter()
            .all(|seen| !seen.headers.contains_key("x-dragonfly-registry"))
    );
}
