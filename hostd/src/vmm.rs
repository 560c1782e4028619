//! Real VMM processes: `mote-vmm`, each in its own session and [jail](crate::jail), found again in /proc.
//!
//! Between fork and exec a child has this program's command line, so a scan would miss it. That is harmless: until exec
//! the child also holds this process's lock on the state directory (flock goes with the open file, which is
//! close-on-exec), so that no second mote-hostd can scan before.

use std::{
    fs::{self, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use crate::{
    errors::{bounded, one_line},
    jail,
    parts::{Launch, MEMORY_FILE, STATE_FILE, VmmError, Vmms},
    paths::{ServerDir, StateDir},
    process::{self, ProcessIdentity},
};
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use mote_host_api::ServerId;
use mote_vmm_api::{InstanceInfo, InstanceState, NetworkInterface, SnapshotCreate, SnapshotType, VmConfig};
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;

mod passing;

/// Largest `vmm.log`, in bytes; see [`trim_log`].
pub const VMM_LOG_MAX: u64 = 256 << 10;
/// Longest answer of a VMM's API that is read, in bytes.
const ANSWER_MAX: usize = 64 << 10;
/// Longest time that one question to a VMM may take.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time that writing a guest's memory to the disk may take.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// First and longest pause between two questions whether the guest runs.
const ASK_PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// `mote-vmm` processes, each in its jail.
#[derive(Debug, Clone)]
pub struct VmmProcesses {
    program: PathBuf,
    state: StateDir,
    /// The network namespace that all of them are in.
    network: Arc<OwnedFd>,
}

impl VmmProcesses {
    /// Starts `program` for the servers of this directory.
    ///
    /// # Errors
    /// The network namespace of VMMs cannot be made.
    pub fn new(program: PathBuf, state: StateDir) -> io::Result<Self> {
        Ok(Self { program, state, network: Arc::new(jail::empty_network()?) })
    }

    fn spawn(&self, launch: &Launch) -> Result<ProcessIdentity, VmmError> {
        let dir = self.state.server(launch.id);
        let user = jail::user_of(launch.id).to_string();
        let mut command = Command::new(&self.program);
        command
            .args(["jail", "--id", &launch.id.to_string(), "--uid", &user, "--gid", &user, "--root"])
            .arg(dir.vm())
            // By an inherited descriptor, so that it is there even if this process has gone meanwhile.
            .args(["--netns", &format!("/proc/self/fd/{}", self.network.as_raw_fd())])
            .args(launch.taps.iter().flat_map(|tap| ["--keep-fd".to_owned(), tap.as_raw_fd().to_string()]))
            .arg("--")
            .arg("--api-sock")
            .arg(dir.inside(&dir.api_socket()))
            .arg("--config-file")
            .arg(dir.inside(&dir.vmm_config()))
            .arg("--exit-report")
            .arg(dir.inside(&dir.exit_report()))
            // A VMM that goes on from files has the devices where they were.
            .args(launch.config.snapshot_load.is_none().then_some("--enable-pci"))
            .stdin(Stdio::null());
        let log = open_log(&dir)?;
        let spawn = |source| VmmError::Spawn { program: self.program.clone(), source };
        command.stdout(log.try_clone().map_err(spawn)?).stderr(log);
        let network = self.network.as_raw_fd();
        let inherited: Vec<RawFd> = launch.taps.iter().map(AsRawFd::as_raw_fd).chain([network]).collect();
        // SAFETY: `detach` only makes system calls and reads memory that was allocated before the fork, so it is
        // async-signal-safe as pre_exec demands.
        unsafe { command.pre_exec(move || detach(&inherited)) };
        let child = command.spawn().map_err(spawn)?;
        let pid = child.id();
        // The child is waited for by pidfd (`Vmms::ended`), or by init when this process has gone.
        drop(child);
        ProcessIdentity::of(pid.cast_signed()).ok_or(VmmError::EndedAtOnce(pid))
    }
}

impl Vmms for VmmProcesses {
    fn scan(&self) -> BoxFuture<'_, Result<Vec<(ServerId, ProcessIdentity)>, VmmError>> {
        Box::pin(async {
            let state = self.state.clone();
            tokio::task::spawn_blocking(move || process::scan(&state))
                .await
                .map_err(io::Error::other)
                .flatten()
                .map_err(VmmError::Scan)
        })
    }

    fn launch(&self, launch: Launch) -> BoxFuture<'_, Result<ProcessIdentity, VmmError>> {
        let this = self.clone();
        Box::pin(async move {
            let program = this.program.clone();
            tokio::task::spawn_blocking(move || this.spawn(&launch))
                .await
                .map_err(|e| VmmError::Spawn { program, source: io::Error::other(e) })?
        })
    }

    fn running(&self, id: ServerId) -> BoxFuture<'_, ()> {
        let socket = self.state.server(id).api_socket();
        Box::pin(async move {
            let mut pause = ASK_PAUSES.0;
            loop {
                let asked = ask::<InstanceInfo>(&socket, "GET", "/", String::new());
                let asked = tokio::time::timeout(ASK_TIMEOUT, asked).await;
                match asked {
                    // A paused guest has run.
                    Ok(Ok(info)) if info.id == id.to_string() && info.state != InstanceState::NotStarted => {
                        return;
                    }
                    other => tracing::trace!(server = %id, ?other, "not yet running"),
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(ASK_PAUSES.1);
            }
        })
    }

    fn ended(&self, process: &ProcessIdentity) -> BoxFuture<'static, ()> {
        let process = process.clone();
        Box::pin(async move {
            loop {
                let waited = match process.open() {
                    Ok(None) => return,
                    Ok(Some(fd)) => fd.ended().await,
                    Err(e) => Err(e),
                };
                match waited {
                    Ok(()) => return,
                    // Out of descriptors, say: look again rather than believe that it has ended.
                    Err(e) => tracing::warn!(pid = process.pid, error = one_line(&e), "cannot watch a VMM"),
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        })
    }

    fn set_paused(&self, id: ServerId, paused: bool) -> BoxFuture<'_, Result<(), VmmError>> {
        let socket = self.state.server(id).api_socket();
        Box::pin(async move {
            let what = if paused { "pause" } else { "resume" };
            let failed = |source: Box<dyn std::error::Error + Send + Sync>| VmmError::Ask { what, source };
            let (state, word) = match paused {
                true => (InstanceState::Paused, "Paused"),
                false => (InstanceState::Running, "Resumed"),
            };
            let change = async {
                // Being told twice is an error for a VMM.
                let info: InstanceInfo = ask(&socket, "GET", "/", String::new()).await?;
                if info.state == state {
                    return Ok(());
                }
                let body = serde_json::json!({ "state": word }).to_string();
                ask::<serde_json::Value>(&socket, "PATCH", "/vm", body).await.map(drop)
            };
            match tokio::time::timeout(ASK_TIMEOUT, change).await {
                Ok(result) => result.map_err(|e| failed(Box::new(e))),
                Err(e) => Err(failed(Box::new(e))),
            }
        })
    }

    fn snapshot(&self, id: ServerId, dir: PathBuf) -> BoxFuture<'_, Result<(), VmmError>> {
        let inside = self.state.server(id).inside(&dir);
        let socket = self.state.server(id).api_socket();
        Box::pin(async move {
            let what = "write its snapshot";
            let body = SnapshotCreate {
                snapshot_type: SnapshotType::Full,
                snapshot_path: inside.join(STATE_FILE),
                mem_file_path: inside.join(MEMORY_FILE),
            };
            let failed = |source: Box<dyn std::error::Error + Send + Sync>| VmmError::Ask { what, source };
            let body = serde_json::to_string(&body).map_err(|e| failed(Box::new(e)))?;
            let asked = ask::<serde_json::Value>(&socket, "PUT", "/snapshot/create", body);
            match tokio::time::timeout(SNAPSHOT_TIMEOUT, asked).await {
                Ok(result) => result.map(drop).map_err(|e| failed(Box::new(e))),
                Err(e) => Err(failed(Box::new(e))),
            }
        })
    }

    fn interfaces(&self, id: ServerId) -> BoxFuture<'_, Result<Vec<String>, VmmError>> {
        let socket = self.state.server(id).api_socket();
        Box::pin(async move {
            let what = "tell its configuration";
            let config = ask::<VmConfig>(&socket, "GET", "/vm/config", String::new());
            match tokio::time::timeout(ASK_TIMEOUT, config).await {
                Ok(Ok(config)) => Ok(config.network_interfaces.into_iter().map(|nic| nic.iface_id).collect()),
                Ok(Err(e)) => Err(VmmError::Ask { what, source: Box::new(e) }),
                Err(e) => Err(VmmError::Ask { what, source: Box::new(e) }),
            }
        })
    }

    fn plug(
        &self,
        id: ServerId,
        interface: NetworkInterface,
        tap: OwnedFd,
    ) -> BoxFuture<'_, Result<(), VmmError>> {
        let socket = self.state.server(id).api_socket();
        Box::pin(async move {
            let failed = |source| VmmError::Ask { what: "plug in a NIC", source };
            let body = serde_json::to_string(&interface).map_err(|e| failed(Box::new(e)))?;
            let path = interface_path(&interface.iface_id);
            let put = passing::put(&socket, &path, &body, &tap);
            match tokio::time::timeout(ASK_TIMEOUT, put).await {
                Ok(Ok((status, _))) if (200..300).contains(&status) => Ok(()),
                Ok(Ok((status, body))) => Err(failed(Box::new(AskError::Refused(status, bounded(&body))))),
                Ok(Err(e)) => Err(failed(Box::new(e))),
                Err(e) => Err(failed(Box::new(e))),
            }
        })
    }

    fn unplug(&self, id: ServerId, interface: String) -> BoxFuture<'_, Result<(), VmmError>> {
        let socket = self.state.server(id).api_socket();
        Box::pin(async move {
            let what = "ask its guest to give up a NIC";
            let path = interface_path(&interface);
            let asked = ask::<serde_json::Value>(&socket, "DELETE", &path, String::new());
            match tokio::time::timeout(ASK_TIMEOUT, asked).await {
                Ok(result) => result.map(drop).map_err(|e| VmmError::Ask { what, source: Box::new(e) }),
                Err(e) => Err(VmmError::Ask { what, source: Box::new(e) }),
            }
        })
    }

    fn signal(&self, process: &ProcessIdentity, signal: Signal) -> Result<(), VmmError> {
        let error = |source| VmmError::Signal { pid: process.pid, source };
        match process.open().map_err(error)? {
            Some(fd) => fd.signal(signal).map_err(error),
            None => Ok(()),
        }
    }
}

/// In the child, after the fork: a session of its own, and of all descriptors above the standard ones only these.
fn detach(inherited: &[RawFd]) -> io::Result<()> {
    // SAFETY: setsid, close_range and fcntl take integers only. All are async-signal-safe system calls.
    unsafe {
        if libc::setsid() == -1 {
            return Err(io::Error::last_os_error());
        }
        // Rust opens everything close-on-exec; this is for libraries that don't. Fails before Linux 5.11: then it is
        // left at that.
        libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        for fd in inherited {
            if libc::fcntl(*fd, libc::F_SETFD, 0) == -1 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// `vmm.log` of a server, emptied: it tells of one VMM.
fn open_log(dir: &ServerDir) -> Result<fs::File, VmmError> {
    let path = dir.vmm_log();
    let options = || {
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o600);
        options
    };
    let open = || -> io::Result<fs::File> {
        let file = options().open(&path)?;
        file.set_len(0)?;
        Ok(file)
    };
    open().map_err(|source| VmmError::Log { path: path.clone(), source })
}

/// Empties a `vmm.log` that has grown beyond [`VMM_LOG_MAX`]. The VMM appends, so it just goes on at the start.
///
/// # Errors
/// Of opening or truncating.
pub fn trim_log(dir: &ServerDir) -> io::Result<()> {
    let path = dir.vmm_log();
    match fs::metadata(&path) {
        Ok(metadata) if metadata.len() > VMM_LOG_MAX => {
            OpenOptions::new().write(true).open(&path)?.set_len(0)
        }
        _ => Ok(()),
    }
}

fn interface_path(id: &str) -> String {
    format!("/network-interfaces/{id}")
}

/// Why a VMM's API gave no answer.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    #[error("no answer")]
    Http(#[source] hyper::Error),
    #[error("the answer breaks off or is too long")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the answer is not what was asked for")]
    Parse(#[source] serde_json::Error),
    #[error("it answers {0}: {1}")]
    Refused(u16, String),
}

/// One question to a VMM's API; an empty answer counts as `null`.
async fn ask<T: DeserializeOwned>(
    socket: &Path,
    method: &'static str,
    path: &str,
    body: String,
) -> Result<T, AskError> {
    let stream = jail::connect(socket).await.map_err(AskError::Connect)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(AskError::Http)?;
    let request = hyper::Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "localhost")
        .header(hyper::header::CONTENT_TYPE, "application/json")
        .body(Full::<bytes::Bytes>::from(body))
        .expect("methods are constants of this module, and paths are made of letters, digits, '-' and '_'");
    let answer = async {
        let response = sender.send_request(request).await.map_err(AskError::Http)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_MAX).collect().await.map_err(AskError::Body)?;
        let body = body.to_bytes();
        if !status.is_success() {
            return Err(AskError::Refused(status.as_u16(), bounded(&String::from_utf8_lossy(&body))));
        }
        serde_json::from_slice(if body.is_empty() { b"null" } else { &body }).map_err(AskError::Parse)
    };
    tokio::pin!(connection);
    tokio::pin!(answer);
    tokio::select! {
        answer = &mut answer => answer,
        result = &mut connection => match result {
            // The connection is done, and what it brought is waiting.
            Ok(()) => answer.await,
            Err(e) => Err(AskError::Http(e)),
        },
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixListener,
    };

    use super::*;

    async fn answer(text: &'static [u8]) -> Result<InstanceInfo, AskError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 1024];
            let n = stream.read(&mut head).await.unwrap();
            assert!(head[..n].starts_with(b"GET / HTTP/1.1\r\n"));
            stream.write_all(text).await.unwrap();
        });
        let result = ask(&path, "GET", "/", String::new()).await;
        server.await.unwrap();
        result
    }

    #[tokio::test]
    async fn state_of_a_vmm_is_read_from_its_socket_with_and_without_keep_alive() {
        let body = br#"{"app_name":"mote-vmm","id":"x","state":"Running","vmm_version":"1"}"#;
        assert_eq!(body.len(), 68);
        for head in ["HTTP/1.1 200 OK\r\nContent-Length: 68\r\n\r\n", "HTTP/1.0 200 OK\r\n\r\n"] {
            let text: &'static [u8] = Box::leak([head.as_bytes(), body].concat().into_boxed_slice());
            assert_eq!(answer(text).await.unwrap().state, InstanceState::Running);
        }
    }

    #[tokio::test]
    async fn nonsense_is_an_error() {
        assert!(matches!(
            answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").await,
            Err(AskError::Parse(_))
        ));
        assert!(answer(b"SSH-2.0-x\r\n").await.is_err());
        let nowhere = ask::<InstanceInfo>(Path::new("/nonexistent"), "GET", "/", String::new());
        assert!(matches!(nowhere.await, Err(AskError::Connect(_))));
        let refused = answer(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno").await;
        assert!(matches!(refused, Err(AskError::Refused(400, text)) if text == "no"));
    }

    #[test]
    fn an_overgrown_vmm_log_is_emptied_and_a_small_one_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        let server = state.server(ServerId::new());
        fs::create_dir_all(server.path()).unwrap();
        trim_log(&server).unwrap();
        fs::write(server.vmm_log(), b"x").unwrap();
        trim_log(&server).unwrap();
        assert_eq!(fs::metadata(server.vmm_log()).unwrap().len(), 1);
        fs::write(server.vmm_log(), vec![b'x'; VMM_LOG_MAX as usize + 1]).unwrap();
        trim_log(&server).unwrap();
        assert_eq!(fs::metadata(server.vmm_log()).unwrap().len(), 0);
    }
}
