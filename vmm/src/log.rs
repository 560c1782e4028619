//! The process's log: lines on stderr or in the file of `--log-path`.
//!
//! Nothing a guest does repeatedly is logged, so that the log stays small.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

/// How much is logged; each level includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// Nothing.
    Off,
    /// What makes the process end or a request fail.
    Error,
    /// What works, but not as wished.
    Warning,
    /// Milestones.
    Info,
    /// Requests that only look.
    Debug,
    /// The same as debug.
    Trace,
}

impl FromStr for Level {
    type Err = String;

    /// Firecracker's names, in any case.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Ok(match name.to_ascii_lowercase().as_str() {
            "off" => Self::Off,
            "error" => Self::Error,
            "warn" | "warning" => Self::Warning,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => return Err("one of Off, Error, Warning, Info, Debug, Trace".to_owned()),
        })
    }
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Info as u8);
static SINK: OnceLock<Sink> = OnceLock::new();

struct Sink {
    id: String,
    file: Option<File>,
}

/// Sets the log up, once.
///
/// # Errors
/// The file cannot be opened for appending.
pub fn set_up(id: &str, level: Level, path: Option<&Path>) -> io::Result<()> {
    LEVEL.store(level as u8, Ordering::Relaxed);
    let file = path.map(|path| File::options().append(true).create(true).open(path)).transpose()?;
    // A second call is ignored: the first one's log goes on.
    let _ = SINK.set(Sink { id: id.to_owned(), file });
    Ok(())
}

/// Writes one line if `level` is to be logged. Failures to write are ignored: there is nowhere to tell them.
pub fn write(level: Level, message: fmt::Arguments<'_>) {
    if level as u8 > LEVEL.load(Ordering::Relaxed) {
        return;
    }
    let sink = SINK.get();
    let id = sink.map_or("", |sink| &sink.id);
    let line = format!("{} [{id}:{level:?}] {message}\n", jiff::Timestamp::now());
    let _ = match sink.and_then(|sink| sink.file.as_ref()) {
        Some(mut file) => file.write_all(line.as_bytes()),
        None => io::stderr().write_all(line.as_bytes()),
    };
}

/// Logs at [`Level::Error`].
macro_rules! error {
    ($($argument:tt)*) => { $crate::log::write($crate::log::Level::Error, format_args!($($argument)*)) };
}
/// Logs at [`Level::Info`].
macro_rules! info {
    ($($argument:tt)*) => { $crate::log::write($crate::log::Level::Info, format_args!($($argument)*)) };
}
/// Logs at [`Level::Debug`].
macro_rules! debug {
    ($($argument:tt)*) => { $crate::log::write($crate::log::Level::Debug, format_args!($($argument)*)) };
}
pub(crate) use {debug, error, info};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_in_any_case_and_ordered() {
        assert_eq!("WARNING".parse(), Ok(Level::Warning));
        assert!(Level::Off < Level::Error && Level::Info < Level::Debug);
        assert!("loud".parse::<Level>().is_err());
    }
}
