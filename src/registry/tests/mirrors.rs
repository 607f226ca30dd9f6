//! Mirrors: in which order, when they are passed over, and when they are asked again.

use super::*;
use crate::registries_conf::watcher::Files;

/// Files that have `mirrors` before the registry of `repository`, as long as the directory is there.
pub(super) fn mirrored(repository: &Repository, mirrors: &[String]) -> (tempfile::TempDir, Files) {
    let mut text = format!("[[registry]]\nlocation = \"{}\"\n", repository.registry);
    for mirror in mirrors {
        text.push_str(&format!("[[registry.mirror]]\nlocation = \"{mirror}\"\n"));
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("registries.conf"), text).unwrap();
    let files = Files::below(dir.path());
    (dir, files)
}

/// A client of [`mirrored`] that leaves dead hosts alone for a short time.
fn client_of(files: Files) -> Client {
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
async fn mirrors_are_asked_in_order_and_those_that_lack_a_blob_not_again() {
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
    // What is said of a blob is said of that one.
    client
        .blob_range(&repository, &Digest::of(b"other"), 3, 4)
        .await
        .unwrap();
    assert_eq!(lacking.count(), 2);
}

#[tokio::test]
async fn the_registry_has_the_last_word() {
    let failing = Server::start(|_, _| status(503)).await;
    let registry = Server::start(|_, _| status(404)).await;
    let repository = registry.repository();
    let (_dir, files) = mirrored(&repository, &[failing.address.to_string()]);
    let client = client_of(files);
    assert!(read(&client, &repository).await.unwrap_err().is_not_found());
    assert!(client.manifest(&repository, "1").await.unwrap_err().is_not_found());
    assert_eq!((failing.count(), registry.count()), (2, 2), "nobody waits for a mirror");
}

#[tokio::test]
async fn a_dead_mirror_is_passed_over_and_asked_again_when_it_is_back() {
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
    // Two schemes of the mirror, and one of the registry that failed.
    assert_eq!(client.stats().requests, 20 + 2 + 1);
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = asked.clone();
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
    // Somebody else than the readers has found out that it is back.
    assert_eq!((registry.count(), asked.load(Ordering::SeqCst)), (before, 3));
}

#[tokio::test]
async fn a_mirror_that_lies_is_not_believed_twice() {
    let lying = Server::start(|seen, _| ranged(seen, &[7; 1000])).await;
    let registry = serving().await;
    let repository = registry.repository();
    let (_dir, files) = mirrored(&repository, &[lying.address.to_string()]);
    let (client, digest) = (client_of(files), Digest::of(&data()));
    assert_eq!(client.blob(&repository, &digest, 1000).await.unwrap(), data());
    assert_eq!((lying.count(), registry.count()), (1, 1));
    // Of a range only the reader knows what it should be.
    let (bytes, giver) = client
        .blob_range_and_giver(&repository, &any_digest(), 3, 4)
        .await
        .unwrap();
    assert_eq!(bytes, [7; 4].as_slice());
    client.distrust(&giver);
    assert_eq!(read(&client, &repository).await.unwrap(), data()[3..7]);
    assert_eq!(lying.count(), 2);
}

/// Readers have bytes of both mirrors at the same time.
#[tokio::test]
async fn who_gave_the_wrong_bytes_is_blamed_whoever_gave_the_last_ones() {
    let lying = Server::start(|seen, count| match count % 2 {
        0 => ranged(seen, &[7; 1000]),
        _ => status(503),
    })
    .await;
    let (honest, registry) = (serving().await, serving().await);
    let repository = registry.repository();
    let (_dir, files) = mirrored(&repository, &[&lying, &honest].map(|server| server.address.to_string()));
    let client = client_of(files);
    let readers = (0..16).map(|number| {
        let (client, repository) = (client.clone(), repository.clone());
        tokio::spawn(async move {
            if number % 3 > 0 {
                return client
                    .blob_range_and_giver(&repository, &any_digest(), 3, 4)
                    .await
                    .unwrap();
            }
            let mut stream = client
                .open_range(&repository, &any_digest(), (3, 6), false)
                .await
                .unwrap();
            (stream.next().await.unwrap().unwrap(), stream.giver().clone())
        })
    });
    let (mut right, mut wrong) = (Vec::new(), Vec::new());
    for reader in readers.collect::<Vec<_>>() {
        let (bytes, giver) = reader.await.unwrap();
        let of_that_kind = if bytes == data()[3..7] { &mut right } else { &mut wrong };
        of_that_kind.push(giver);
    }
    assert!(right.iter().all(|giver| !wrong.contains(giver)));
    assert_eq!((right.len(), wrong.len(), registry.count()), (8, 8, 0));
    let before = lying.count();
    for giver in &wrong {
        client.distrust(giver);
        assert_eq!(read(&client, &repository).await.unwrap(), data()[3..7]);
    }
    assert_eq!((lying.count(), registry.count()), (before, 0));
}

#[tokio::test]
async fn a_mirror_that_is_busy_is_not_waited_for() {
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
async fn what_is_blocked_is_not_asked_for() {
    let registry = serving().await;
    let repository = registry.repository();
    let dir = tempfile::tempdir().unwrap();
    let text = format!("[[registry]]\nlocation = \"{}\"\nblocked = true\n", repository.registry);
    std::fs::write(dir.path().join("registries.conf"), text).unwrap();
    let result = read(&client_of(Files::below(dir.path())), &repository).await;
    assert!(matches!(result, Err(Error::Blocked { .. })), "{result:?}");
    assert_eq!(registry.count(), 0);
}

#[tokio::test]
async fn each_place_gets_the_credentials_kept_for_it() {
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
async fn a_mirror_that_ignores_ranges_is_passed_over_from_then_on() {
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
async fn one_that_was_fetching_a_blob_is_asked_for_others() {
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

/// A mirror that gives a byte now and then, or none, has its share of the time and no more.
#[tokio::test]
async fn a_mirror_that_trickles_or_is_silent_does_not_use_up_the_time_of_the_registry() {
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
        assert_eq!((slow.count(), registry.count()), (1, 3), "it is left alone");
    }
}

/// It answers `/v2/` at once and nothing else: it is let in for one request at a time, and for longer and longer not at all.
#[tokio::test]
async fn signs_of_life_do_not_let_all_readers_in_to_a_mirror() {
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
    // Eight at first, and then one after each of the pauses, of which there is room for six in that time.
    assert!(blobs <= 8 + 6, "{blobs}");
}

#[tokio::test]
async fn a_mirror_that_may_recover_is_tried_again_if_the_registry_is_out_of_reach() {
    let mirror = Server::start(|seen, count| match count {
        0 => status(503),
        _ => ranged(seen, &data()),
    })
    .await;
    let (_socket, dead) = failures::reserved_port();
    let (_dir, files) = mirrored(&dead, &[mirror.address.to_string()]);
    assert_eq!(read(&client_of(files), &dead).await.unwrap(), data()[3..7]);
    assert_eq!(mirror.count(), 2);
    // Where all fail, all are named.
    let failing = Server::start(|_, _| status(503)).await;
    let (_dir, files) = mirrored(&dead, &[failing.address.to_string()]);
    let error = read(&client_of(files), &dead).await.unwrap_err();
    assert!(error.is_transient() && error.is_unreachable());
    let told = error.to_string();
    assert!(
        told.contains(&dead.registry) && told.contains(&failing.address.to_string()),
        "{told}"
    );
    assert!(std::error::Error::source(&error).is_some());
}

#[tokio::test]
async fn a_mirror_that_leads_to_a_dead_storage_is_left_alone() {
    let (_socket, dead) = failures::reserved_port();
    let place = dead.registry.clone();
    let mirror = Server::start(move |_, _| redirected(format!("http://{place}/blob"))).await;
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
