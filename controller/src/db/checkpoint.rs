//! SQLite's log is carried over into the database beside the writers, not by one of them.
//!
//! Left to itself SQLite does it in the commit that makes the log a thousand pages long: every twentieth create of a server
//! would wait for some megabytes to be written and synchronized twice. Durability is as it was: a commit is in the log and
//! on the disk before it is acknowledged, whether the log is carried over soon or late.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use sqlx::pool::CloseEvent;
use tokio::time::sleep;

use super::driver::{SqliteConn, SqliteOptions};

/// How often it is looked whether there is something to carry over.
const PERIOD: Duration = Duration::from_secs(1);
/// A log that is shorter can wait: SQLite's thousand pages.
const SHORT_BYTES: u64 = 4 << 20;

/// Carries the log over until `closed`.
pub(super) async fn run(options: SqliteOptions, mut closed: CloseEvent) {
    let log = log_of(&options.path);
    let mut seen = None;
    loop {
        tokio::select! {
            () = &mut closed => return,
            () = sleep(PERIOD) => {}
        }
        let Some(written) = written(&log).filter(|written| seen != Some(*written)) else { continue };
        let options = options.clone();
        let done = tokio::task::spawn_blocking(move || SqliteConn::open(&options)?.checkpoint()).await;
        match done {
            Ok(Ok(())) => seen = Some(written),
            Ok(Err(error)) => tracing::warn!(%error, "the database's log can't be carried over now"),
            Err(_) => return,
        }
    }
}

fn log_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    name.into()
}

/// When a log that isn't short was last written to.
fn written(log: &Path) -> Option<SystemTime> {
    let found = std::fs::metadata(log).ok()?;
    found.modified().ok().filter(|_| found.len() >= SHORT_BYTES)
}
