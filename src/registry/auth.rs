//! Authorization of requests: basic authentication, and tokens, each obtained once for all requests that wait for it.
//!
//! [`Auth`] caches one authorization per repository; [`Authenticator`] provides it to one request; [`token`] implements
//! the protocol of token servers.

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
    credentials::{CredentialOrigin, Credentials, FoundCredentials, Keyring},
    host_name::Trust,
    redirect_hosts::RedirectHosts,
    response::Response,
};
use crate::registries_conf::watcher::RegistriesConfPaths;

mod token;

use token::TokenRequest;

/// How long a password is used before it is looked up again, since it may have been replaced.
const PASSWORD_LIFETIME: Duration = Duration::from_secs(5 * 60);
/// Most repositories with a cached authorization. Beyond it, those not in use are dropped.
const MAX_REPOSITORIES: usize = 4096;
/// How often one request obtains another authorization.
const MAX_RENEWALS: u32 = 2;

/// The `Authorization` header of requests. No `Debug`: it is a secret.
#[derive(Clone)]
pub(super) struct Authorization {
    header: HeaderValue,
    /// `None` if it does not expire.
    expires: Option<Instant>,
    /// Describes its credentials in messages.
    who: String,
    /// The credentials that obtained it; `None` if it is anonymous.
    found: Option<FoundCredentials>,
}

/// An authorization obtained because the previous one was refused or has expired.
struct RenewedAuthorization {
    authorization: Authorization,
    /// Identifies it, see [`RepositoryAuth::renew`].
    epoch: u64,
    /// Whether this request has obtained it, and not another one before.
    is_fresh: bool,
}

/// The authorization at hand.
enum CachedAuthorization {
    /// Valid, or `None` if none was ever needed.
    Valid(Option<HeaderValue>),
    /// Expired. The registry would answer with these challenges.
    Expired(Vec<Challenge>),
}

/// The authorization for one repository.
#[derive(Default)]
struct RepositoryAuth {
    state: Mutex<RepositoryAuthState>,
    /// Held while an authorization is being obtained.
    renewing: tokio::sync::Mutex<()>,
}

#[derive(Clone, Default)]
struct RepositoryAuthState {
    /// How often an authorization has been obtained, failures included.
    epoch: u64,
    /// A failure is shared with the requests that waited for it only.
    result: Option<Result<Authorization, Error>>,
    /// The challenges that `result` answers.
    challenges: Vec<Challenge>,
}

impl RepositoryAuth {
    /// The authorization at hand, and the epoch to pass to [`RepositoryAuth::renew`] if it is refused.
    fn current(&self) -> (u64, CachedAuthorization) {
        let state = self.state.lock();
        let cached = match &state.result {
            Some(Ok(authorization)) if authorization.expires.is_none_or(|at| Instant::now() < at) => {
                CachedAuthorization::Valid(Some(authorization.header.clone()))
            }
            Some(Ok(_)) => CachedAuthorization::Expired(state.challenges.clone()),
            Some(Err(_)) | None => CachedAuthorization::Valid(None),
        };
        (state.epoch, cached)
    }

    /// Replaces the authorization of `epoch` with one that answers `challenges`. One caller runs `obtain`, and
    /// concurrent callers share its result. If that caller is cancelled, the next one runs its own.
    async fn renew(
        &self,
        epoch: u64,
        challenges: &[Challenge],
        obtain: impl Future<Output = Result<Authorization, Error>>,
    ) -> Result<RenewedAuthorization, Error> {
        let _renewing = self.renewing.lock().await;
        {
            let state = self.state.lock();
            if let Some(result) = state.result.as_ref().filter(|_| state.epoch != epoch) {
                return result.clone().map(|authorization| RenewedAuthorization {
                    authorization,
                    epoch: state.epoch,
                    is_fresh: false,
                });
            }
        }
        let result = obtain.await;
        let mut state = self.state.lock();
        *state = RepositoryAuthState {
            epoch: state.epoch + 1,
            result: Some(result.clone()),
            challenges: challenges.to_vec(),
        };
        result.map(|authorization| RenewedAuthorization {
            authorization,
            epoch: state.epoch,
            is_fresh: true,
        })
    }

    /// If the authorization at hand was obtained with pushed credentials: its epoch, these, and the challenges it
    /// answers.
    fn pushed(&self) -> Option<(u64, FoundCredentials, Vec<Challenge>)> {
        let state = self.state.lock();
        let Some(Ok(Authorization { found: Some(found), .. })) = &state.result else {
            return None;
        };
        (found.origin == CredentialOrigin::Pushed).then(|| (state.epoch, found.clone(), state.challenges.clone()))
    }

    /// If another request has replaced the authorization of `epoch`: the challenges that the new one answers.
    fn replaced(&self, epoch: u64) -> Option<Vec<Challenge>> {
        let state = self.state.lock();
        (state.epoch != epoch && matches!(state.result, Some(Ok(_)))).then(|| state.challenges.clone())
    }

    /// Drops the authorization, since better credentials may be available.
    fn forget(&self) {
        let mut state = self.state.lock();
        *state = RepositoryAuthState {
            epoch: state.epoch + 1,
            ..RepositoryAuthState::default()
        };
    }
}

/// The authorizations of all repositories.
pub(super) struct Auth {
    keyring: Keyring,
    repositories: Mutex<HashMap<Repository, Arc<RepositoryAuth>>>,
}

impl Auth {
    /// See [`Keyring::new`].
    pub(super) fn new(auth_files: Option<Vec<PathBuf>>, registries_conf: RegistriesConfPaths) -> Self {
        Self {
            keyring: Keyring::new(auth_files, registries_conf),
            repositories: Mutex::default(),
        }
    }

    fn repository(&self, repository: &Repository) -> Arc<RepositoryAuth> {
        let mut entries = self.repositories.lock();
        if entries.len() >= MAX_REPOSITORIES && !entries.contains_key(repository) {
            entries.retain(|_, entry| Arc::strong_count(entry) > 1);
        }
        entries.entry(repository.clone()).or_default().clone()
    }

    /// Uses `credentials` for `repository` and repositories below it from now on.
    pub(super) fn push_credentials(&self, repository: &Repository, credentials: Credentials) {
        if !self.keyring.push_credentials(repository, credentials) {
            return;
        }
        let entries = self.repositories.lock();
        let is_inside = |other: &Repository| {
            let rest = other.name.strip_prefix(&repository.name);
            other.registry == repository.registry && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        for (_, entry) in entries.iter().filter(|(other, _)| is_inside(other)) {
            entry.forget();
        }
    }

    /// The pushed credentials by repository.
    pub(super) fn pushed_credentials(&self) -> Vec<(Repository, Credentials)> {
        self.keyring.pushed()
    }

    /// Authenticates one request for `repository`. `trust` is the trust in its registry.
    pub(super) fn authenticator<'a>(
        &'a self,
        redirect_hosts: &'a RedirectHosts,
        repository: &'a Repository,
        trust: Trust,
    ) -> Authenticator<'a> {
        Authenticator {
            auth: self,
            redirect_hosts,
            repository,
            trust,
            cached: self.repository(repository),
            epoch: 0,
            renewals: 0,
            last: None,
        }
    }

    /// Records that the registry refuses `authorization`. Returns whether other credentials may be available.
    fn reject(&self, repository: &Repository, authorization: &Authorization) -> bool {
        let found = authorization.found.as_ref();
        found.is_some_and(|found| self.keyring.reject(repository, found))
    }

    /// Obtains an authorization that answers one of `challenges`, which the registry of `repository` has sent. `trust`
    /// is the trust in that registry.
    pub(super) async fn obtain(
        &self,
        redirect_hosts: &RedirectHosts,
        repository: &Repository,
        trust: Trust,
        challenges: &[Challenge],
    ) -> Result<Authorization, Error> {
        let offered = |scheme: &str| challenges.iter().find(|challenge| challenge.scheme == scheme);
        let (bearer, basic) = (offered("bearer"), offered("basic"));
        if bearer.is_none() && basic.is_none() {
            let detail = "it offers no supported authentication scheme";
            return Err(unauthorized(repository, detail.to_owned()));
        }
        loop {
            let look_up = self.keyring.find(repository).await;
            let (who, found) = (look_up.who(), look_up.found);
            let obtained = match bearer {
                Some(challenge) => {
                    let request = TokenRequest {
                        redirect_hosts,
                        repository,
                        trust,
                        challenge,
                    };
                    request.send(found.clone(), who).await
                }
                None => basic_authorization(repository, found.clone(), who),
            };
            match (&obtained, &found) {
                // Tries the next credentials. Ends, because pushed credentials can be rejected only once.
                (Err(Error::Unauthorized { .. }), Some(found)) if self.keyring.reject(repository, found) => {}
                _ => return obtained,
            }
        }
    }
}

/// Provides the authorization of one request.
pub(super) struct Authenticator<'a> {
    auth: &'a Auth,
    redirect_hosts: &'a RedirectHosts,
    repository: &'a Repository,
    trust: Trust,
    cached: Arc<RepositoryAuth>,
    /// The epoch of the authorization in use.
    epoch: u64,
    renewals: u32,
    /// The authorization in use, if it was renewed for this request.
    last: Option<RenewedAuthorization>,
}

impl Authenticator<'_> {
    /// The authorization to send the request with first: the one at hand, renewed if it has expired.
    pub(super) async fn initial(&mut self) -> Result<Option<HeaderValue>, Error> {
        let (epoch, cached) = self.cached.current();
        self.epoch = epoch;
        let challenges = match cached {
            CachedAuthorization::Valid(header) => return Ok(header),
            // Renewed without asking the registry, which would refuse each of the waiting requests.
            CachedAuthorization::Expired(challenges) => challenges,
        };
        match self.renew(&challenges).await {
            Ok(header) => {
                // If this one is refused, the registry may have other challenges by now.
                self.last = None;
                Ok(Some(header))
            }
            Err(error) if error.is_transient() => Err(error),
            Err(_) => {
                self.epoch = self.cached.current().0;
                Ok(None)
            }
        }
    }

    /// The authorization to send the request with again, if `response` refuses the last one. Ignores answers of
    /// redirect targets.
    ///
    /// # Errors
    /// [`Error::Unauthorized`] if no other authorization can be obtained, and the errors of requests for tokens.
    pub(super) async fn after(&mut self, response: &mut Response) -> Result<Option<HeaderValue>, Error> {
        match response.status() {
            _ if response.is_cross_origin() => return Ok(None),
            StatusCode::UNAUTHORIZED => {}
            StatusCode::FORBIDDEN => return self.instead_of_pushed(response).await,
            status => {
                if status.is_success() && self.renewals > 0 {
                    self.touch_pushed();
                }
                return Ok(None);
            }
        }
        if let Some(last) = &self.last {
            // An authorization that another request obtained may have expired meanwhile.
            let may_have_other = self.auth.reject(self.repository, &last.authorization) || !last.is_fresh;
            if !may_have_other || self.renewals >= MAX_RENEWALS {
                let detail = response.error_detail().await;
                let who = &last.authorization.who;
                let detail = format!("it refuses {who} {detail}").trim_end().to_owned();
                return Err(unauthorized(self.repository, detail));
            }
        }
        response.drain().await;
        self.renew(&challenges(response.headers())).await.map(Some)
    }

    /// Replaces pushed credentials, once, after status 403: some registries answer so when these have expired. A
    /// concurrent request may have replaced them already.
    async fn instead_of_pushed(&mut self, response: &mut Response) -> Result<Option<HeaderValue>, Error> {
        if self.renewals >= MAX_RENEWALS {
            return Ok(None);
        }
        let pushed = self.cached.pushed().filter(|(_, found, _)| !found.is_rejected);
        let challenges = match pushed {
            Some((epoch, found, challenges)) => {
                if epoch == self.epoch {
                    self.auth.keyring.reject(self.repository, &found);
                }
                challenges
            }
            None => match self.cached.replaced(self.epoch) {
                Some(challenges) => challenges,
                None => return Ok(None),
            },
        };
        response.drain().await;
        self.renew(&challenges).await.map(Some)
    }

    /// Extends the lifetime of pushed credentials that the registry has accepted.
    fn touch_pushed(&self) {
        if let Some((_, found, _)) = self.cached.pushed().filter(|(epoch, ..)| *epoch == self.epoch) {
            self.auth.keyring.touch(self.repository, &found);
        }
    }

    async fn renew(&mut self, challenges: &[Challenge]) -> Result<HeaderValue, Error> {
        let obtain = self
            .auth
            .obtain(self.redirect_hosts, self.repository, self.trust, challenges);
        let renewed = self.cached.renew(self.epoch, challenges, obtain).await?;
        self.epoch = renewed.epoch;
        self.renewals += 1;
        let header = renewed.authorization.header.clone();
        self.last = Some(renewed);
        Ok(header)
    }
}

/// Basic authentication with a password.
fn basic_authorization(
    repository: &Repository,
    found: Option<FoundCredentials>,
    who: String,
) -> Result<Authorization, Error> {
    match found.as_ref().map(|found| &found.credentials) {
        Some(Credentials::Password { user, password }) => {
            let header = basic_header(user, password)
                .ok_or_else(|| unauthorized(repository, format!("{who} are not valid in a header")))?;
            Ok(Authorization {
                header,
                expires: Instant::now().checked_add(PASSWORD_LIFETIME),
                who,
                found,
            })
        }
        Some(Credentials::IdentityToken { .. }) => {
            let detail = format!("it needs a password, but {who} are an identity token");
            Err(unauthorized(repository, detail))
        }
        None => Err(unauthorized(
            repository,
            format!("it needs a password, and refuses {who}"),
        )),
    }
}

fn unauthorized(repository: &Repository, detail: String) -> Error {
    Error::Unauthorized {
        registry: repository.registry.clone(),
        repository: repository.name.clone(),
        detail,
    }
}

/// The header of basic authentication; `None` if it would be invalid.
fn basic_header(user: &str, password: &str) -> Option<HeaderValue> {
    secret_header(&format!(
        "Basic {}",
        BASE64_STANDARD.encode(format!("{user}:{password}"))
    ))
}

/// A header that `Debug` does not show, and that HTTP/2 does not put into its compression table.
fn secret_header(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}
