//! The matrix of faults: everything that goes wrong with registries in the field, by every kind of image, read in order (so
//! that read-ahead takes part) and here and there by many readers.
//!
//! [`matrix`] says what is demanded of each. TLS with a private authority is in `hosts`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nydus_store::fixtures::{EmbeddedRegistry, Fault, RequestInfo, registry::FaultHook};

use matrix::{Outcome, Place, Trouble, is_of_data, run};

mod matrix;

/// Each request for data goes wrong so.
fn always(fault: Fault) -> Trouble {
    one_of(1, fault)
}

/// One of so many requests for data goes wrong so.
fn one_of(many: usize, fault: Fault) -> Trouble {
    one_of_them(many, move |_| fault.clone())
}

fn one_of_them(many: usize, fault: impl Fn(&RequestInfo) -> Fault + Clone + Send + Sync + 'static) -> Trouble {
    Trouble::Hook(Box::new(move |_| {
        let (fault, count) = (fault.clone(), AtomicUsize::new(0));
        on_data(move |request| match count.fetch_add(1, Ordering::Relaxed) % many {
            0 => fault(request),
            _ => Fault::None,
        })
    }))
}

/// A byte in the middle of what is asked for is another.
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
fn delay_before_the_headers() {
    run(always(Fault::Delay(Duration::from_millis(150))), Outcome::Right);
}

/// 512 KiB/s for each request.
#[test]
fn bandwidth_cap() {
    let pause = Duration::from_millis(32);
    let bytes = 16 << 10;
    run(always(Fault::Paced { bytes, pause }), Outcome::Right);
}

#[test]
fn silence() {
    run(always(Fault::Stall), Outcome::Fails);
}

#[test]
fn stall_at_a_byte() {
    run(always(Fault::StallAfter(100)), Outcome::Fails);
}

/// What is longer stalls: read-ahead, and the units of large gzip layers.
#[test]
fn stall_late() {
    run(always(Fault::StallAfter(80 << 10)), Outcome::Either);
}

#[test]
fn stall_now_and_then() {
    run(one_of(5, Fault::StallAfter(100)), Outcome::Either);
}

#[test]
fn reset_in_the_middle() {
    run(always(Fault::Reset(100)), Outcome::Fails);
}

#[test]
fn reset_late() {
    run(always(Fault::Reset(80 << 10)), Outcome::Either);
}

#[test]
fn reset_now_and_then() {
    run(one_of(3, Fault::Reset(100)), Outcome::Either);
}

#[test]
fn short_body() {
    run(always(Fault::Truncate(100)), Outcome::Fails);
}

/// The bytes asked for are all there.
#[test]
fn content_length_that_is_too_long() {
    run(always(Fault::Length(1000)), Outcome::Right);
}

#[test]
fn content_length_that_is_too_short() {
    run(always(Fault::Length(-10)), Outcome::Fails);
}

#[test]
fn other_range_than_asked_for() {
    run(always(Fault::OtherRange { told: true }), Outcome::Fails);
}

#[test]
fn other_range_than_told() {
    run(always(Fault::OtherRange { told: false }), Outcome::Fails);
}

#[test]
fn everything_instead_of_a_range() {
    run(always(Fault::IgnoreRange), Outcome::Right);
}

#[test]
fn flipped_byte() {
    run(one_of_them(1, flip), Outcome::Fails);
}

#[test]
fn flipped_byte_now_and_then() {
    run(one_of_them(4, flip), Outcome::Either);
}

/// What is given out first, and expires after so many uses; what is given out later does not.
struct Expiring {
    uses: AtomicUsize,
    given: AtomicUsize,
    most: usize,
}

impl Expiring {
    fn after(most: usize) -> Arc<Self> {
        let (uses, given) = Default::default();
        Arc::new(Self { uses, given, most })
    }

    fn give(&self) -> &'static str {
        match self.given.fetch_add(1, Ordering::Relaxed) {
            0 => "first",
            _ => "later",
        }
    }

    fn takes(&self, given: &str) -> bool {
        given == "later" || given == "first" && self.uses.fetch_add(1, Ordering::Relaxed) < self.most
    }
}

#[test]
fn token_that_expires_mid_way() {
    let hook = |place: &Place| {
        let challenge = format!("Bearer realm=\"{}/token\",service=\"test\"", place.url);
        // All who wait for the first one can use it.
        let tokens = Expiring::after(place.readers + 2);
        let hook: FaultHook = Arc::new(move |request| {
            if request.path == "/token" {
                let answer = format!("{{\"token\": \"{}\", \"expires_in\": 300}}", tokens.give());
                return respond(200, &[("content-type", "application/json")], &answer);
            }
            let given = request.authorization.as_deref().unwrap_or_default();
            match is_of_data(request) && !tokens.takes(given.trim_start_matches("Bearer ")) {
                true => respond(401, &[("www-authenticate", &challenge)], ""),
                false => Fault::None,
            }
        });
        hook
    };
    run(Trouble::Hook(Box::new(hook)), Outcome::Right);
}

/// The storage is gone when it is over, so that addresses of it must be forgotten.
#[test]
fn redirect_to_an_address_that_expires() {
    let hook = |place: &Place| {
        let storage = EmbeddedRegistry::start().unwrap();
        for (digest, bytes) in &place.blobs {
            storage.add_blob("signed", *digest, bytes.clone());
        }
        let signatures = Expiring::after(3);
        let known = Arc::clone(&signatures);
        storage.set_fault(Some(Arc::new(move |request| match known.takes(&request.query) {
            true => Fault::None,
            false => Fault::Status(403),
        })));
        on_data(move |request| {
            let (_, digest) = request.path.rsplit_once('/').unwrap();
            let signature = signatures.give();
            Fault::RedirectTo(format!("{}/v2/signed/blobs/{digest}?{signature}", storage.url()))
        })
    };
    run(Trouble::Hook(Box::new(hook)), Outcome::Right);
}

/// The registry answers all the while.
#[test]
fn redirect_to_a_silent_storage() {
    let hook = |_: &Place| {
        let storage = EmbeddedRegistry::start().unwrap();
        storage.set_fault(Some(Arc::new(|_| Fault::Stall)));
        on_data(move |request| Fault::RedirectTo(format!("{}{}", storage.url(), request.path)))
    };
    run(Trouble::Hook(Box::new(hook)), Outcome::Fails);
}

#[test]
fn too_many_requests() {
    run(always(respond(429, &[("retry-after", "1")], "")), Outcome::Fails);
}

/// All requests in the first half of each second.
#[test]
fn bursts_of_503() {
    let hook = |_: &Place| {
        let start = Instant::now();
        on_data(move |_| match start.elapsed().subsec_millis() {
            0..500 => Fault::Status(503),
            _ => Fault::None,
        })
    };
    run(Trouble::Hook(Box::new(hook)), Outcome::Either);
}

#[test]
fn trickle() {
    let pause = Duration::from_millis(50);
    run(always(Fault::Paced { bytes: 1, pause }), Outcome::Fails);
}

#[test]
fn refused_connections() {
    run(Trouble::Away, Outcome::Fails);
}
