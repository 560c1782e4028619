//! A PostgreSQL server of one's own (Debian's package `postgresql`): its own directory, a Unix socket in it, no network.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

/// How long a new server may take until it accepts connections.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A server that ends with this value, and with this process.
pub struct Server {
    dir: tempfile::TempDir,
    process: Child,
}

/// Why no server can be had on this machine.
pub fn why_none() -> Option<String> {
    if programs().is_none() {
        return Some("PostgreSQL (Debian's package postgresql) is not installed".into());
    }
    (nix::unistd::geteuid().is_root() && !succeeds(Command::new("id").args(["-u", "postgres"])))
        .then(|| "root can't run PostgreSQL, and there is no user postgres".into())
}

impl Server {
    /// Starts one and waits until it accepts connections.
    pub fn start() -> anyhow::Result<Self> {
        let programs = programs().context("PostgreSQL is not installed")?;
        let root = nix::unistd::geteuid().is_root();
        let dir = tempfile::Builder::new().prefix("pg").tempdir_in("/tmp").context("making a directory")?;
        if root && !succeeds(Command::new("chown").arg("postgres").arg(dir.path())) {
            bail!("can't give {} to the user postgres", dir.path().display());
        }
        let as_postgres = |program: &str| {
            // The server ends when this process does, however it does.
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "SIGQUIT"]);
            if root {
                command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
            }
            command.arg(programs.join(program)).current_dir(dir.path()).stdin(Stdio::null());
            command
        };
        let data = dir.path().join("data");
        let made = as_postgres("initdb")
            .args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync", "-D"])
            .arg(&data)
            .output()
            .context("running initdb")?;
        if !made.status.success() {
            bail!("initdb: {}", String::from_utf8_lossy(&made.stderr));
        }
        let mut server = as_postgres("postgres");
        server.arg("-D").arg(&data).args(["-c", "listen_addresses=", "-c", "max_connections=400"]);
        // These databases need not survive anything.
        server.args(["-c", "fsync=off", "-c", "shared_buffers=32MB", "-c"]);
        server.arg(format!("unix_socket_directories={}", dir.path().display()));
        let log = fs::File::create(dir.path().join("log")).context("making the log")?;
        server.stdout(Stdio::null()).stderr(log).process_group(0);
        let process = server.spawn().context("starting postgres")?;
        let mut server = Self { dir, process };
        server.wait_ready(&programs.join("pg_isready"))?;
        Ok(server)
    }

    /// The socket is there before connections are accepted: until then they are refused with "is starting up".
    fn wait_ready(&mut self, pg_isready: &Path) -> anyhow::Result<()> {
        let end = Instant::now() + START_TIMEOUT;
        while !succeeds(Command::new(pg_isready).args(["-q", "-h", self.socket()])) {
            let ended = self.process.try_wait().context("waiting for postgres")?;
            if ended.is_some() || Instant::now() > end {
                let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
                bail!("PostgreSQL accepts no connections ({ended:?}):\n{log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The directory of its socket.
    pub fn socket(&self) -> &str {
        self.dir.path().to_str().expect("the name of a temporary directory is text")
    }

    /// The URL of one of its databases; `postgres` is there from the start.
    pub fn url(&self, database: &str) -> String {
        url(self.socket(), database)
    }
}

/// The URL of a database on the server whose socket is in the directory `socket`.
pub fn url(socket: &str, database: &str) -> String {
    format!("postgres://postgres@localhost/{database}?host={socket}")
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGQUIT is PostgreSQL's immediate end, which takes its other processes along.
        let _ = Command::new("kill").args(["-QUIT", &self.process.id().to_string()]).status();
        let _ = self.process.wait();
    }
}

fn succeeds(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// The directory of the newest PostgreSQL's programs.
fn programs() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?;
    let newest = versions.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok()).max()?;
    let bin = Path::new("/usr/lib/postgresql").join(newest.to_string()).join("bin");
    bin.join("postgres").metadata().is_ok_and(|m| m.permissions().mode() & 0o111 != 0).then_some(bin)
}
