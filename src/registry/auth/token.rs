//! Requests to token servers ([token](https://distribution.github.io/distribution/spec/auth/token/) and
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
        credentials::{Credentials, FoundCredentials},
        host_name::{Trust, authority, leads_to_this_machine, without_user_info},
        redirect_hosts::RedirectHosts,
        request::HttpRequest,
        response::Response,
    },
    Authorization, basic_header, secret_header, unauthorized,
};

/// Most bytes of a token server's answer.
const MAX_ANSWER: u64 = 1 << 20;
/// Lifetime of a token whose server states none: the protocol's default.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
/// Shortest assumed lifetime of a token, since it has just been issued.
const MIN_LIFETIME: Duration = Duration::from_secs(1);
/// A token is not used for this long before it expires, because it could expire in flight. For a short-lived one, it is
/// the last quarter.
const MARGIN: Duration = Duration::from_secs(5);
/// The user name sent with an identity token whose user is unknown.
const TOKEN_USER: &str = "<token>";

/// One request for a token.
pub(super) struct TokenRequest<'a> {
    pub(super) redirect_hosts: &'a RedirectHosts,
    pub(super) repository: &'a Repository,
    pub(super) trust: Trust,
    pub(super) challenge: &'a Challenge,
}

/// A token server's answer. OAuth2 calls the token `access_token`.
#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    /// Seconds. Other types are ignored, so that the token stays usable.
    #[serde(default)]
    expires_in: serde_json::Value,
    #[serde(default)]
    issued_at: serde_json::Value,
}

impl TokenAnswer {
    /// How long the token is used, from its request at `date` by the server's clock.
    fn lifetime(&self, date: Option<Timestamp>) -> Duration {
        let stated = self.expires_in.as_f64().filter(|seconds| *seconds > 0.0);
        let stated = stated.map_or(DEFAULT_LIFETIME, |seconds| {
            Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
        });
        // A cached token is older than its answer. This machine's clock may be wrong, so that it is not used.
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
    /// Requests a token with the credentials that were `found`. `who` describes them in messages.
    pub(super) async fn send(&self, found: Option<FoundCredentials>, who: String) -> Result<Authorization, Error> {
        let (realm, trust) = self.realm()?;
        let what = format!("token for {}", self.repository);
        // The lifetime may have started as early as this.
        let requested = Instant::now();
        let credentials = found.as_ref().map(|found| &found.credentials);
        let mut response = self.send_to(realm, trust, &what, credentials, &who).await?;
        let host = response.host().to_owned();
        match response.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let detail = response.error_detail().await;
                let detail = format!("its token server {host} refuses {who} {detail}")
                    .trim_end()
                    .to_owned();
                return Err(unauthorized(self.repository, detail));
            }
            // OAuth2's status for an invalid refresh token (RFC 6749, 5.2).
            StatusCode::BAD_REQUEST if matches!(credentials, Some(Credentials::IdentityToken { .. })) => {
                let detail = format!("its token server {host} refuses the identity token of {who}");
                return Err(unauthorized(self.repository, detail));
            }
            // `Error::NotFound` would be mistaken for a missing image.
            StatusCode::NOT_FOUND => return Err(response.invalid("no token server there")),
            _ => response = response.check().await?,
        }
        let date = response.header(header::DATE).and_then(|date| rfc2822::parse(date).ok());
        let bytes = response.read_all(MAX_ANSWER).await?;
        // The parser's message is dropped: it may quote the token.
        let answer: TokenAnswer = serde_json::from_slice(&bytes).map_err(|_| response.invalid("not a token"))?;
        let lifetime = answer.lifetime(date.map(|date| date.timestamp()));
        let token = [answer.token, answer.access_token]
            .into_iter()
            .flatten()
            .find(|token| !token.is_empty());
        let header = token.and_then(|token| secret_header(&format!("Bearer {token}")));
        Ok(Authorization {
            header: header.ok_or_else(|| response.invalid("no usable token"))?,
            // A time that overflows the clock means that it never expires.
            expires: requested.checked_add(lifetime),
            who,
            found,
        })
    }

    /// The token server's URL, and the trust in it. An insecure registry may name an insecure token server. A registry
    /// on loopback grants no trust: its token server is trusted by its own name.
    fn realm(&self) -> Result<(Url, Trust), Error> {
        let unusable = |detail: &str| unauthorized(self.repository, detail.to_owned());
        let realm = self
            .challenge
            .param("realm")
            .ok_or_else(|| unusable("it names no token server"))?;
        let realm = Url::parse(realm).ok().and_then(without_user_info);
        let realm = realm.ok_or_else(|| unusable("the URL of its token server is invalid"))?;
        let trust = match (self.redirect_hosts.trust(&realm), self.trust) {
            (Trust::Strict, Trust::Insecure) => Trust::Insecure,
            (own, _) => own,
        };
        let registry = Url::parse(&format!("https://{}/", self.repository.registry));
        let target = registry
            .ok()
            .and_then(|registry| leads_to_this_machine(&registry, &realm));
        if let Some(target) = target {
            let detail = format!("its token server would be {target}");
            return Err(unauthorized(self.repository, detail));
        }
        let plain_for_strict = realm.scheme() == "http" && self.trust == Trust::Strict;
        if plain_for_strict || (realm.scheme() == "http" && trust == Trust::Strict) {
            let detail = format!("its token server {} is not reached over TLS", authority(&realm));
            return Err(unauthorized(self.repository, detail));
        }
        Ok((realm, trust))
    }

    async fn send_to(
        &self,
        realm: Url,
        trust: Trust,
        what: &str,
        credentials: Option<&Credentials>,
        who: &str,
    ) -> Result<Response, Error> {
        let unusable = || unauthorized(self.repository, format!("{who} are not valid in a header"));
        let (user, password) = match credentials {
            None => return self.get(realm, trust, what, None).await,
            Some(Credentials::Password { user, password }) => (user.as_str(), password),
            Some(Credentials::IdentityToken { user, token }) => {
                let mut response = self.refresh(realm.clone(), trust, what, token).await?;
                if !lacks_oauth2(response.status()) {
                    return Ok(response);
                }
                response.drain().await;
                (
                    user.as_deref().filter(|user| !user.is_empty()).unwrap_or(TOKEN_USER),
                    token,
                )
            }
        };
        let header = basic_header(user, password).ok_or_else(unusable)?;
        let account = (user != TOKEN_USER).then_some(user);
        self.get(realm, trust, what, Some((account, header))).await
    }

    /// The scopes to request: to pull from the repository, and the registry's own scope if a proxy has changed the
    /// name. The latter is used only if it grants no more than to pull.
    fn scopes(&self) -> impl Iterator<Item = String> {
        let requested = format!("repository:{}:pull", self.repository.name);
        let offered = self.challenge.param("scope").unwrap_or_default();
        let offered = Some(offered).filter(|scope| {
            let words: Vec<_> = scope.split(':').collect();
            matches!(words[..], ["repository", _, "pull"]) && !scope.contains(' ') && *scope != requested
        });
        let offered = offered.map(str::to_owned);
        std::iter::once(requested).chain(offered)
    }

    /// Not in `get` itself: the query's builder is not `Send`, but the future of `get` must be.
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
        let mut request = HttpRequest::new(Method::GET, realm, what);
        request.registry = &self.repository.registry;
        request.authorization = login.map(|(_, header)| header);
        let response = self.redirect_hosts.send(&request, trust).await?;
        self.redirect_hosts.follow(request, response).await
    }

    /// Posts an identity token (OAuth2's refresh). Follows no redirects: the secret is in the body.
    async fn refresh(&self, realm: Url, trust: Trust, what: &str, token: &str) -> Result<Response, Error> {
        let scope: Vec<_> = self.scopes().collect();
        // Uses a URL's query as the form encoder.
        let mut form = realm.clone();
        form.query_pairs_mut()
            .clear()
            .append_pair("grant_type", "refresh_token")
            .append_pair("service", self.challenge.param("service").unwrap_or_default())
            .append_pair("client_id", "nydus-store")
            .append_pair("scope", &scope.join(" "))
            .append_pair("refresh_token", token);
        let mut request = HttpRequest::new(Method::POST, realm, what);
        request.registry = &self.repository.registry;
        request.form = Some(form.query().unwrap_or_default().to_owned());
        self.redirect_hosts.send(&request, trust).await
    }
}

/// Whether `status` is what token servers without OAuth2 answer to a POST.
fn lacks_oauth2(status: StatusCode) -> bool {
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
    fn token_is_not_used_in_its_last_seconds() {
        assert_eq!(lifetime("{}", None), 55.0);
        assert_eq!(lifetime(r#"{"expires_in": 300}"#, None), 295.0);
        assert_eq!(lifetime(r#"{"expires_in": 8}"#, None), 6.0);
        // Invalid lifetimes become the default or the shortest one.
        assert_eq!(lifetime(r#"{"expires_in": 0}"#, None), 55.0);
        assert_eq!(lifetime(r#"{"expires_in": -5}"#, None), 55.0);
        assert_eq!(lifetime(r#"{"expires_in": "soon"}"#, None), 55.0);
        assert_eq!(lifetime(r#"{"expires_in": 0.001}"#, None), 0.75);
        assert!(lifetime(r#"{"expires_in": 1e300}"#, None) > 1e18);
    }

    #[test]
    fn age_of_a_cached_token_shortens_its_lifetime() {
        let answer = r#"{"expires_in": 300, "issued_at": "2026-01-02T03:04:05.678Z"}"#;
        assert_eq!(lifetime(answer, Some("Fri, 02 Jan 2026 03:07:05 GMT")).round(), 116.0);
        assert_eq!(lifetime(answer, Some("Fri, 02 Jan 2026 03:00:00 GMT")), 295.0);
        assert_eq!(lifetime(answer, Some("Fri, 02 Jan 2026 05:00:00 GMT")), 0.75);
        assert_eq!(lifetime(answer, None), 295.0);
        let answer = r#"{"expires_in": 300, "issued_at": "yesterday"}"#;
        assert_eq!(lifetime(answer, Some("Fri, 02 Jan 2026 03:07:05 GMT")), 295.0);
    }
}
