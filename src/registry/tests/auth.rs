//! Tokens, passwords, and redirects that must not receive them.

use super::{
    super::{
        auth::Auth, challenge::challenges, host_name::Trust, redirect_hosts::RedirectHosts, request::HttpRequest,
        response, transport::Transport,
    },
    *,
};

const SECRET: &str = "s3cr3t";

/// A registry with its own token server at `/token`. Tokens are numbered, and only the latest is valid.
async fn token_registry(valid: Arc<AtomicUsize>) -> Server {
    Server::start(move |seen, _| {
        if seen.uri.starts_with("/token") {
            let token = format!("{SECRET}-{}", valid.fetch_add(1, Ordering::SeqCst) + 1);
            return serde_json::json!({ "token": token, "expires_in": 300 })
                .to_string()
                .into_response();
        }
        let latest = format!("Bearer {SECRET}-{}", valid.load(Ordering::SeqCst));
        if seen.authorization() != latest {
            let host = seen.header(header::HOST);
            return challenged(format!(
                r#"Bearer realm="http://{host}/token?a=b",service="the service""#
            ));
        }
        ranged(seen, &data())
    })
    .await
}

fn token_requests(server: &Server) -> Vec<Seen> {
    server
        .log()
        .into_iter()
        .filter(|seen| seen.uri.starts_with("/token"))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn token_is_obtained_once_for_concurrent_requests() {
    let valid = Arc::new(AtomicUsize::new(0));
    let server = token_registry(valid.clone()).await;
    let (_dir, files) = auth_file(&[(&server.address.to_string(), "me:pass word")]);
    let client = client_with(Options {
        auth_files: Some(files),
        ..Options::default()
    });
    let read_many = async || {
        let task = |i| {
            let (client, repository) = (client.clone(), server.repository());
            tokio::spawn(async move { client.blob_range(&repository, &any_digest(), i, 10).await })
        };
        for task in (0..20).map(task).collect::<Vec<_>>() {
            task.await.unwrap().unwrap();
        }
    };
    read_many().await;
    let asked = token_requests(&server);
    assert_eq!(asked.len(), 1);
    assert_eq!(
        asked[0].uri,
        "/token?a=b&account=me&service=the+service&scope=repository%3Aorg%2Fimage%3Apull"
    );
    let basic = format!("Basic {}", BASE64_STANDARD.encode("me:pass word"));
    assert_eq!(asked[0].authorization(), basic);
    assert!(
        server
            .log()
            .iter()
            .all(|seen| seen.uri.starts_with("/token") || seen.authorization() != basic)
    );

    // The registry forgets the token: one of the requests obtains another.
    valid.fetch_add(1, Ordering::SeqCst);
    read_many().await;
    assert_eq!(token_requests(&server).len(), 2);
    assert!(!format!("{client:?}").contains(SECRET));
}

#[tokio::test]
async fn anonymous_token_is_requested_without_credentials() {
    let server = token_registry(Arc::default()).await;
    client()
        .blob_range(&server.repository(), &any_digest(), 0, 10)
        .await
        .unwrap();
    let asked = token_requests(&server);
    assert_eq!(
        asked[0].uri,
        "/token?a=b&service=the+service&scope=repository%3Aorg%2Fimage%3Apull"
    );
    assert_eq!(asked[0].authorization(), "");
}

#[tokio::test]
async fn identity_token_is_posted() {
    let server = Server::start(|seen, _| match (seen.method.as_str(), seen.authorization()) {
        ("POST", _) => serde_json::json!({ "access_token": "access" })
            .to_string()
            .into_response(),
        ("GET", "Bearer access") => ranged(seen, &data()),
        _ => challenged(format!(
            r#"Bearer realm="http://{}/token",service=s"#,
            seen.header(header::HOST)
        )),
    })
    .await;
    let auths = serde_json::json!({ "auths": { server.address.to_string(): { "identitytoken": "id&token" } } });
    let (_dir, files) = write_auth_file(&auths.to_string());
    let client = client_with(Options {
        auth_files: Some(files),
        ..Options::default()
    });
    client
        .blob_range(&server.repository(), &any_digest(), 0, 10)
        .await
        .unwrap();
    let posted = server
        .log()
        .into_iter()
        .find(|seen| seen.method == Method::POST)
        .unwrap();
    assert_eq!(posted.uri, "/token");
    assert_eq!(posted.header(header::CONTENT_TYPE), "application/x-www-form-urlencoded");
    let form = "grant_type=refresh_token&service=s&client_id=nydus-store&scope=repository%3Aorg%2Fimage%3Apull\
                &refresh_token=id%26token";
    assert_eq!(posted.body, form);
}

#[tokio::test]
async fn basic_authentication_uses_the_most_specific_credentials() {
    let server = Server::start(|seen, _| {
        let user = if seen.uri.starts_with("/v2/org/image/") {
            "image"
        } else {
            "org"
        };
        let expected = format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{SECRET}")));
        if seen.authorization() == expected {
            ranged(seen, &data())
        } else {
            challenged(r#"Basic realm="r""#)
        }
    })
    .await;
    let host = server.address.to_string();
    let (image, org) = (format!("image:{SECRET}"), format!("org:{SECRET}"));
    let (_dir, mut files) = auth_file(&[
        (&host, "wrong:x"),
        (&format!("{host}/org/image"), &image),
        (&format!("{host}/org"), &org),
    ]);
    // Malformed and missing files are skipped.
    let (_other, malformed) = write_auth_file("{");
    files.splice(0..0, malformed.into_iter().chain(["/nonexistent/auth.json".into()]));
    let client = client_with(Options {
        auth_files: Some(files),
        ..Options::default()
    });
    for name in ["org/image", "org/other"] {
        client
            .blob_range(&Repository::new(&host, name), &any_digest(), 0, 10)
            .await
            .unwrap();
    }
    let error = client
        .blob_range(&Repository::new(&host, "else"), &any_digest(), 0, 10)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unauthorized { .. }), "{error:?}");
    assert!(
        error.to_string().contains("auth.json") && !error.is_transient(),
        "{error}"
    );
    assert!(!format!("{client:?} {error:?} {error}").contains(SECRET));
}

#[tokio::test]
async fn login_takes_effect_while_the_client_runs() {
    let server = Server::start(|seen, _| {
        let expected = format!("Basic {}", BASE64_STANDARD.encode("me:new"));
        if seen.authorization() == expected {
            ranged(seen, &data())
        } else {
            challenged(r#"Basic realm="r""#)
        }
    })
    .await;
    let (_dir, files) = auth_file(&[(&server.address.to_string(), "me:old")]);
    let client = client_with(Options {
        auth_files: Some(files.clone()),
        ..Options::default()
    });
    let result = client.blob_range(&server.repository(), &any_digest(), 0, 10).await;
    assert!(matches!(result, Err(Error::Unauthorized { .. })), "{result:?}");
    let (_new, new) = auth_file(&[(&server.address.to_string(), "me:new")]);
    std::fs::rename(&new[0], &files[0]).unwrap();
    client
        .blob_range(&server.repository(), &any_digest(), 0, 10)
        .await
        .unwrap();
}

#[tokio::test]
async fn refusal_by_the_token_server_is_final() {
    for (code, unauthorized) in [(401, true), (403, true), (404, false)] {
        let server = Server::start(move |seen, _| match seen.uri.starts_with("/token") {
            true => status(code),
            false => challenged(format!(r#"Bearer realm="http://{}/token""#, seen.header(header::HOST))),
        })
        .await;
        let error = client().manifest(&server.repository(), "1").await.unwrap_err();
        assert_eq!(matches!(error, Error::Unauthorized { .. }), unauthorized, "{error:?}");
        assert!(!error.is_not_found() && !error.is_transient(), "{error:?}");
    }
}

#[tokio::test]
async fn failed_token_request_is_shared_by_its_waiters() {
    let server = Server::start_async(|seen: Seen, _| async move {
        if !seen.uri.starts_with("/token") {
            return challenged(format!(r#"Bearer realm="http://{}/token""#, seen.header(header::HOST)));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        status(403)
    })
    .await;
    let client = client();
    let task = |_| {
        let (client, repository) = (client.clone(), server.repository());
        tokio::spawn(async move { client.manifest(&repository, "1").await })
    };
    for task in (0..10).map(task).collect::<Vec<_>>() {
        assert!(matches!(task.await.unwrap(), Err(Error::Unauthorized { .. })));
    }
    assert_eq!(token_requests(&server).len(), 1);
}

#[tokio::test]
async fn redirect_keeps_the_range_and_drops_the_credentials() {
    let storage = Server::start(|seen, _| ranged(seen, &data())).await;
    let target = storage.address;
    let server = Server::start(move |seen, _| match (seen.authorization(), seen.uri.as_str()) {
        ("", _) => challenged(r#"Basic realm="r""#),
        (_, "/hop") => redirected(format!("http://user:pw@{target}/data?sig={SECRET}")),
        _ => redirected("/hop"),
    })
    .await;
    let (_dir, files) = auth_file(&[(&server.address.to_string(), "me:x")]);
    let client = client_with(Options {
        auth_files: Some(files),
        ..Options::default()
    });
    assert_eq!(
        client
            .blob_range(&server.repository(), &any_digest(), 7, 3)
            .await
            .unwrap(),
        data()[7..10]
    );
    let seen = &storage.log()[0];
    assert_eq!((seen.authorization(), seen.header(header::RANGE)), ("", "bytes=7-9"));
    assert_eq!(seen.uri, format!("/data?sig={SECRET}"));
    assert!(
        server
            .log()
            .iter()
            .any(|seen| seen.uri == "/hop" && seen.authorization() != "")
    );
}

#[tokio::test]
async fn redirect_target_gets_no_credentials() {
    let storage = Server::start(|_, _| challenged(r#"Basic realm="r""#)).await;
    let location = format!("http://{}/data?sig={SECRET}", storage.address);
    let server = Server::start(move |_, _| redirected(&location)).await;
    let entries = [server.address.to_string(), storage.address.to_string()];
    let (_dir, files) = auth_file(&[(&entries[0], "me:x"), (&entries[1], "me:y")]);
    let client = client_with(Options {
        auth_files: Some(files),
        ..Options::default()
    });
    let error = client
        .blob_range(&server.repository(), &any_digest(), 0, 10)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Status { status: 401, .. }), "{error:?}");
    assert!(!format!("{error:?} {error}").contains(SECRET), "{error:?}");
    assert!(
        storage
            .log()
            .iter()
            .chain(&server.log())
            .all(|seen| seen.authorization().is_empty())
    );
}

#[tokio::test]
async fn endless_and_malformed_redirects_are_refused() {
    for location in ["/v2/loop", "ftp://r.example/", "http://"] {
        let server = Server::start(move |_, _| redirected(location)).await;
        let result = client().blob_range(&server.repository(), &any_digest(), 0, 10).await;
        assert!(
            matches!(result, Err(Error::InvalidResponse { .. })),
            "{location}: {result:?}"
        );
        assert_eq!(server.count(), if location == "/v2/loop" { 6 } else { 1 });
    }
}

/// Gets `/` from `server`.
async fn get(server: &Server) -> (RedirectHosts, reqwest::Url, response::Response) {
    let transport = Arc::new(Transport::new(Arc::default()).unwrap());
    let url: reqwest::Url = format!("http://{}/", server.address).parse().unwrap();
    let request = HttpRequest::new(Method::GET, url.clone(), "a test");
    let response = transport.send(&request, Trust::Loopback).await.unwrap();
    (RedirectHosts::new(transport, &Options::default()), url, response)
}

#[tokio::test]
async fn redirect_from_tls_to_plain_http_is_refused() {
    let server = Server::start(|_, _| redirected("http://r.example/")).await;
    let (redirect_hosts, url, response) = get(&server).await;
    // Pretends that the answer came over TLS.
    let url = url.as_str().replace("http:", "https:").parse().unwrap();
    let request = HttpRequest::new(Method::GET, url, "a test");
    let error = redirect_hosts.follow(request, response).await.err().unwrap();
    assert!(error.to_string().contains("plain HTTP on r.example"), "{error}");
}

#[tokio::test]
async fn redirect_from_another_host_to_this_machine_is_refused() {
    let server = Server::start(|_, _| redirected("http://127.0.0.1:1/")).await;
    let (redirect_hosts, _, response) = get(&server).await;
    // Pretends that the answer came from another host.
    let url = "http://r.example/".parse().unwrap();
    let request = HttpRequest::new(Method::GET, url, "a test");
    let error = redirect_hosts.follow(request, response).await.err().unwrap();
    assert!(error.to_string().contains("which is this machine"), "{error}");
}

#[tokio::test]
async fn strict_registry_cannot_name_a_plain_http_token_server() {
    let server = token_registry(Arc::default()).await;
    let (redirect_hosts, _, response) = get(&server).await;
    let challenges = challenges(response.headers());
    let auth = Auth::new(Some(Vec::new()), Default::default());
    let repository = Repository::new("r.example", "org/image");
    let obtained = auth
        .obtain(&redirect_hosts, &repository, Trust::Strict, &challenges)
        .await;
    assert!(matches!(obtained.err(), Some(Error::Unauthorized { .. })));
    assert!(token_requests(&server).is_empty());
    // Nor may an insecure registry name a token server on this machine.
    let obtained = auth
        .obtain(&redirect_hosts, &repository, Trust::Insecure, &challenges)
        .await;
    let error = obtained.err().unwrap().to_string();
    assert!(error.contains("this machine"), "{error}");
    let local = server.repository();
    let obtained = auth.obtain(&redirect_hosts, &local, Trust::Insecure, &challenges);
    assert!(obtained.await.is_ok());
}

#[tokio::test]
async fn loopback_registry_cannot_name_a_plain_http_token_server_on_another_host() {
    let server = Server::start(|_, _| challenged(r#"Bearer realm="http://r.example/token""#)).await;
    let (_dir, files) = auth_file(&[(&server.address.to_string(), "me:x")]);
    let client = client_with(Options {
        auth_files: Some(files),
        ..Options::default()
    });
    let error = client.manifest(&server.repository(), "1").await.unwrap_err();
    assert!(
        error.to_string().contains("r.example is not reached over TLS"),
        "{error}"
    );
}
