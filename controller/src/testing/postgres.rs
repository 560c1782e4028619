//! All of this crate's tests once more, on PostgreSQL.
//!
//! The one test here starts a private server and runs this test program again with [`POSTGRES_VARIABLE`] set; every
//! [`TestApp`](super::TestApp) then has a database of its own on it.

use std::{
    io::Read,
    process::{Command, Stdio},
};

use mote_tests::postgres::{self, Server, url};
use sqlx::{Connection, PgConnection};

use super::POSTGRES_VARIABLE;
use crate::db;

/// The database that each test's is a copy of, with the schema.
const TEMPLATE: &str = "mote_template";

/// A new, migrated database for one test; `None` where tests run on SQLite.
pub(super) async fn database() -> Option<String> {
    copy_of(TEMPLATE).await
}

/// One without anything in it.
pub(super) async fn empty() -> Option<String> {
    copy_of("template0").await
}

async fn copy_of(template: &str) -> Option<String> {
    let server = std::env::var(POSTGRES_VARIABLE).ok()?;
    let name = format!("t{}", uuid::Uuid::new_v4().simple());
    let mut conn = PgConnection::connect(&url(&server, "postgres")).await.unwrap();
    let sql = format!("CREATE DATABASE {name} TEMPLATE {template}");
    sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut conn).await.unwrap();
    conn.close().await.unwrap();
    Some(url(&server, &name))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn everything_holds_on_postgresql_as_well() {
    if std::env::var_os(POSTGRES_VARIABLE).is_some() {
        return;
    }
    if let Some(reason) = postgres::why_none() {
        println!("SKIPPED: {reason}");
        return;
    }
    let server = tokio::task::block_in_place(Server::start).unwrap();
    let mut conn = PgConnection::connect(&server.url("postgres")).await.unwrap();
    let sql = format!("CREATE DATABASE {TEMPLATE}");
    sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut conn).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let pools = db::open(dir.path(), Some(&server.url(TEMPLATE))).await.unwrap();
    pools.read.close().await;
    pools.write.close().await;
    let tests = tokio::task::block_in_place(|| {
        let mut tests = Command::new(std::env::current_exe().unwrap());
        tests.env(POSTGRES_VARIABLE, server.socket());
        // Those that ask the database's module for SQLite are skipped by the name of their module.
        tests.args(["--skip", "db::tests::sqlite", "--test-threads", "4"]);
        if let Ok(filter) = std::env::var("MOTE_TEST_POSTGRES_FILTER") {
            tests.arg(filter);
        }
        tests.stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = tests.spawn().unwrap();
        let mut output = String::new();
        child.stdout.take().unwrap().read_to_string(&mut output).unwrap();
        (child.wait().unwrap(), output)
    });
    println!("{}", tests.1);
    assert!(tests.0.success(), "tests failed on PostgreSQL; their output is above");
}
