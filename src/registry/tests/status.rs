//! What is known of hosts.

use super::*;
use crate::registry::{CircuitStatus, HostStatus};

fn named<'a>(hosts: &'a [HostStatus], name: &str) -> &'a HostStatus {
    hosts.iter().find(|host| host.host == name).unwrap()
}

#[tokio::test]
async fn hosts_are_listed_with_load_counters_and_circuit() {
    let storage = Server::start(|seen, _| ranged(seen, &data())).await;
    let location = format!("http://{}/signed", storage.address);
    let server = Server::start(move |_, _| {
        (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, location.clone())]).into_response()
    })
    .await;
    let client = client();
    let mut stream = client
        .open_range(&server.repository(), &any_digest(), (3, 6), false)
        .await
        .unwrap();
    let hosts = client.hosts();
    let registry = named(&hosts, &server.address.to_string());
    let load = registry.load.unwrap();
    assert_eq!((load.in_flight, load.waiting), (1, 0));
    assert_eq!(registry.circuit, CircuitStatus::Closed);
    assert_eq!((registry.stats.answers.redirect, registry.stats.bytes_received), (1, 0));
    // The attempt at TLS got no answer.
    assert_eq!((registry.stats.requests, registry.stats.answers.none), (2, 1));
    while stream.next().await.unwrap().is_some() {}
    drop(stream);
    let hosts = client.hosts();
    assert_eq!(named(&hosts, &server.address.to_string()).load.unwrap().in_flight, 0);
    let storage = named(&hosts, &storage.address.to_string());
    assert!(storage.load.is_none(), "it has no limit of requests");
    assert_eq!((storage.stats.answers.success, storage.stats.bytes_received), (1, 4));
}

#[tokio::test]
async fn open_circuit_and_retries_are_shown() {
    let (repository, _) = raw_server(&["HTTP/1.1 200 O\r\n"], false).await;
    let client = client_with(Options {
        retries: 1,
        circuit_failures: 1,
        circuit_pause: Duration::from_secs(60),
        circuit_max_pause: Duration::from_secs(60),
        ..Options::default()
    })
    .with_patience(Duration::ZERO);
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let unreachable = Repository::new(closed.to_string(), "org/image");
    client.blob_range(&unreachable, &any_digest(), 0, 4).await.unwrap_err();
    let host = named(&client.hosts(), &closed.to_string()).clone();
    assert!(matches!(host.circuit, CircuitStatus::Open(_)), "{host:?}");
    assert_eq!(host.stats.answers.none, host.stats.requests);
    let before = client.stats().retries;
    client.blob_range(&repository, &any_digest(), 0, 4).await.unwrap_err();
    assert_eq!(client.stats().retries, before + 1);
}

#[tokio::test]
async fn corrupt_answers_are_counted() {
    let server = Server::start(|seen, _| ranged(seen, &data())).await;
    let client = client();
    client
        .blob(&server.repository(), &any_digest(), 1 << 20)
        .await
        .unwrap_err();
    let (_, served_by) = client
        .blob_range_with_origin(&server.repository(), &any_digest(), 0, 4)
        .await
        .unwrap();
    let before = client.stats().corrupt_answers;
    assert!(before > 0);
    client.report_corrupt(&served_by);
    assert_eq!(client.stats().corrupt_answers, before + 1);
}
