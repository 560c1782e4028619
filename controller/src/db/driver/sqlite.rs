//! SQLite's half of the driver: statements run where they are asked for, on the thread of the task that awaits them.
//!
//! SQLite is a library, not a server. sqlx's own driver gives each connection a thread and sends it every statement: two
//! wake-ups for what takes ten microseconds in the page cache, and a row copied value by value onto the heap. Here a
//! statement is a call, and its result one piece of memory ([`Rows`]). What can take long isn't done that way: the wait for
//! another process's lock is a sleep of the task, and a commit (an `fdatasync`) tells the runtime that the thread is
//! occupied.

use std::{
    borrow::Cow,
    fmt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use rusqlite::{Connection, ErrorCode, OpenFlags, ffi, types::ValueRef as NativeValue};
use sqlx::{
    SqlStr,
    error::{BoxDynError, DatabaseError, ErrorKind},
};
use sqlx_core::transaction::{
    begin_ansi_transaction_sql, commit_ansi_transaction_sql, rollback_ansi_transaction_sql,
};
use tokio::runtime::{Handle, RuntimeFlavor};

use super::value::{Argument, Arguments, SqliteCell, SqliteValueRef};

/// Prepared statements that a connection keeps: more than there are texts of SQL in the program's busy parts.
const STATEMENTS: usize = 512;
/// A statement that takes longer is told of.
const SLOW: Duration = Duration::from_secs(1);
/// A log of so many pages (of 4 KiB) is carried over by the writer itself, should nobody else do it ([`crate::db`]).
const LONG_LOG: u32 = 8192;
/// Pause before another process's lock is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(5);

/// How to open a file.
#[derive(Debug, Clone)]
pub struct SqliteOptions {
    /// The file, which is there.
    pub path: PathBuf,
    /// How long another process's lock is waited for.
    pub lock_wait: Duration,
}

/// A connection.
#[derive(Debug)]
pub struct SqliteConn {
    native: Connection,
    lock_wait: Duration,
    /// Transactions within each other.
    depth: usize,
}

/// What a statement did.
pub(super) struct Outcome {
    pub(super) rows: Arc<Rows>,
    pub(super) rows_affected: u64,
}

/// The rows of one statement, in one piece.
#[derive(Debug, Default)]
pub(super) struct Rows {
    names: Vec<Box<str>>,
    cells: Vec<SqliteCell<Span>>,
    text: String,
}

/// Where a text is in [`Rows::text`], in bytes.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: u32,
    length: u32,
}

impl Rows {
    pub(super) fn names(&self) -> &[Box<str>] {
        &self.names
    }

    /// Number of rows.
    pub(super) fn len(&self) -> usize {
        self.cells.len().checked_div(self.names.len()).unwrap_or(0)
    }

    /// The value in a row and column, both from 0.
    pub(super) fn value(&self, row: usize, column: usize) -> Result<SqliteValueRef<'_>, sqlx::Error> {
        let width = self.names.len();
        let cell = (column < width).then(|| self.cells.get(row * width + column)).flatten();
        let cell = cell.ok_or(sqlx::Error::ColumnIndexOutOfBounds { index: column, len: width })?;
        Ok(cell.map(|span| {
            let start = span.start as usize;
            &self.text[start..start + span.length as usize]
        }))
    }

    fn push(&mut self, value: NativeValue<'_>) -> Result<(), BoxDynError> {
        self.cells.push(match value {
            NativeValue::Null => SqliteCell::Null,
            NativeValue::Integer(value) => SqliteCell::Int(value),
            NativeValue::Text(bytes) => {
                let text = std::str::from_utf8(bytes)?;
                let span = Span { start: self.text.len().try_into()?, length: text.len().try_into()? };
                self.text.push_str(text);
                SqliteCell::Text(span)
            }
            NativeValue::Real(_) => SqliteCell::Other("REAL"),
            NativeValue::Blob(_) => SqliteCell::Other("BLOB"),
        });
        Ok(())
    }
}

impl SqliteConn {
    /// Opens the file with what every connection keeps to: see [`crate::db`].
    pub(crate) fn open(options: &SqliteOptions) -> Result<Self, sqlx::Error> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let native = Connection::open_with_flags(&options.path, flags).map_err(failed)?;
        native.busy_timeout(options.lock_wait).map_err(failed)?;
        native.set_prepared_statement_cache_capacity(STATEMENTS);
        let settings = format!(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
             PRAGMA wal_autocheckpoint = {LONG_LOG}"
        );
        native.execute_batch(&settings).map_err(failed)?;
        Ok(Self { native, lock_wait: options.lock_wait, depth: 0 })
    }

    pub(super) fn close(self) -> Result<(), sqlx::Error> {
        self.native.close().map_err(|(_, error)| failed(error))
    }

    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    pub(super) fn forget_statements(&mut self) {
        self.native.flush_prepared_statement_cache();
    }

    /// The columns that a statement gives.
    pub(super) fn columns(&self, sql: &str) -> Result<Vec<Box<str>>, sqlx::Error> {
        let statement = self.native.prepare_cached(sql).map_err(failed)?;
        Ok(statement.column_names().into_iter().map(Box::from).collect())
    }

    /// Runs a statement and reads up to `limit` rows. Without arguments it may be several, of which no rows are read.
    pub(super) fn run(
        &mut self,
        sql: &str,
        arguments: Option<Arguments>,
        limit: usize,
    ) -> Result<Outcome, sqlx::Error> {
        if self.depth > 0 && self.native.is_autocommit() {
            // What follows would be no part of a transaction any more, and be kept.
            let text = "SQLite has taken the transaction back after an error";
            return Err(sqlx::Error::Protocol(text.into()));
        }
        let begun = Instant::now();
        let Some(arguments) = arguments else {
            self.native.execute_batch(sql).map_err(failed)?;
            return Ok(Outcome { rows: Arc::default(), rows_affected: self.native.changes() });
        };
        let mut statement = self.native.prepare_cached(sql).map_err(failed)?;
        bind(&mut statement, &arguments)?;
        let mut rows = Rows::default();
        let width = statement.column_count();
        if width > 0 {
            rows.names = statement.column_names().into_iter().map(Box::from).collect();
        }
        let read_only = statement.readonly();
        let mut native = statement.raw_query();
        while rows.len() < limit
            && let Some(row) = native.next().map_err(failed)?
        {
            for column in 0..width {
                rows.push(row.get_ref(column).map_err(failed)?).map_err(sqlx::Error::Decode)?;
            }
        }
        drop(native);
        let rows_affected = if read_only { 0 } else { self.native.changes() };
        let took = begun.elapsed();
        if took > SLOW {
            tracing::warn!(sql, rows = rows.len(), took_ms = took.as_millis(), "a slow statement");
        }
        Ok(Outcome { rows: Arc::new(rows), rows_affected })
    }

    /// Begins a transaction, or one within it. A `statement` of its own is for one that writes: it waits for the lock.
    pub(super) async fn begin(&mut self, statement: Option<SqlStr>) -> Result<(), sqlx::Error> {
        let Some(statement) = statement else {
            let sql = begin_ansi_transaction_sql(self.depth);
            self.native.execute_batch(sql.as_str()).map_err(failed)?;
            self.depth += 1;
            return Ok(());
        };
        if self.depth > 0 {
            return Err(sqlx::Error::InvalidSavePointStatement);
        }
        let end = Instant::now() + self.lock_wait;
        loop {
            self.native.busy_timeout(Duration::ZERO).map_err(failed)?;
            let begun = self.native.execute_batch(statement.as_str());
            self.native.busy_timeout(self.lock_wait).map_err(failed)?;
            match begun {
                Ok(()) => break,
                Err(error) if is_busy(&error) && Instant::now() < end => tokio::time::sleep(TRY_AGAIN).await,
                Err(error) => return Err(failed(error)),
            }
        }
        self.depth = 1;
        Ok(())
    }

    /// Carries over what of the log no reader needs any more, without keeping anybody from writing.
    pub(crate) fn checkpoint(&self) -> Result<(), sqlx::Error> {
        self.native.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(())).map_err(failed)
    }

    /// Ends a transaction; the outermost is on the disk afterwards.
    pub(super) fn commit(&mut self) -> Result<(), sqlx::Error> {
        let sql = match self.depth {
            0 => return Ok(()),
            depth => commit_ansi_transaction_sql(depth),
        };
        let commit = || self.native.execute_batch(sql.as_str()).map_err(failed);
        match waits_for_the_disk(self.depth) {
            true => tokio::task::block_in_place(commit)?,
            false => commit()?,
        }
        self.depth -= 1;
        Ok(())
    }

    /// Takes a transaction back.
    pub(super) fn rollback(&mut self) -> Result<(), sqlx::Error> {
        let sql = match self.depth {
            0 => return Ok(()),
            depth => rollback_ansi_transaction_sql(depth),
        };
        self.depth -= 1;
        // After some errors (a full disk, say) SQLite has done it already.
        match self.native.is_autocommit() {
            true => Ok(()),
            false => self.native.execute_batch(sql.as_str()).map_err(failed),
        }
    }
}

/// Whether a runtime with other threads should be told that this one is occupied.
fn waits_for_the_disk(depth: usize) -> bool {
    let several = |runtime: Handle| runtime.runtime_flavor() == RuntimeFlavor::MultiThread;
    depth == 1 && Handle::try_current().is_ok_and(several)
}

/// Binds `$1` and so on: SQLite takes them for names, numbered as they occur.
fn bind(statement: &mut rusqlite::Statement<'_>, arguments: &Arguments) -> Result<(), sqlx::Error> {
    for place in 1..=statement.parameter_count() {
        let number = statement.parameter_name(place).and_then(|name| name.strip_prefix('$')?.parse().ok());
        let number: usize =
            number.ok_or_else(|| sqlx::Error::Protocol("a parameter is not $NUMBER".into()))?;
        let argument = number.checked_sub(1).and_then(|index| arguments.get(index));
        let bound = match argument {
            None => return Err(sqlx::Error::Protocol(format!("${number} has no argument"))),
            Some(Argument::Null(_)) => Ok(()),
            Some(Argument::Bool(value)) => statement.raw_bind_parameter(place, *value),
            Some(Argument::Int(value)) => statement.raw_bind_parameter(place, *value),
            Some(Argument::Text(value)) => statement.raw_bind_parameter(place, value.as_str()),
        };
        bound.map_err(failed)?;
    }
    Ok(())
}

fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

fn failed(error: rusqlite::Error) -> sqlx::Error {
    match error {
        rusqlite::Error::SqliteFailure(code, text) => {
            let message = text.unwrap_or_else(|| code.to_string());
            sqlx::Error::Database(Box::new(SqliteError { code: code.extended_code, message }))
        }
        other => sqlx::Error::Protocol(other.to_string()),
    }
}

/// An error of SQLite.
#[derive(Debug)]
struct SqliteError {
    /// Extended result code.
    code: i32,
    message: String,
}

impl fmt::Display for SqliteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "(code: {}) {}", self.code, self.message)
    }
}

impl std::error::Error for SqliteError {}

impl DatabaseError for SqliteError {
    fn message(&self) -> &str {
        &self.message
    }

    fn code(&self) -> Option<Cow<'_, str>> {
        Some(self.code.to_string().into())
    }

    fn as_error(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        self
    }

    fn as_error_mut(&mut self) -> &mut (dyn std::error::Error + Send + Sync + 'static) {
        self
    }

    fn into_error(self: Box<Self>) -> Box<dyn std::error::Error + Send + Sync + 'static> {
        self
    }

    fn kind(&self) -> ErrorKind {
        match self.code {
            ffi::SQLITE_CONSTRAINT_UNIQUE | ffi::SQLITE_CONSTRAINT_PRIMARYKEY => ErrorKind::UniqueViolation,
            ffi::SQLITE_CONSTRAINT_FOREIGNKEY => ErrorKind::ForeignKeyViolation,
            ffi::SQLITE_CONSTRAINT_NOTNULL => ErrorKind::NotNullViolation,
            ffi::SQLITE_CONSTRAINT_CHECK => ErrorKind::CheckViolation,
            _ => ErrorKind::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::StatementStatus;

    fn open(dir: &std::path::Path) -> SqliteConn {
        let path = dir.join("a.db");
        std::fs::OpenOptions::new().create(true).append(true).open(&path).unwrap();
        SqliteConn::open(&SqliteOptions { path, lock_wait: Duration::from_millis(50) }).unwrap()
    }

    fn run(conn: &mut SqliteConn, sql: &str) -> Result<Outcome, sqlx::Error> {
        conn.run(sql, Some(Arguments::default()), usize::MAX)
    }

    #[test]
    fn a_statement_is_prepared_once_by_connection() {
        let dir = tempfile::tempdir().unwrap();
        let mut conn = open(dir.path());
        for _ in 0..3 {
            assert_eq!(run(&mut conn, "SELECT 1").unwrap().rows.len(), 1);
        }
        let statement = conn.native.prepare_cached("SELECT 1").unwrap();
        assert_eq!(statement.get_status(StatementStatus::Run), 3);
    }

    #[test]
    fn arguments_are_bound_by_their_numbers_wherever_they_stand() {
        let dir = tempfile::tempdir().unwrap();
        let mut conn = open(dir.path());
        let mut arguments = Arguments::default();
        sqlx::Arguments::add(&mut arguments, "a").unwrap();
        sqlx::Arguments::add(&mut arguments, 7_i64).unwrap();
        let outcome = conn.run("SELECT $2, $1, $2, NULL", Some(arguments), 9).unwrap();
        let row: Vec<_> = (0..4).map(|column| outcome.rows.value(0, column).unwrap()).collect();
        use SqliteCell::{Int, Null, Text};
        assert!(matches!(row[..], [Int(7), Text("a"), Int(7), Null]), "{row:?}");
        assert!(outcome.rows.value(0, 4).is_err() && outcome.rows.value(1, 0).is_err());
        assert!(run(&mut conn, "SELECT $1").is_err(), "an argument that isn't there is no NULL");
    }

    #[tokio::test]
    async fn a_writer_waits_for_another_and_is_refused_when_its_time_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let (mut one, mut other) = (open(dir.path()), open(dir.path()));
        one.begin(Some(sqlx::SqlSafeStr::into_sql_str("BEGIN IMMEDIATE"))).await.unwrap();
        let begin = || sqlx::SqlSafeStr::into_sql_str("BEGIN IMMEDIATE");
        let refused = other.begin(Some(begin())).await.unwrap_err();
        assert_eq!(refused.as_database_error().unwrap().code().unwrap(), "5");
        assert_eq!(other.depth(), 0);
        one.commit().unwrap();
        other.begin(Some(begin())).await.unwrap();
        other.rollback().unwrap();
    }

    #[tokio::test]
    async fn a_transaction_that_sqlite_has_taken_back_takes_no_more_statements() {
        let dir = tempfile::tempdir().unwrap();
        let mut conn = open(dir.path());
        run(&mut conn, "CREATE TABLE a (b INTEGER PRIMARY KEY)").unwrap();
        conn.begin(None).await.unwrap();
        run(&mut conn, "INSERT INTO a VALUES (1)").unwrap();
        run(&mut conn, "INSERT OR ROLLBACK INTO a VALUES (1)").map(drop).unwrap_err();
        run(&mut conn, "INSERT INTO a VALUES (2)").map(drop).unwrap_err();
        conn.rollback().unwrap();
        assert_eq!(run(&mut conn, "SELECT b FROM a").unwrap().rows.len(), 0);
    }
}
