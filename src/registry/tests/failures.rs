//! Retries, time-outs and circuits.

use std::time::Instant;

use tokio::net::TcpSocket;

use super::*;

#[tokio::test]
async fn transient_failures_are_retried() {
    let server = Server::start(|seen, count| match count {
        0 => (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, "0")]).into_response(),
        1 => status(503),
        _ => ranged(seen, &data()),
    })
    .await;
    let bytes = client()
        .blob_range(&server.repository(), &any_digest(), 3, 4)
        .await
        .unwrap();
    assert_eq!(bytes, data()[3..7]);
    assert_eq!(server.count(), 3);
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let server = Server::start(|seen, count| match count {
        0 => (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, "1")]).into_response(),
        _ => ranged(seen, &data()),
    })
    .await;
    let started = Instant::now();
    client()
        .blob_range(&server.repository(), &any_digest(), 3, 4)
        .await
        .unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn error_contains_the_message_of_the_registry() {
    let body = r#"{"errors":[{"code":"UNAVAILABLE","message":"down\nfor a while"}]}"#;
    let server = Server::start(move |_, _| (StatusCode::BAD_GATEWAY, body).into_response()).await;
    let error = impatient()
        .blob_range(&server.repository(), &any_digest(), 3, 4)
        .await
        .unwrap_err();
    assert!(error.is_transient());
    assert!(
        error
            .to_string()
            .ends_with("answered with status 502: UNAVAILABLE down for a while"),
        "{error}"
    );
    assert_eq!(server.count(), 3);
}

#[tokio::test]
async fn refusals_are_not_retried() {
    for (code, transient) in [(400, false), (403, false), (404, false), (451, false)] {
        let server = Server::start(move |_, _| status(code)).await;
        let error = client()
            .blob_range(&server.repository(), &any_digest(), 3, 4)
            .await
            .unwrap_err();
        assert_eq!(error.is_transient(), transient, "{error}");
        assert_eq!(server.count(), 1, "{code}");
    }
}

const SHORT: &str = "HTTP/1.1 206 P\r\ncontent-range: bytes 0-9/10\r\ncontent-length: 10\r\n\r\n01234";
const FULL: &str = "HTTP/1.1 206 P\r\ncontent-range: bytes 0-9/10\r\ncontent-length: 10\r\n\r\n0123456789";
/// A complete body that is shorter than its range.
const SMALL: &str =
    "HTTP/1.1 206 P\r\ncontent-range: bytes 0-9/10\r\ncontent-length: 5\r\nconnection: close\r\n\r\n01234";

#[tokio::test]
async fn short_bodies_are_retried() {
    let (repository, requests) = raw_server(&[SHORT, SMALL, FULL], false).await;
    assert_eq!(
        client().blob_range(&repository, &any_digest(), 0, 10).await.unwrap(),
        "0123456789"
    );
    assert_eq!(requests.load(Ordering::SeqCst), 3);

    let (repository, requests) = raw_server(&[SHORT], false).await;
    let result = client().blob_range(&repository, &any_digest(), 0, 10).await;
    assert!(
        matches!(
            result,
            Err(Error::ShortBody {
                expected: 10,
                actual: 5,
                ..
            })
        ),
        "{result:?}"
    );
    assert_eq!(requests.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn connection_closed_without_an_answer_is_retried() {
    let (repository, requests) = raw_server(&["", FULL], false).await;
    assert_eq!(
        client().blob_range(&repository, &any_digest(), 0, 10).await.unwrap(),
        "0123456789"
    );
    assert_eq!(requests.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn silence_ends_in_a_timeout() {
    for script in [&["", ""][..], &[SHORT, SHORT]] {
        let (repository, requests) = raw_server(script, true).await;
        let client = client_with(Options {
            connect_timeout: Duration::from_millis(300),
            read_timeout: Duration::from_millis(300),
            retries: 1,
            ..Options::default()
        });
        let client = client.with_patience(Duration::ZERO);
        let started = Instant::now();
        let result = client.blob_range(&repository, &any_digest(), 0, 10).await;
        assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
        assert_eq!(requests.load(Ordering::SeqCst), 2);
    }
}

#[tokio::test]
async fn whole_call_is_limited_in_time() {
    let server = Server::start(|_, _| (StatusCode::SERVICE_UNAVAILABLE, [("retry-after", "60")]).into_response()).await;
    let client = client_with(Options {
        request_timeout: Duration::from_millis(300),
        ..Options::default()
    });
    let started = Instant::now();
    let result = client.blob_range(&server.repository(), &any_digest(), 0, 10).await;
    assert!(
        matches!(result, Err(Error::Status { .. })),
        "tells what was waited for: {result:?}"
    );
    let result = client
        .with_patience(Duration::ZERO)
        .blob_range(&server.repository(), &any_digest(), 0, 10)
        .await;
    assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
    assert!(started.elapsed() < Duration::from_secs(30));
}

/// A port that is bound but not listened on.
pub(super) fn reserved_port() -> (TcpSocket, Repository) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let repository = Repository::new(socket.local_addr().unwrap().to_string(), "org/image");
    (socket, repository)
}

#[tokio::test]
async fn unreachable_host_is_a_transient_failure() {
    let (_socket, repository) = reserved_port();
    let error = impatient().manifest(&repository, "1").await.unwrap_err();
    assert!(
        matches!(error, Error::Unreachable { .. }) && error.is_transient(),
        "{error:?}"
    );
    assert_eq!(error.to_string(), format!("cannot connect to {}", repository.registry));
    assert!(std::error::Error::source(&error).is_some());
}

#[tokio::test]
async fn registry_that_comes_back_is_reached_by_a_retry() {
    let (socket, repository) = reserved_port();
    let client = client_with(Options {
        retries: 5,
        ..Options::default()
    });
    let call = tokio::spawn(async move { client.manifest(&repository, "1").await });
    tokio::time::sleep(Duration::from_millis(150)).await;
    let app = axum::Router::new().fallback(|| async { manifest("x/y", "{}") });
    tokio::spawn(async move { axum::serve(socket.listen(16).unwrap(), app).await });
    call.await.unwrap().unwrap();
}

/// Of a thousand readers, only the first few wait for a silent host.
#[tokio::test]
async fn open_circuit_fails_requests_at_once() {
    let (repository, requests) = raw_server(&[""], true).await;
    let client = client_with(Options {
        connect_timeout: Duration::from_millis(200),
        read_timeout: Duration::from_millis(200),
        max_requests_per_host: 8,
        circuit_failures: 3,
        circuit_pause: Duration::from_secs(60),
        circuit_max_pause: Duration::from_secs(60),
        ..Options::default()
    });
    let client = client.with_patience(Duration::ZERO);
    let read = || {
        let (client, repository) = (client.clone(), repository.clone());
        tokio::spawn(async move { client.blob_range(&repository, &any_digest(), 0, 10).await })
    };
    let readers: Vec<_> = (0..1000).map(|_| read()).collect();
    let mut refused = 0;
    for reader in readers {
        match reader.await.unwrap() {
            Err(Error::CircuitOpen { failures, retry_in, .. }) => {
                assert!(failures >= 3 && retry_in <= Duration::from_secs(60));
                refused += 1;
            }
            result => assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}"),
        }
    }
    assert!(refused >= 992, "{refused}");
    assert!(requests.load(Ordering::SeqCst) <= 16, "{requests:?}");
    let error = read().await.unwrap().unwrap_err();
    assert!(
        error.is_unreachable() && error.to_string().contains("next attempt in"),
        "{error}"
    );
}

#[tokio::test]
async fn retry_after_delays_all_requests_to_the_host() {
    let server = Server::start(|seen, count| match count {
        0 => (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")]).into_response(),
        _ => ranged(seen, &data()),
    })
    .await;
    let (client, repository) = (client(), server.repository());
    let first = tokio::spawn({
        let (client, repository) = (client.clone(), repository.clone());
        async move { client.blob_range(&repository, &any_digest(), 0, 10).await }
    });
    while server.count() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    let started = Instant::now();
    client.blob_range(&repository, &any_digest(), 0, 10).await.unwrap();
    assert!(started.elapsed() >= Duration::from_millis(500));
    first.await.unwrap().unwrap();
    assert_eq!(server.count(), 3);
}

#[tokio::test]
async fn retry_after_may_be_a_date() {
    let server = Server::start(|seen, count| match count {
        0 => {
            let date = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(2));
            (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, date)]).into_response()
        }
        _ => ranged(seen, &data()),
    })
    .await;
    let started = Instant::now();
    let read = client().blob_range(&server.repository(), &any_digest(), 3, 4).await;
    read.unwrap();
    assert!(started.elapsed() >= Duration::from_millis(900));
}

/// The host is asked each time: it may have ignored ranges only while it fetched the blob itself.
#[tokio::test]
async fn whole_blob_is_not_read_for_a_distant_range() {
    let (repository, requests) = raw_server(&["HTTP/1.1 200 O\r\ncontent-length: 1000000000\r\n\r\n"], true).await;
    let client = client();
    for _ in 0..3 {
        let error = client
            .blob_range(&repository, &any_digest(), 100 << 20, 10)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::WrongRange { .. }), "{error:?}");
    }
    let far = (10 << 30, (10 << 30) + 9);
    let opened = client.open_range(&repository, &any_digest(), far, false).await;
    let error = opened.err().unwrap();
    assert!(matches!(error, Error::WrongRange { .. }), "{error:?}");
    assert_eq!(requests.load(Ordering::SeqCst), 4);
    assert_eq!(client.stats().bytes_received, 0);
}

/// The probe reads a long body; other requests do not wait for its end.
#[tokio::test]
async fn circuit_closes_while_the_probe_still_reads() {
    let server = Server::start_async(|seen, count| async move {
        match count {
            0 => tokio::time::sleep(Duration::from_secs(60)).await,
            1 => return dripping(Duration::from_secs(60)).into_response(),
            _ => {}
        }
        ranged(&seen, &data())
    })
    .await;
    let client = client_with(Options {
        connect_timeout: Duration::from_millis(200),
        answer_timeout: Some(Duration::from_millis(200)),
        retries: 0,
        circuit_failures: 1,
        circuit_pause: Duration::from_millis(50),
        ..Options::default()
    });
    let repository = server.repository();
    let digest = any_digest();
    let read = || client.blob_range(&repository, &digest, 0, 10);
    let hasty = client.with_patience(Duration::ZERO);
    let failed = hasty.blob_range(&repository, &digest, 0, 10).await;
    assert!(matches!(failed, Err(Error::Timeout { .. })));
    let mut stream = client.open_range(&repository, &digest, (0, 99), false).await.unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap(), "x");
    for _ in 0..3 {
        read().await.unwrap();
    }
    drop(stream);
}

#[tokio::test]
async fn huge_retry_after_is_limited() {
    for asked in ["18446744073709551615", "Fri, 31 Dec 9999 23:59:59 GMT"] {
        let server = Server::start(move |seen, count| match count {
            0 => (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, asked)]).into_response(),
            _ => ranged(seen, &data()),
        })
        .await;
        let client = client_with(Options {
            max_pause: Duration::from_millis(50),
            ..Options::default()
        });
        let read = client.blob_range(&server.repository(), &any_digest(), 3, 4).await;
        assert_eq!(read.unwrap(), data()[3..7]);
    }
}
