//! The process's log: lines on stderr or in the file of `--log-path` or `PUT /logger`.
//!
//! Nothing a guest does repeatedly is logged, so that the log stays small.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mote_vmm_api::Logger;

use crate::civil::{self, Civil};
use crate::metrics;

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
static SINK: Mutex<Sink> =
    Mutex::new(Sink { id: String::new(), file: None, show_level: false, show_origin: false, module: None });

/// Where lines go and what they look like.
struct Sink {
    id: String,
    file: Option<File>,
    show_level: bool,
    show_origin: bool,
    /// Only lines from modules whose path starts so.
    module: Option<String>,
}

fn sink() -> MutexGuard<'static, Sink> {
    SINK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The log can't be as wanted; it is as before then.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// No level.
    #[error("level {0:?} is not {1}")]
    Level(String, String),
    /// The file can't be opened.
    #[error("cannot open log_path {}", .0.display())]
    Open(PathBuf, #[source] io::Error),
}

/// Sets the log up for the VM with this id.
///
/// # Errors
/// The file cannot be opened for appending.
pub fn set_up(id: &str, level: Level, path: Option<&Path>) -> io::Result<()> {
    let file = path.map(metrics::open_appending).transpose()?;
    LEVEL.store(level as u8, Ordering::Relaxed);
    let mut sink = sink();
    id.clone_into(&mut sink.id);
    if file.is_some() {
        sink.file = file;
    }
    Ok(())
}

/// Changes what `config` names.
///
/// # Errors
/// See [`LogError`].
pub fn configure(config: &Logger) -> Result<(), LogError> {
    let level = config
        .level
        .as_deref()
        .map(|name| name.parse::<Level>().map_err(|expected| LogError::Level(name.to_owned(), expected)));
    let level = level.transpose()?;
    let open =
        |path: &PathBuf| metrics::open_appending(path).map_err(|source| LogError::Open(path.clone(), source));
    let file = config.log_path.as_ref().map(open).transpose()?;
    if let Some(level) = level {
        LEVEL.store(level as u8, Ordering::Relaxed);
    }
    let mut sink = sink();
    if file.is_some() {
        sink.file = file;
    }
    sink.show_level = config.show_level.unwrap_or(sink.show_level);
    sink.show_origin = config.show_log_origin.unwrap_or(sink.show_origin);
    if config.module.is_some() {
        sink.module.clone_from(&config.module);
    }
    Ok(())
}

/// Where in the source a line comes from.
pub struct Origin {
    /// Path of the module.
    pub module: &'static str,
    /// Source file.
    pub file: &'static str,
    /// Line in it.
    pub line: u32,
}

/// Writes one line if `level` is to be logged. A line that can't be written is counted and lost.
pub fn write(level: Level, origin: &Origin, message: fmt::Arguments<'_>) {
    if level as u8 > LEVEL.load(Ordering::Relaxed) {
        return;
    }
    let mut sink = sink();
    if sink.module.as_deref().is_some_and(|module| !origin.module.starts_with(module)) {
        return;
    }
    let (second, nanoseconds) = civil::now();
    let mut line = format!("{}.{nanoseconds:09}Z [{}", Civil::from_seconds(second), sink.id);
    if sink.show_level {
        line.push_str(&format!(":{level:?}"));
    }
    if sink.show_origin {
        line.push_str(&format!(":{}:{}", origin.file, origin.line));
    }
    line.push_str(&format!("] {message}\n"));
    let written = match &mut sink.file {
        Some(file) => file.write_all(line.as_bytes()),
        None => io::stderr().write_all(line.as_bytes()),
    };
    if written.is_err() {
        metrics::MISSED_LOG_COUNT.add_one();
    }
}

/// Logs at a level.
macro_rules! log_at {
    ($level:ident, $($argument:tt)*) => {{
        const ORIGIN: $crate::log::Origin =
            $crate::log::Origin { module: module_path!(), file: file!(), line: line!() };
        $crate::log::write($crate::log::Level::$level, &ORIGIN, format_args!($($argument)*))
    }};
}
/// Logs at [`Level::Error`].
macro_rules! error {
    ($($argument:tt)*) => { $crate::log::log_at!(Error, $($argument)*) };
}
/// Logs at [`Level::Info`].
macro_rules! info {
    ($($argument:tt)*) => { $crate::log::log_at!(Info, $($argument)*) };
}
/// Logs at [`Level::Debug`].
macro_rules! debug {
    ($($argument:tt)*) => { $crate::log::log_at!(Debug, $($argument)*) };
}
pub(crate) use {debug, error, info, log_at};

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
