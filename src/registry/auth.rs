//! Proof of who we are: basic authentication, and tokens obtained once however many requests wait for them.
//!
//! [`token`] speaks with token servers.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use parking_lot::Mutex;
use reqwest::{StatusCode, header::HeaderValue};

use super::{
    Error, Repository,
    challenge::{Challenge, challenges},
    credentials::{Credentials, Found, Keyring, Origin},
    response::Response,
    transport::{Transport, Trust},
};
use crate::registries_conf::watcher::Files;

mod token;

use token::TokenRequest;

/// For how long a password is used before it is looked up again: another one may have come that may do more.
const PASSWORD_LIFETIME: Duration = Duration::from_secs(5 * 60);
/// Most repositories of which a proof is kept; beyond, those that are not in use are forgotten.
const MAX_ENTRIES: usize = 4096;
/// How often one request gets another proof of who we are.
const MAX_RENEWALS: u32 = 2;

/// What a request may carry as proof. No `Debug`: it is a secret.
#[derive(Clone)]
pub(super) struct Grant {
    header: HeaderValue,
    /// `None` for what does not run out.
    expires: Option<Instant>,
    /// On whose behalf, for messages.
    who: String,
    /// What it was had with, if it was not anonymous.
    found: Option<Found>,
}

/// A proof that was asked for because another one will not do.
struct Renewed {
    grant: Grant,
    /// Tells it from others, see [`Entry::renew`].
    epoch: u64,
    /// Whether nobody has used it before.
    fresh: bool,
}

/// The proof at hand.
enum Proof {
    /// There is one, or none was ever needed.
    Known(Option<HeaderValue>),
    /// It has run out. The registry would ask for another in this way.
    RunOut(Vec<Challenge>),
}

/// The proof for one repository of one registry.
#[derive(Default)]
struct Entry {
    state: Mutex<State>,
    /// Held while a proof is being obtained.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Clone, Default)]
struct State {
    /// How often a proof has been asked for, failures included.
    epoch: u64,
    /// Failures are kept for those who were waiting with whoever asked, and for nobody else.
    outcome: Option<Result<Grant, Error>>,
    /// What the last one answers.
    challenges: Vec<Challenge>,
}

impl Entry {
    /// The proof at hand, and the epoch to tell [`Entry::renew`] should it be refused.
    fn current(&self) -> (u64, Proof) {
        let state = self.state.lock();
        let proof = match &state.outcome {
            Some(Ok(grant)) if grant.expires.is_none_or(|at| Instant::now() < at) => {
                Proof::Known(Some(grant.header.clone()))
            }
            Some(Ok(_)) => Proof::RunOut(state.challenges.clone()),
            Some(Err(_)) | None => Proof::Known(None),
        };
        (state.epoch, proof)
    }

    /// Obtains another proof than that of `epoch`, which answers `challenges`. Of many callers one does it, and the others
    /// share what came of it; if it gives up, because its own time is over, the next one takes its turn.
    async fn renew(
        &self,
        epoch: u64,
        challenges: &[Challenge],
        obtain: impl Future<Output = Result<Grant, Error>>,
    ) -> Result<Renewed, Error> {
        let _turn = self.turn.lock().await;
        {
            let state = self.state.lock();
            if let Some(outcome) = state.outcome.as_ref().filter(|_| state.epoch != epoch) {
                return outcome.clone().map(|grant| Renewed {
                    grant,
                    epoch: state.epoch,
                    fresh: false,
                });
            }
        }
        let outcome = obtain.await;
        let mut state = self.state.lock();
        *state = State {
            epoch: state.epoch + 1,
            outcome: Some(outcome.clone()),
            challenges: challenges.to_vec(),
        };
        outcome.map(|grant| Renewed {
            grant,
            epoch: state.epoch,
            fresh: true,
        })
    }

    /// What is had with credentials that were handed over, if that is the proof at hand, and what it answers; with its epoch.
    fn handed(&self) -> Option<(u64, Found, Vec<Challenge>)> {
        let state = self.state.lock();
        let Some(Ok(Grant { found: Some(found), .. })) = &state.outcome else {
            return None;
        };
        (found.origin == Origin::PushedCredentials).then(|| (state.epoch, found.clone(), state.challenges.clone()))
    }

    /// What the proof at hand answers, if somebody has obtained it in the place of that of `epoch`.
    fn replaced(&self, epoch: u64) -> Option<Vec<Challenge>> {
        let state = self.state.lock();
        (state.epoch != epoch && matches!(state.outcome, Some(Ok(_)))).then(|| state.challenges.clone())
    }

    /// Forgets the proof, since there may be a better one.
    fn forget(&self) {
        let mut state = self.state.lock();
        *state = State {
            epoch: state.epoch + 1,
            ..State::default()
        };
    }
}

/// All proofs, by registry and repository.
pub(super) struct Auth {
    keyring: Keyring,
    entries: Mutex<HashMap<Repository, Arc<Entry>>>,
}

impl Auth {
    /// See [`Keyring::new`].
    pub(super) fn new(files: Option<Vec<PathBuf>>, registries: Files) -> Self {
        Self {
            keyring: Keyring::new(files, registries),
            entries: Mutex::default(),
        }
    }

    fn entry(&self, repository: &Repository) -> Arc<Entry> {
        let mut entries = self.entries.lock();
        if entries.len() >= MAX_ENTRIES && !entries.contains_key(repository) {
            entries.retain(|_, entry| Arc::strong_count(entry) > 1);
        }
        entries.entry(repository.clone()).or_default().clone()
    }

    /// Uses `credentials` for `repository` and what is below it from now on.
    pub(super) fn push_credentials(&self, repository: &Repository, credentials: Credentials) {
        if !self.keyring.push_credentials(repository, credentials) {
            return;
        }
        let entries = self.entries.lock();
        let inside = |other: &Repository| {
            let rest = other.name.strip_prefix(&repository.name);
            other.registry == repository.registry && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        for (_, entry) in entries.iter().filter(|(other, _)| inside(other)) {
            entry.forget();
        }
    }

    /// Proves who we are, for one request for `repository`, whose registry is trusted as `trust` says.
    pub(super) fn proving<'a>(
        &'a self,
        transport: &'a Transport,
        repository: &'a Repository,
        trust: Trust,
    ) -> Proving<'a> {
        Proving {
            auth: self,
            transport,
            repository,
            trust,
            entry: self.entry(repository),
            epoch: 0,
            renewals: 0,
            last: None,
        }
    }

    /// Notes that the registry refuses `grant`. Whether there may be another one to try.
    fn refuse(&self, repository: &Repository, grant: &Grant) -> bool {
        let found = grant.found.as_ref();
        found.is_some_and(|found| self.keyring.refuse(repository, found))
    }

    /// Answers one of `challenges`, those of the registry of `repository`, which is trusted as `trust` says.
    pub(super) async fn obtain(
        &self,
        transport: &Transport,
        repository: &Repository,
        trust: Trust,
        challenges: &[Challenge],
    ) -> Result<Grant, Error> {
        let offered = |scheme: &str| challenges.iter().find(|challenge| challenge.scheme == scheme);
        let (bearer, basic) = (offered("bearer"), offered("basic"));
        if bearer.is_none() && basic.is_none() {
            let detail = "it offers no way to authenticate that is known here";
            return Err(unauthorized(repository, detail.to_owned()));
        }
        loop {
            let look_up = self.keyring.find(repository).await;
            let (who, found) = (look_up.who(), look_up.found);
            let obtained = match bearer {
                Some(challenge) => {
                    let request = TokenRequest {
                        transport,
                        repository,
                        trust,
                        challenge,
                    };
                    request.run(found.clone(), who).await
                }
                None => password(repository, found.clone(), who),
            };
            match (&obtained, &found) {
                // Only once for each that was handed over: then they are known to be refused.
                (Err(Error::Unauthorized { .. }), Some(found)) if self.keyring.refuse(repository, found) => {}
                _ => return obtained,
            }
        }
    }
}

/// Who we are, proved to one registry for one request.
pub(super) struct Proving<'a> {
    auth: &'a Auth,
    transport: &'a Transport,
    repository: &'a Repository,
    trust: Trust,
    entry: Arc<Entry>,
    /// Of the proof used.
    epoch: u64,
    renewals: u32,
    /// The proof used, if it is not one that was at hand.
    last: Option<Renewed>,
}

impl Proving<'_> {
    /// What to send the request with first: the proof at hand, or another if that has run out.
    pub(super) async fn at_hand(&mut self) -> Result<Option<HeaderValue>, Error> {
        let (epoch, proof) = self.entry.current();
        self.epoch = epoch;
        let challenges = match proof {
            Proof::Known(proof) => return Ok(proof),
            // The registry would only say so, to each of those who ask.
            Proof::RunOut(challenges) => challenges,
        };
        match self.renew(&challenges).await {
            Ok(proof) => {
                // If this is refused, it may be that the registry wants something else by now.
                self.last = None;
                Ok(Some(proof))
            }
            Err(error) if error.is_transient() => Err(error),
            Err(_) => {
                self.epoch = self.entry.current().0;
                Ok(None)
            }
        }
    }

    /// What to send the request with again, if `response` refuses the proof. Where the registry has redirected to has no say
    /// in that.
    ///
    /// # Errors
    /// There is none, or this registry refuses all.
    pub(super) async fn another(&mut self, response: &mut Response) -> Result<Option<HeaderValue>, Error> {
        match response.status() {
            _ if response.is_foreign() => return Ok(None),
            StatusCode::UNAUTHORIZED => {}
            StatusCode::FORBIDDEN => return self.instead_of_handed(response).await,
            status => {
                if status.is_success() && self.renewals > 0 {
                    self.still_of_use();
                }
                return Ok(None);
            }
        }
        if let Some(last) = &self.last {
            // What somebody else has got may have run out meanwhile.
            let other = self.auth.refuse(self.repository, &last.grant) || !last.fresh;
            if !other || self.renewals >= MAX_RENEWALS {
                let detail = response.detail().await;
                let detail = format!("it refuses {} {detail}", last.grant.who).trim_end().to_owned();
                return Err(unauthorized(self.repository, detail));
            }
        }
        response.drain().await;
        self.renew(&challenges(response.headers())).await.map(Some)
    }

    /// What was handed over once may let in no more, which some registries say with 403: then others are tried, once. Somebody
    /// who was denied at the same time may have done so.
    async fn instead_of_handed(&mut self, response: &mut Response) -> Result<Option<HeaderValue>, Error> {
        if self.renewals >= MAX_RENEWALS {
            return Ok(None);
        }
        let handed = self.entry.handed().filter(|(_, found, _)| !found.refused);
        let challenges = match handed {
            Some((epoch, found, challenges)) => {
                if epoch == self.epoch {
                    self.auth.keyring.refuse(self.repository, &found);
                }
                challenges
            }
            None => match self.entry.replaced(self.epoch) {
                Some(challenges) => challenges,
                None => return Ok(None),
            },
        };
        response.drain().await;
        self.renew(&challenges).await.map(Some)
    }

    fn still_of_use(&self) {
        if let Some((_, found, _)) = self.entry.handed().filter(|(epoch, ..)| *epoch == self.epoch) {
            self.auth.keyring.touch(self.repository, &found);
        }
    }

    async fn renew(&mut self, challenges: &[Challenge]) -> Result<HeaderValue, Error> {
        let obtain = self
            .auth
            .obtain(self.transport, self.repository, self.trust, challenges);
        let renewed = self.entry.renew(self.epoch, challenges, obtain).await?;
        self.epoch = renewed.epoch;
        self.renewals += 1;
        let header = renewed.grant.header.clone();
        self.last = Some(renewed);
        Ok(header)
    }
}

/// Basic authentication.
fn password(repository: &Repository, found: Option<Found>, who: String) -> Result<Grant, Error> {
    match found.as_ref().map(|found| &found.credentials) {
        Some(Credentials::Password { user, password }) => {
            let header = basic(user, password)
                .ok_or_else(|| unauthorized(repository, format!("{who} cannot be sent to anybody")))?;
            Ok(Grant {
                header,
                expires: Instant::now().checked_add(PASSWORD_LIFETIME),
                who,
                found,
            })
        }
        Some(Credentials::IdentityToken { .. }) => {
            let detail = format!("it takes no identity token, and there are only {who}");
            Err(unauthorized(repository, detail))
        }
        None => Err(unauthorized(
            repository,
            format!("it wants a password, and refuses {who}"),
        )),
    }
}

/// A registry that does not let us in.
fn unauthorized(repository: &Repository, detail: String) -> Error {
    Error::Unauthorized {
        registry: repository.registry.clone(),
        repository: repository.name.clone(),
        detail,
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
