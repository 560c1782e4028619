//! One driver over two databases: [`Either`](Mote) SQLite or PostgreSQL, chosen when a connection is made.
//!
//! `sqlx::Any` would be the ready-made thing, but it reads neither SQLite's `BOOLEAN` nor PostgreSQL's sums, and copies
//! each row. Here a connection, a row, a value is an enum of the two native ones and everything is handed through;
//! the few differences between the databases that a query's author can't see are levelled in [`value`].

mod row;
mod sqlite;
mod value;

use std::{
    fmt::{self, Debug},
    str::FromStr,
    time::Duration,
};

use futures_util::{
    FutureExt, StreamExt, TryFutureExt, TryStreamExt,
    future::{self, BoxFuture},
    stream::{self, BoxStream},
};
use log::LevelFilter;
use sqlx::{
    ConnectOptions, Connection, Database, Describe, Either, Executor, PgConnection, Postgres, SqlSafeStr,
    SqlStr, Transaction,
    error::BoxDynError,
    postgres::{PgArguments, PgConnectOptions, PgStatement},
};
use sqlx_core::{database::HasStatementCache, executor::Execute, transaction::TransactionManager};

pub use row::{Column, Row, Statement};
use sqlite::Outcome;
pub use sqlite::{SqliteConn, SqliteOptions};
pub use value::{Arguments, TypeInfo, Value, ValueRef};

/// The driver.
#[derive(Debug)]
pub struct Mote;

impl Database for Mote {
    type Connection = Conn;
    type TransactionManager = Transactions;
    type Row = Row;
    type QueryResult = QueryResult;
    type Column = Column;
    type TypeInfo = TypeInfo;
    type Value = Value;
    type ValueRef<'r> = ValueRef<'r>;
    type Arguments = Arguments;
    type ArgumentBuffer = Vec<value::Argument>;
    type Statement = Statement;

    const NAME: &'static str = "SQLite or PostgreSQL";
    const URL_SCHEMES: &'static [&'static str] = &["sqlite", "postgres", "postgresql"];
}

impl HasStatementCache for Mote {}

/// What a statement did.
#[derive(Debug, Default, Clone, Copy)]
pub struct QueryResult {
    rows_affected: u64,
}

impl QueryResult {
    /// Rows inserted, changed or deleted.
    pub fn rows_affected(&self) -> u64 {
        self.rows_affected
    }
}

impl Extend<QueryResult> for QueryResult {
    fn extend<T: IntoIterator<Item = Self>>(&mut self, iter: T) {
        for one in iter {
            self.rows_affected += one.rows_affected;
        }
    }
}

/// How long another process's lock on SQLite's file is waited for, if nothing else is said.
const DEFAULT_LOCK_WAIT: Duration = Duration::from_secs(15);

/// A connection to one of the two.
#[derive(Debug)]
pub enum Conn {
    /// SQLite.
    Sqlite(Box<SqliteConn>),
    /// PostgreSQL.
    Postgres(Box<PgConnection>),
}

/// How to connect to one of the two.
#[derive(Debug, Clone)]
pub enum Options {
    /// SQLite.
    Sqlite(SqliteOptions),
    /// PostgreSQL.
    Postgres(Box<PgConnectOptions>),
}

impl FromStr for Options {
    type Err = sqlx::Error;

    fn from_str(url: &str) -> Result<Self, sqlx::Error> {
        let url = url.parse().map_err(|error| sqlx::Error::Configuration(Box::new(error)))?;
        Self::from_url(&url)
    }
}

impl ConnectOptions for Options {
    type Connection = Conn;

    fn from_url(url: &url::Url) -> Result<Self, sqlx::Error> {
        Ok(match url.scheme() {
            "postgres" | "postgresql" => Self::Postgres(Box::new(PgConnectOptions::from_url(url)?)),
            _ => Self::Sqlite(SqliteOptions { path: url.path().into(), lock_wait: DEFAULT_LOCK_WAIT }),
        })
    }

    async fn connect(&self) -> Result<Conn, sqlx::Error> {
        Ok(match self {
            Self::Sqlite(options) => Conn::Sqlite(Box::new(SqliteConn::open(options)?)),
            Self::Postgres(options) => Conn::Postgres(Box::new(options.connect().await?)),
        })
    }

    fn log_statements(self, level: LevelFilter) -> Self {
        match self {
            Self::Sqlite(options) => Self::Sqlite(options),
            Self::Postgres(options) => Self::Postgres(Box::new(options.log_statements(level))),
        }
    }

    fn log_slow_statements(self, level: LevelFilter, duration: Duration) -> Self {
        match self {
            Self::Sqlite(options) => Self::Sqlite(options),
            Self::Postgres(options) => Self::Postgres(Box::new(options.log_slow_statements(level, duration))),
        }
    }
}

impl Connection for Conn {
    type Database = Mote;
    type Options = Options;

    fn close(self) -> impl Future<Output = Result<(), sqlx::Error>> + Send + 'static {
        match self {
            Self::Sqlite(conn) => async move { conn.close() }.boxed(),
            Self::Postgres(conn) => conn.close().boxed(),
        }
    }

    fn close_hard(self) -> impl Future<Output = Result<(), sqlx::Error>> + Send + 'static {
        match self {
            Self::Sqlite(conn) => async move { conn.close() }.boxed(),
            Self::Postgres(conn) => conn.close_hard().boxed(),
        }
    }

    fn ping(&mut self) -> impl Future<Output = Result<(), sqlx::Error>> + Send + '_ {
        match self {
            // SQLite's file doesn't go away.
            Self::Sqlite(_) => future::ready(Ok(())).boxed(),
            Self::Postgres(conn) => conn.ping().boxed(),
        }
    }

    fn begin(&mut self) -> impl Future<Output = Result<Transaction<'_, Mote>, sqlx::Error>> + Send + '_ {
        Transaction::begin(self, None)
    }

    fn begin_with(
        &mut self,
        statement: impl SqlSafeStr,
    ) -> impl Future<Output = Result<Transaction<'_, Mote>, sqlx::Error>> + Send + '_ {
        Transaction::begin(self, Some(statement.into_sql_str()))
    }

    fn cached_statements_size(&self) -> usize {
        match self {
            // It keeps no count.
            Self::Sqlite(_) => 0,
            Self::Postgres(conn) => conn.cached_statements_size(),
        }
    }

    fn clear_cached_statements(&mut self) -> impl Future<Output = Result<(), sqlx::Error>> + Send + '_ {
        match self {
            Self::Sqlite(conn) => async move {
                conn.forget_statements();
                Ok(())
            }
            .boxed(),
            Self::Postgres(conn) => conn.clear_cached_statements().boxed(),
        }
    }

    fn shrink_buffers(&mut self) {
        match self {
            Self::Sqlite(_) => {}
            Self::Postgres(conn) => conn.shrink_buffers(),
        }
    }

    fn flush(&mut self) -> impl Future<Output = Result<(), sqlx::Error>> + Send + '_ {
        match self {
            Self::Sqlite(_) => future::ready(Ok(())).boxed(),
            Self::Postgres(conn) => conn.flush().boxed(),
        }
    }

    fn should_flush(&self) -> bool {
        match self {
            Self::Sqlite(_) => false,
            Self::Postgres(conn) => conn.should_flush(),
        }
    }
}

/// Begins and ends transactions.
#[derive(Debug)]
pub struct Transactions;

type PgTransactions = <Postgres as Database>::TransactionManager;

impl TransactionManager for Transactions {
    type Database = Mote;

    fn begin(
        conn: &mut Conn,
        statement: Option<SqlStr>,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send + '_ {
        match conn {
            Conn::Sqlite(conn) => conn.begin(statement).boxed(),
            Conn::Postgres(conn) => PgTransactions::begin(conn, statement).boxed(),
        }
    }

    fn commit(conn: &mut Conn) -> impl Future<Output = Result<(), sqlx::Error>> + Send + '_ {
        match conn {
            Conn::Sqlite(conn) => async move { conn.commit() }.boxed(),
            Conn::Postgres(conn) => PgTransactions::commit(conn).boxed(),
        }
    }

    fn rollback(conn: &mut Conn) -> impl Future<Output = Result<(), sqlx::Error>> + Send + '_ {
        match conn {
            Conn::Sqlite(conn) => async move { conn.rollback() }.boxed(),
            Conn::Postgres(conn) => PgTransactions::rollback(conn).boxed(),
        }
    }

    fn start_rollback(conn: &mut Conn) {
        match conn {
            Conn::Sqlite(conn) => {
                if let Err(error) = conn.rollback() {
                    tracing::error!(%error, "a transaction can't be taken back");
                }
            }
            Conn::Postgres(conn) => PgTransactions::start_rollback(conn),
        }
    }

    fn get_transaction_depth(conn: &Conn) -> usize {
        match conn {
            Conn::Sqlite(conn) => conn.depth(),
            Conn::Postgres(conn) => PgTransactions::get_transaction_depth(conn),
        }
    }
}

/// A query for PostgreSQL's driver.
struct Native {
    sql: SqlStr,
    arguments: Option<PgArguments>,
    persistent: bool,
}

impl Execute<'_, Postgres> for Native {
    fn sql(self) -> SqlStr {
        self.sql
    }

    fn statement(&self) -> Option<&PgStatement> {
        None
    }

    fn take_arguments(&mut self) -> Result<Option<PgArguments>, BoxDynError> {
        Ok(self.arguments.take())
    }

    fn persistent(&self) -> bool {
        self.persistent
    }
}

/// The form of a query for PostgreSQL's driver.
fn native<'q>(mut query: impl Execute<'q, Mote>) -> Result<Native, sqlx::Error> {
    let persistent = query.persistent();
    let arguments = query.take_arguments().map_err(sqlx::Error::Encode)?;
    let arguments = arguments.map(Arguments::into_postgres).transpose().map_err(sqlx::Error::Encode)?;
    // A statement without arguments may be several: not to be prepared. The native driver asks for this when it has
    // taken the arguments already.
    let persistent = persistent && arguments.is_some();
    Ok(Native { sql: query.sql(), arguments, persistent })
}

/// Runs a query on SQLite, and reads up to `limit` rows.
fn run<'q>(
    conn: &mut SqliteConn,
    mut query: impl Execute<'q, Mote>,
    limit: usize,
) -> Result<Outcome, sqlx::Error> {
    let arguments = query.take_arguments().map_err(sqlx::Error::Encode)?;
    conn.run(query.sql().as_str(), arguments, limit)
}

type Step = Either<QueryResult, Row>;

impl<'c> Executor<'c> for &'c mut Conn {
    type Database = Mote;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Step, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Mote>,
    {
        match self {
            Conn::Sqlite(conn) => stream::once(async move { run(conn, query, usize::MAX) })
                .map_ok(|Outcome { rows, rows_affected }| {
                    let count = rows.len();
                    let rows =
                        (0..count).map(move |place| Either::Right(Row::of_sqlite(rows.clone(), place)));
                    let done = Either::Left(QueryResult { rows_affected });
                    stream::iter(rows.chain([done]).map(Ok))
                })
                .try_flatten()
                .boxed(),
            Conn::Postgres(conn) => match native(query) {
                Ok(query) => conn
                    .fetch_many(query)
                    .map_ok(|step| match step {
                        Either::Left(done) => {
                            Either::Left(QueryResult { rows_affected: done.rows_affected() })
                        }
                        Either::Right(row) => Either::Right(Row::from(row)),
                    })
                    .boxed(),
                Err(error) => stream::once(future::ready(Err(error))).boxed(),
            },
        }
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<Row>, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Mote>,
    {
        match self {
            Conn::Sqlite(conn) => async move {
                let rows = run(conn, query, 1)?.rows;
                Ok((rows.len() > 0).then(|| Row::of_sqlite(rows, 0)))
            }
            .boxed(),
            Conn::Postgres(conn) => match native(query) {
                Ok(query) => conn.fetch_optional(query).map_ok(|row| row.map(Row::from)).boxed(),
                Err(error) => future::ready(Err(error)).boxed(),
            },
        }
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        _parameters: &'e [TypeInfo],
    ) -> BoxFuture<'e, Result<Statement, sqlx::Error>>
    where
        'c: 'e,
    {
        match self {
            Conn::Sqlite(conn) => async move {
                let names = conn.columns(sql.as_str())?;
                Ok(Statement::of_sqlite(sql, &names))
            }
            .boxed(),
            Conn::Postgres(conn) => conn.prepare_with(sql, &[]).map_ok(Statement::from_postgres).boxed(),
        }
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, Result<Describe<Mote>, sqlx::Error>>
    where
        'c: 'e,
    {
        async move {
            let columns = sqlx::Statement::columns(&self.prepare_with(sql, &[]).await?).to_vec();
            Ok(Describe { nullable: vec![None; columns.len()], columns, parameters: None })
        }
        .boxed()
    }
}

impl fmt::Display for Mote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::NAME)
    }
}
