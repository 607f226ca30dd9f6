//! Announcements of pulls: messages between [`auth-helper`](crate::cli) and the daemon.
//!
//! At each pull, containers/image starts the program that `additional-layer-store-auth-helper` in registries.conf
//! names. It does so after it has read the manifest and before it looks for layers. It writes [`Logins`] to the
//! program's standard input and waits for it to exit
//! ([containers-registries.conf(5)](https://github.com/containers/image/blob/main/docs/containers-registries.conf.5.md)).

use std::{
    collections::BTreeMap,
    io::{self, Read},
};

use serde::{Deserialize, Serialize};

use crate::{
    image::reference::{InvalidReference, Reference},
    registry::Credentials,
};

/// Largest [`Logins`] as JSON, in bytes. They contain one login, and tokens have a few thousand bytes.
pub const MAX_LOGINS_BYTES: usize = 64 << 10;

/// Credentials by image reference.
#[derive(Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Logins(BTreeMap<String, Login>);

/// A missing field is empty. All fields are missing for a registry without a login.
#[derive(Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Login {
    username: String,
    password: String,
    identity_token: String,
}

/// The input is not what containers/image writes. Errors do not quote it, because it contains secrets.
#[derive(Debug, thiserror::Error)]
pub enum InvalidLogins {
    /// The input cannot be read.
    #[error("cannot read credentials from standard input: {0}")]
    Read(io::Error),
    /// The input is too long.
    #[error("credentials on standard input are longer than {MAX_LOGINS_BYTES} bytes")]
    Long,
    /// The input has another form.
    #[error(
        "malformed credentials on standard input (line {line}, column {column}); expected JSON as in containers-registries.conf(5)"
    )]
    Form {
        /// Line of the error, from 1 on.
        line: usize,
        /// Column of the error.
        column: usize,
    },
}

impl Logins {
    /// Reads logins as JSON.
    pub fn read(from: impl Read) -> Result<Self, InvalidLogins> {
        let mut bytes = Vec::new();
        let read = from.take(MAX_LOGINS_BYTES as u64 + 1).read_to_end(&mut bytes);
        read.map_err(InvalidLogins::Read)?;
        if bytes.len() > MAX_LOGINS_BYTES {
            return Err(InvalidLogins::Long);
        }
        serde_json::from_slice(&bytes).map_err(|error| InvalidLogins::Form {
            line: error.line(),
            column: error.column(),
        })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no image.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each image with its credentials, if there are any.
    pub fn images(self) -> impl Iterator<Item = Result<(Reference, Option<Credentials>), InvalidReference>> {
        let credentials = |login: Login| (login != Login::default()).then(|| login.into());
        let logins = self.0.into_iter();
        logins.map(move |(reference, login)| Ok((reference.parse()?, credentials(login))))
    }
}

/// A reply of the daemon to an announcement; several follow one another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// The announcement is being processed, for at most this many seconds.
    Accepted(u64),
    /// The image's layers are published. The value is the id of the topmost layer.
    Published(String),
    /// The image is not a Nydus image or does not exist: the pull continues without this program.
    Ordinary,
    /// The image is a Nydus image, but cannot be served.
    Failed {
        /// Reference of the image.
        reference: String,
        /// The cause.
        why: String,
    },
}

impl From<Login> for Credentials {
    fn from(login: Login) -> Self {
        let Login {
            username: user,
            password,
            identity_token: token,
        } = login;
        if token.is_empty() {
            return Self::Password { user, password };
        }
        let user = (!user.is_empty()).then_some(user);
        Self::IdentityToken { user, token }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials(json: &str) -> Vec<(String, Option<Credentials>)> {
        let logins = Logins::read(json.as_bytes()).unwrap().images();
        logins
            .map(Result::unwrap)
            .map(|(reference, credentials)| (reference.to_string(), credentials))
            .collect()
    }

    #[test]
    fn logins_of_containers_image_are_parsed() {
        let image = "r.example:5000/team/app:1";
        let password = Credentials::Password {
            user: "me".to_owned(),
            password: "s".to_owned(),
        };
        let token = Credentials::IdentityToken {
            user: None,
            token: "t".to_owned(),
        };
        for (login, expected) in [
            (r#"{"username":"me","password":"s"}"#, Some(password)),
            (r#"{"identityToken":"t"}"#, Some(token)),
            ("{}", None),
        ] {
            let found = credentials(&format!(r#"{{"{image}":{login}}}"#));
            assert_eq!(found, [(image.to_owned(), expected)]);
        }
    }

    #[test]
    fn malformed_logins_are_rejected_without_quoting_them() {
        for text in ["", "[]", "{\"a\": 1}", "{\"a\": {\"password\": \"secret\""] {
            let error = Logins::read(text.as_bytes()).err().unwrap();
            assert!(matches!(error, InvalidLogins::Form { .. }), "{error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        assert!(matches!(Logins::read(io::repeat(b' ')), Err(InvalidLogins::Long)));
        let mut odd = Logins::read(&br#"{"a b":{"username":"me"}}"#[..]).unwrap().images();
        assert!(odd.next().unwrap().is_err());
    }
}
