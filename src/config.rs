//! The configuration file, `/etc/nydus-store/config.toml`.
//!
//! Every key has a default, so the file is optional. `docs/configuration.md` documents the keys for administrators.
//! Unknown keys and wrong types are errors that name the line.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, de::IgnoredAny};

use crate::{
    blob::size_limit::{DiskShare, SizeLimit},
    image::{prefetch, resolve::Limits},
    monitor::listener::LoopbackAddress,
    rafs::MAX_BOOTSTRAP_BYTES,
    registry::{self, HostSettings, Proxy},
};

/// Path of the configuration without `--config`.
pub const DEFAULT_PATH: &str = "/etc/nydus-store/config.toml";

/// The configuration.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Whether to send no requests to registries: reads of uncached data fail at once.
    pub offline: bool,
    /// Resolution of images.
    pub images: ImageConfig,
    /// Requests to registries.
    pub registry: RegistryConfig,
    /// Read-ahead and prefetch.
    pub fetch: FetchConfig,
    /// The cache on disk.
    pub cache: CacheConfig,
    /// The FUSE file systems.
    pub fuse: FuseConfig,
    /// The image store.
    pub store: StoreConfig,
    /// Metrics for Prometheus.
    pub metrics: MetricsConfig,
    /// `[mirror]` of earlier versions; ignored with a warning.
    mirror: Option<IgnoredAny>,
}

/// `[images]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageConfig {
    /// Time-out for resolving an image while Podman waits, in seconds: 1 to 600.
    pub resolve_timeout: u64,
    /// How long a failed look-up is cached, in seconds: 0 to 3600.
    pub negative_ttl: u64,
    /// Maximum size of a bootstrap layer, in uncompressed MiB: 1 to 1024, the limit of the bootstrap reader.
    pub max_bootstrap_size: u64,
}

/// `[registry]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Time-out for a connection, in seconds: 1 to 600.
    pub connect_timeout: u64,
    /// Time-out for the first byte of a response, in seconds: 1 to 600; defaults to `read_timeout`.
    pub answer_timeout: Option<u64>,
    /// Time-out between two parts of a response, in seconds: 1 to 600.
    pub read_timeout: u64,
    /// Time-out for a request with all its retries, in seconds: 1 to 3600.
    pub request_timeout: u64,
    /// Maximum number of retries of a request that failed temporarily: 0 to 20.
    pub retries: u32,
    /// Maximum back-off before a retry, in seconds: 1 to 600.
    pub max_pause: u64,
    /// Consecutive failures of a host that open its circuit: 1 to 1000. A mirror's circuit opens at the first failure.
    pub circuit_failures: u32,
    /// How long a circuit stays open the first time, in seconds: 1 to 3600.
    pub circuit_pause: u64,
    /// Maximum time that a circuit stays open, in seconds: 1 to 3600.
    pub circuit_max_pause: u64,
    /// Maximum concurrent requests for ranges of blobs to one host, and as many others: 1 to 1024.
    pub max_requests: usize,
    /// Registries (`host[:port]`) that may use plain HTTP or an unverifiable certificate. Loopback hosts always may.
    pub insecure: Vec<String>,
    /// Files with credentials, instead of those of containers-auth.json(5).
    pub auth_files: Option<Vec<PathBuf>>,
    /// The proxy for hosts other than loopback, instead of the environment's.
    pub proxy: Option<Proxy>,
    /// Hosts, domains and networks that bypass the proxy, instead of the environment's `NO_PROXY`.
    pub no_proxy: Option<Vec<String>>,
    /// Overrides for single hosts.
    pub host: Vec<HostSettings>,
}

/// `[fetch]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FetchConfig {
    /// Whether to read ahead of sequential readers.
    pub read_ahead: bool,
    /// Whether to prefetch the image's prefetch list when Podman looks the image up.
    pub prefetch: bool,
    /// Whether to record traces of container starts and to prefetch by them.
    pub learn: bool,
    /// Whether to download the rest of images in use in the background.
    pub fill: bool,
    /// Maximum rate of that download, in uncompressed MiB/s: 0 (unlimited) to 65536.
    pub fill_rate: u64,
}

/// `[cache]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    /// Maximum disk space of the cache: a size, or a percentage of the file system.
    #[serde(deserialize_with = "DiskShare::deserialize_limit")]
    pub limit: DiskShare,
    /// Disk space that the cache leaves free, in the same forms.
    pub min_free: DiskShare,
}

/// `[fuse]`
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FuseConfig {
    /// Threads that process FUSE requests: 1 to 64. A request that waits for a registry occupies no thread.
    pub threads: usize,
}

/// `[store]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreConfig {
    /// Additional graph roots of containers/storage whose images and containers may need published layers. The graph
    /// root in storage.conf is always considered.
    pub graph_roots: Vec<PathBuf>,
}

/// `[metrics]`
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsConfig {
    /// Loopback address and port to serve metrics at by HTTP; nowhere if absent. The control socket always serves them.
    pub listen: Option<LoopbackAddress>,
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

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            limit: DiskShare::Percent(50),
            // The kubelet begins to remove images at 15 %.
            min_free: DiskShare::Percent(20),
        }
    }
}

impl Default for FuseConfig {
    fn default() -> Self {
        Self { threads: 4 }
    }
}

/// The configuration is unusable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not TOML, or has an unknown key or a value of the wrong type.
    #[error("{path}: {source}\nsee docs/configuration.md for all keys")]
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
        /// The value.
        value: u64,
        /// The minimum.
        min: u64,
        /// The maximum.
        max: u64,
    },
}

impl Config {
    /// Reads and validates `path`, or [`DEFAULT_PATH`], which may be missing.
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
                file = %path.display(),
                "ignoring table [mirror]; delete it"
            );
        }
        Ok(config)
    }

    /// Key, value, minimum and maximum of each bounded number.
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

    /// The limits for resolving and reading images.
    pub fn limits(&self) -> Limits {
        Limits {
            resolve_timeout: Duration::from_secs(self.images.resolve_timeout),
            negative_ttl: Duration::from_secs(self.images.negative_ttl),
            max_bootstrap_size: self.images.max_bootstrap_size << 20,
            load_timeout: Duration::from_secs(self.images.resolve_timeout.max(self.registry.request_timeout)),
            // A corrupt chunk is fetched twice.
            chunk_timeout: Duration::from_secs(2 * self.registry.request_timeout),
            read_ahead: self.fetch.read_ahead,
            cache: SizeLimit {
                limit: self.cache.limit,
                min_free: self.cache.min_free,
            },
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
    fn max_bootstrap_size_is_limited_to_the_reader_limit() {
        let message = error("[images]\nmax_bootstrap_size = 1025\n");
        assert!(
            message.ends_with("`images.max_bootstrap_size` is 1025, but must be from 1 to 1024"),
            "{message}"
        );
        let largest = Config::parse("[images]\nmax_bootstrap_size = 1024\n", Path::new("config.toml")).unwrap();
        assert_eq!(largest.limits().max_bootstrap_size, MAX_BOOTSTRAP_BYTES);
    }

    #[test]
    fn documented_example_equals_the_default() {
        let documented = include_str!("../docs/configuration.md");
        let (_, rest) = documented.split_once("```toml\n").unwrap();
        let (example, _) = rest.split_once("```").unwrap();
        let parsed = Config::parse(example, Path::new("docs/configuration.md")).unwrap();
        assert_eq!(format!("{parsed:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn documented_optional_keys_are_accepted() {
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
    fn errors_name_the_line_and_the_key() {
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
    fn cache_limit_is_a_size_or_a_percentage() {
        let config = |text: &str| Config::parse(text, Path::new("config.toml")).unwrap().limits().cache;
        assert_eq!(config("").limit, DiskShare::Percent(50));
        let given = config("[cache]\nlimit = \"50GiB\"\nmin_free = \"0%\"\n");
        assert_eq!(
            (given.limit, given.min_free),
            (DiskShare::Bytes(50 << 30), DiskShare::Percent(0))
        );
        for (value, reason) in [
            ("\"80 percent\"", "not an amount of disk space"),
            ("\"120%\"", "not an amount of disk space"),
            ("\"1MiB\"", "at least 32MiB"),
            ("\"0%\"", "at least 32MiB or 1%"),
            ("100", "expected a string"),
        ] {
            let message = error(&format!("[cache]\nlimit = {value}\n"));
            assert!(
                message.contains("line 2") && message.contains("limit") && message.contains(reason),
                "{message}"
            );
        }
    }

    #[test]
    fn legacy_mirror_table_is_ignored() {
        let text = "offline = true\n[mirror]\nlisten = \"127.0.0.1:6055\"\nallow_uids = [7]\n";
        let config = Config::parse(text, Path::new("config.toml")).unwrap();
        assert!(config.offline && config.mirror.is_none());
    }

    #[test]
    fn only_the_default_file_may_be_missing() {
        assert!(Config::load(Some(Path::new("/nonexistent/config.toml"))).is_err());
    }
}
