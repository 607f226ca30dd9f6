//! Precedence and lifetime of credentials, and their replacement when refused.

use bytes::Bytes;

use super::*;
use crate::registry::Credentials;

const MANY: usize = 50;

fn password(user: &str) -> Credentials {
    Credentials::Password {
        user: user.to_owned(),
        password: "x".to_owned(),
    }
}

fn basic(user: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:x")))
}

fn with_files(files: Vec<PathBuf>, retries: u32) -> Client {
    client_with(Options {
        auth_files: Some(files),
        retries,
        ..Options::default()
    })
}

fn token(text: &str, expires_in: u32) -> Response {
    serde_json::json!({ "token": text, "expires_in": expires_in })
        .to_string()
        .into_response()
}

fn bearer_challenge(seen: &Seen) -> Response {
    let host = seen.header(header::HOST);
    challenged(format!(r#"Bearer realm="http://{host}/token""#))
}

fn is_token(seen: &Seen) -> bool {
    seen.uri.starts_with("/token")
}

fn token_requests(server: &Server) -> usize {
    server.log().iter().filter(|seen| is_token(seen)).count()
}

/// Reads the same bytes [`MANY`] times at once. Returns the failures.
async fn read_many(client: &Client, repository: &Repository) -> Vec<Error> {
    let task = |_| {
        let (client, repository) = (client.clone(), repository.clone());
        tokio::spawn(async move { client.blob_range(&repository, &any_digest(), 0, 10).await })
    };
    let mut failures = Vec::new();
    for task in (0..MANY).map(task).collect::<Vec<_>>() {
        failures.extend(task.await.unwrap().err());
    }
    failures
}

async fn read(client: &Client, repository: &Repository) -> Result<Bytes, Error> {
    client.blob_range(repository, &any_digest(), 0, 10).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_token_is_renewed_once_for_concurrent_requests() {
    // The first token serves ten requests.
    let (issued, served) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let server = Server::start(move |seen, _| {
        if is_token(seen) {
            return token(&issued.fetch_add(1, Ordering::SeqCst).to_string(), 300);
        }
        match seen.authorization() {
            "Bearer 0" if served.fetch_add(1, Ordering::SeqCst) < 10 => ranged(seen, &data()),
            "Bearer 1" => ranged(seen, &data()),
            _ => bearer_challenge(seen),
        }
    })
    .await;
    let client = client();
    read(&client, &server.repository()).await.unwrap();
    let failures = read_many(&client, &server.repository()).await;
    assert!(failures.is_empty(), "{failures:?}");
    assert_eq!(token_requests(&server), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registry_that_refuses_all_tokens_gets_few_requests() {
    let server = Server::start_async(|seen, _| async move {
        if !is_token(&seen) {
            return bearer_challenge(&seen);
        }
        // Lets all requests wait for this token.
        tokio::time::sleep(Duration::from_millis(300)).await;
        token("useless", 300)
    })
    .await;
    let failures = read_many(&client(), &server.repository()).await;
    let refused = |error: &Error| matches!(error, Error::Unauthorized { .. });
    assert!(failures.len() == MANY && failures.iter().all(refused), "{failures:?}");
    // Each read sends at most three requests, and few of them request a token.
    assert!(
        server.count() <= 4 * MANY && token_requests(&server) <= MANY / 2,
        "{}",
        token_requests(&server)
    );
}

#[tokio::test]
async fn expired_token_is_renewed_before_its_use() {
    let server = Server::start(|seen, _| match (is_token(seen), seen.authorization()) {
        (true, _) => token("short", 1),
        (_, "Bearer short") => ranged(seen, &data()),
        _ => bearer_challenge(seen),
    })
    .await;
    let (client, repository) = (client(), server.repository());
    for _ in 0..2 {
        read(&client, &repository).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
    let sent: Vec<_> = server
        .log()
        .iter()
        .map(|seen| seen.authorization().to_owned())
        .collect();
    assert_eq!(sent, ["", "", "Bearer short", "", "Bearer short"]);
    assert_eq!(token_requests(&server), 2);
}

#[tokio::test]
async fn failed_token_request_is_repeated_by_the_next_call() {
    let server = Server::start(|seen, count| match (is_token(seen), seen.authorization()) {
        (true, _) if count == 1 => status(503),
        (true, _) => token("t", 300),
        (_, "Bearer t") => ranged(seen, &data()),
        _ => bearer_challenge(seen),
    })
    .await;
    let client = with_files(Vec::new(), 0).with_patience(Duration::ZERO);
    let error = read(&client, &server.repository()).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    read(&client, &server.repository()).await.unwrap();
    assert_eq!(token_requests(&server), 2);
}

#[tokio::test]
async fn identity_token_is_sent_as_password_without_oauth2() {
    for (entry, expected, account) in [
        (serde_json::json!({ "identitytoken": "id" }), "<token>:id", ""),
        (
            serde_json::json!({ "identitytoken": "id", "auth": BASE64_STANDARD.encode("me:") }),
            "me:id",
            "account=me&",
        ),
    ] {
        let server = Server::start(|seen, _| match (seen.method.as_str(), seen.authorization()) {
            ("POST", _) => status(405),
            _ if is_token(seen) => token("t", 300),
            (_, "Bearer t") => ranged(seen, &data()),
            _ => bearer_challenge(seen),
        })
        .await;
        let auths = serde_json::json!({ "auths": { server.address.to_string(): entry } });
        let (_dir, files) = write_auth_file(&auths.to_string());
        read(&with_files(files, 0), &server.repository()).await.unwrap();
        let asked = &server.log()[2];
        let header = format!("Basic {}", BASE64_STANDARD.encode(expected));
        assert_eq!((asked.method.as_str(), asked.authorization()), ("GET", &*header));
        assert_eq!(
            asked.uri,
            format!("/token?{account}scope=repository%3Aorg%2Fimage%3Apull")
        );
    }
}

#[tokio::test]
async fn refused_identity_token_is_unauthorized() {
    let server = Server::start(|seen, _| match is_token(seen) {
        true => status(400),
        false => bearer_challenge(seen),
    })
    .await;
    let auths = serde_json::json!({ "auths": { server.address.to_string(): { "identitytoken": "s3cr3t" } } });
    let (_dir, files) = write_auth_file(&auths.to_string());
    let error = read(&with_files(files, 0), &server.repository()).await.unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("identity token") && !text.contains("s3cr3t"), "{text}");
}

#[tokio::test]
async fn offered_scope_is_requested_only_if_it_is_a_pull() {
    for (scope, asked) in [
        (
            "repository:proxied/image:pull",
            "&scope=repository%3Aproxied%2Fimage%3Apull",
        ),
        ("repository:org/image:pull,push", ""),
        ("repository:org/image:pull repository:other:push", ""),
        ("registry:catalog:*", ""),
    ] {
        let server = Server::start(move |seen, _| {
            let host = seen.header(header::HOST);
            match (is_token(seen), seen.authorization()) {
                (true, _) => token("t", 300),
                (_, "Bearer t") => ranged(seen, &data()),
                _ => challenged(format!(r#"Bearer realm="http://{host}/token",scope="{scope}""#)),
            }
        })
        .await;
        read(&client(), &server.repository()).await.unwrap();
        let expected = format!("/token?scope=repository%3Aorg%2Fimage%3Apull{asked}");
        assert_eq!(server.log()[1].uri, expected);
    }
}

/// A registry that accepts the password of `user`, or a token obtained with it.
async fn accepting(user: &'static str, bearer: bool) -> Server {
    Server::start(move |seen, _| {
        let right = seen.authorization() == basic(user);
        match (is_token(seen), bearer) {
            (true, _) if right => token("t", 300),
            (true, _) => status(401),
            (_, true) if seen.authorization() == "Bearer t" => ranged(seen, &data()),
            (_, true) => bearer_challenge(seen),
            (_, false) if right => ranged(seen, &data()),
            (_, false) => challenged(r#"Basic realm="r""#),
        }
    })
    .await
}

#[tokio::test]
async fn pushed_credentials_precede_files() {
    for bearer in [false, true] {
        let server = accepting("pushed", bearer).await;
        let (_dir, files) = auth_file(&[(&server.address.to_string(), "file:x")]);
        let (client, repository) = (with_files(files, 0), server.repository());
        assert!(read(&client, &repository).await.is_err());
        client.push_credentials(&repository, password("pushed")).unwrap();
        read(&client, &repository).await.unwrap();
        let below = Repository::new(&repository.registry, "org/image/part");
        read(&client, &below).await.unwrap();
        // Other repositories do not use them.
        let other = Repository::new(&repository.registry, "org/other");
        assert!(read(&client, &other).await.is_err());
        assert!(!format!("{client:?} {:?}", password("s3cr3t")).contains("s3cr3t"));
    }
}

#[tokio::test]
async fn refused_pushed_credentials_are_replaced_by_files() {
    for bearer in [false, true] {
        let server = accepting("file", bearer).await;
        let (_dir, files) = auth_file(&[(&server.address.to_string(), "file:x")]);
        let (client, repository) = (with_files(files, 0), server.repository());
        client.push_credentials(&repository, password("pushed")).unwrap();
        read(&client, &repository).await.unwrap();
        // They are not tried again.
        let tried = |log: Vec<Seen>| {
            log.iter()
                .filter(|seen| seen.authorization() == basic("pushed"))
                .count()
        };
        read(&client, &Repository::new(&repository.registry, "org/image/part"))
            .await
            .unwrap();
        assert_eq!(tried(server.log()), 1);
        // They are tried again once pushed again.
        client.push_credentials(&repository, password("pushed")).unwrap();
        read(&client, &repository).await.unwrap();
        assert_eq!(tried(server.log()), 2);
    }
}

/// Some registries answer 403 to a token obtained with expired credentials.
#[tokio::test]
async fn denied_pushed_credentials_are_replaced_by_files() {
    let server = Server::start(|seen, _| match seen.authorization() {
        sent if sent == basic("pushed") => status(403),
        sent if sent == basic("file") => ranged(seen, &data()),
        _ => challenged(r#"Basic realm="r""#),
    })
    .await;
    let (_dir, files) = auth_file(&[(&server.address.to_string(), "file:x")]);
    let (client, repository) = (with_files(files, 0), server.repository());
    client.push_credentials(&repository, password("pushed")).unwrap();
    assert!(read_many(&client, &repository).await.is_empty());
    let log = server.log();
    let denied = || log.iter().filter(|seen| seen.authorization() == basic("pushed"));
    assert!(denied().count() >= 1);
    let before = server.count();
    read(&client, &repository).await.unwrap();
    assert_eq!(server.count(), before + 1);
    // Without other credentials, later calls are denied at once.
    let (_dir, files) = auth_file(&[]);
    let client = with_files(files, 0);
    client.push_credentials(&repository, password("pushed")).unwrap();
    for expected in [3, 1, 1] {
        let before = server.count();
        assert!(matches!(read(&client, &repository).await, Err(Error::Denied { .. })));
        assert_eq!(server.count(), before + expected);
    }
}

#[tokio::test]
async fn pushed_credentials_need_a_valid_repository_name() {
    let error = client().push_credentials(&Repository::new("r.example", "a/../b"), password("me"));
    assert!(matches!(error, Err(Error::InvalidName { .. })), "{error:?}");
}
