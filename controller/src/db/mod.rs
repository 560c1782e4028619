//! The database: SQLite in `<state dir>/mote.db`, and what every table keeps to.
//!
//! - **SQL** is written for PostgreSQL as well: `$1` placeholders, `ON CONFLICT`, no `rowid`, no SQLite functions.
//! - **Time** is a `BIGINT` of microseconds since 1970 UTC ([`now_us`]): compares and indexes as it is, and every service
//!   prints it in its own form.
//! - **Ids** are `TEXT`: 32 hex digits for users, projects, domains, roles (as Keystone's), hyphened UUIDs elsewhere.
//! - **Truth values** are `BOOLEAN`, JSON is `TEXT`.
//!
//! **Durability.** WAL with `synchronous = FULL`: what was acknowledged survives `kill -9` *and* loss of power, at the
//! price of one `fdatasync` per commit. `NORMAL` would survive only the former: after a power failure hosts would have
//! executed a generation of their desired state that the database has forgotten.
//!
//! **Writing.** All writes go through one connection ([`crate::app::App::begin`]) whose pool is the queue, in transactions that are
//! `IMMEDIATE`: they take SQLite's write lock at the start, so none fails half-way by having read an old state. Readers
//! (other connections) are never blocked. Other processes (`mote-controller bootstrap`) are waited for by the busy time-out.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use sqlx::{
    Sqlite, SqliteConnection, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

/// Connections that read at the same time.
const READERS: u32 = 4;
/// How long a writer waits for its turn, and how long for another process's lock.
const WRITE_WAIT: Duration = Duration::from_secs(15);
/// How long a reader waits for a connection.
const READ_WAIT: Duration = Duration::from_secs(15);

/// The database's driver. Everything outside this module names it by these aliases, so that one place decides.
pub type Db = Sqlite;
/// A connection, inside a transaction or not.
pub type Conn = SqliteConnection;
/// Connections.
pub type Pool = SqlitePool;
/// A transaction.
pub type Tx = Transaction<'static, Db>;

/// The pools of [`open`].
#[derive(Debug, Clone)]
pub struct Pools {
    /// For reading.
    pub read: Pool,
    /// One connection, for writing.
    pub write: Pool,
}

/// Why the database can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// The state directory can't be made.
    #[error("can't create {path}")]
    CreateDir {
        /// Directory.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The file can't be made.
    #[error("can't create {path}")]
    CreateFile {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// SQLite refuses.
    #[error("can't open {path}")]
    Connect {
        /// File.
        path: PathBuf,
        /// Cause.
        source: sqlx::Error,
    },
    /// The schema can't be brought up to date.
    #[error("can't migrate {path}")]
    Migrate {
        /// File.
        path: PathBuf,
        /// Cause.
        source: sqlx::migrate::MigrateError,
    },
}

/// Opens the database below `state_dir`, creates it if absent, and migrates it.
///
/// # Errors
/// See [`DbError`].
pub async fn open(state_dir: &Path) -> Result<Pools, DbError> {
    create_private_dir(state_dir)?;
    let path = state_dir.join("mote.db");
    create_private_file(&path)?;
    let failed = |source| DbError::Connect { path: path.clone(), source };
    let options = SqliteConnectOptions::new()
        .filename(&path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(WRITE_WAIT)
        .optimize_on_close(true, None);
    let write = SqlitePoolOptions::new()
        .max_connections(1)
        .acquire_timeout(WRITE_WAIT)
        .idle_timeout(None)
        .max_lifetime(None)
        .connect_with(options.clone())
        .await
        .map_err(failed)?;
    sqlx::migrate!("./migrations")
        .run(&write)
        .await
        .map_err(|source| DbError::Migrate { path: path.clone(), source })?;
    let read = SqlitePoolOptions::new()
        .max_connections(READERS)
        .acquire_timeout(READ_WAIT)
        .idle_timeout(None)
        .max_lifetime(None)
        .connect_with(options)
        .await
        .map_err(failed)?;
    Ok(Pools { read, write })
}

/// Makes the state directory. Keys, password hashes and tenants' images are below: nobody but the owner may look.
///
/// # Errors
/// If it can't be made.
pub fn create_private_dir(path: &Path) -> Result<(), DbError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| DbError::CreateDir { path: path.to_owned(), source })
}

/// Makes the database's file, so that SQLite need not: it (and its log, which takes over the mode) is private, also in a
/// directory that somebody else made.
fn create_private_file(path: &Path) -> Result<(), DbError> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map(drop).map_err(|source| DbError::CreateFile { path: path.to_owned(), source })
}

/// Begins a transaction that holds the write lock from the start.
///
/// # Errors
/// If the lock isn't had in time.
pub async fn begin_immediate(pool: &Pool) -> Result<Tx, sqlx::Error> {
    pool.begin_with("BEGIN IMMEDIATE").await
}

/// Now, in microseconds since 1970 UTC.
pub fn now_us() -> i64 {
    Timestamp::now().as_microsecond()
}

/// `2026-11-23T03:00:00Z`, as Nova, Glance and Neutron write it.
pub fn rfc3339_s(us: i64) -> String {
    timestamp(us).strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `2026-11-23T03:00:00.000000Z`, as Keystone writes it.
pub fn rfc3339_us(us: i64) -> String {
    timestamp(us).strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

fn timestamp(us: i64) -> Timestamp {
    Timestamp::from_microsecond(us).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// Whether a write failed because a row with the same unique key exists.
pub fn is_unique_violation(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|e| e.is_unique_violation())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_printed_as_each_service_does() {
        assert_eq!(rfc3339_s(1_795_402_800_000_000), "2026-11-23T03:00:00Z");
        assert_eq!(rfc3339_us(1_795_402_800_000_007), "2026-11-23T03:00:00.000007Z");
    }

    #[tokio::test]
    async fn opening_twice_keeps_the_data_and_pragmas_are_set() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let pools = open(dir.path()).await.unwrap();
            let sync: i64 = sqlx::query_scalar("PRAGMA synchronous").fetch_one(&pools.write).await.unwrap();
            let keys: i64 = sqlx::query_scalar("PRAGMA foreign_keys").fetch_one(&pools.read).await.unwrap();
            let journal: String =
                sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&pools.read).await.unwrap();
            assert_eq!((sync, keys, journal.as_str()), (2, 1, "wal"));
            pools.read.close().await;
            pools.write.close().await;
        }
    }

    #[tokio::test]
    async fn the_files_are_private_also_in_an_open_directory() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let _pools = open(dir.path()).await.unwrap();
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o077, 0, "{:?}", entry.path());
        }
    }

    #[tokio::test]
    async fn a_dropped_transaction_leaves_nothing_and_frees_the_writer() {
        let dir = tempfile::tempdir().unwrap();
        let pools = open(dir.path()).await.unwrap();
        for _ in 0..3 {
            let mut tx = begin_immediate(&pools.write).await.unwrap();
            sqlx::query("INSERT INTO settings (name, value) VALUES ('a', 'b')")
                .execute(&mut *tx)
                .await
                .unwrap();
        }
        let n: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM settings WHERE name = 'a'")
            .fetch_one(&pools.read)
            .await
            .unwrap();
        assert_eq!(n, 0);
    }
}
