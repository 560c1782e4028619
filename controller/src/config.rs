//! What an administrator chooses.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use crate::http::limits::Rate;

/// The one region of this cloud.
pub const REGION: &str = "RegionOne";
/// Largest image, if the administrator does not say otherwise: 64 GiB.
pub const DEFAULT_MAX_IMAGE_BYTES: u64 = 64 << 30;
/// Lifetime of a token, Keystone's default (`[token] expiration`): one hour.
pub const DEFAULT_TOKEN_LIFETIME_S: u64 = 3600;

/// How long deleted servers are shown, if the administrator does not say otherwise: 30 days.
pub const KEEP_DELETED: Duration = Duration::from_secs(30 * 86_400);

/// Validated configuration of a controller.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where HTTP is served.
    pub listen: SocketAddr,
    /// Database, keys and image bytes.
    pub state_dir: PathBuf,
    /// `postgres://…`; without it, SQLite below [`state_dir`](Self::state_dir).
    pub database: Option<String>,
    /// How clients reach [`listen`](Self::listen), `http://host:port` without a slash at the end; the catalog's base.
    pub public_url: String,
    /// Largest image in bytes.
    pub max_image_bytes: u64,
    /// `s3://…` and the keys (id, secret) of the bucket for images' bytes; without it, a directory below
    /// [`state_dir`](Self::state_dir).
    pub image_store: Option<(String, Option<Keys>)>,
    /// `host` or `host:port` from which images may be downloaded; empty: `web-download` is off.
    pub image_download_hosts: Vec<String>,
    /// Lifetime of tokens in seconds.
    pub token_lifetime_s: u64,
    /// What happens after failed log-ins.
    pub lockout: Lockout,
    /// Shortest new password in characters.
    pub password_min_chars: usize,
    /// Log-ins of an address.
    pub login_rate: Rate,
    /// Requests of a project.
    pub project_rate: Rate,
    /// How long deleted servers are shown in lists of changes and to admins.
    pub keep_deleted: Duration,
}

/// Keys of a bucket (access key id, secret), which are never printed.
#[derive(Clone)]
pub struct Keys(pub (String, String));

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Keys").field(&self.0.0).finish_non_exhaustive()
    }
}

/// Log-ins of an address: far more than people and deployments need, far fewer than guessing does.
pub const LOGIN_RATE: Rate = Rate { per_second: 20, burst: 200 };

/// After so many failed log-ins of a user in a row, none is let in for a while.
#[derive(Debug, Clone, Copy)]
pub struct Lockout {
    /// How many; 0: any number may fail.
    pub attempts: u32,
    /// How long.
    pub duration: Duration,
}

impl Default for Lockout {
    /// Ten in a row, for five minutes: trying a million passwords takes about a year.
    fn default() -> Self {
        Self { attempts: 10, duration: Duration::from_secs(300) }
    }
}

/// A public URL that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not `http(s)://host[:port][/path]`.
    #[error("public URL {0:?} is not of the form http://host:port or https://host[:port]/path")]
    PublicUrl(String),
}

impl Config {
    /// A configuration with the defaults for all that is not named.
    ///
    /// # Errors
    /// If the public URL is none.
    pub fn new(listen: SocketAddr, state_dir: PathBuf, public_url: &str) -> Result<Self, ConfigError> {
        let refused = || ConfigError::PublicUrl(public_url.to_owned());
        let uri: ::http::Uri = public_url.parse().map_err(|_| refused())?;
        if !matches!(uri.scheme_str(), Some("http" | "https"))
            || uri.host().is_none()
            || uri.query().is_some()
        {
            return Err(refused());
        }
        Ok(Self {
            listen,
            state_dir,
            database: None,
            public_url: public_url.trim_end_matches('/').to_owned(),
            max_image_bytes: DEFAULT_MAX_IMAGE_BYTES,
            image_store: None,
            image_download_hosts: Vec::new(),
            token_lifetime_s: DEFAULT_TOKEN_LIFETIME_S,
            lockout: Lockout::default(),
            password_min_chars: 1,
            login_rate: LOGIN_RATE,
            project_rate: Rate { per_second: 0, burst: 0 },
            keep_deleted: KEEP_DELETED,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(url: &str) -> Result<Config, ConfigError> {
        Config::new(([127, 0, 0, 1], 8774).into(), "/tmp".into(), url)
    }

    #[test]
    fn public_url_loses_its_last_slash() {
        assert_eq!(with("http://cloud.example:8774/").unwrap().public_url, "http://cloud.example:8774");
    }

    #[test]
    fn public_url_without_scheme_or_host_is_refused() {
        for url in ["cloud.example", "", "/identity", "ftp://x/", "http://x/?a=b"] {
            assert!(with(url).is_err(), "{url}");
        }
    }
}
