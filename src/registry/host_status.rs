//! What is known of each host at present: its circuit, its requests, and its counters.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    client::Client,
    stats::{CircuitStatus, HostLoad, HostStats},
};

/// A registry, a mirror, or a host that these have led to, such as a storage or a token server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostStatus {
    /// `host[:port]`, as in registries.conf.
    pub host: String,
    /// The state of its circuit.
    pub circuit: CircuitStatus,
    /// Its requests at present; `None` for a host that is no registry or mirror.
    pub load: Option<HostLoad>,
    /// Its totals.
    #[serde(flatten)]
    pub stats: HostStats,
}

impl Client {
    /// The hosts used so far, by name.
    pub fn hosts(&self) -> Vec<HostStatus> {
        let mut hosts: BTreeMap<String, HostStatus> = BTreeMap::new();
        for (name, circuit, load) in self.known_hosts() {
            let host = entry(&mut hosts, name);
            host.circuit = host.circuit.or_worse(circuit);
            if let Some(load) = load {
                let all = host.load.get_or_insert_default();
                all.in_flight += load.in_flight;
                all.waiting += load.waiting;
            }
        }
        for (name, stats) in self.host_stats() {
            entry(&mut hosts, name).stats = stats;
        }
        hosts.into_values().collect()
    }
}

fn entry(hosts: &mut BTreeMap<String, HostStatus>, name: String) -> &mut HostStatus {
    hosts.entry(name).or_insert_with_key(|name| HostStatus {
        host: name.clone(),
        circuit: CircuitStatus::default(),
        load: None,
        stats: HostStats::default(),
    })
}
