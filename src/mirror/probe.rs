//! Whether a mirror answers, asked from outside.

use std::{net::SocketAddr, time::Duration};

use reqwest::{StatusCode, header};

use super::answer::SERVER;

/// What is wrong with a mirror.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Nothing answers.
    #[error("nothing answers on {listen}")]
    Silent {
        /// Where it should.
        listen: SocketAddr,
        /// The cause.
        source: reqwest::Error,
    },
    /// It is no mirror of ours.
    #[error("what answers on {listen} is not nydus-store's mirror")]
    Other {
        /// Where it answers.
        listen: SocketAddr,
    },
    /// It does not serve this user.
    #[error("the mirror on {listen} refuses this user")]
    Refused {
        /// Where it answers.
        listen: SocketAddr,
    },
    /// It answers otherwise than it should.
    #[error("the mirror on {listen} answers with status {status}")]
    Status {
        /// Where it answers.
        listen: SocketAddr,
        /// The status.
        status: StatusCode,
    },
}

/// Asks the mirror on `listen` whether it is one.
pub async fn probe(listen: SocketAddr, patience: Duration) -> Result<(), ProbeError> {
    let silent = |source| ProbeError::Silent { listen, source };
    // Plain HTTP alone, but the client wants to know how TLS is made. If that has been chosen already, it serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([])
        .timeout(patience);
    let request = client.build().map_err(silent)?.get(format!("http://{listen}/v2/"));
    let answer = request.send().await.map_err(silent)?;
    let server = answer.headers().get(header::SERVER);
    if server.is_none_or(|server| server != SERVER) {
        return Err(ProbeError::Other { listen });
    }
    match answer.status() {
        StatusCode::OK => Ok(()),
        StatusCode::FORBIDDEN => Err(ProbeError::Refused { listen }),
        status => Err(ProbeError::Status { listen, status }),
    }
}
