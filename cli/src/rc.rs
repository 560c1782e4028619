//! Which cloud to talk to: the OS_* variables, else the openrc file that `mote up` wrote.

use std::{collections::HashMap, env, fs, path::Path};

use anyhow::{Context as _, bail};

/// What is needed to take a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// `OS_AUTH_URL`, ends in `/v3`.
    pub auth_url: String,
    /// `OS_USERNAME`.
    pub username: String,
    /// `OS_PASSWORD`.
    pub password: String,
    /// `OS_USER_DOMAIN_NAME`.
    pub user_domain: String,
    /// `OS_PROJECT_NAME`.
    pub project: String,
    /// `OS_PROJECT_DOMAIN_NAME`.
    pub project_domain: String,
}

/// Name of the file in the state directory.
pub const OPENRC: &str = "admin-openrc.sh";

impl Credentials {
    /// From the environment when `OS_AUTH_URL` is set, else from `<state_dir>/admin-openrc.sh`.
    pub fn find(state_dir: &Path) -> anyhow::Result<Self> {
        if env::var_os("OS_AUTH_URL").is_some() {
            return Self::from_lookup(|k| env::var(k).ok()).context("reading the OS_* variables");
        }
        Self::read(&state_dir.join(OPENRC))
            .context("no cloud to talk to: OS_AUTH_URL is not set and none was started here (start one with `mote up`)")
    }

    /// From an openrc file that [`Credentials::to_openrc`] made.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let variables = parse(&text);
        Self::from_lookup(|k| variables.get(k).cloned())
            .with_context(|| format!("reading {}", path.display()))
    }

    fn from_lookup(get: impl Fn(&str) -> Option<String>) -> anyhow::Result<Self> {
        let need = |k: &str| get(k).filter(|v| !v.is_empty()).with_context(|| format!("{k} is not set"));
        let auth_url = need("OS_AUTH_URL")?.trim_end_matches('/').to_owned();
        if !auth_url.starts_with("http://") {
            bail!("OS_AUTH_URL is {auth_url:?}; this client speaks http:// only");
        }
        let auth_url = if auth_url.ends_with("/v3") { auth_url } else { format!("{auth_url}/v3") };
        Ok(Self {
            auth_url,
            username: need("OS_USERNAME")?,
            password: need("OS_PASSWORD")?,
            user_domain: get("OS_USER_DOMAIN_NAME").unwrap_or_else(|| "Default".into()),
            project: need("OS_PROJECT_NAME")?,
            project_domain: get("OS_PROJECT_DOMAIN_NAME").unwrap_or_else(|| "Default".into()),
        })
    }

    /// The openrc file: shell `export` lines.
    pub fn to_openrc(&self) -> String {
        let lines = [
            ("OS_AUTH_URL", self.auth_url.as_str()),
            ("OS_USERNAME", &self.username),
            ("OS_PASSWORD", &self.password),
            ("OS_USER_DOMAIN_NAME", &self.user_domain),
            ("OS_PROJECT_NAME", &self.project),
            ("OS_PROJECT_DOMAIN_NAME", &self.project_domain),
            ("OS_IDENTITY_API_VERSION", "3"),
            ("OS_REGION_NAME", "RegionOne"),
        ];
        let mut text = String::from("# The administrator of this cloud. Use it with: source <this file>\n");
        for (key, value) in lines {
            text.push_str(&format!("export {key}='{}'\n", value.replace('\'', r"'\''")));
        }
        text
    }
}

/// Reads `export KEY='VALUE'` lines as [`Credentials::to_openrc`] writes them.
fn parse(text: &str) -> HashMap<String, String> {
    let mut variables = HashMap::new();
    for line in text.lines() {
        let Some((key, value)) = line.trim().strip_prefix("export ").and_then(|l| l.split_once('=')) else {
            continue;
        };
        let value = value.strip_prefix('\'').and_then(|v| v.strip_suffix('\'')).unwrap_or(value);
        variables.insert(key.to_owned(), value.replace(r"'\''", "'"));
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_openrc_file_is_read_back_as_it_was_written_even_with_quotes_in_the_password() {
        let written = Credentials {
            auth_url: "http://127.0.0.1:8774/identity/v3".into(),
            username: "admin".into(),
            password: "it's a $secret".into(),
            user_domain: "Default".into(),
            project: "admin".into(),
            project_domain: "Default".into(),
        };
        let variables = parse(&written.to_openrc());
        assert_eq!(Credentials::from_lookup(|k| variables.get(k).cloned()).unwrap(), written);
    }

    #[test]
    fn a_missing_variable_is_named() {
        let error =
            Credentials::from_lookup(|k| (k == "OS_AUTH_URL").then(|| "http://x/v3".into())).unwrap_err();
        assert_eq!(error.to_string(), "OS_USERNAME is not set");
    }
}
