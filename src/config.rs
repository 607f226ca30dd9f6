//! The configuration file, `/etc/nydus-store/config.toml`.
//!
//! Every key has a default, so that no file is needed. What a key means is documented here and, for people, in
//! `docs/configuration.md`. Unknown keys and wrong types are errors that name the line.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, de::IgnoredAny};

use crate::{
    image::{prefetch, resolve::Limits},
    rafs::MAX_BOOTSTRAP_BYTES,
    registry::{self, HostSettings, Proxy},
};

/// Where the configuration is looked for when none is named.
pub const DEFAULT_PATH: &str = "/etc/nydus-store/config.toml";

/// The configuration.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Whether no registry is ever asked: what is not on this host fails at once.
    pub offline: bool,
    /// How images are found.
    pub images: ImageConfig,
    /// How registries are spoken to.
    pub registry: RegistryConfig,
    /// What is fetched before it is asked for.
    pub fetch: FetchConfig,
    /// How the kernel is served.
    pub fuse: FuseConfig,
    /// What is published.
    pub store: StoreConfig,
    /// `[mirror]` of earlier versions, which has no effect.
    mirror: Option<IgnoredAny>,
}

/// `[images]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageConfig {
    /// Seconds that Podman may be kept waiting when it looks for an image: 1 to 600.
    pub resolve_timeout: u64,
    /// Seconds for which a failed look-up is remembered: 0 to 3600.
    pub negative_ttl: u64,
    /// Largest bootstrap layer, in uncompressed MiB: 1 to 1024, since no larger bootstrap can be read.
    pub max_bootstrap_size: u64,
}

/// `[registry]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Seconds to wait for a connection: 1 to 600.
    pub connect_timeout: u64,
    /// Seconds to wait for the first byte of an answer: 1 to 600; `read_timeout` if not given.
    pub answer_timeout: Option<u64>,
    /// Longest silence in the middle of an answer, in seconds: 1 to 600.
    pub read_timeout: u64,
    /// Seconds for a whole request with all its retries: 1 to 3600.
    pub request_timeout: u64,
    /// How often a request is repeated that may succeed the next time: 0 to 20.
    pub retries: u32,
    /// Longest pause before that, in seconds: 1 to 600.
    pub max_pause: u64,
    /// How often in a row a host may not answer before it is left alone: 1 to 1000. One with another to ask instead
    /// (a mirror) is left alone at once.
    pub circuit_failures: u32,
    /// Seconds for which it is left alone the first time: 1 to 3600.
    pub circuit_pause: u64,
    /// Most seconds for which it is left alone: 1 to 3600.
    pub circuit_max_pause: u64,
    /// Requests at a time to one registry: 1 to 1024.
    pub max_requests: usize,
    /// Registries (`host[:port]`) that may speak plain HTTP or have a certificate that cannot be verified. Those on
    /// loopback may anyway.
    pub insecure: Vec<String>,
    /// Files with credentials, instead of the usual ones of containers-auth.json(5).
    pub auth_files: Option<Vec<PathBuf>>,
    /// The proxy for registries that are not on loopback, instead of the environment's.
    pub proxy: Option<Proxy>,
    /// Hosts, domains and networks that are asked without it, instead of the environment's `NO_PROXY`.
    pub no_proxy: Option<Vec<String>>,
    /// What is different for single hosts.
    pub host: Vec<HostSettings>,
}

/// `[fetch]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FetchConfig {
    /// Whether to fetch ahead of those who read an image in order.
    pub read_ahead: bool,
    /// Whether to fetch what an image's builder has listed, as soon as Podman looks for the image.
    pub prefetch: bool,
    /// Whether to note what the start of an image needs, and to fetch that beforehand the next time.
    pub learn: bool,
    /// Whether to fetch all the rest of an image in use in the background.
    pub fill: bool,
    /// Most uncompressed MiB of that in a second: 0, for no bound, to 65536.
    pub fill_rate: u64,
}

/// `[fuse]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FuseConfig {
    /// Threads that answer the kernel: 1 to 64. Requests that wait for a registry do not occupy one.
    pub threads: usize,
}

/// `[store]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// Directories of containers/storage (`graphroot`) whose images and containers may need published layers, beside that of
    /// storage.conf.
    pub graph_roots: Vec<PathBuf>,
}

impl Default for ImageConfig {
    fn default() -> Self {
        Self {
            resolve_timeout: 30,
            negative_ttl: 10,
            max_bootstrap_size: 1024,
        }
    }
}

impl Default for RegistryConfig {
    fn default() -> Self {
        let registry::Options {
            connect_timeout,
            read_timeout,
            request_timeout,
            retries,
            max_pause,
            circuit_failures,
            circuit_pause,
            circuit_max_pause,
            max_requests_per_host,
            ..
        } = registry::Options::default();
        Self {
            connect_timeout: connect_timeout.as_secs(),
            answer_timeout: None,
            read_timeout: read_timeout.as_secs(),
            request_timeout: request_timeout.as_secs(),
            retries,
            max_pause: max_pause.as_secs(),
            circuit_failures,
            circuit_pause: circuit_pause.as_secs(),
            circuit_max_pause: circuit_max_pause.as_secs(),
            max_requests: max_requests_per_host,
            insecure: Vec::new(),
            auth_files: None,
            proxy: None,
            no_proxy: None,
            host: Vec::new(),
        }
    }
}

impl Default for FetchConfig {
    fn default() -> Self {
        Self {
            read_ahead: true,
            prefetch: true,
            learn: true,
            fill: false,
            fill_rate: 0,
        }
    }
}

impl Default for FuseConfig {
    fn default() -> Self {
        Self { threads: 4 }
    }
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not TOML, has a key that does not exist, or a value of the wrong type.
    #[error("{path}: {source}\nThe keys are listed in docs/configuration.md.")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause, with line and column.
        source: Box<toml::de::Error>,
    },
    /// A value is out of its range.
    #[error("{path}: `{key}` is {value}, but must be from {min} to {max}")]
    Range {
        /// The file.
        path: PathBuf,
        /// The key, with its table.
        key: &'static str,
        /// What is there.
        value: u64,
        /// The least that is allowed.
        min: u64,
        /// The most that is allowed.
        max: u64,
    },
}

impl Config {
    /// Reads `path`; `None` means [`DEFAULT_PATH`], which may be missing.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let named = path.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(named) {
            Ok(text) => Self::parse(&text, named),
            Err(error) if path.is_none() && error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read {
                path: named.to_owned(),
                source,
            }),
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let parsed: Result<Self, _> = toml::from_str(text);
        let mut config = parsed.map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        for (key, value, min, max) in config.ranges() {
            if !(min..=max).contains(&value) {
                return Err(ConfigError::Range {
                    path: path.to_owned(),
                    key,
                    value,
                    min,
                    max,
                });
            }
        }
        if config.mirror.take().is_some() {
            tracing::warn!(
                "{}: the table [mirror] has no effect any more: delete it",
                path.display()
            );
        }
        Ok(config)
    }

    fn ranges(&self) -> [(&'static str, u64, u64, u64); 15] {
        let Self {
            images, registry, fuse, ..
        } = self;
        [
            ("images.resolve_timeout", images.resolve_timeout, 1, 600),
            ("images.negative_ttl", images.negative_ttl, 0, 3600),
            (
                "images.max_bootstrap_size",
                images.max_bootstrap_size,
                1,
                MAX_BOOTSTRAP_BYTES >> 20,
            ),
            ("registry.connect_timeout", registry.connect_timeout, 1, 600),
            (
                "registry.answer_timeout",
                registry.answer_timeout.unwrap_or(registry.read_timeout),
                1,
                600,
            ),
            ("registry.read_timeout", registry.read_timeout, 1, 600),
            ("registry.request_timeout", registry.request_timeout, 1, 3600),
            ("registry.retries", u64::from(registry.retries), 0, 20),
            ("registry.max_pause", registry.max_pause, 1, 600),
            (
                "registry.circuit_failures",
                u64::from(registry.circuit_failures),
                1,
                1000,
            ),
            ("registry.circuit_pause", registry.circuit_pause, 1, 3600),
            ("registry.circuit_max_pause", registry.circuit_max_pause, 1, 3600),
            ("registry.max_requests", registry.max_requests as u64, 1, 1024),
            ("fetch.fill_rate", self.fetch.fill_rate, 0, 65536),
            ("fuse.threads", fuse.threads as u64, 1, 64),
        ]
    }

    /// The registry client's options.
    pub fn registry_options(&self) -> registry::Options {
        let config = &self.registry;
        registry::Options {
            connect_timeout: Duration::from_secs(config.connect_timeout),
            answer_timeout: config.answer_timeout.map(Duration::from_secs),
            read_timeout: Duration::from_secs(config.read_timeout),
            request_timeout: Duration::from_secs(config.request_timeout),
            retries: config.retries,
            max_pause: Duration::from_secs(config.max_pause),
            circuit_failures: config.circuit_failures,
            circuit_pause: Duration::from_secs(config.circuit_pause),
            circuit_max_pause: Duration::from_secs(config.circuit_max_pause),
            insecure: config.insecure.clone(),
            registries_conf: None,
            certs_dirs: None,
            proxy: config.proxy.clone(),
            no_proxy: config.no_proxy.clone(),
            hosts: config.host.clone(),
            auth_files: config.auth_files.clone(),
            offline: self.offline,
            max_requests_per_host: config.max_requests,
        }
    }

    /// The bounds for resolving images.
    pub fn limits(&self) -> Limits {
        Limits {
            resolve_timeout: Duration::from_secs(self.images.resolve_timeout),
            negative_ttl: Duration::from_secs(self.images.negative_ttl),
            max_bootstrap_size: self.images.max_bootstrap_size << 20,
            // Damage is fetched twice.
            chunk_timeout: Duration::from_secs(2 * self.registry.request_timeout),
            read_ahead: self.fetch.read_ahead,
            prefetch: prefetch::PrefetchOptions {
                builder_list: self.fetch.prefetch && !self.offline,
                replay_trace: self.fetch.learn && !self.offline,
                record_accesses: self.fetch.learn,
                whole_image: self.fetch.fill && !self.offline,
                whole_image_rate: self.fetch.fill_rate << 20,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Config::parse(text, Path::new("config.toml")).unwrap_err().to_string()
    }

    #[test]
    fn bootstraps_larger_than_can_be_read_are_not_configured() {
        let message = error("[images]\nmax_bootstrap_size = 1025\n");
        assert!(
            message.ends_with("`images.max_bootstrap_size` is 1025, but must be from 1 to 1024"),
            "{message}"
        );
        let largest = Config::parse("[images]\nmax_bootstrap_size = 1024\n", Path::new("config.toml")).unwrap();
        assert_eq!(largest.limits().max_bootstrap_size, MAX_BOOTSTRAP_BYTES);
    }

    #[test]
    fn the_documented_example_is_the_default() {
        let documented = include_str!("../docs/configuration.md");
        let (_, rest) = documented.split_once("```toml\n").unwrap();
        let (example, _) = rest.split_once("```").unwrap();
        let parsed = Config::parse(example, Path::new("docs/configuration.md")).unwrap();
        assert_eq!(format!("{parsed:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn what_the_example_leaves_out_can_be_set() {
        let documented = include_str!("../docs/configuration.md");
        let commented = documented.lines().filter_map(|line| line.strip_prefix("# "));
        let lines: Vec<_> = commented
            .skip_while(|line| *line != "[[registry.host]]")
            .take(5)
            .collect();
        let config = Config::parse(&lines.join("\n"), Path::new("docs/configuration.md")).unwrap();
        let [host] = &config.registry_options().hosts[..] else {
            panic!("one host");
        };
        assert!(host.name == "127.0.0.1:4001" && host.proxy.is_some() && host.health_check.is_some());
        let proxies = error("[registry]\nproxy = \"proxy.example:3128\"\n");
        assert!(
            proxies.contains("line 2") && proxies.contains("http://host:port"),
            "{proxies}"
        );
    }

    #[test]
    fn mistakes_name_the_line_and_the_key() {
        let unknown = error("[registry]\nretries = 1\nretires = 2\n");
        assert!(unknown.contains("line 3") && unknown.contains("retires"), "{unknown}");
        let wrong_type = error("[fuse]\n\nthreads = \"many\"\n");
        assert!(
            wrong_type.contains("line 3") && wrong_type.contains("threads"),
            "{wrong_type}"
        );
        let range = error("[fuse]\nthreads = 0\n");
        assert!(
            range.contains("fuse.threads") && range.contains("from 1 to 64"),
            "{range}"
        );
    }

    #[test]
    fn mirror_table_of_earlier_versions_is_ignored() {
        let text = "offline = true\n[mirror]\nlisten = \"127.0.0.1:6055\"\nallow_uids = [7]\n";
        let config = Config::parse(text, Path::new("config.toml")).unwrap();
        assert!(config.offline && config.mirror.is_none());
    }

    #[test]
    fn only_the_default_file_may_be_missing() {
        assert!(Config::load(Some(Path::new("/nonexistent/config.toml"))).is_err());
    }
}
