//! Proof of who we are: basic authentication, and tokens obtained once however many requests wait for them
//! ([token](https://distribution.github.io/distribution/spec/auth/token/) and
//! [OAuth2](https://distribution.github.io/distribution/spec/auth/oauth/) protocols of the distribution project).

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use parking_lot::Mutex;
use reqwest::{Method, StatusCode, Url, header::HeaderValue};
use serde::Deserialize;

use super::{
    Error, Repository,
    challenge::Challenge,
    credentials::{self, Credentials, Found},
    response::Response,
    transport::{Request, Transport, Trust, authority, without_user},
};

/// Most bytes of a token server's answer.
const MAX_TOKEN: u64 = 1 << 20;
/// A token is taken to live at least so long: the protocol's default, and older servers give nonsense.
const MIN_LIFETIME: Duration = Duration::from_secs(60);
/// A token is not used in its last seconds: it might run out under way.
const MARGIN: Duration = Duration::from_secs(5);

/// What a request may carry as proof. No `Debug`: it is a secret.
#[derive(Clone)]
pub(super) struct Grant {
    pub(super) header: HeaderValue,
    /// `None` for what does not run out.
    expires: Option<Instant>,
    /// On whose behalf, for messages.
    pub(super) who: String,
}

/// The proof for one repository of one registry.
#[derive(Default)]
pub(super) struct Entry {
    state: Mutex<State>,
    /// Held while a proof is being obtained.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Clone, Default)]
struct State {
    /// How often a proof has been asked for, failures included.
    epoch: u64,
    outcome: Option<Result<Grant, Error>>,
}

impl Entry {
    /// The proof at hand, and the epoch to tell [`Entry::renew`] should it be refused.
    pub(super) fn current(&self) -> (u64, Option<HeaderValue>) {
        let state = self.state.lock();
        let usable = |grant: &&Grant| grant.expires.is_none_or(|at| Instant::now() < at);
        let grant = state
            .outcome
            .as_ref()
            .and_then(|outcome| outcome.as_ref().ok())
            .filter(usable);
        (state.epoch, grant.map(|grant| grant.header.clone()))
    }

    /// Obtains another proof than that of `epoch`. Of many callers one does it, and the others share what came of it;
    /// if it gives up, because its own time is over, the next one takes its turn.
    pub(super) async fn renew(
        &self,
        epoch: u64,
        obtain: impl Future<Output = Result<Grant, Error>>,
    ) -> Result<Grant, Error> {
        let _turn = self.turn.lock().await;
        {
            let state = self.state.lock();
            if let Some(outcome) = state.outcome.as_ref().filter(|_| state.epoch != epoch) {
                return outcome.clone();
            }
        }
        let outcome = obtain.await;
        let mut state = self.state.lock();
        *state = State {
            epoch: state.epoch + 1,
            outcome: Some(outcome.clone()),
        };
        outcome
    }
}

/// All proofs, by registry and repository.
pub(super) struct Auth {
    files: Vec<PathBuf>,
    entries: Mutex<HashMap<Repository, Arc<Entry>>>,
}

impl Auth {
    pub(super) fn new(files: Option<Vec<PathBuf>>) -> Self {
        let usual = || credentials::usual_files(|name| std::env::var_os(name), rustix::process::getuid().as_raw());
        Self {
            files: files.unwrap_or_else(usual),
            entries: Mutex::default(),
        }
    }

    pub(super) fn entry(&self, repository: &Repository) -> Arc<Entry> {
        self.entries.lock().entry(repository.clone()).or_default().clone()
    }

    /// Answers one of `challenges`, those of the registry of `repository`, which is trusted as `trust` says.
    pub(super) async fn obtain(
        &self,
        transport: &Transport,
        repository: &Repository,
        trust: Trust,
        challenges: &[Challenge],
    ) -> Result<Grant, Error> {
        let found = credentials::find(&self.files, repository).await;
        let offered = |scheme: &str| challenges.iter().find(|challenge| challenge.scheme == scheme);
        if let Some(challenge) = offered("bearer") {
            return TokenRequest {
                transport,
                repository,
                trust,
                challenge,
            }
            .run(found)
            .await;
        }
        if offered("basic").is_none() {
            return Err(unauthorized(
                repository,
                "it offers no way to authenticate that is known here".into(),
            ));
        }
        match found {
            Some(Found {
                credentials: Credentials::Password { user, password },
                file,
            }) => {
                let who = format!("the credentials of {}", file.display());
                let header = basic(&user, &password).ok_or_else(|| unauthorized(repository, who.clone()))?;
                Ok(Grant {
                    header,
                    expires: None,
                    who,
                })
            }
            Some(Found { file, .. }) => {
                let detail = format!("it takes no identity token such as that of {}", file.display());
                Err(unauthorized(repository, detail))
            }
            None => Err(unauthorized(
                repository,
                "it wants a password and none was found".into(),
            )),
        }
    }
}

/// A registry that does not let us in.
pub(super) fn unauthorized(repository: &Repository, detail: String) -> Error {
    Error::Unauthorized {
        registry: repository.registry.clone(),
        repository: repository.name.clone(),
        detail,
    }
}

/// One request for a token.
struct TokenRequest<'a> {
    transport: &'a Transport,
    repository: &'a Repository,
    trust: Trust,
    challenge: &'a Challenge,
}

/// What a token server answers; `access_token` is OAuth2's name for it.
#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<u64>,
}

impl TokenRequest<'_> {
    async fn run(&self, found: Option<Found>) -> Result<Grant, Error> {
        let who = match &found {
            Some(found) => format!("the credentials of {}", found.file.display()),
            None => "anonymous access (no credentials were found)".to_owned(),
        };
        let (realm, trust) = self.realm()?;
        let what = format!("a token for {}", self.repository);
        // From before it was asked for, since nobody says when the server's clock started.
        let asked = Instant::now();
        let mut response = match found.map(|found| found.credentials) {
            Some(Credentials::IdentityToken(token)) => self.refresh(realm, trust, &what, &token).await?,
            Some(Credentials::Password { user, password }) => {
                let header = basic(&user, &password).ok_or_else(|| unauthorized(self.repository, who.clone()))?;
                self.get(realm, trust, &what, Some((user, header))).await?
            }
            None => self.get(realm, trust, &what, None).await?,
        };
        let host = response.host().to_owned();
        match response.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let detail = response.detail().await;
                let detail = format!("its token server {host} refuses {who} {detail}")
                    .trim_end()
                    .to_owned();
                return Err(unauthorized(self.repository, detail));
            }
            // Not to be taken for a missing image.
            StatusCode::NOT_FOUND => return Err(response.invalid("there is no token server")),
            _ => response = response.check().await?,
        }
        let bytes = response.read_all(MAX_TOKEN).await?;
        // Its own words are not told: they may quote the token.
        let answer: TokenAnswer = serde_json::from_slice(&bytes).map_err(|_| response.invalid("not a token"))?;
        let token = [answer.token, answer.access_token]
            .into_iter()
            .flatten()
            .find(|token| !token.is_empty());
        let header = token.and_then(|token| secret(&format!("Bearer {token}")));
        let lifetime = answer
            .expires_in
            .map_or(MIN_LIFETIME, Duration::from_secs)
            .max(MIN_LIFETIME);
        Ok(Grant {
            header: header.ok_or_else(|| response.invalid("no usable token in it"))?,
            // Beyond what the clock can tell is as good as for ever.
            expires: asked.checked_add(lifetime - MARGIN),
            who,
        })
    }

    /// The token server's address. It is the registry that names it, so it may be trusted as far as the registry.
    fn realm(&self) -> Result<(Url, Trust), Error> {
        let unusable = |detail: &str| unauthorized(self.repository, detail.to_owned());
        let realm = self
            .challenge
            .param("realm")
            .ok_or_else(|| unusable("it names no token server"))?;
        let realm = Url::parse(realm).ok().and_then(without_user);
        let realm = realm.ok_or_else(|| unusable("the address of its token server is invalid"))?;
        if realm.scheme() == "http" && self.trust == Trust::Strict {
            let detail = format!("its token server {} is not reached over TLS", authority(&realm));
            return Err(unauthorized(self.repository, detail));
        }
        let trust = match (self.transport.trust(&realm), self.trust) {
            (Trust::Strict, Trust::Insecure | Trust::Loopback) => Trust::Insecure,
            (own, _) => own,
        };
        Ok((realm, trust))
    }

    fn scope(&self) -> String {
        format!("repository:{}:pull", self.repository.name)
    }

    /// Not in `get` itself, whose future has to be `Send`: the query's builder is not.
    fn extend_query(&self, realm: &mut Url, user: Option<&String>) {
        let mut query = realm.query_pairs_mut();
        if let Some(name) = user {
            query.append_pair("account", name);
        }
        if let Some(service) = self.challenge.param("service") {
            query.append_pair("service", service);
        }
        query.append_pair("scope", &self.scope());
    }

    async fn get(
        &self,
        mut realm: Url,
        trust: Trust,
        what: &str,
        user: Option<(String, HeaderValue)>,
    ) -> Result<Response, Error> {
        self.extend_query(&mut realm, user.as_ref().map(|(name, _)| name));
        let mut request = Request::new(Method::GET, realm, what);
        request.home = &self.repository.registry;
        request.authorization = user.map(|(_, header)| header);
        let response = self.transport.send(&request, trust).await?;
        self.transport.follow(request, response).await
    }

    /// OAuth2's refresh of an identity token. A redirect is not followed: the secret is in the body.
    async fn refresh(&self, realm: Url, trust: Trust, what: &str, token: &str) -> Result<Response, Error> {
        // A URL's query is the one form encoder at hand.
        let mut form = realm.clone();
        form.query_pairs_mut()
            .clear()
            .append_pair("grant_type", "refresh_token")
            .append_pair("service", self.challenge.param("service").unwrap_or_default())
            .append_pair("client_id", "nydus-store")
            .append_pair("scope", &self.scope())
            .append_pair("refresh_token", token);
        let mut request = Request::new(Method::POST, realm, what);
        request.home = &self.repository.registry;
        request.form = Some(form.query().unwrap_or_default().to_owned());
        self.transport.send(&request, trust).await
    }
}

/// The header of basic authentication.
fn basic(user: &str, password: &str) -> Option<HeaderValue> {
    secret(&format!(
        "Basic {}",
        BASE64_STANDARD.encode(format!("{user}:{password}"))
    ))
}

/// A header that is not shown by `Debug` and never compressed into a shared table.
fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}
