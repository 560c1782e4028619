//! *Mote*: a virtio console.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// *Mote*: `/mote/console`, and `console` in the config file: a virtio console with one port (`/dev/hvc0`). With neither
/// `output_path` nor `socket_path` it is this process's stdout and stdin, which the serial port must have left
/// (`serial_out_path`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// File the output is appended to (created 0600).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_path: Option<PathBuf>,
    /// When the file would pass this many bytes it is renamed to `<path>.1` (replacing an older one) and started anew. Default
    /// 1 MiB. Needs `output_path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_limit_bytes: Option<u64>,
    /// A Unix stream socket that the VMM listens on: what a client writes becomes the guest's input, and each client is sent
    /// the output from when it connects (a slow client loses bytes, never the guest time).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_path: Option<PathBuf>,
    /// The console's size in characters, if the guest shall know it (VIRTIO_CONSOLE_F_SIZE).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ConsoleSize>,
}

/// *Mote*: the size of a console in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ConsoleSize {
    /// Width.
    pub columns: u16,
    /// Height.
    pub rows: u16,
}
