//! Requests for blobs that the registry refuses.

use std::process::Command;

use nydus_store::fixtures::Fault;

use crate::common::{BINARY, Lab, Sample, Serve};

/// The failure applies to the whole blob, so other ranges are not requested.
#[test]
fn refused_blob_is_requested_once() {
    let lab = Lab::with_daemon(Serve::prepare(""));
    for (status, words) in [(404, "does not exist"), (403, "denies access"), (401, "credentials")] {
        let sample = Sample::new(status.into());
        let (name, data) = (format!("refused{status}"), sample.data_digest());
        lab.add(&sample, &name);
        lab.fault_on(&name, data, Fault::Status(status));
        let mut command = Command::new(BINARY);
        command.args(["preseed", &format!("docker://{}", lab.reference(&name)), "--root"]);
        let refused = command.arg(lab.serve.root()).output().unwrap();
        let message = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(1) && message.contains(words), "{message}");
        let asked = lab
            .registry
            .log()
            .iter()
            .filter(|request| request.digest == Some(data))
            .count();
        assert_eq!(asked, 1, "{message}");
    }
}
