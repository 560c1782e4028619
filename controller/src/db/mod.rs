//! The database: SQLite in `<state dir>/mote.db`, or PostgreSQL 15 or newer; and what every table keeps to.
//!
//! - **One text of SQL** for both ([`driver`]): `$1` placeholders, `ON CONFLICT`, no `rowid`, no functions of one database
//!   only. `ORDER BY` a nullable column says where NULLs go, `LIKE` is not relied on for case, `GROUP BY` names all columns.
//!   Migrations (`migrations/`, forward only) are shared as well.
//! - **Time** is a `BIGINT` of microseconds since 1970 UTC ([`now_us`]): compares and indexes as it is, and every service
//!   prints it in its own form.
//! - **Ids** are `TEXT`: 32 hex digits for users, projects, domains, roles (as Keystone's), hyphened UUIDs elsewhere.
//! - **Truth values** are `BOOLEAN`, JSON is `TEXT`.
//!
//! **Writing.** All writes go through [`crate::app::App::begin`], and in the whole cloud one such transaction is under way
//! at a time: what it reads stays true until it ends, so that quotas, addresses and claims are exact without a retry.
//!
//! | | SQLite | PostgreSQL |
//! |---|---|---|
//! | within a controller | the pool of one connection is the queue | the same |
//! | between processes | `BEGIN IMMEDIATE` takes the file's write lock | `pg_advisory_xact_lock` |
//! | what it sees | the newest state | `READ COMMITTED`: each statement begins after the lock was had, and the lock is let go after the commit is visible |
//! | readers | own connections, never wait | the same; their transactions are `REPEATABLE READ`: one snapshot, as in SQLite |
//!
//! A statement that failed ends the transaction on PostgreSQL: never go on after one, use `ON CONFLICT` where a conflict is
//! expected.
//!
//! **Durability.** SQLite runs with WAL and `synchronous = FULL`: what was acknowledged survives `kill -9` *and* loss of
//! power, at the price of one `fdatasync` per commit; the log is carried over beside the commits. `NORMAL` would survive only the former: after a power failure hosts
//! would have executed a generation of their desired state that the database has forgotten. PostgreSQL does the same with
//! its default `synchronous_commit`.

mod checkpoint;
pub mod driver;
mod presence;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::Timestamp;
use sqlx::{
    Connection, SqlSafeStr, Transaction,
    migrate::{Migration, MigrationType, Migrator},
    pool::PoolOptions,
    postgres::PgConnectOptions,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};

pub use presence::Presence;

/// Connections that read at the same time.
const READERS: u32 = 4;
/// The same for PostgreSQL, where a reader's wait is the network's, not a processor's.
const READERS_POSTGRES: u32 = 16;
/// How long a writer waits for its turn, and how long for another process's lock.
const WRITE_WAIT: Duration = Duration::from_secs(15);
/// How long a reader waits for a connection.
const READ_WAIT: Duration = Duration::from_secs(15);
/// PostgreSQL ends a transaction whose controller has fallen silent for so long, so that the others can write.
const SILENT_WRITER: Duration = Duration::from_secs(30);
/// Longest time of one statement on PostgreSQL.
const STATEMENT: Duration = Duration::from_secs(60);
/// How long a PostgreSQL server that is still coming up is waited for.
const STARTING: Duration = Duration::from_secs(30);
/// Pause before it is asked again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Takes away what SQLite knows of how large tables are. It would be of some earlier day (of the empty tables of a new cloud,
/// say), and make plans that read whole tables; without, it trusts the indexes.
const STATISTICS: [&str; 2] = ["DROP TABLE IF EXISTS sqlite_stat1", "DROP TABLE IF EXISTS sqlite_stat4"];
/// The advisory lock of the one writer: "mote".
const WRITER_LOCK: &str = "SELECT pg_advisory_xact_lock(1836020837)";

/// The advisory lock of who makes or removes images' bytes together with the record that names them.
const BLOBS_LOCK: &str = "SELECT pg_advisory_xact_lock(1836020838)";

/// The schema, for both databases.
static MIGRATIONS: Migrator = sqlx::migrate!("./migrations");
/// The triggers of 0097 in SQLite's language.
const SQLITE_TRIGGERS: &str = include_str!("../../migrations/sqlite/0097_usage_triggers.sql");
/// The same in PostgreSQL's.
const POSTGRES_TRIGGERS: &str = include_str!("../../migrations/postgres/0097_usage_triggers.sql");

/// The database's driver. Everything outside this module names it by these aliases, so that one place decides.
pub type Db = driver::Mote;
/// A connection, inside a transaction or not.
pub type Conn = driver::Conn;
/// Connections.
pub type Pool = sqlx::Pool<Db>;
/// A transaction.
pub type Tx = Transaction<'static, Db>;

/// The pools of [`open`].
#[derive(Debug, Clone)]
pub struct Pools {
    /// For reading.
    pub read: Pool,
    /// One connection, for writing.
    pub write: Pool,
    /// Where PostgreSQL is, if it is that: to listen for what other controllers say.
    pub postgres: Option<PgConnectOptions>,
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
    /// Not a URL of PostgreSQL. The URL has a password in it and is not shown.
    #[error("the database's URL must be of the form postgres://user:password@host:port/database")]
    Url(#[source] Option<sqlx::Error>),
    /// PostgreSQL is too old.
    #[error("{place} is version {version}; PostgreSQL 15 or newer is needed")]
    TooOld {
        /// Server.
        place: String,
        /// What it says of itself.
        version: String,
    },
    /// The database refuses.
    #[error("can't open {place}")]
    Connect {
        /// File or server.
        place: String,
        /// Cause.
        source: sqlx::Error,
    },
    /// The schema can't be brought up to date.
    #[error("can't migrate {place}")]
    Migrate {
        /// File or server.
        place: String,
        /// Cause.
        source: sqlx::migrate::MigrateError,
    },
}

/// Opens the database at `url` (PostgreSQL), or without one the SQLite file below `state_dir`, and migrates it.
///
/// # Errors
/// See [`DbError`].
pub async fn open(state_dir: &Path, url: Option<&str>) -> Result<Pools, DbError> {
    create_private_dir(state_dir)?;
    match url {
        Some(url) => open_postgres(url).await,
        None => open_sqlite(state_dir).await,
    }
}

/// The migrations of one database: the shared ones, and its own triggers.
fn migrations(triggers: &'static str) -> Migrator {
    let own =
        Migration::new(97, "usage triggers".into(), MigrationType::Simple, triggers.into_sql_str(), false);
    Migrator::with_migrations(MIGRATIONS.iter().cloned().chain([own]).collect())
}

async fn open_sqlite(state_dir: &Path) -> Result<Pools, DbError> {
    let path = state_dir.join(SQLITE_FILE);
    create_private_file(&path)?;
    let place = path.display().to_string();
    let failed = |source| DbError::Connect { place: place.clone(), source };
    let options = SqliteConnectOptions::new()
        .filename(&path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(WRITE_WAIT);
    let mut first = sqlx::SqliteConnection::connect_with(&options).await.map_err(failed)?;
    let migrated = migrations(SQLITE_TRIGGERS).run(&mut first).await;
    migrated.map_err(|source| DbError::Migrate { place: place.clone(), source })?;
    for table in STATISTICS {
        sqlx::query(table).execute(&mut first).await.map_err(failed)?;
    }
    first.close().await.map_err(failed)?;
    let file = driver::SqliteOptions { path, lock_wait: WRITE_WAIT };
    let options = driver::Options::Sqlite(file.clone());
    let (write, read) = pools(options.clone(), options, READERS);
    let (write, read) = (write.await.map_err(failed)?, read.await.map_err(failed)?);
    tokio::spawn(checkpoint::run(file, write.close_event()));
    Ok(Pools { write, read, postgres: None })
}

async fn open_postgres(url: &str) -> Result<Pools, DbError> {
    if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
        return Err(DbError::Url(None));
    }
    let options: PgConnectOptions = url.parse().map_err(|error| DbError::Url(Some(error)))?;
    let options = options.application_name("mote-controller");
    let place = format!(
        "the database {} at {}:{}",
        options.get_database().unwrap_or("of the same name as the user"),
        options.get_socket().map_or(options.get_host().to_owned(), |path| path.display().to_string()),
        options.get_port()
    );
    let failed = |source| DbError::Connect { place: place.clone(), source };
    let mut first = connect_when_started(&options).await.map_err(failed)?;
    let version = first.server_version_num();
    if version.is_some_and(|number| number < 150_000) {
        let version = version.map_or_else(String::new, |number| (number / 10_000).to_string());
        return Err(DbError::TooOld { place, version });
    }
    let migrated = migrations(POSTGRES_TRIGGERS).run(&mut first).await;
    migrated.map_err(|source| DbError::Migrate { place: place.clone(), source })?;
    first.close().await.map_err(failed)?;
    let ms = |limit: Duration| limit.as_millis().to_string();
    let both = options.clone().options([("statement_timeout", ms(STATEMENT))]);
    let write = both.clone().options([
        ("lock_timeout", ms(WRITE_WAIT)),
        ("idle_in_transaction_session_timeout", ms(SILENT_WRITER)),
    ]);
    let read = both.options([("default_transaction_isolation", "repeatable read")]);
    let (write, read) = pools(
        driver::Options::Postgres(Box::new(write)),
        driver::Options::Postgres(Box::new(read)),
        READERS_POSTGRES,
    );
    Ok(Pools {
        write: write.await.map_err(failed)?,
        read: read.await.map_err(failed)?,
        postgres: Some(options),
    })
}

/// A connection, also when the server is still coming up (after a boot of the machine, or its own recovery from a crash): it
/// listens before it lets anybody in, and says so by SQLSTATE 57P03, cannot_connect_now.
async fn connect_when_started(options: &PgConnectOptions) -> Result<sqlx::PgConnection, sqlx::Error> {
    let end = tokio::time::Instant::now() + STARTING;
    loop {
        match sqlx::PgConnection::connect_with(options).await {
            Err(sqlx::Error::Database(error))
                if error.code().as_deref() == Some("57P03") && tokio::time::Instant::now() < end =>
            {
                tracing::info!("PostgreSQL is starting up; waiting");
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            outcome => return outcome,
        }
    }
}

fn pools(
    write: driver::Options,
    read: driver::Options,
    readers: u32,
) -> (impl Future<Output = Result<Pool, sqlx::Error>>, impl Future<Output = Result<Pool, sqlx::Error>>) {
    let pool = |size, wait, options| {
        let pool = PoolOptions::<Db>::new().max_connections(size).acquire_timeout(wait);
        pool.idle_timeout(None).max_lifetime(None).connect_with(options)
    };
    (pool(1, WRITE_WAIT, write), pool(readers, READ_WAIT, read))
}

/// The name of SQLite's file in the state directory.
pub const SQLITE_FILE: &str = "mote.db";

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

/// Makes a database with the schema as it was before a migration, and in it what an earlier version would have made.
#[cfg(test)]
pub(crate) async fn make_old(state_dir: &Path, url: Option<&str>, before: i64, made: &[&'static str]) {
    let migrations = MIGRATIONS.iter().filter(|migration| migration.version < before).cloned().collect();
    let old = Migrator::with_migrations(migrations);
    match url {
        None => {
            let options = SqliteConnectOptions::new().filename(state_dir.join(SQLITE_FILE));
            let mut conn =
                sqlx::SqliteConnection::connect_with(&options.create_if_missing(true)).await.unwrap();
            old.run(&mut conn).await.unwrap();
            for sql in made {
                sqlx::query(*sql).execute(&mut conn).await.unwrap();
            }
            conn.close().await.unwrap();
        }
        Some(url) => {
            let mut conn = sqlx::PgConnection::connect(url).await.unwrap();
            old.run(&mut conn).await.unwrap();
            for sql in made {
                sqlx::query(*sql).execute(&mut conn).await.unwrap();
            }
            conn.close().await.unwrap();
        }
    }
}

/// Begins a transaction that is the only one of the whole cloud that writes.
///
/// # Errors
/// If its turn doesn't come in time.
pub async fn begin_immediate(pool: &Pool) -> Result<Tx, sqlx::Error> {
    let mut conn = pool.acquire().await?;
    if let driver::Conn::Sqlite(_) = &mut *conn {
        return Transaction::begin(conn, Some("BEGIN IMMEDIATE".into_sql_str())).await;
    }
    let mut tx = Transaction::begin(conn, None).await?;
    sqlx::query(WRITER_LOCK).execute(&mut *tx).await?;
    Ok(tx)
}

/// A turn among all controllers to make or remove images' bytes; it ends when it is dropped. None is needed on SQLite,
/// which has one controller.
///
/// # Errors
/// Of the database.
pub async fn blobs_turn(pool: &Pool) -> Result<Option<Tx>, sqlx::Error> {
    let mut tx = pool.begin().await?;
    if let driver::Conn::Sqlite(_) = &*tx {
        return Ok(None);
    }
    sqlx::query(BLOBS_LOCK).execute(&mut *tx).await?;
    Ok(Some(tx))
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

    mod sqlite {
        use super::*;

        #[tokio::test]
        async fn what_was_there_before_it_was_counted_is_counted() {
            let dir = tempfile::tempdir().unwrap();
            let options =
                SqliteConnectOptions::new().filename(dir.path().join("a.db")).create_if_missing(true);
            let mut conn = sqlx::SqliteConnection::connect_with(&options).await.unwrap();
            let all = migrations(SQLITE_TRIGGERS);
            let before = all.iter().filter(|migration| migration.version < 96).cloned().collect();
            Migrator::with_migrations(before).run(&mut conn).await.unwrap();
            sqlx::raw_sql(
                "INSERT INTO hosts (id, number, name, availability_zone, own_zone, secret_hash, vcpus, memory_mib,
                     disk_gib, kernel, version, traits, last_seen_us, created_us)
                 VALUES ('h', 1, 'h', 'nova', 'nova', '', 4, 4096, 40, '', '', '[]', 0, 0),
                     ('empty', 2, 'empty', 'nova', 'nova', '', 4, 4096, 40, '', '', '[]', 0, 0);
                 INSERT INTO servers (id, project_id, user_id, name, hostname, flavor_id, flavor_name, vcpus,
                     memory_mib, disk_gib, disk_claim_gib, image_id, boot, metadata, restart_policy, launch_index,
                     availability_zone, host_id, desired_power, run_generation, changed_generation, vm_state,
                     created_us, updated_us, held_vcpus, held_memory_mib)
                 VALUES ('s', 'p', '', '', '', '', '', 2, 512, 1, 5, '', '', '', '', 0, '', 'h', '', 0, 0, '', 0, 0,
                     1, 100),
                     ('t', 'p', '', '', '', '', '', 1, 256, 1, 2, '', '', '', '', 0, '', NULL, '', 0, 0, '', 0, 0, 0, 0)",
            )
            .execute(&mut conn)
            .await
            .unwrap();
            all.run(&mut conn).await.unwrap();
            let hosts: Vec<(i64, i64, i64, i64)> = sqlx::query_as(
                "SELECT promised_servers, promised_vcpus, promised_memory_mib, promised_disk_gib FROM hosts
                 ORDER BY number",
            )
            .fetch_all(&mut conn)
            .await
            .unwrap();
            assert_eq!(hosts, [(1, 3, 612, 5), (0, 0, 0, 0)]);
            let projects: Vec<(String, i64, i64, i64, i64)> =
                sqlx::query_as("SELECT project_id, instances, cores, ram_mib, ports FROM project_usage")
                    .fetch_all(&mut conn)
                    .await
                    .unwrap();
            assert_eq!(projects, [("p".to_owned(), 2, 4, 868, 0)]);
        }

        #[tokio::test]
        async fn opening_twice_keeps_the_data_and_pragmas_are_set() {
            let dir = tempfile::tempdir().unwrap();
            for _ in 0..2 {
                let pools = open(dir.path(), None).await.unwrap();
                let sync: i64 =
                    sqlx::query_scalar("PRAGMA synchronous").fetch_one(&pools.write).await.unwrap();
                let keys: i64 =
                    sqlx::query_scalar("PRAGMA foreign_keys").fetch_one(&pools.read).await.unwrap();
                let journal: String =
                    sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&pools.read).await.unwrap();
                assert_eq!((sync, keys, journal.as_str()), (2, 1, "wal"));
                pools.read.close().await;
                pools.write.close().await;
            }
        }

        #[tokio::test]
        async fn statistics_of_an_earlier_day_are_forgotten_at_the_start() {
            let dir = tempfile::tempdir().unwrap();
            let pools = open(dir.path(), None).await.unwrap();
            sqlx::query("ANALYZE").execute(&pools.write).await.unwrap();
            pools.read.close().await;
            pools.write.close().await;
            let pools = open(dir.path(), None).await.unwrap();
            let plan: Vec<(i64, i64, i64, String)> =
                sqlx::query_as("EXPLAIN QUERY PLAN SELECT id FROM ports WHERE server_id = 'x'")
                    .fetch_all(&pools.read)
                    .await
                    .unwrap();
            assert!(plan[0].3.contains("ports_server"), "{plan:?}");
        }

        #[tokio::test]
        async fn the_files_are_private_also_in_an_open_directory() {
            use std::os::unix::fs::PermissionsExt;
            let dir = tempfile::tempdir().unwrap();
            std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
            let _pools = open(dir.path(), None).await.unwrap();
            for entry in std::fs::read_dir(dir.path()).unwrap() {
                let entry = entry.unwrap();
                assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o077, 0, "{:?}", entry.path());
            }
        }

        #[tokio::test]
        async fn a_dropped_transaction_leaves_nothing_and_frees_the_writer() {
            let dir = tempfile::tempdir().unwrap();
            let pools = open(dir.path(), None).await.unwrap();
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
}
