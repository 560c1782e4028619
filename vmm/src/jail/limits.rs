//! Resource limits (setrlimit(2)).

use std::str::FromStr;

use nix::errno::Errno;

/// Open descriptors when nothing is said, as Firecracker's.
const DEFAULT_NO_FILE: u64 = 2048;

/// One limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Largest file in bytes.
    FileSize(u64),
    /// Number of open descriptors.
    NoFile(u64),
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("NAME=VALUE")?;
        let value = value.parse().map_err(|_| format!("{value:?} is no number"))?;
        match name {
            "fsize" => Ok(Self::FileSize(value)),
            "no-file" => Ok(Self::NoFile(value)),
            _ => Err(format!("{name:?} is neither fsize nor no-file")),
        }
    }
}

/// Sets the limits, the last of each kind, and that of descriptors in any case.
pub(super) fn apply(limits: &[Limit]) -> nix::Result<()> {
    for limit in [&[Limit::NoFile(DEFAULT_NO_FILE)], limits].concat() {
        let (resource, value) = match limit {
            Limit::FileSize(value) => (libc::RLIMIT_FSIZE, value),
            Limit::NoFile(value) => (libc::RLIMIT_NOFILE, value),
        };
        let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
        // SAFETY: the pointer is to a whole structure, which is only read.
        Errno::result(unsafe { libc::setrlimit(resource, &raw const limit) })?;
    }
    Ok(())
}
