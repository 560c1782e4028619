//! The microVM metadata service: what `PUT /mmds/config` takes. The data of `/mmds` itself is any JSON.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// How a guest gets at its metadata.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum MmdsVersion {
    /// A GET is enough; session tokens are given out, but not asked for.
    #[default]
    V1,
    /// A GET needs a session token.
    V2,
}

/// `PUT /mmds/config`, and `mmds-config` in the config file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// Whether session tokens are needed.
    #[serde(default)]
    pub version: MmdsVersion,
    /// Ids of the interfaces whose guest reaches the service; at least one.
    pub network_interfaces: Vec<String>,
    /// The service's address, link-local (169.254.1.0 to 169.254.254.255). Default 169.254.169.254.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Answer in EC2's text format, whatever the request's `Accept` says.
    #[serde(default)]
    pub imds_compat: bool,
}
