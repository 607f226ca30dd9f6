//! Checks the signature policy. An image that it rejects cannot be pulled, lazy or not.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::Finding;
use crate::setup::layout::{self, Layout};

const NAME: &str = "signature-policy";

/// containers-policy.json(5).
#[derive(Debug, Deserialize)]
struct Policy {
    default: Vec<Requirement>,
    #[serde(default)]
    transports: BTreeMap<String, BTreeMap<String, Vec<Requirement>>>,
}

#[derive(Debug, Deserialize)]
struct Requirement {
    #[serde(rename = "type")]
    kind: String,
}

impl Policy {
    /// Registry scopes that are accepted if the default rejects.
    fn accepted(&self) -> Vec<&str> {
        let scopes = self.transports.get("docker").into_iter().flatten();
        let accepted = scopes.filter(|(_, requirements)| !rejects(requirements));
        accepted
            .map(|(scope, _)| match scope.as_str() {
                "" => "any registry",
                scope => scope,
            })
            .collect()
    }
}

fn rejects(requirements: &[Requirement]) -> bool {
    requirements.iter().any(|requirement| requirement.kind == "reject")
}

/// Checks /etc/containers/policy.json.
pub fn check(layout: &Layout) -> Finding {
    let path = layout.policy.display();
    let text = match layout::read_optional(&layout.policy) {
        Ok(Some(text)) => text,
        Ok(None) => return Finding::ok(NAME, format!("{path} does not exist")),
        Err(error) => return Finding::warn(NAME, error.to_string(), "run doctor as root"),
    };
    let policy: Policy = match serde_json::from_str(&text) {
        Ok(policy) => policy,
        Err(error) => {
            return Finding::warn(
                NAME,
                format!("{path}: {error}"),
                "fix the file; nothing can be pulled until then",
            );
        }
    };
    Finding::ok(
        NAME,
        match (rejects(&policy.default), policy.accepted().as_slice()) {
            (false, _) => format!("{path} accepts images by default"),
            (true, []) => format!("{path} rejects all images: nothing can be pulled from a registry"),
            (true, accepted) => format!("{path} accepts images only from {}", accepted.join(", ")),
        },
    )
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::doctor::Status;

    #[test]
    fn rejecting_default_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(Some(dir.path()), |_| None);
        fs::create_dir_all(layout.policy.parent().unwrap_or(Path::new("/"))).unwrap();
        assert!(check(&layout).detail.contains("does not exist"));
        let reject = r#"[{"type": "reject"}]"#;
        let accept = r#"[{"type": "insecureAcceptAnything"}]"#;
        for (text, words) in [
            (format!(r#"{{"default": {accept}}}"#), "accepts images by default"),
            (format!(r#"{{"default": {reject}}}"#), "rejects all images"),
            (
                format!(
                    r#"{{"default": {reject}, "transports": {{"docker": {{"a.example": [{{"type": "signedBy"}}],
                        "b.example": {reject}}}, "oci": {{"": {accept}}}}}}}"#
                ),
                "only from a.example",
            ),
        ] {
            fs::write(&layout.policy, text).unwrap();
            let finding = check(&layout);
            assert!(finding.status == Status::Ok && finding.detail.ends_with(words) || finding.detail.contains(words));
        }
        fs::write(&layout.policy, "{").unwrap();
        assert_eq!(check(&layout).status, Status::Warn);
    }
}
