//! Questions of the controller to a host. They change nothing that matters if they are lost: a caller gets a timeout.

use serde::{Deserialize, Serialize};

use crate::{RequestId, ServerId, Traffic};

/// One question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRequest {
    /// To be named in the reply.
    pub id: RequestId,
    /// What is asked.
    pub kind: HostRequestKind,
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum HostRequestKind {
    /// The end of the console log → [`HostReply::ConsoleOutput`].
    ConsoleOutput {
        /// Server.
        server_id: ServerId,
        /// Number of lines from the end; all that is kept without.
        lines: Option<u32>,
    },
    /// Bytes of the console log from an offset on, waiting up to some seconds for the first new one →
    /// [`HostReply::ConsoleRead`].
    ConsoleRead {
        /// Server.
        server_id: ServerId,
        /// Offset since the VMM was started; what is no longer kept is skipped.
        offset: u64,
        /// Longest wait in milliseconds, at most 10,000.
        wait_ms: u64,
    },
    /// What a server's VMM uses → [`HostReply::Diagnostics`].
    Diagnostics {
        /// Server.
        server_id: ServerId,
    },
    /// Input for the serial console → [`HostReply::Done`].
    ConsoleWrite {
        /// Server.
        server_id: ServerId,
        /// The bytes, base64.
        data: String,
    },
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum HostReply {
    /// Text, invalid UTF-8 replaced.
    ConsoleOutput {
        /// The lines.
        output: String,
    },
    /// Bytes.
    ConsoleRead {
        /// Offset after the last byte.
        next_offset: u64,
        /// The bytes, base64.
        data: String,
    },
    /// What a VMM uses.
    Diagnostics(Diagnostics),
    /// Carried out.
    Done,
    /// Not possible.
    Error {
        /// Why, for a person.
        message: String,
    },
}

/// What a server's VMM uses, as the host's kernel counts it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diagnostics {
    /// Seconds since its VMM was started; none runs without.
    pub uptime_s: Option<u64>,
    /// Processor time of each vCPU's thread in nanoseconds, by vCPU.
    pub vcpu_time_ns: Vec<u64>,
    /// Memory that the VMM occupies, MiB.
    pub memory_used_mib: Option<u64>,
    /// Bytes that the VMM has read from and written to disks.
    pub disk_read_bytes: Option<u64>,
    /// See above.
    pub disk_write_bytes: Option<u64>,
    /// Number of drives.
    pub disks: u32,
    /// MAC addresses of its NICs.
    pub nics: Vec<String>,
    /// What each of them has carried since the VMM was started, in their order; none where there is no tap.
    #[serde(default)]
    pub traffic: Vec<Option<Traffic>>,
}
