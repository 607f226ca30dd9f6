//! Announcements of pulls, on their way from [`auth-helper`](crate::cli) to the daemon and back.
//!
//! At each pull containers/image starts the program that `additional-layer-store-auth-helper` in registries.conf names,
//! after it has the manifest and before it looks for layers, waits for it, and writes [`Logins`] to its standard input
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

/// Most bytes of [`Logins`] as JSON: there is one in it, and tokens have some thousand bytes.
pub const MAX_BYTES: usize = 64 << 10;

/// Credentials by an image's reference.
#[derive(Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Logins(BTreeMap<String, Login>);

/// What is left out is empty: all of it for a registry to which nobody has logged in.
#[derive(Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Login {
    username: String,
    password: String,
    identity_token: String,
}

/// What came is not what containers/image writes. It is not quoted, since it has secrets.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// It cannot be read.
    #[error("cannot read what Podman hands over: {0}")]
    Read(io::Error),
    /// It is too long.
    #[error("what Podman hands over is longer than {MAX_BYTES} bytes")]
    Long,
    /// It has another form.
    #[error(
        "what Podman hands over has an unknown form (line {line}, column {column}): it should be JSON as in containers-registries.conf(5)"
    )]
    Form {
        /// Where.
        line: usize,
        /// Where.
        column: usize,
    },
}

impl Logins {
    /// Reads them as JSON.
    pub fn read(from: impl Read) -> Result<Self, Malformed> {
        let mut bytes = Vec::new();
        let read = from.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes);
        read.map_err(Malformed::Read)?;
        if bytes.len() > MAX_BYTES {
            return Err(Malformed::Long);
        }
        serde_json::from_slice(&bytes).map_err(|error| Malformed::Form {
            line: error.line(),
            column: error.column(),
        })
    }

    /// How many images there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each image and the credentials for it, if there are any.
    pub fn images(self) -> impl Iterator<Item = Result<(Reference, Option<Credentials>), InvalidReference>> {
        let credentials = |login: Login| (login != Login::default()).then(|| login.into());
        let logins = self.0.into_iter();
        logins.map(move |(reference, login)| Ok((reference.parse()?, credentials(login))))
    }
}

/// What the daemon answers to an announcement, one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It is being worked on, for so many seconds at most.
    Accepted(u64),
    /// The image's layers are published; the id of the topmost.
    Published(String),
    /// It is no Nydus image, or there is none: the ordinary pull is the right one.
    Ordinary,
    /// It is to be a Nydus image, but cannot be served.
    Failed {
        /// The image.
        reference: String,
        /// Why.
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
    fn what_containers_image_writes() {
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
    fn what_it_does_not_write() {
        for text in ["", "[]", "{\"a\": 1}", "{\"a\": {\"password\": \"secret\""] {
            let error = Logins::read(text.as_bytes()).err().unwrap();
            assert!(matches!(error, Malformed::Form { .. }), "{error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        assert!(matches!(Logins::read(io::repeat(b' ')), Err(Malformed::Long)));
        let mut odd = Logins::read(&br#"{"a b":{"username":"me"}}"#[..]).unwrap().images();
        assert!(odd.next().unwrap().is_err());
    }
}
