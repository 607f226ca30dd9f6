//! [`TokenServer`]: issues JSON Web Tokens for `docker-registry`
//! ([specification](https://distribution.github.io/distribution/spec/auth/jwt/)).

use std::{
    collections::HashMap,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use axum::{
    extract::Request,
    http::{Method, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD as BASE64, URL_SAFE_NO_PAD},
};
use parking_lot::Mutex;
use rcgen::{CertificateParams, KeyPair};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use serde_json::json;

use super::{IDENTITY_TOKEN, PASSWORD, USER};

const ISSUER: &str = "the issuer";
const SERVICE: &str = "the service";
/// Seconds for which the registry accepts an expired token.
const LEEWAY: u64 = 60;

/// A token request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRequest {
    pub method: Method,
    /// The authenticated user; `None` if anonymous.
    pub user: Option<String>,
    pub scope: String,
}

struct TokenService {
    key: EcdsaKeyPair,
    certificate: Vec<u8>,
    /// Seconds for which the registry accepts a token.
    lifetime: AtomicU64,
    requests: Mutex<Vec<TokenRequest>>,
}

/// A token server that runs until the test's runtime ends. [`USER`] may pull everything, other users only `public`.
pub struct TokenServer {
    address: std::net::SocketAddr,
    service: Arc<TokenService>,
}

impl TokenServer {
    /// Starts a server and writes its certificate into `dir`.
    pub async fn start(dir: &Path) -> Self {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let certificate = CertificateParams::new(vec!["token.example".to_owned()]).unwrap();
        let certificate = certificate.self_signed(&key).unwrap();
        fs::write(dir.join("token.pem"), certificate.pem()).unwrap();
        let random = SystemRandom::new();
        let signing = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key.serialize_der(), &random);
        let service = Arc::new(TokenService {
            key: signing.unwrap(),
            certificate: certificate.der().to_vec(),
            lifetime: AtomicU64::new(300),
            requests: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answering = Arc::clone(&service);
        let app = axum::Router::new().fallback(move |request: Request| {
            let service = Arc::clone(&answering);
            async move { service.answer(request).await }
        });
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, service }
    }

    /// Configuration lines of a registry that trusts this server.
    pub fn config(&self, dir: &Path) -> String {
        format!(
            "auth: {{token: {{realm: \"http://{}/token\", service: \"{SERVICE}\", issuer: \"{ISSUER}\", \
             rootcertbundle: {}}}}}\n",
            self.address,
            dir.join("token.pem").display()
        )
    }

    /// Limits later tokens to this number of seconds, although responses announce a longer life.
    pub fn limit_lifetime(&self, seconds: u64) {
        self.service.lifetime.store(seconds, Ordering::SeqCst);
    }

    pub fn requests(&self) -> Vec<TokenRequest> {
        self.service.requests.lock().clone()
    }
}

impl TokenService {
    async fn answer(&self, request: Request) -> Response {
        let (parts, body) = request.into_parts();
        let body = axum::body::to_bytes(body, 1 << 16).await.unwrap();
        let text = match parts.method {
            Method::POST => String::from_utf8(body.to_vec()).unwrap(),
            _ => parts.uri.query().unwrap_or_default().to_owned(),
        };
        let url = reqwest::Url::parse(&format!("http://x/?{text}")).unwrap();
        let given: HashMap<_, _> = url.query_pairs().into_owned().collect();
        let basic = format!("Basic {}", BASE64.encode(format!("{USER}:{PASSWORD}")));
        let authorization = parts.headers.get(header::AUTHORIZATION);
        let user = match authorization.map(|value| value.to_str().unwrap()) {
            Some(value) if value == basic => Some(USER),
            Some(_) => return StatusCode::UNAUTHORIZED.into_response(),
            None if given.get("refresh_token").is_some_and(|token| token == IDENTITY_TOKEN) => Some(USER),
            None if parts.method == Method::POST => return StatusCode::BAD_REQUEST.into_response(),
            None => None,
        };
        assert_eq!(given["service"], SERVICE);
        let scope = given["scope"].clone();
        self.requests.lock().push(TokenRequest {
            method: parts.method,
            user: user.map(str::to_owned),
            scope: scope.clone(),
        });
        let token = self.token(&scope, user);
        json!({"token": token, "access_token": token, "expires_in": 300})
            .to_string()
            .into_response()
    }

    /// Signs a token for the allowed part of `scope`.
    fn token(&self, scope: &str, user: Option<&str>) -> String {
        let name = scope
            .strip_prefix("repository:")
            .and_then(|rest| rest.strip_suffix(":pull"));
        let name = name.unwrap_or_else(|| panic!("{scope} is not a pull scope"));
        let access = match user.is_some() || name == "public" {
            true => json!([{"type": "repository", "name": name, "actions": ["pull"]}]),
            false => json!([]),
        };
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let header = json!({"typ": "JWT", "alg": "ES256", "x5c": [BASE64.encode(&self.certificate)]});
        let claims = json!({
            "iss": ISSUER, "sub": user.unwrap_or_default(), "aud": SERVICE, "jti": "1", "access": access,
            "nbf": now - LEEWAY, "iat": now, "exp": now + self.lifetime.load(Ordering::SeqCst) - LEEWAY,
        });
        let part = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(header), part(claims));
        let signature = self.key.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}
