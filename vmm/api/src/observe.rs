//! What the process tells about itself: `PUT /logger` and `PUT /metrics`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `/logger`; what is left out stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// `Off`, `Error`, `Warning`, `Info`, `Debug` or `Trace`, in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<String>,
    /// File or named pipe that lines are appended to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// Each line names its level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Each line names the source line it comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only lines from source modules whose path starts with this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// `/metrics`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// File or named pipe that one line of JSON is appended to every minute, at `FlushMetrics` and at the end.
    pub metrics_path: PathBuf,
    /// Each line has the VM's id as `id`.
    #[serde(default)]
    pub emit_id: bool,
    /// Each line has these as `properties`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
    /// *Mote*: file that is replaced at each of these times by the totals so far in Prometheus' text format.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prometheus_path: Option<PathBuf>,
}
