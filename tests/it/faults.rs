//! The fault matrix: registry faults × kinds of images × access patterns. Sequential access includes read-ahead; random
//! access has many readers.
//!
//! [`matrix`] defines what each cell must satisfy. TLS with a private CA is tested in `hosts`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nydus_store::fixtures::{EmbeddedRegistry, Fault, RequestInfo, registry::FaultHook};

use matrix::{HookContext, Injection, Outcome, is_of_data, run};

mod matrix;

/// Every request for data has this fault.
fn always(fault: Fault) -> Injection {
    one_in(1, fault)
}

/// One in `many` requests for data has this fault.
fn one_in(many: usize, fault: Fault) -> Injection {
    one_in_with(many, move |_| fault.clone())
}

fn one_in_with(many: usize, fault: impl Fn(&RequestInfo) -> Fault + Clone + Send + Sync + 'static) -> Injection {
    Injection::Hook(Box::new(move |_| {
        let (fault, count) = (fault.clone(), AtomicUsize::new(0));
        on_data(move |request| match count.fetch_add(1, Ordering::Relaxed) % many {
            0 => fault(request),
            _ => Fault::None,
        })
    }))
}

/// Flips a byte in the middle of the requested range.
fn flip(request: &RequestInfo) -> Fault {
    let range = request.range.as_deref().unwrap_or_default();
    let ends = range.trim_start_matches("bytes=").split_once('-').unwrap();
    let [first, last] = [ends.0, ends.1].map(|end| end.parse::<usize>().unwrap());
    Fault::FlipByte((last - first) / 2)
}

fn on_data(decide: impl Fn(&RequestInfo) -> Fault + Send + Sync + 'static) -> FaultHook {
    Arc::new(move |request| match is_of_data(request) {
        true => decide(request),
        false => Fault::None,
    })
}

fn respond(status: u16, headers: &[(&str, &str)], body: &str) -> Fault {
    let header = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    Fault::Respond {
        status,
        headers: headers.iter().map(header).collect(),
        body: body.into(),
    }
}

#[test]
fn delayed_headers_are_waited_for() {
    run(always(Fault::Delay(Duration::from_millis(150))), Outcome::AllSucceed);
}

/// 512 KiB/s per request.
#[test]
fn limited_bandwidth_reads_right() {
    let pause = Duration::from_millis(32);
    let bytes = 16 << 10;
    run(always(Fault::Paced { bytes, pause }), Outcome::AllSucceed);
}

#[test]
fn silence_gives_eio() {
    run(always(Fault::Stall), Outcome::SomeFail);
}

#[test]
fn stall_at_byte_100_gives_eio() {
    run(always(Fault::StallAfter(100)), Outcome::SomeFail);
}

/// Only long responses stall: those of read-ahead and of units of large gzip layers.
#[test]
fn stall_at_80_kib_gives_data_or_eio() {
    run(always(Fault::StallAfter(80 << 10)), Outcome::SomeMayFail);
}

#[test]
fn occasional_stall_gives_data_or_eio() {
    run(one_in(5, Fault::StallAfter(100)), Outcome::SomeMayFail);
}

#[test]
fn reset_at_byte_100_gives_eio() {
    run(always(Fault::Reset(100)), Outcome::SomeFail);
}

#[test]
fn reset_at_80_kib_gives_data_or_eio() {
    run(always(Fault::Reset(80 << 10)), Outcome::SomeMayFail);
}

#[test]
fn occasional_reset_gives_data_or_eio() {
    run(one_in(3, Fault::Reset(100)), Outcome::SomeMayFail);
}

#[test]
fn short_body_gives_eio() {
    run(always(Fault::Truncate(100)), Outcome::SomeFail);
}

/// The requested bytes arrive completely.
#[test]
fn too_long_content_length_reads_right() {
    run(always(Fault::Length(1000)), Outcome::AllSucceed);
}

#[test]
fn too_short_content_length_gives_eio() {
    run(always(Fault::Length(-10)), Outcome::SomeFail);
}

#[test]
fn unrequested_range_gives_eio() {
    run(always(Fault::OtherRange { told: true }), Outcome::SomeFail);
}

#[test]
fn wrong_content_range_gives_eio() {
    run(always(Fault::OtherRange { told: false }), Outcome::SomeFail);
}

#[test]
fn ignored_range_reads_right() {
    run(always(Fault::IgnoreRange), Outcome::AllSucceed);
}

#[test]
fn flipped_byte_gives_eio() {
    run(one_in_with(1, flip), Outcome::SomeFail);
}

#[test]
fn occasional_flipped_byte_gives_data_or_eio() {
    run(one_in_with(4, flip), Outcome::SomeMayFail);
}

/// Issues values, such as tokens. The first one expires after `max_uses` uses; later ones do not expire.
struct ExpiringIssuer {
    uses: AtomicUsize,
    issued: AtomicUsize,
    max_uses: usize,
}

impl ExpiringIssuer {
    fn after(max_uses: usize) -> Arc<Self> {
        let (uses, issued) = Default::default();
        Arc::new(Self { uses, issued, max_uses })
    }

    fn issue(&self) -> &'static str {
        match self.issued.fetch_add(1, Ordering::Relaxed) {
            0 => "first",
            _ => "later",
        }
    }

    fn accepts(&self, value: &str) -> bool {
        value == "later" || value == "first" && self.uses.fetch_add(1, Ordering::Relaxed) < self.max_uses
    }
}

#[test]
fn token_that_expires_during_reads_is_renewed() {
    let hook = |context: &HookContext| {
        let challenge = format!("Bearer realm=\"{}/token\",service=\"test\"", context.url);
        // Every reader that waits for the first token can use it once.
        let tokens = ExpiringIssuer::after(context.readers + 2);
        let hook: FaultHook = Arc::new(move |request| {
            if request.path == "/token" {
                let answer = format!("{{\"token\": \"{}\", \"expires_in\": 300}}", tokens.issue());
                return respond(200, &[("content-type", "application/json")], &answer);
            }
            let credentials = request.authorization.as_deref().unwrap_or_default();
            match is_of_data(request) && !tokens.accepts(credentials.trim_start_matches("Bearer ")) {
                true => respond(401, &[("www-authenticate", &challenge)], ""),
                false => Fault::None,
            }
        });
        hook
    };
    run(Injection::Hook(Box::new(hook)), Outcome::AllSucceed);
}

/// The storage is gone once the fault ends, so cached redirects must be invalidated.
#[test]
fn expired_redirect_is_requested_again() {
    let hook = |context: &HookContext| {
        let storage = EmbeddedRegistry::start().unwrap();
        for (digest, bytes) in &context.blobs {
            storage.add_blob("signed", *digest, bytes.clone());
        }
        let signatures = ExpiringIssuer::after(3);
        let known = Arc::clone(&signatures);
        storage.set_fault(Some(Arc::new(move |request| match known.accepts(&request.query) {
            true => Fault::None,
            false => Fault::Status(403),
        })));
        on_data(move |request| {
            let (_, digest) = request.path.rsplit_once('/').unwrap();
            let signature = signatures.issue();
            Fault::RedirectTo(format!("{}/v2/signed/blobs/{digest}?{signature}", storage.url()))
        })
    };
    run(Injection::Hook(Box::new(hook)), Outcome::AllSucceed);
}

/// The registry itself keeps answering.
#[test]
fn redirect_to_a_silent_storage_gives_eio() {
    let hook = |_: &HookContext| {
        let storage = EmbeddedRegistry::start().unwrap();
        storage.set_fault(Some(Arc::new(|_| Fault::Stall)));
        on_data(move |request| Fault::RedirectTo(format!("{}{}", storage.url(), request.path)))
    };
    run(Injection::Hook(Box::new(hook)), Outcome::SomeFail);
}

#[test]
fn too_many_requests_gives_eio() {
    run(always(respond(429, &[("retry-after", "1")], "")), Outcome::SomeFail);
}

/// 503 for all requests in the first half of each second.
#[test]
fn bursts_of_503_give_data_or_eio() {
    let hook = |_: &HookContext| {
        let start = Instant::now();
        on_data(move |_| match start.elapsed().subsec_millis() {
            0..500 => Fault::Status(503),
            _ => Fault::None,
        })
    };
    run(Injection::Hook(Box::new(hook)), Outcome::SomeMayFail);
}

#[test]
fn trickle_gives_eio() {
    let pause = Duration::from_millis(50);
    run(always(Fault::Paced { bytes: 1, pause }), Outcome::SomeFail);
}

#[test]
fn refused_connections_give_eio() {
    run(Injection::Unreachable, Outcome::SomeFail);
}
