//! The local status socket: who connects is sent one JSON document, [`Status`], and the connection is closed.

use std::{fs, io, os::unix::fs::PermissionsExt, path::PathBuf, sync::Arc, time::Duration};

use mote_host_api::{CloudId, HostId, Inventory};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};

use crate::{
    agent::Snapshot,
    connection::ConnectionStatus,
    files::{self, FileError},
    paths::RunDir,
};

/// Clients that are served at the same time.
const CLIENTS_MAX: usize = 16;
/// Longest time for one of them.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest document that is read, in bytes.
const DOCUMENT_MAX: u64 = 64 << 20;

/// What `mote-hostd status` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the running agent.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Host.
    pub host_id: HostId,
    /// Its name.
    pub name: String,
    /// Its availability zone.
    pub availability_zone: String,
    /// Cloud.
    pub cloud_id: CloudId,
    /// Address of the controller.
    pub controller_url: String,
    /// Connection to it.
    pub controller: ConnectionStatus,
    /// What the host has.
    pub inventory: Inventory,
    /// What the agent knows.
    #[serde(flatten)]
    pub snapshot: Snapshot,
}

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// Nobody there.
    #[error("mote-hostd does not run here (nobody answers at {})", path.display())]
    NotRunning {
        /// Socket.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Answer.
    #[error("mote-hostd gave no answer")]
    Read(#[source] io::Error),
    /// Answer.
    #[error("mote-hostd's answer is not understood (another version?)")]
    Parse(#[from] serde_json::Error),
    /// Timeout.
    #[error("mote-hostd does not answer")]
    Timeout,
    /// Socket.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// Socket.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Directory.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Listens at the socket (0600). Only who holds the lock of the state directory may call this: an older socket is removed.
///
/// # Errors
/// [`StatusError`].
pub fn listen(run: &RunDir) -> Result<UnixListener, StatusError> {
    let path = run.control_socket();
    files::create_private_dir(run.path())?;
    files::remove_file(&path)?;
    let listen = || -> io::Result<UnixListener> {
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    listen().map_err(|source| StatusError::Listen { path: path.clone(), source })
}

/// Serves the status.
pub async fn serve(listener: UnixListener, status: impl Fn() -> Status) {
    let slots = Arc::new(Semaphore::new(CLIENTS_MAX));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((mut stream, _)) => {
                let document = serde_json::to_vec(&status()).unwrap_or_default();
                tokio::spawn(async move {
                    // A client that goes away is its own affair.
                    let _ = tokio::time::timeout(CLIENT_TIMEOUT, stream.write_all(&document)).await;
                    drop(slot);
                });
            }
            Err(e) => {
                tracing::warn!(error = %e, "status socket");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Asks the running agent.
///
/// # Errors
/// [`StatusError`].
pub async fn ask(run: &RunDir) -> Result<Status, StatusError> {
    let path = run.control_socket();
    let stream =
        UnixStream::connect(&path).await.map_err(|source| StatusError::NotRunning { path, source })?;
    let mut document = Vec::new();
    let mut stream = stream.take(DOCUMENT_MAX);
    tokio::time::timeout(CLIENT_TIMEOUT, stream.read_to_end(&mut document))
        .await
        .map_err(|_| StatusError::Timeout)?
        .map_err(StatusError::Read)?;
    Ok(serde_json::from_slice(&document)?)
}

/// For people.
pub fn text(status: &Status) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    let connection = match (&status.controller.connected, &status.controller.error) {
        (true, _) => format!("connected since {}", status.controller.since),
        (false, Some(error)) => format!("NOT connected since {}: {error}", status.controller.since),
        (false, None) => "not yet connected".to_owned(),
    };
    let inventory = &status.inventory;
    // Writing to a String cannot fail.
    let _ = writeln!(text, "host        {} ({})", status.name, status.host_id);
    let _ = writeln!(text, "zone        {}", status.availability_zone);
    let _ = writeln!(text, "cloud       {}", status.cloud_id);
    let _ = writeln!(text, "controller  {}, {connection}", status.controller_url);
    let _ = writeln!(
        text,
        "capacity    {} vCPUs, {} MiB, {} GiB; {}",
        inventory.vcpus,
        inventory.memory_mib,
        inventory.disk_gib,
        inventory.traits.join(" ")
    );
    let snapshot = &status.snapshot;
    let _ = writeln!(text, "generation  {} (applied {})", snapshot.generation, snapshot.applied_generation);
    let networks = snapshot.networks.map_or_else(|| "not looked at yet".to_owned(), |n| n.to_string());
    let _ = writeln!(text, "networks    {networks}");
    for problem in &snapshot.network_problems {
        let _ = writeln!(text, "            {problem}");
    }
    let _ = writeln!(text, "servers     {}", snapshot.servers.len());
    for server in &snapshot.servers {
        let state = format!("{:?}", server.observed.state).to_lowercase();
        let pids: Vec<String> = server.pids.iter().map(|pid| format!("pid {pid}")).collect();
        let message = server.observed.message.as_deref().unwrap_or_default();
        let line = format!("  {}  {state:<9}  {}  {message}", server.observed.id, pids.join(", "));
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}
