//! How a VM process ends: exit codes and the report it leaves behind for a supervisor that is not its parent.

use serde::{Deserialize, Serialize};

/// Why `mote-vmm` ended. [`ExitReason::code`] is the process's exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// Something on the host failed (KVM, memory, a file).
    HostError,
    /// The guest asked for a reset (i8042, ACPI reset register, port 0xcf9).
    Reboot,
    /// Triple fault or KVM internal error.
    Crash,
    /// The configuration cannot be carried out (a kernel that is no kernel, a missing file).
    BadConfig,
    /// The command line is wrong.
    BadArguments,
    /// Ended by SIGTERM, SIGINT or SIGHUP from the host.
    Terminated,
}

impl ExitReason {
    /// The process's exit code: 0 power-off, 1 host error, 3 reboot, 4 crash, 5 terminated, and Firecracker's 152 (bad
    /// configuration) and 153 (bad arguments).
    pub const fn code(self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::HostError => 1,
            Self::Reboot => 3,
            Self::Crash => 4,
            Self::Terminated => 5,
            Self::BadConfig => 152,
            Self::BadArguments => 153,
        }
    }
}

/// *Mote*: the JSON that `--exit-report PATH` makes the process write (to `PATH.tmp`, then renamed) just before it ends.
/// A dead process without a report was killed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExitReport {
    /// Why it ended.
    pub reason: ExitReason,
    /// One line for a person, with causes; for a crash the bytes at RIP.
    pub message: String,
}
