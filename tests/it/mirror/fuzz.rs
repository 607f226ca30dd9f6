//! Requests put together at random from what may hurt.

use nydus_store::{digest::Digest, fixtures::content::Random};

use super::{Reply, Site, exchange};
use crate::common::Sample;

/// How many requests.
const REQUESTS: usize = 600;

fn pick<'a>(random: &mut Random, from: &[&'a str]) -> &'a str {
    from[random.below(from.len() as u64) as usize]
}

/// A path of parts that are each all right, nearly, or not at all.
fn path(random: &mut Random, host: &str, digest: &str) -> String {
    let long = "a".repeat(1 + random.below(3000) as usize);
    let parts = [
        "v2",
        host,
        "app",
        "manifests",
        "blobs",
        "1",
        digest,
        "..",
        ".",
        "",
        "%2e%2e",
        "%2f",
        "%00",
        "%",
        "%zz",
        "@",
        "sha256:",
        "sha256:..%2f..",
        "sha512:00",
        "_",
        "a_b",
        "localhost",
        "[::1]:1",
        "user:pw@h",
        "étc",
        "tags",
        "list",
        "uploads",
        &long,
        "\\..\\",
        "app:1",
        "referrers",
    ];
    let mut path = if random.below(4) > 0 {
        format!("/v2/{host}")
    } else {
        String::new()
    };
    for _ in 0..=random.below(6) {
        path.push('/');
        path.push_str(pick(random, &parts));
    }
    path
}

fn request(random: &mut Random, host: &str, digest: &str) -> Vec<u8> {
    let method = pick(
        random,
        &[
            "GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "BREW", "get",
        ],
    );
    let path: String = path(random, host, digest);
    // With the body that goes with it: else both sides would wait for more.
    let headers = [
        ("", ""),
        ("", "hello"),
        ("", "\0\0\0"),
        ("Range: bytes=0-18446744073709551615\r\n", ""),
        ("Range: bytes=-0\r\n", ""),
        ("Accept: */*\r\n", ""),
        ("Host: other\r\n", ""),
        ("Content-Length: 5\r\n", "hello"),
        ("Transfer-Encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n"),
        ("Authorization: Basic !!!\r\n", ""),
        ("X: \0\r\n", ""),
    ];
    let (header, body) = headers[random.below(headers.len() as u64) as usize];
    let query = pick(random, &["", "?", "?ns=..", "?a=b&%"]);
    format!("{method} {path}{query} HTTP/1.1\r\nHost: mirror\r\nConnection: close\r\n{header}\r\n{body}").into_bytes()
}

#[test]
fn random_requests_do_no_harm() {
    let (site, sample) = (Site::new(), Sample::new(70));
    let layer = site.0.add(&sample, "app");
    let (host, digest) = (site.0.registry.addr().to_string(), sample.data().to_string());
    let seed = u64::from(std::process::id());
    let mut random = Random::new(seed);
    for number in 0..REQUESTS {
        let mut sent = request(&mut random, &host, &digest);
        if random.below(10) == 0 {
            // In the first line.
            let end = sent.iter().position(|byte| *byte == b'\r').unwrap();
            let at = random.below(end as u64) as usize;
            sent[at] = random.number() as u8;
        }
        let (mirror, shown) = (site.0.serve.mirror(), String::from_utf8_lossy(&sent).into_owned());
        let answer = exchange(mirror, &sent);
        // Some are no HTTP, to which no answer is an answer.
        if answer.is_empty() {
            continue;
        }
        let reply = Reply::parse(&answer);
        let right = matches!(reply.status, 200 | 206) && (reply.body.is_empty() || is_known(&sample, &reply.body));
        let refused = (400..500).contains(&reply.status);
        assert!(
            right || refused,
            "seed {seed}, request {number}: {} to\n{shown}",
            reply.status
        );
    }
    assert!(site.0.serve.is_running());
    assert!(!site.0.serve.log().contains("panicked"));
    sample.check(&layer);
}

/// Whether that is something that the registry has.
fn is_known(sample: &Sample, body: &[u8]) -> bool {
    let data = sample.data_bytes();
    let whole = Digest::of(body) == sample.data();
    let text = String::from_utf8_lossy(body);
    whole || text.contains("schemaVersion") || data.windows(body.len()).any(|window| window == body)
}
