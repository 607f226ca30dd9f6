//! Outages of less than `request_timeout`: calls wait for the host instead of failing.

use tokio::task::{JoinHandle, JoinSet};

use super::*;
use crate::registry::tests::{failures::reserved_port, mirrors::mirrored};

/// Bound of every wait, for a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// A registry that can go away and come back at the same address. Counts the requests that it gets.
struct Moody {
    address: SocketAddr,
    requests: Arc<AtomicUsize>,
    serving: Option<JoinHandle<()>>,
}

impl Moody {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut moody = Self {
            address: listener.local_addr().unwrap(),
            requests: Arc::default(),
            serving: None,
        };
        drop(listener);
        moody.come_back().await;
        moody
    }

    async fn come_back(&mut self) {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        let (listener, counter) = (socket.listen(64).unwrap(), Arc::clone(&self.requests));
        self.serving = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&counter)));
            }
        }));
    }

    /// Closes all connections, and refuses new ones.
    async fn leave(&mut self) {
        let serving = self.serving.take().unwrap();
        serving.abort();
        serving.await.unwrap_err();
    }

    fn repository(&self) -> Repository {
        Repository::new(self.address.to_string(), "org/image")
    }

    fn count(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// Answers requests for bytes 3 to 6 of [`data`] on one connection.
async fn serve(mut stream: tokio::net::TcpStream, requests: Arc<AtomicUsize>) {
    let mut head = [0; 8192];
    while let Ok(1..) = stream.read(&mut head).await {
        if head[0] != b'G' {
            return;
        }
        requests.fetch_add(1, Ordering::SeqCst);
        let answer = "HTTP/1.1 206 P\r\ncontent-range: bytes 3-6/1000\r\ncontent-length: 4\r\n\r\n";
        let answer = [answer.as_bytes(), &data()[3..7]].concat();
        if stream.write_all(&answer).await.is_err() {
            return;
        }
    }
}

/// Options with which an outage is noticed soon.
fn options() -> Options {
    Options {
        retries: 0,
        circuit_failures: 2,
        circuit_pause: Duration::from_millis(50),
        request_timeout: LONG,
        ..Options::default()
    }
}

type Read = JoinHandle<Result<bytes::Bytes, Error>>;

fn read(client: &Client, repository: &Repository) -> Read {
    let (client, repository) = (client.clone(), repository.clone());
    tokio::spawn(async move { client.blob_range(&repository, &any_digest(), 3, 4).await })
}

fn reads(client: &Client, repository: &Repository) -> Vec<Read> {
    (0..50).map(|_| read(client, repository)).collect()
}

async fn ended(read: Read) -> Result<bytes::Bytes, Error> {
    tokio::time::timeout(LONG, read).await.unwrap().unwrap()
}

#[tokio::test]
async fn calls_wait_for_a_registry_that_is_away() {
    let mut registry = Moody::start().await;
    let (client, repository) = (client_with(options()), registry.repository());
    ended(read(&client, &repository)).await.unwrap();
    for _ in 0..3 {
        registry.leave().await;
        let before = registry.count();
        let waiting = reads(&client, &repository);
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(waiting.iter().all(|read| !read.is_finished()));
        registry.come_back().await;
        for read in waiting {
            assert_eq!(ended(read).await.unwrap(), data()[3..7]);
        }
        // Each read, and connections that were closed meanwhile.
        assert!(registry.count() - before >= 50);
    }
}

#[tokio::test]
async fn connections_that_break_without_an_answer_are_waited_out() {
    let (repository, requests) = raw_server(
        &[
            "",
            "",
            "",
            "",
            "",
            "",
            "HTTP/1.1 206 P\r\ncontent-range: bytes 3-6/9\r\ncontent-length: 4\r\n\r\nback",
        ],
        false,
    )
    .await;
    let client = client_with(options());
    assert_eq!(ended(read(&client, &repository)).await.unwrap(), "back");
    assert_eq!(requests.load(Ordering::SeqCst), 7);
}

#[tokio::test]
async fn prefetches_and_impatient_calls_do_not_wait() {
    let (_socket, repository) = reserved_port();
    let client = client_with(options());
    let (waiting, digest) = (read(&client, &repository), any_digest());
    for _ in 0..5 {
        let opened = client.open_range(&repository, &digest, (3, 6), true);
        let error = tokio::time::timeout(LONG, opened).await.unwrap().err().unwrap();
        assert!(error.is_away(), "{error:?}");
        let hasty = client.with_patience(Duration::ZERO);
        assert!(ended(read(&hasty, &repository)).await.unwrap_err().is_away());
    }
    assert!(!waiting.is_finished());
    waiting.abort();
}

#[tokio::test]
async fn registry_that_stays_away_fails_calls_with_its_error_and_later_ones_at_once() {
    let (_socket, repository) = reserved_port();
    let client = client_with(Options {
        request_timeout: Duration::from_millis(500),
        circuit_max_pause: Duration::from_secs(600),
        circuit_pause: Duration::from_secs(600),
        ..options()
    });
    // Longer than `request_timeout`, so that the outage ends it.
    let (client, digest) = (client.with_patience(LONG), any_digest());
    let blob = client.blob(&repository, &digest, 100 << 20);
    let error = tokio::time::timeout(LONG, blob).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::CircuitOpen { .. }), "{error:?}");
    let requests = client.stats().requests;
    for _ in 0..20 {
        let error = ended(read(&client, &repository)).await.unwrap_err();
        assert!(matches!(error, Error::CircuitOpen { .. }), "{error:?}");
        let chain = crate::error_chain::ErrorChain(&error).to_string();
        assert!(chain.contains("cannot connect"), "{chain}");
    }
    assert_eq!(client.stats().requests, requests, "no request is sent");
}

#[tokio::test]
async fn call_ends_with_the_error_of_the_host_when_its_patience_does() {
    let (_socket, repository) = reserved_port();
    let client = client_with(options()).with_patience(Duration::from_millis(200));
    let error = ended(read(&client, &repository)).await.unwrap_err();
    assert!(error.is_away() && !matches!(error, Error::Timeout { .. }), "{error:?}");
}

/// A proxy in front of the registry answers in its place.
#[tokio::test]
async fn unavailable_registry_is_probed_by_single_pings() {
    let is_away = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let away = Arc::clone(&is_away);
    let registry = Server::start(move |seen, _| match (away.load(Ordering::SeqCst), seen.uri.as_str()) {
        (true, _) => status(502),
        (false, "/v2/") => status(401),
        (false, _) => ranged(seen, &data()),
    })
    .await;
    let (client, repository) = (client_with(options()), registry.repository());
    let waiting = reads(&client, &repository);
    let pings = || registry.log().iter().filter(|seen| seen.uri == "/v2/").count();
    tokio::time::timeout(LONG, async {
        while pings() < 4 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    let before = registry.count();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(registry.count() - before < 10, "only probes");
    is_away.store(false, Ordering::SeqCst);
    for read in waiting {
        assert_eq!(ended(read).await.unwrap(), data()[3..7]);
    }
}

/// A registry that cannot serve one blob is not away.
#[tokio::test]
async fn unavailable_blob_delays_no_other() {
    let bad = Digest::of(b"bad");
    let registry = Server::start(move |seen, _| match seen.uri.as_str() {
        "/v2/" => status(200),
        uri if uri.contains(&bad.to_string()) => status(503),
        _ => ranged(seen, &data()),
    })
    .await;
    let client = client_with(Options {
        circuit_pause: Duration::from_secs(600),
        ..options()
    });
    let repository = registry.repository();
    let of_bad = tokio::spawn({
        let (client, repository) = (client.clone(), repository.clone());
        async move { client.blob_range(&repository, &bad, 3, 4).await }
    });
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(ended(read(&client, &repository)).await.unwrap(), data()[3..7]);
    }
    assert!(!of_bad.is_finished());
    of_bad.abort();
}

#[tokio::test]
async fn answers_are_not_waited_out() {
    for code in [400, 401, 403, 404] {
        let registry = Server::start(move |_, _| status(code)).await;
        ended(read(&client_with(options()), &registry.repository()))
            .await
            .unwrap_err();
        assert!(registry.count() <= 2, "{code}");
    }
}

#[tokio::test]
async fn storage_that_is_away_is_waited_for_without_delaying_the_registry() {
    let mut storage = Moody::start().await;
    let target = storage.address;
    let other = any_digest();
    let registry = Server::start(move |seen, _| match seen.uri.contains(&other.to_string()) {
        true => redirected(format!("http://{target}/blob")),
        false => ranged(seen, &data()),
    })
    .await;
    let client = client_with(Options {
        max_requests_per_host: 2,
        ..options()
    });
    let repository = registry.repository();
    storage.leave().await;
    let waiting = reads(&client, &repository);
    for number in 0..20u8 {
        let blob = Digest::of(&[number]);
        let read = client.blob_range(&repository, &blob, 3, 4);
        assert_eq!(tokio::time::timeout(LONG, read).await.unwrap().unwrap(), data()[3..7]);
    }
    assert!(waiting.iter().all(|read| !read.is_finished()));
    storage.come_back().await;
    for read in waiting {
        assert_eq!(ended(read).await.unwrap(), data()[3..7]);
    }
}

#[tokio::test]
async fn mirror_that_works_is_asked_at_once() {
    let (_socket, dead) = reserved_port();
    let mirror = Server::start(|seen, _| ranged(seen, &data())).await;
    let (_dir, files) = mirrored(&dead, &[mirror.address.to_string()]);
    let client = client_with(Options {
        registries_conf: Some(files),
        ..options()
    });
    for read in reads(&client, &dead) {
        assert_eq!(ended(read).await.unwrap(), data()[3..7]);
    }
}

/// The registry cannot be reached at all, as on a site that has only a mirror.
#[tokio::test]
async fn mirror_that_is_away_is_waited_for_if_the_registry_is_away_too() {
    let (_socket, dead) = reserved_port();
    let mut mirror = Moody::start().await;
    let (_dir, files) = mirrored(&dead, &[mirror.address.to_string()]);
    let client = client_with(Options {
        registries_conf: Some(files),
        ..options()
    });
    ended(read(&client, &dead)).await.unwrap();
    mirror.leave().await;
    let waiting = reads(&client, &dead);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(waiting.iter().all(|read| !read.is_finished()));
    mirror.come_back().await;
    for read in waiting {
        assert_eq!(ended(read).await.unwrap(), data()[3..7]);
    }
}

#[tokio::test]
async fn offline_client_does_not_wait() {
    let (_socket, repository) = reserved_port();
    let client = client_with(Options {
        offline: true,
        ..options()
    });
    let result = ended(read(&client, &repository)).await;
    assert!(matches!(result, Err(Error::Offline { .. })), "{result:?}");
}
