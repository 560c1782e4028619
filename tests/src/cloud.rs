//! A cloud of one's own: `mote up` on a free port in a temporary directory, removed with everything when dropped.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use mote::{client::Client, rc::Credentials};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{place::Place, programs::program};

/// How long `mote up` may take.
const UP_TIMEOUT: Duration = Duration::from_secs(90);

/// A running cloud.
pub struct Cloud {
    dir: tempfile::TempDir,
    /// `http://127.0.0.1:PORT`.
    pub url: String,
    up: Child,
}

impl Cloud {
    /// Starts one with this machine as its host.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_with("127.0.0.1", &[])
    }

    /// Starts one that listens on `address`, with further arguments of `mote up`.
    pub fn start_with(address: &str, more: &[&str]) -> anyhow::Result<Self> {
        Self::start_on(None, address, more)
    }

    /// As [`start_with`](Self::start_with), with its state in the PostgreSQL database at this URL.
    pub fn start_on(database: Option<&str>, address: &str, more: &[&str]) -> anyhow::Result<Self> {
        // Socket paths are short, so the directory is, too.
        let dir = tempfile::Builder::new().prefix("mt").tempdir_in("/tmp").context("making a directory")?;
        let port = free_port()?;
        let up = spawn_up(dir.path(), database, &format!("{address}:{port}"), more)?;
        let mut cloud = Self { dir, url: format!("http://{address}:{port}"), up };
        cloud.wait_ready()?;
        Ok(cloud)
    }

    fn wait_ready(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + UP_TIMEOUT;
        while !self.log().contains("the cloud is up at") {
            if let Some(status) = self.up.try_wait().context("waiting for mote up")? {
                bail!("mote up ended ({status}):\n{}", self.log());
            }
            if Instant::now() > deadline {
                bail!("mote up is not ready after {UP_TIMEOUT:?}:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// What the daemons printed.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("up.log")).unwrap_or_default()
    }

    /// The state directory.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The directory of sockets.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// Directories in which a server may leave files.
    pub fn server_dirs(&self) -> Vec<String> {
        vec![self.state_dir().join("host").display().to_string(), self.run_dir().display().to_string()]
    }

    /// The administrator's credentials.
    pub fn credentials(&self) -> anyhow::Result<Credentials> {
        Credentials::read(&self.state_dir().join(mote::rc::OPENRC))
    }

    /// A client that has taken a token.
    pub async fn client(&self) -> anyhow::Result<Client> {
        Client::login(&self.credentials()?).await
    }

    /// Runs the `mote` command against this cloud and gives its output.
    pub fn mote(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(program("mote"))
            .args(arguments)
            .env("MOTE_STATE_DIR", self.state_dir())
            .env_remove("OS_AUTH_URL")
            .stdin(Stdio::null())
            .output()
            .context("running mote")?;
        if !output.status.success() {
            bail!("mote {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The pid of a daemon that `mote up` runs.
    pub fn daemon(&self, name: &str) -> anyhow::Result<i32> {
        let id = self.up.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))
            .context("looking at mote up's children")?;
        for pid in children.split_whitespace() {
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            // The kernel keeps 15 characters.
            if comm.trim() == &name[..name.len().min(15)] {
                return pid.parse().context("a pid is a number");
            }
        }
        bail!("{name} doesn't run");
    }

    /// `kill -9` of a daemon; waits until `mote up` has started it again under another pid.
    pub fn kill9_daemon(&self, name: &str) -> anyhow::Result<()> {
        let before = self.daemon(name)?;
        kill(Pid::from_raw(before), Signal::SIGKILL).context("killing")?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.daemon(name).is_ok_and(|now| now != before) {
            if Instant::now() > deadline {
                bail!("{name} was not started again:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The pid of a server's VMM on this machine.
    pub fn vmm(server_id: &str) -> Option<i32> {
        fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let mut words = line.split(|b| *b == 0);
            let program = Path::new(std::str::from_utf8(words.next()?).ok()?).file_name()?.to_owned();
            (program == "mote-vmm" && words.any(|w| w == server_id.as_bytes())).then_some(pid)
        })
    }

    /// Everything that this cloud left on this machine once its servers are deleted.
    pub fn leftovers(&self, server_id: &str, network_id: Option<&str>) -> anyhow::Result<String> {
        Place::Here.leftovers(&self.server_dirs(), server_id, network_id)
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of mote up ---\n{}", self.log());
        }
        if let Ok(id) = i32::try_from(self.up.id()) {
            // It may have ended already: then there is nothing to stop.
            let _ = kill(Pid::from_raw(id), Signal::SIGTERM);
        }
        let _ = self.up.wait();
        // A test that failed may have left servers and networks: they name this directory, or are inside it.
        let dir = self.dir.path().display();
        let script = format!(
            r#"for p in /proc/[0-9]*; do if tr '\0' ' ' <$p/cmdline 2>/dev/null | grep -q -e '^[^ ]*mote-vm[m] .*{dir}/'; then kill -9 ${{p#/proc/}}; fi; done
[ -e {dir}/state/host/netns-prefix ] && for n in $(ip netns list | cut -d' ' -f1 | grep "^$(cat {dir}/state/host/netns-prefix)"); do ip netns delete $n; done; true"#
        );
        if let Err(e) = Place::Here.sh(&script) {
            eprintln!("cleaning up after {dir}: {e:#}");
        }
    }
}

/// Starts `mote up` in `dir`; its output goes to `up.log` there.
fn spawn_up(dir: &Path, database: Option<&str>, listen: &str, more: &[&str]) -> anyhow::Result<Child> {
    let log = fs::File::create(dir.join("up.log")).context("making the log")?;
    let mut up = Command::new(program("mote"));
    match database {
        Some(url) => up.env("MOTE_DATABASE", url),
        None => up.env_remove("MOTE_DATABASE"),
    };
    up.args(["up", "--listen", listen, "--run-dir"])
        .arg(dir.join("run"))
        .args(more)
        .env("MOTE_STATE_DIR", dir.join("state"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("sharing the log")?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {}", program("mote").display()))
}

/// A port that is free now.
pub fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("looking for a free port")?;
    Ok(listener.local_addr().context("reading the port")?.port())
}
