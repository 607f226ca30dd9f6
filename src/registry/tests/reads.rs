//! Reads of manifests, blobs and ranges, and invalid answers that are refused.

use super::*;

#[tokio::test]
async fn manifests_are_read_by_tag_and_digest() {
    let text = r#"{"mediaType":"application/vnd.oci.image.index.v1+json"}"#;
    let server = Server::start(move |seen, _| match seen.uri.as_str() {
        "/v2/org/image/manifests/1.0" => manifest("application/vnd.oci.image.index.v1+json; charset=utf-8", text),
        "/v2/org/image/manifests/bare" => Response::new(Body::from(text)),
        uri if uri.contains("sha256") => manifest("x/y", text),
        _ => status(404),
    })
    .await;
    let (client, repository, digest) = (client(), server.repository(), Digest::of(text.as_bytes()));
    let found = client.manifest(&repository, "1.0").await.unwrap();
    assert_eq!((found.digest, &found.bytes[..]), (digest, text.as_bytes()));
    assert_eq!(client.manifest(&repository, "bare").await.unwrap(), found);
    assert_eq!(client.manifest(&repository, &digest.to_string()).await.unwrap(), found);
    assert!(
        server.log()[0]
            .header(header::ACCEPT)
            .contains("vnd.docker.distribution.manifest.list.v2+json")
    );

    let other = client.manifest(&repository, &any_digest().to_string()).await;
    assert!(
        matches!(other, Err(Error::DigestMismatch { actual, .. }) if actual == digest),
        "{other:?}"
    );
    let missing = client.manifest(&repository, "none").await.unwrap_err();
    assert!(missing.is_not_found() && !missing.is_transient());
    assert_eq!(
        missing.to_string(),
        format!("manifest {repository}:none does not exist")
    );
    for selector in ["", "a/b", "..", "sha256:00", "a?b"] {
        assert!(
            matches!(
                client.manifest(&repository, selector).await,
                Err(Error::InvalidName { .. })
            ),
            "{selector}"
        );
    }
    for name in ["", "a//b", "../a", "a?b", "a/..", "a%2f"] {
        let named = Repository::new(&repository.registry, name);
        assert!(
            matches!(client.manifest(&named, "1").await, Err(Error::InvalidName { .. })),
            "{name}"
        );
    }
}

#[tokio::test]
async fn manifest_digest_is_read_by_head_where_possible() {
    let server = Server::start(|seen, _| match (seen.method.as_str(), seen.uri.rsplit('/').next()) {
        ("HEAD", Some("head")) => [("docker-content-digest", any_digest().to_string())].into_response(),
        ("HEAD", Some("bare")) => status(200),
        ("HEAD", Some("get")) => status(405),
        ("HEAD", _) => status(404),
        _ => manifest("x/y", "{}"),
    })
    .await;
    let (client, repository) = (client(), server.repository());
    assert_eq!(client.manifest_digest(&repository, "head").await.unwrap(), any_digest());
    assert_eq!(server.count(), 1);
    assert_eq!(
        client.manifest_digest(&repository, "bare").await.unwrap(),
        Digest::of(b"{}")
    );
    assert_eq!(
        client.manifest_digest(&repository, "get").await.unwrap(),
        Digest::of(b"{}")
    );
    assert!(
        client
            .manifest_digest(&repository, "none")
            .await
            .unwrap_err()
            .is_not_found()
    );
}

#[tokio::test]
async fn whole_blobs_are_verified_and_limited_in_size() {
    let server = Server::start(|_, _| data().into_response()).await;
    let (client, repository) = (client(), server.repository());
    let digest = Digest::of(&data());
    assert_eq!(client.blob(&repository, &digest, 1000).await.unwrap(), data());
    let result = client.blob(&repository, &digest, 999).await;
    assert!(matches!(result, Err(Error::TooLarge { limit: 999, .. })), "{result:?}");
    let result = client.blob(&repository, &any_digest(), 1000).await;
    assert!(matches!(result, Err(Error::DigestMismatch { .. })), "{result:?}");
    assert_eq!(client.stats().requests, 4, "three reads and the attempt at TLS");
    assert!(client.stats().bytes_received >= 2000);
}

#[tokio::test]
async fn ranges_are_read_exactly() {
    let server = Server::start(|seen, _| ranged(seen, &data())).await;
    let (client, repository) = (client(), server.repository());
    for (offset, len) in [(0, 1), (5, 10), (0, 1000), (999, 1)] {
        let bytes = client
            .blob_range(&repository, &any_digest(), offset, len)
            .await
            .unwrap();
        assert_eq!(bytes, data()[offset as usize..][..len]);
    }
    assert_eq!(server.log()[1].header(header::RANGE), "bytes=5-14");
    assert_eq!(client.blob_range(&repository, &any_digest(), 5, 0).await.unwrap(), "");
    let result = client.blob_range(&repository, &any_digest(), u64::MAX, 2).await;
    assert!(matches!(result, Err(Error::WrongRange { .. })), "{result:?}");
}

#[tokio::test]
async fn whole_blob_is_read_up_to_the_end_of_the_range() {
    let server = Server::start(|_, _| data().into_response()).await;
    let (client, repository) = (client(), server.repository());
    let bytes = client.blob_range(&repository, &any_digest(), 500, 100).await.unwrap();
    assert_eq!(bytes, data()[500..600]);
    let result = client.blob_range(&repository, &any_digest(), 950, 100).await;
    assert!(matches!(result, Err(Error::WrongRange { .. })), "{result:?}");
}

/// Serves ranges of [`data`], extended by `before` and `behind` bytes.
async fn generous_server(before: usize, behind: usize) -> Server {
    Server::start(move |seen, _| {
        let (first, last) = seen.range().unwrap();
        let (first, last) = (first.saturating_sub(before), (last + behind).min(999));
        let range = [(header::CONTENT_RANGE, format!("bytes {first}-{last}/1000"))];
        (StatusCode::PARTIAL_CONTENT, range, data()[first..=last].to_vec()).into_response()
    })
    .await
}

#[tokio::test]
async fn requested_part_is_taken_of_a_longer_range() {
    for (before, behind) in [(0, 1), (1, 0), (300, 300), (2000, 2000)] {
        let server = generous_server(before, behind).await;
        let (client, repository) = (client(), server.repository());
        for (offset, len) in [(0, 10), (500, 100), (990, 10)] {
            let expected = &data()[offset..][..len];
            let bytes = client.blob_range(&repository, &any_digest(), offset as u64, len).await;
            assert_eq!(bytes.unwrap(), expected);
            let range = (offset as u64, (offset + len - 1) as u64);
            let mut stream = client
                .open_range(&repository, &any_digest(), range, false)
                .await
                .unwrap();
            let mut streamed = Vec::new();
            while let Some(bytes) = stream.next().await.unwrap() {
                streamed.extend_from_slice(&bytes);
            }
            assert_eq!(streamed, expected);
        }
    }
}

#[tokio::test]
async fn longer_range_that_starts_too_early_is_refused() {
    let server = Server::start(|_, _| {
        let range = [(header::CONTENT_RANGE, "bytes 0-99999999/100000000")];
        (StatusCode::PARTIAL_CONTENT, range, dripping(Duration::from_millis(1))).into_response()
    })
    .await;
    let offset = (64 << 20) + 1;
    let result = client()
        .blob_range(&server.repository(), &any_digest(), offset, 1)
        .await;
    assert!(matches!(result, Err(Error::WrongRange { .. })), "{result:?}");
}

#[tokio::test]
async fn wrong_ranges_are_refused_without_a_retry() {
    let answers: &[(u16, &str)] = &[
        (206, "bytes 6-15/1000"),
        (206, "bytes 5-9/10"),
        (206, "nonsense"),
        (206, ""),
        (416, "bytes */10"),
    ];
    for &(code, range) in answers {
        let server = Server::start(move |_, _| {
            let code = StatusCode::from_u16(code).unwrap();
            (code, [(header::CONTENT_RANGE, range)], vec![0; 10]).into_response()
        })
        .await;
        let result = client().blob_range(&server.repository(), &any_digest(), 5, 10).await;
        assert!(matches!(result, Err(Error::WrongRange { .. })), "{range}: {result:?}");
        assert_eq!(server.count(), 1, "{range}: retried");
    }
}

#[tokio::test]
async fn encoded_bodies_are_refused() {
    let server = Server::start(|_, _| ([(header::CONTENT_ENCODING, "gzip")], data()).into_response()).await;
    let result = client().blob_range(&server.repository(), &any_digest(), 0, 10).await;
    assert!(matches!(result, Err(Error::InvalidResponse { .. })), "{result:?}");
}

#[tokio::test]
async fn plain_http_on_loopback_is_remembered() {
    let server = Server::start(|seen, _| ranged(seen, &data())).await;
    let (client, repository) = (client(), server.repository());
    for _ in 0..5 {
        client.blob_range(&repository, &any_digest(), 0, 10).await.unwrap();
    }
    assert_eq!(client.stats().requests, 6, "TLS is tried once");
}

#[tokio::test]
async fn requests_in_flight_are_limited() {
    let active = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let counters = active.clone();
    let server = Server::start_async(move |seen, _| {
        let counters = counters.clone();
        async move {
            let now = counters.0.fetch_add(1, Ordering::SeqCst) + 1;
            counters.1.fetch_max(now, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(20)).await;
            counters.0.fetch_sub(1, Ordering::SeqCst);
            ranged(&seen, &data())
        }
    })
    .await;
    let client = client_with(Options {
        max_requests_per_host: 3,
        ..Options::default()
    });
    let tasks: Vec<_> = (0..12)
        .map(|i| {
            let (client, repository) = (client.clone(), server.repository());
            tokio::spawn(async move { client.blob_range(&repository, &any_digest(), i, 10).await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(active.1.load(Ordering::SeqCst), 3);
}

/// A request counts until its body has ended.
#[tokio::test]
async fn prefetches_leave_permits_for_reads() {
    let server = Server::start(|seen, _| match seen.range() {
        // Does not end before the reader drops it.
        Some((0, 99)) => {
            let range = (header::CONTENT_RANGE, "bytes 0-99/1000");
            (
                StatusCode::PARTIAL_CONTENT,
                [range],
                dripping(Duration::from_millis(500)),
            )
                .into_response()
        }
        _ => ranged(seen, &data()),
    })
    .await;
    let client = client_with(Options {
        max_requests_per_host: 4,
        ..Options::default()
    });
    let (sender, mut opened) = tokio::sync::mpsc::unbounded_channel();
    for _ in 0..6 {
        let (client, repository, sender) = (client.clone(), server.repository(), sender.clone());
        tokio::spawn(async move {
            let stream = client.open_range(&repository, &any_digest(), (0, 99), true).await;
            sender.send(stream.unwrap()).unwrap_or_default();
        });
    }
    let first = [opened.recv().await.unwrap(), opened.recv().await.unwrap()];
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!((server.count(), opened.len()), (client.max_prefetches(), 0));
    let read = client.blob_range(&server.repository(), &any_digest(), 100, 10).await;
    assert_eq!(read.unwrap(), data()[100..110]);
    assert_eq!(server.count(), 3);
    // Ended streams return their permits.
    drop(first);
    let _next = [opened.recv().await.unwrap(), opened.recv().await.unwrap()];
    assert_eq!(server.count(), 5);
}

#[tokio::test]
async fn ignored_ranges_are_remembered_until_one_is_honoured() {
    let server = Server::start(|seen, count| match count {
        1 => data().into_response(),
        _ => ranged(seen, &data()),
    })
    .await;
    let (client, repository) = (client(), server.repository());
    for expected in [true, false, true] {
        client.blob_range(&repository, &any_digest(), 3, 4).await.unwrap();
        assert_eq!(client.supports_ranges(&repository, &any_digest()), expected);
        assert!(client.supports_ranges(&repository, &Digest::of(b"other")));
    }
}
