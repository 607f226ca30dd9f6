//! Mirrors: their order, when they are skipped, and when they are asked again.

use super::*;
use crate::registries_conf::watcher::RegistriesConfPaths;

/// A registries.conf with `mirrors` for the registry of `repository`. It lives as long as the returned directory.
pub(super) fn mirrored(repository: &Repository, mirrors: &[String]) -> (tempfile::TempDir, RegistriesConfPaths) {
    let mut text = format!("[[registry]]\nlocation = \"{}\"\n", repository.registry);
    for mirror in mirrors {
        text.push_str(&format!("[[registry.mirror]]\nlocation = \"{mirror}\"\n"));
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("registries.conf"), text).unwrap();
    let files = RegistriesConfPaths::in_dir(dir.path());
    (dir, files)
}

/// A client with the files of [`mirrored`], whose circuits open for a short time.
fn client_of(files: RegistriesConfPaths) -> Client {
    client_with(Options {
        registries_conf: Some(files),
        circuit_pause: Duration::from_millis(50),
        circuit_max_pause: Duration::from_millis(50),
        ..Options::default()
    })
}

async fn serving() -> Server {
    Server::start(|seen, _| ranged(seen, &data())).await
}

async fn read(client: &Client, repository: &Repository) -> Result<bytes::Bytes, Error> {
    client.blob_range(repository, &any_digest(), 3, 4).await
}

#[tokio::test]
async fn mirrors_are_asked_in_order_and_not_again_for_a_missing_blob() {
    let lacking = Server::start(|_, _| status(404)).await;
    let (mirror, registry) = (serving().await, serving().await);
    let repository = registry.repository();
    let mirrors = [lacking.address.to_string(), format!("{}/proxy/cache", mirror.address)];
    let (_dir, files) = mirrored(&repository, &mirrors);
    let client = client_of(files);
    for _ in 0..3 {
        assert_eq!(read(&client, &repository).await.unwrap(), data()[3..7]);
    }
    assert_eq!((lacking.count(), mirror.count(), registry.count()), (1, 3, 0));
    assert!(
        mirror.log()[0]
            .uri
            .starts_with("/v2/proxy/cache/org/image/blobs/sha256:")
    );
    // It is asked for other blobs.
    client
        .blob_range(&repository, &Digest::of(b"other"), 3, 4)
        .await
        .unwrap();
    assert_eq!(lacking.count(), 2);
}

#[tokio::test]
async fn answer_of_the_registry_is_final() {
    let failing = Server::start(|_, _| status(503)).await;
    let registry = Server::start(|_, _| status(404)).await;
    let repository = registry.repository();
    let (_dir, files) = mirrored(&repository, &[failing.address.to_string()]);
    let client = client_of(files);
    assert!(read(&client, &repository).await.unwrap_err().is_not_found());
    assert!(client.manifest(&repository, "1").await.unwrap_err().is_not_found());
    assert_eq!(
        (failing.count(), registry.count()),
        (2, 2),
        "a failed mirror causes no retry"
    );
}

#[tokio::test]
async fn dead_mirror_is_skipped_and_asked_again_when_it_is_back() {
    let (socket, dead) = failures::reserved_port();
    let registry = serving().await;
    let repository = registry.repository();
    let (_dir, files) = mirrored(&repository, std::slice::from_ref(&dead.registry));
    let client = client_with(Options {
        registries_conf: Some(files),
        circuit_pause: Duration::from_secs(1),
        ..Options::default()
    });
    for _ in 0..20 {
        read(&client, &repository).await.unwrap();
    }
    assert_eq!(registry.count(), 20);
    // Two schemes of the mirror, and the failed one of the registry.
    assert_eq!(client.stats().requests, 20 + 2 + 1);
    let requests = Arc::new(AtomicUsize::new(0));
    let counter = requests.clone();
    let app = axum::Router::new().fallback(move || {
        counter.fetch_add(1, Ordering::SeqCst);
        async {
            (
                StatusCode::PARTIAL_CONTENT,
                [(header::CONTENT_RANGE, "bytes 3-6/9")],
                "back",
            )
        }
    });
    tokio::spawn(async move { axum::serve(socket.listen(16).unwrap(), app).await });
    let mut back = false;
    for _ in 0..100 {
        back = read(&client, &repository).await.unwrap() == "back";
        if back {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(back, "the mirror is asked again");
    let before = registry.count();
    read(&client, &repository).await.unwrap();
    // A ping, and not a read, has found out that it is back.
    assert_eq!((registry.count(), requests.load(Ordering::SeqCst)), (before, 3));
}

#[tokio::test]
async fn mirror_with_corrupt_bytes_is_not_asked_again() {
    let corrupt = Server::start(|seen, _| ranged(seen, &[7; 1000])).await;
    let registry = serving().await;
    let repository = registry.repository();
    let (_dir, files) = mirrored(&repository, &[corrupt.address.to_string()]);
    let (client, digest) = (client_of(files), Digest::of(&data()));
    assert_eq!(client.blob(&repository, &digest, 1000).await.unwrap(), data());
    assert_eq!((corrupt.count(), registry.count()), (1, 1));
    // Only the reader can verify a range.
    let (bytes, served_by) = client
        .blob_range_with_origin(&repository, &any_digest(), 3, 4)
        .await
        .unwrap();
    assert_eq!(bytes, [7; 4].as_slice());
    client.report_corrupt(&served_by);
    assert_eq!(read(&client, &repository).await.unwrap(), data()[3..7]);
    assert_eq!(corrupt.count(), 2);
}

/// Concurrent reads get bytes of two mirrors.
#[tokio::test]
async fn corrupt_bytes_are_attributed_to_the_mirror_that_served_them() {
    let corrupt = Server::start(|seen, count| match count % 2 {
        0 => ranged(seen, &[7; 1000]),
        _ => status(503),
    })
    .await;
    let (honest, registry) = (serving().await, serving().await);
    let repository = registry.repository();
    let (_dir, files) = mirrored(
        &repository,
        &[&corrupt, &honest].map(|server| server.address.to_string()),
    );
    let client = client_of(files);
    let readers = (0..16).map(|number| {
        let (client, repository) = (client.clone(), repository.clone());
        tokio::spawn(async move {
            if number % 3 > 0 {
                return client
                    .blob_range_with_origin(&repository, &any_digest(), 3, 4)
                    .await
                    .unwrap();
            }
            let mut stream = client
                .open_range(&repository, &any_digest(), (3, 6), false)
                .await
                .unwrap();
            (stream.next().await.unwrap().unwrap(), stream.served_by().clone())
        })
    });
    let (mut right, mut wrong) = (Vec::new(), Vec::new());
    for reader in readers.collect::<Vec<_>>() {
        let (bytes, served_by) = reader.await.unwrap();
        let group = if bytes == data()[3..7] { &mut right } else { &mut wrong };
        group.push(served_by);
    }
    assert!(right.iter().all(|served_by| !wrong.contains(served_by)));
    assert_eq!((right.len(), wrong.len(), registry.count()), (8, 8, 0));
    let before = corrupt.count();
    for served_by in &wrong {
        client.report_corrupt(served_by);
        assert_eq!(read(&client, &repository).await.unwrap(), data()[3..7]);
    }
    assert_eq!((corrupt.count(), registry.count()), (before, 0));
}

#[tokio::test]
async fn busy_mirror_is_skipped_without_a_wait() {
    let busy =
        Server::start(|_, _| (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, "5")]).into_response()).await;
    let registry = serving().await;
    let repository = registry.repository();
    let (_dir, files) = mirrored(&repository, &[busy.address.to_string()]);
    let client = client_of(files);
    for _ in 0..3 {
        read(&client, &repository).await.unwrap();
    }
    assert_eq!((busy.count(), registry.count()), (1, 3));
}

#[tokio::test]
async fn blocked_registry_gets_no_request() {
    let registry = serving().await;
    let repository = registry.repository();
    let dir = tempfile::tempdir().unwrap();
    let text = format!("[[registry]]\nlocation = \"{}\"\nblocked = true\n", repository.registry);
    std::fs::write(dir.path().join("registries.conf"), text).unwrap();
    let result = read(&client_of(RegistriesConfPaths::in_dir(dir.path())), &repository).await;
    assert!(matches!(result, Err(Error::Blocked { .. })), "{result:?}");
    assert_eq!(registry.count(), 0);
}

#[tokio::test]
async fn mirror_gets_its_own_credentials() {
    let mirror = Server::start(|seen, _| match seen.authorization() {
        "" => challenged("Basic realm=\"x\""),
        _ => ranged(seen, &data()),
    })
    .await;
    let repository = Repository::new("registry.test", "org/image");
    let (_dir, files) = mirrored(&repository, &[mirror.address.to_string()]);
    let at_mirror = mirror.address.to_string();
    let (_auth, auth_files) = auth_file(&[("registry.test", "me:secret"), (&at_mirror, "mirror:word")]);
    let client = client_with(Options {
        registries_conf: Some(files),
        auth_files: Some(auth_files),
        ..Options::default()
    });
    read(&client, &repository).await.unwrap();
    let expected = format!("Basic {}", BASE64_STANDARD.encode("mirror:word"));
    let log = mirror.log();
    let sent: Vec<_> = log
        .iter()
        .map(Seen::authorization)
        .filter(|sent| !sent.is_empty())
        .collect();
    assert_eq!(sent, [expected.as_str()]);
}

#[tokio::test]
async fn mirror_that_ignores_ranges_of_a_blob_is_skipped() {
    let whole = Server::start(|_, _| data().into_response()).await;
    let registry = serving().await;
    let repository = registry.repository();
    let (_dir, files) = mirrored(&repository, &[whole.address.to_string()]);
    let client = client_of(files);
    for _ in 0..3 {
        assert_eq!(read(&client, &repository).await.unwrap(), data()[3..7]);
    }
    assert_eq!((whole.count(), registry.count()), (1, 2));
}

#[tokio::test]
async fn mirror_that_ignored_ranges_of_one_blob_is_asked_for_others() {
    let whole = Server::start(|seen, count| match count {
        0 => data().into_response(),
        _ => ranged(seen, &data()),
    })
    .await;
    let registry = serving().await;
    let repository = registry.repository();
    let (_dir, files) = mirrored(&repository, &[whole.address.to_string()]);
    let client = client_of(files);
    read(&client, &repository).await.unwrap();
    client
        .blob_range(&repository, &Digest::of(b"other"), 3, 4)
        .await
        .unwrap();
    assert_eq!((whole.count(), registry.count()), (2, 0));
}

#[tokio::test]
async fn slow_or_silent_mirror_gets_only_its_share_of_the_time() {
    for silent in [true, false] {
        let slow = Server::start_async(move |_, _| async move {
            if silent {
                tokio::time::sleep(Duration::from_secs(60)).await;
            }
            let range = (header::CONTENT_RANGE, "bytes 3-1002/2000");
            let body = dripping(Duration::from_millis(100));
            (StatusCode::PARTIAL_CONTENT, [range], body).into_response()
        })
        .await;
        let registry = Server::start(|seen, _| match seen.uri.as_str() {
            "/v2/" => status(200),
            _ => ranged(seen, &[9; 2000]),
        })
        .await;
        let repository = registry.repository();
        let (_dir, files) = mirrored(&repository, &[slow.address.to_string()]);
        let client = client_with(Options {
            registries_conf: Some(files),
            request_timeout: Duration::from_secs(2),
            circuit_pause: Duration::from_secs(600),
            circuit_max_pause: Duration::from_secs(600),
            ..Options::default()
        });
        for _ in 0..3 {
            let bytes = client.blob_range(&repository, &any_digest(), 3, 1000).await.unwrap();
            assert_eq!(bytes, [9; 1000].as_slice());
        }
        assert_eq!((slow.count(), registry.count()), (1, 3), "its circuit is open");
    }
}

/// The mirror answers only pings. Each pause permits one read, and the pauses grow.
#[tokio::test]
async fn answered_pings_do_not_close_the_circuit_of_a_mirror() {
    let stalling = Server::start_async(|seen, _| async move {
        if seen.uri != "/v2/" {
            tokio::time::sleep(Duration::from_secs(60)).await;
        }
        status(200)
    })
    .await;
    let registry = serving().await;
    let repository = registry.repository();
    let (_dir, files) = mirrored(&repository, &[stalling.address.to_string()]);
    let client = client_with(Options {
        registries_conf: Some(files),
        connect_timeout: Duration::from_millis(50),
        read_timeout: Duration::from_millis(50),
        circuit_pause: Duration::from_millis(50),
        circuit_max_pause: Duration::from_secs(600),
        ..Options::default()
    });
    let started = std::time::Instant::now();
    while started.elapsed() < Duration::from_secs(2) {
        let readers: Vec<_> = (0..8)
            .map(|_| {
                let (client, repository) = (client.clone(), repository.clone());
                tokio::spawn(async move { read(&client, &repository).await })
            })
            .collect();
        for reader in readers {
            reader.await.unwrap().unwrap();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let blobs = stalling.log().iter().filter(|seen| seen.uri != "/v2/").count();
    // Eight at first, and then one after each pause. Six pauses fit into the time.
    assert!(blobs <= 8 + 6, "{blobs}");
}

#[tokio::test]
async fn failed_mirror_is_retried_if_the_registry_is_unreachable() {
    let mirror = Server::start(|seen, count| match count {
        0 => status(503),
        _ => ranged(seen, &data()),
    })
    .await;
    let (_socket, dead) = failures::reserved_port();
    let (_dir, files) = mirrored(&dead, &[mirror.address.to_string()]);
    assert_eq!(read(&client_of(files), &dead).await.unwrap(), data()[3..7]);
    assert_eq!(mirror.count(), 2);
    // If all endpoints fail, the error names all.
    let failing = Server::start(|_, _| status(503)).await;
    let (_dir, files) = mirrored(&dead, &[failing.address.to_string()]);
    let client = client_of(files).with_patience(Duration::ZERO);
    let error = read(&client, &dead).await.unwrap_err();
    assert!(error.is_transient() && error.is_unreachable());
    let message = error.to_string();
    assert!(
        message.contains(&dead.registry) && message.contains(&failing.address.to_string()),
        "{message}"
    );
    assert!(std::error::Error::source(&error).is_some());
}

#[tokio::test]
async fn mirror_that_redirects_to_a_dead_host_is_skipped() {
    let (_socket, dead) = failures::reserved_port();
    let target = dead.registry.clone();
    let mirror = Server::start(move |_, _| redirected(format!("http://{target}/blob"))).await;
    let registry = serving().await;
    let repository = registry.repository();
    let (_dir, files) = mirrored(&repository, &[mirror.address.to_string()]);
    let client = client_with(Options {
        registries_conf: Some(files),
        circuit_pause: Duration::from_secs(600),
        circuit_max_pause: Duration::from_secs(600),
        ..Options::default()
    });
    for _ in 0..5 {
        read(&client, &repository).await.unwrap();
    }
    assert_eq!((mirror.count(), registry.count()), (1, 5));
}
