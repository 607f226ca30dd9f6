//! Where registries lead to, such as storages and token servers: whether these answer, and where nobody is to be led.

use std::{net::IpAddr, sync::Arc};

use reqwest::Url;

use super::{
    Error,
    circuit::{Circuit, Rules},
    response::Response,
    transport::{Request, Transport, Trust, authority, is_loopback},
};

/// Most hosts that registries lead to of which it is known whether they answer; beyond, those not in use are forgotten.
const MAX_ELSEWHERE: usize = 1024;

impl Transport {
    /// The circuit of a host, `host[:port]`, that is no registry, or is not asked as one.
    pub(super) fn elsewhere(&self, host: &str) -> Arc<Circuit> {
        let mut circuits = self.elsewhere.lock();
        if circuits.len() >= MAX_ELSEWHERE && !circuits.contains_key(host) {
            circuits.retain(|_, circuit| Arc::strong_count(circuit) > 1);
        }
        let new = || Arc::new(Circuit::new(host.to_owned(), Rules::of(&self.options)));
        Arc::clone(circuits.entry(host.to_owned()).or_insert_with(new))
    }

    /// Sends one request to a host that a registry leads to, such as a storage or a token server, unless that is left
    /// alone.
    pub(super) async fn send_elsewhere(&self, request: &Request<'_>, trust: Trust) -> Result<Response, Error> {
        let circuit = self.elsewhere(&authority(&request.url));
        circuit.quiet(request.alternative).await?;
        // What it is may be the only one for mirrors and registry: a mirror's failure counts as any other.
        let mut pass = if request.alternative {
            circuit.enter(false, request.due)?
        } else {
            circuit.enter_patiently(request.due).await?
        };
        match self.send(request, trust).await {
            Ok(mut response) => {
                pass.answered();
                response.watch(pass);
                Ok(response)
            }
            Err(error) => {
                if error.is_silence() {
                    pass.failed();
                }
                Err(error)
            }
        }
    }

    /// Names the target if `from`, which is not on this machine, leads to this machine.
    pub(super) fn leads_in(&self, from: &Url, to: &Url) -> Option<String> {
        let host = |url: &Url| url.host_str().map(str::to_owned).unwrap_or_default();
        let in_from_outside = is_here(&host(to)) && !is_here(&host(from));
        in_from_outside.then(|| format!("{}, which is this machine", authority(to)))
    }
}

/// This machine in whatever way it may be written: this is for what is refused, not for what is trusted.
fn is_here(host: &str) -> bool {
    let host = host.trim_end_matches('.');
    let address = host.trim_start_matches('[').trim_end_matches(']');
    let unspecified = address
        .parse()
        .is_ok_and(|ip: IpAddr| ip.to_canonical().is_unspecified());
    unspecified || is_loopback(host) || host.ends_with(".localhost")
}
