//! Counters of a client, in total and by host, and the states that hosts can be in.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use reqwest::StatusCode;
use serde::{Deserialize, Serialize};

/// Most hosts with counters of their own. Redirects can name any number of hosts; the rest share one entry.
const MAX_HOSTS: usize = 256;
/// Name of the entry that the rest of the hosts share.
const OTHER_HOSTS: &str = "other";

/// Totals since the client was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// HTTP requests sent, with retries, redirects and token requests.
    pub requests: u64,
    /// Bytes of bodies received.
    pub bytes_received: u64,
    /// Rounds of requests that were repeated after a pause.
    pub retries: u64,
    /// Answers whose bytes did not match a digest.
    pub corrupt_answers: u64,
}

/// Totals of one host since the client was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStats {
    /// HTTP requests sent.
    pub requests: u64,
    /// Bytes of bodies received.
    pub bytes_received: u64,
    /// How the requests were answered.
    pub answers: Answers,
}

/// Numbers of answers by class of status.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answers {
    /// 2xx.
    pub success: u64,
    /// 3xx.
    pub redirect: u64,
    /// 4xx, such as 401 before authentication and 404.
    pub client_error: u64,
    /// 5xx.
    pub server_error: u64,
    /// None: the host was unreachable, silent or too slow, or the caller gave up.
    pub none: u64,
}

/// The state of a circuit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CircuitStatus {
    /// Requests pass.
    #[default]
    Closed,
    /// One request probes the host, or the next one will.
    HalfOpen,
    /// Requests fail at once, until the next probe in so many seconds.
    Open(f64),
}

/// Requests of one host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLoad {
    /// Requests whose answers have not ended.
    pub in_flight: usize,
    /// Requests that wait for the permit to be sent.
    pub waiting: usize,
}

/// Counters of a client.
#[derive(Debug, Default)]
pub(super) struct Counters {
    hosts: Mutex<BTreeMap<String, Arc<HostCounters>>>,
    pub(super) retries: AtomicU64,
    pub(super) corrupt_answers: AtomicU64,
}

/// Counters of one host.
#[derive(Debug, Default)]
pub(super) struct HostCounters {
    requests: AtomicU64,
    pub(super) bytes_received: AtomicU64,
    answers: [AtomicU64; 5],
}

/// A request whose answer is still to come. Dropped without one, it counts as unanswered.
pub(super) struct UnansweredRequest<'a> {
    host: &'a HostCounters,
    status: Option<StatusCode>,
}

impl CircuitStatus {
    /// Open for `left`, or half-open if nothing is left.
    pub(super) fn open_for(left: Duration) -> Self {
        match left.is_zero() {
            true => Self::HalfOpen,
            false => Self::Open(left.as_secs_f64()),
        }
    }

    /// Whether requests pass.
    pub fn is_closed(self) -> bool {
        self == Self::Closed
    }

    /// The worse of both, where one host has two circuits.
    pub(super) fn or_worse(self, other: Self) -> Self {
        match (self, other) {
            (Self::Closed, other) | (Self::HalfOpen, other @ Self::Open(_)) => other,
            (state, _) => state,
        }
    }
}

impl Counters {
    /// The counters of the host of that name.
    pub(super) fn host(&self, name: String) -> Arc<HostCounters> {
        let mut hosts = self.hosts.lock();
        let is_full = hosts.len() >= MAX_HOSTS && !hosts.contains_key(&name);
        let name = if is_full { OTHER_HOSTS.to_owned() } else { name };
        Arc::clone(hosts.entry(name).or_default())
    }

    /// The totals by host.
    pub(super) fn hosts(&self) -> BTreeMap<String, HostStats> {
        let hosts = self.hosts.lock();
        hosts.iter().map(|(name, host)| (name.clone(), host.stats())).collect()
    }

    pub(super) fn stats(&self) -> Stats {
        let hosts = self.hosts();
        Stats {
            requests: hosts.values().map(|host| host.requests).sum(),
            bytes_received: hosts.values().map(|host| host.bytes_received).sum(),
            retries: self.retries.load(Ordering::Relaxed),
            corrupt_answers: self.corrupt_answers.load(Ordering::Relaxed),
        }
    }
}

impl HostCounters {
    /// Counts a request that is about to be sent.
    pub(super) fn begin(&self) -> UnansweredRequest<'_> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let status = None;
        UnansweredRequest { host: self, status }
    }

    fn stats(&self) -> HostStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let [success, redirect, client_error, server_error, none] = self.answers.each_ref().map(load);
        HostStats {
            requests: load(&self.requests),
            bytes_received: load(&self.bytes_received),
            answers: Answers {
                success,
                redirect,
                client_error,
                server_error,
                none,
            },
        }
    }
}

impl UnansweredRequest<'_> {
    /// The headers of an answer have arrived.
    pub(super) fn answered(mut self, status: StatusCode) {
        self.status = Some(status);
    }
}

impl Drop for UnansweredRequest<'_> {
    fn drop(&mut self) {
        let class = match self.status {
            Some(status) if status.is_redirection() => 1,
            Some(status) if status.is_client_error() => 2,
            Some(status) if status.is_server_error() => 3,
            Some(_) => 0,
            None => 4,
        };
        self.host.answers[class].fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_host_and_class_of_status() {
        let counters = Counters::default();
        let host = counters.host("r.example".into());
        for status in [200, 206, 307, 404, 503] {
            host.begin().answered(StatusCode::from_u16(status).unwrap());
        }
        drop(host.begin());
        counters
            .host("r.example".into())
            .bytes_received
            .fetch_add(7, Ordering::Relaxed);
        let answers = Answers {
            success: 2,
            redirect: 1,
            client_error: 1,
            server_error: 1,
            none: 1,
        };
        let expected = HostStats {
            requests: 6,
            bytes_received: 7,
            answers,
        };
        assert_eq!(counters.hosts()["r.example"], expected);
    }

    #[test]
    fn number_of_hosts_is_bounded() {
        let counters = Counters::default();
        for number in 0..2 * MAX_HOSTS {
            drop(counters.host(format!("h{number}.example")).begin());
        }
        let hosts = counters.hosts();
        assert_eq!(hosts.len(), MAX_HOSTS + 1);
        assert_eq!(hosts[OTHER_HOSTS].requests, MAX_HOSTS as u64);
        assert_eq!(counters.stats().requests, 2 * MAX_HOSTS as u64);
    }

    #[test]
    fn worse_circuit_of_a_host_counts() {
        use CircuitStatus::{Closed, HalfOpen, Open};
        for (one, other, worse) in [
            (Closed, Closed, Closed),
            (Closed, HalfOpen, HalfOpen),
            (HalfOpen, Closed, HalfOpen),
            (HalfOpen, Open(1.0), Open(1.0)),
            (Open(2.0), HalfOpen, Open(2.0)),
        ] {
            assert_eq!(one.or_worse(other), worse);
        }
        assert_eq!(CircuitStatus::open_for(Duration::ZERO), HalfOpen);
    }
}
