//! Firecracker's token buckets.

use serde::{Deserialize, Serialize};

/// Limits of a device: bytes and operations, each by a token bucket. A bucket that is left out is no limit; in a
/// `PATCH` it is left as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// A token is a byte.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// A token is an operation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A token bucket. It starts full. A `size` or `refill_time` of 0 means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens that the bucket holds.
    pub size: u64,
    /// Tokens beside those in the bucket that are spent first and never come back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket becomes full.
    pub refill_time: u64,
}
