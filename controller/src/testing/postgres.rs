//! All of this crate's tests once more, on PostgreSQL.
//!
//! The one test here starts a private server (Debian's package `postgresql`: its own directory, a Unix socket in it, no
//! network) and runs this test program again with [`POSTGRES_VARIABLE`] set; every
//! [`TestApp`](super::TestApp) then has a database of its own on it.

use std::{
    io::Read,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use sqlx::{Connection, PgConnection};

use super::POSTGRES_VARIABLE;
use crate::db;

/// The database that each test's is a copy of, with the schema.
const TEMPLATE: &str = "mote_template";

/// A new, migrated database for one test; `None` where tests run on SQLite.
pub(super) async fn database() -> Option<String> {
    let server = std::env::var(POSTGRES_VARIABLE).ok()?;
    let name = format!("t{}", uuid::Uuid::new_v4().simple());
    let mut conn = PgConnection::connect(&url(&server, "postgres")).await.unwrap();
    let sql = format!("CREATE DATABASE {name} TEMPLATE {TEMPLATE}");
    sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut conn).await.unwrap();
    conn.close().await.unwrap();
    Some(url(&server, &name))
}

/// `server` is the directory of its socket.
fn url(server: &str, database: &str) -> String {
    format!("postgres://postgres@localhost/{database}?host={server}")
}

/// A server that ends with this value, and with this process.
struct Server {
    dir: tempfile::TempDir,
    process: Child,
}

impl Server {
    /// Starts one, or says why none can be had here.
    fn start() -> Result<Self, String> {
        let programs = programs().ok_or("PostgreSQL (Debian's package postgresql) is not installed")?;
        let root = is_root();
        if root && !command_succeeds(Command::new("id").args(["-u", "postgres"])) {
            return Err("root can't run PostgreSQL, and there is no user postgres".into());
        }
        let dir = tempfile::Builder::new().prefix("pg").tempdir_in("/tmp").unwrap();
        if root {
            assert!(command_succeeds(Command::new("chown").arg("postgres").arg(dir.path())));
        }
        let as_postgres = |program: &str| {
            // The server ends when this process does, however it does.
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "SIGQUIT"]);
            if root {
                command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
            }
            command.arg(programs.join(program)).current_dir(dir.path());
            command
        };
        let data = dir.path().join("data");
        let made = as_postgres("initdb")
            .args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync", "-D"])
            .arg(&data)
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let mut server = as_postgres("postgres");
        server.arg("-D").arg(&data).args(["-c", "listen_addresses=", "-c", "max_connections=400"]);
        // These databases need not survive anything.
        server.args(["-c", "fsync=off", "-c", "shared_buffers=32MB", "-c"]);
        server.arg(format!("unix_socket_directories={}", dir.path().display()));
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let process = server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0).spawn();
        Ok(Self { process: process.unwrap(), dir })
    }

    fn socket(&self) -> &str {
        self.dir.path().to_str().unwrap()
    }

    /// A connection as soon as it serves: the socket is there a little before that.
    async fn connect(&self) -> PgConnection {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            match PgConnection::connect(&url(self.socket(), "postgres")).await {
                Ok(connection) => return connection,
                Err(error) if Instant::now() > end => {
                    let log = std::fs::read_to_string(self.dir.path().join("log")).unwrap();
                    panic!("{error}\n{log}");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGQUIT is PostgreSQL's immediate end, which takes its other processes along.
        let _ = Command::new("kill").args(["-QUIT", &self.process.id().to_string()]).status();
        let _ = self.process.wait();
    }
}

fn is_root() -> bool {
    let uid = Command::new("id").arg("-u").output().unwrap().stdout;
    uid.trim_ascii() == b"0"
}

fn command_succeeds(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// The directory of the newest PostgreSQL's programs.
fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    let newest = versions.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok()).max()?;
    let bin = Path::new("/usr/lib/postgresql").join(newest.to_string()).join("bin");
    bin.join("postgres").metadata().is_ok_and(|m| m.permissions().mode() & 0o111 != 0).then_some(bin)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn everything_holds_on_postgresql_as_well() {
    if std::env::var_os(POSTGRES_VARIABLE).is_some() {
        return;
    }
    let server = match tokio::task::block_in_place(Server::start) {
        Ok(server) => server,
        Err(reason) => {
            println!("SKIPPED: {reason}");
            return;
        }
    };
    let mut conn = server.connect().await;
    let sql = format!("CREATE DATABASE {TEMPLATE}");
    sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut conn).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let pools = db::open(dir.path(), Some(&url(server.socket(), TEMPLATE))).await.unwrap();
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
