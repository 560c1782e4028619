//! Firecracker's persistent memory devices.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::RateLimiter;

/// `/pmem/{id}`: a file in the guest's memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// 1–64 characters, letters, digits and `_`; equals the id in the path.
    pub id: String,
    /// File or block device. The guest sees its size rounded up to 2 MiB; what is written behind its end is lost.
    pub path_on_host: PathBuf,
    /// Adds `root=/dev/pmemN ro|rw` to the command line.
    #[serde(default)]
    pub root_device: bool,
    /// Mapped read-only: what the guest writes has no effect.
    #[serde(default)]
    pub read_only: bool,
    /// Limits of flushes: each is an operation, and as many bytes as the file has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// `PATCH /pmem/{id}`, after the start. What is left out stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PmemPatch {
    /// Equals the id in the path.
    pub id: String,
    /// Buckets to replace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}
