//! Token servers ([token](https://distribution.github.io/distribution/spec/auth/token/) and
//! [OAuth2](https://distribution.github.io/distribution/spec/auth/oauth/) protocols of the distribution project).

use std::time::{Duration, Instant};

use jiff::{Timestamp, fmt::rfc2822};
use reqwest::{
    Method, StatusCode, Url,
    header::{self, HeaderValue},
};
use serde::Deserialize;

use super::{
    super::{
        Error, Repository,
        challenge::Challenge,
        credentials::{Credentials, Found},
        response::Response,
        transport::{Request, Transport, Trust, authority, without_user},
    },
    Grant, basic, secret, unauthorized,
};

/// Most bytes of a token server's answer.
const MAX_TOKEN: u64 = 1 << 20;
/// How long a token lives if its server does not say: the protocol's default.
const USUAL_LIFETIME: Duration = Duration::from_secs(60);
/// A token is taken to live at least so long: it has just been given.
const MIN_LIFETIME: Duration = Duration::from_secs(1);
/// A token is not used in its last seconds, because it might run out under way; or, if it is short-lived, not in its last
/// quarter.
const MARGIN: Duration = Duration::from_secs(5);
/// Whom token servers take the one with an identity token for, if his name is not known.
const NOBODY: &str = "<token>";

/// One request for a token.
pub(super) struct TokenRequest<'a> {
    pub(super) transport: &'a Transport,
    pub(super) repository: &'a Repository,
    pub(super) trust: Trust,
    pub(super) challenge: &'a Challenge,
}

/// What a token server answers; `access_token` is OAuth2's name for it.
#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    /// Seconds. Whatever else is there is no reason to have no token.
    #[serde(default)]
    expires_in: serde_json::Value,
    #[serde(default)]
    issued_at: serde_json::Value,
}

impl TokenAnswer {
    /// For how long the token may be used from when it was asked for, which was at `date` by the server's own clock.
    fn lifetime(&self, date: Option<Timestamp>) -> Duration {
        let stated = self.expires_in.as_f64().filter(|seconds| *seconds > 0.0);
        let stated = stated.map_or(USUAL_LIFETIME, |seconds| {
            Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
        });
        // One from a cache is older than its answer. What our own clock says does not matter.
        let issued = self.issued_at.as_str().and_then(|at| at.parse::<Timestamp>().ok());
        let age = issued.zip(date).and_then(|(issued, date)| {
            let age = date.duration_since(issued);
            Duration::try_from(age).ok()
        });
        let rest = stated.saturating_sub(age.unwrap_or_default()).max(MIN_LIFETIME);
        rest - MARGIN.min(rest / 4)
    }
}

impl TokenRequest<'_> {
    /// Asks for a token with what was `found`, on behalf of `who`.
    pub(super) async fn run(&self, found: Option<Found>, who: String) -> Result<Grant, Error> {
        let (realm, trust) = self.realm()?;
        let what = format!("a token for {}", self.repository);
        // From before it was asked for, since nobody says when the server's clock started.
        let asked = Instant::now();
        let credentials = found.as_ref().map(|found| &found.credentials);
        let mut response = self.ask(realm, trust, &what, credentials, &who).await?;
        let host = response.host().to_owned();
        match response.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let detail = response.detail().await;
                let detail = format!("its token server {host} refuses {who} {detail}")
                    .trim_end()
                    .to_owned();
                return Err(unauthorized(self.repository, detail));
            }
            // OAuth2's word for a refresh token that it does not take (RFC 6749, 5.2).
            StatusCode::BAD_REQUEST if matches!(credentials, Some(Credentials::IdentityToken { .. })) => {
                let detail = format!("its token server {host} does not take the identity token of {who}");
                return Err(unauthorized(self.repository, detail));
            }
            // Not to be taken for a missing image.
            StatusCode::NOT_FOUND => return Err(response.invalid("there is no token server")),
            _ => response = response.check().await?,
        }
        let date = response.header(header::DATE).and_then(|date| rfc2822::parse(date).ok());
        let bytes = response.read_all(MAX_TOKEN).await?;
        // Its own words are not told: they may quote the token.
        let answer: TokenAnswer = serde_json::from_slice(&bytes).map_err(|_| response.invalid("not a token"))?;
        let lifetime = answer.lifetime(date.map(|date| date.timestamp()));
        let token = [answer.token, answer.access_token]
            .into_iter()
            .flatten()
            .find(|token| !token.is_empty());
        let header = token.and_then(|token| secret(&format!("Bearer {token}")));
        Ok(Grant {
            header: header.ok_or_else(|| response.invalid("no usable token in it"))?,
            // Beyond what the clock can tell is as good as for ever.
            expires: asked.checked_add(lifetime),
            who,
            found,
        })
    }

    /// The token server's address. It is the registry that names it, so it may be trusted as far as the registry, and a
    /// registry on this machine as far as the address itself.
    fn realm(&self) -> Result<(Url, Trust), Error> {
        let unusable = |detail: &str| unauthorized(self.repository, detail.to_owned());
        let realm = self
            .challenge
            .param("realm")
            .ok_or_else(|| unusable("it names no token server"))?;
        let realm = Url::parse(realm).ok().and_then(without_user);
        let realm = realm.ok_or_else(|| unusable("the address of its token server is invalid"))?;
        let trust = match (self.transport.trust(&realm), self.trust) {
            (Trust::Strict, Trust::Insecure) => Trust::Insecure,
            (own, _) => own,
        };
        let registry = Url::parse(&format!("https://{}/", self.repository.registry));
        if let Some(why) = registry
            .ok()
            .and_then(|registry| self.transport.leads_in(&registry, &realm))
        {
            return Err(unauthorized(
                self.repository,
                format!("its token server would be {why}"),
            ));
        }
        let plain_for_strict = realm.scheme() == "http" && self.trust == Trust::Strict;
        if plain_for_strict || (realm.scheme() == "http" && trust == Trust::Strict) {
            let detail = format!("its token server {} is not reached over TLS", authority(&realm));
            return Err(unauthorized(self.repository, detail));
        }
        Ok((realm, trust))
    }

    async fn ask(
        &self,
        realm: Url,
        trust: Trust,
        what: &str,
        credentials: Option<&Credentials>,
        who: &str,
    ) -> Result<Response, Error> {
        let unusable = || unauthorized(self.repository, format!("{who} cannot be sent to anybody"));
        let (user, password) = match credentials {
            None => return self.get(realm, trust, what, None).await,
            Some(Credentials::Password { user, password }) => (user.as_str(), password),
            Some(Credentials::IdentityToken { user, token }) => {
                let mut response = self.refresh(realm.clone(), trust, what, token).await?;
                if !knows_no_post(response.status()) {
                    return Ok(response);
                }
                response.drain().await;
                (user.as_deref().filter(|user| !user.is_empty()).unwrap_or(NOBODY), token)
            }
        };
        let header = basic(user, password).ok_or_else(unusable)?;
        let account = (user != NOBODY).then_some(user);
        self.get(realm, trust, what, Some((account, header))).await
    }

    /// What is asked for: to pull from the repository; and what the registry says, where a proxy before it has changed
    /// the name, but no more than to pull.
    fn scopes(&self) -> impl Iterator<Item = String> {
        let own = format!("repository:{}:pull", self.repository.name);
        let theirs = self.challenge.param("scope").unwrap_or_default();
        let theirs = Some(theirs).filter(|scope| {
            let words: Vec<_> = scope.split(':').collect();
            matches!(words[..], ["repository", _, "pull"]) && !scope.contains(' ') && *scope != own
        });
        let theirs = theirs.map(str::to_owned);
        std::iter::once(own).chain(theirs)
    }

    /// Not in `get` itself, whose future has to be `Send`: the query's builder is not.
    fn extend_query(&self, realm: &mut Url, account: Option<&str>) {
        let mut query = realm.query_pairs_mut();
        if let Some(name) = account {
            query.append_pair("account", name);
        }
        if let Some(service) = self.challenge.param("service") {
            query.append_pair("service", service);
        }
        for scope in self.scopes() {
            query.append_pair("scope", &scope);
        }
    }

    async fn get(
        &self,
        mut realm: Url,
        trust: Trust,
        what: &str,
        login: Option<(Option<&str>, HeaderValue)>,
    ) -> Result<Response, Error> {
        self.extend_query(&mut realm, login.as_ref().and_then(|(account, _)| *account));
        let mut request = Request::new(Method::GET, realm, what);
        request.home = &self.repository.registry;
        request.authorization = login.map(|(_, header)| header);
        let response = self.transport.send_elsewhere(&request, trust).await?;
        self.transport.follow(request, response).await
    }

    /// OAuth2's refresh of an identity token. A redirect is not followed: the secret is in the body.
    async fn refresh(&self, realm: Url, trust: Trust, what: &str, token: &str) -> Result<Response, Error> {
        let scope: Vec<_> = self.scopes().collect();
        // A URL's query is the one form encoder at hand.
        let mut form = realm.clone();
        form.query_pairs_mut()
            .clear()
            .append_pair("grant_type", "refresh_token")
            .append_pair("service", self.challenge.param("service").unwrap_or_default())
            .append_pair("client_id", "nydus-store")
            .append_pair("scope", &scope.join(" "))
            .append_pair("refresh_token", token);
        let mut request = Request::new(Method::POST, realm, what);
        request.home = &self.repository.registry;
        request.form = Some(form.query().unwrap_or_default().to_owned());
        self.transport.send_elsewhere(&request, trust).await
    }
}

/// Token servers without OAuth2 answer so to its request.
fn knows_no_post(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lifetime(answer: &str, date: Option<&str>) -> f64 {
        let answer: TokenAnswer = serde_json::from_str(answer).unwrap();
        let date = date.map(|date| rfc2822::parse(date).unwrap().timestamp());
        answer.lifetime(date).as_secs_f64()
    }

    #[test]
    fn tokens_are_not_used_to_their_very_end() {
        assert_eq!(lifetime("{}", None), 55.0);
        assert_eq!(lifetime(r#"{"expires_in": 300}"#, None), 295.0);
        assert_eq!(lifetime(r#"{"expires_in": 8}"#, None), 6.0);
        // Nonsense is the usual lifetime, or the shortest one.
        assert_eq!(lifetime(r#"{"expires_in": 0}"#, None), 55.0);
        assert_eq!(lifetime(r#"{"expires_in": -5}"#, None), 55.0);
        assert_eq!(lifetime(r#"{"expires_in": "soon"}"#, None), 55.0);
        assert_eq!(lifetime(r#"{"expires_in": 0.001}"#, None), 0.75);
        assert!(lifetime(r#"{"expires_in": 1e300}"#, None) > 1e18);
    }

    #[test]
    fn a_token_from_a_cache_is_older_than_its_answer() {
        let answer = r#"{"expires_in": 300, "issued_at": "2026-01-02T03:04:05.678Z"}"#;
        assert_eq!(lifetime(answer, Some("Fri, 02 Jan 2026 03:07:05 GMT")).round(), 116.0);
        assert_eq!(lifetime(answer, Some("Fri, 02 Jan 2026 03:00:00 GMT")), 295.0);
        assert_eq!(lifetime(answer, Some("Fri, 02 Jan 2026 05:00:00 GMT")), 0.75);
        assert_eq!(lifetime(answer, None), 295.0);
        let answer = r#"{"expires_in": 300, "issued_at": "yesterday"}"#;
        assert_eq!(lifetime(answer, Some("Fri, 02 Jan 2026 03:07:05 GMT")), 295.0);
    }
}
