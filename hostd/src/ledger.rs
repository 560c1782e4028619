//! The ledger: one small file per server that says what this host was doing with it.
//!
//! The ledger never claims more than is safe to assume after `kill -9`: each step is recorded as *intended* before it is
//! taken and as *done* after it. Whether a VMM runs is never read from here alone; it is looked up in /proc.

use std::{collections::BTreeSet, fs, io, path::PathBuf};

use jiff::Timestamp;
use mote_host_api::{BootSpec, NetworkId, ObservedServer, PortId, ServerId, ServerSpec, ServerState};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    errors::one_line,
    files::{self, Durability, FileError},
    jail,
    paths::{REMOVED_PREFIX, StateDir},
    process::{ProcessIdentity, boot_id},
};

/// Format of the file.
const VERSION: u32 = 1;

/// Where a server is in its life on this host.
///
/// ```text
///             ┌──────────── wanted again / new run generation ───────────────┐
///             ▼                                                              │
/// (none) ─► Preparing ─► Starting ─► Running ─► Stopping ─► Stopped ─────────┤
///             │  ▲          │           │                                    │
///             │  └─ again ──┴───────────┤ (VMM ended by itself)              │
///             └─────────────────────────┴────────────────► Failed / Stopped ─┘
/// Running ─► Suspended ─► Starting
/// any ─► Removing ─► (none)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// No VMM; image, disk and ports are being made, or a start is due.
    Preparing,
    /// A VMM is about to be started or has been; whether it runs is to be looked up.
    Starting,
    /// The VMM was seen running its guest.
    Running,
    /// The VMM is being ended on purpose, so its end is no failure.
    Stopping,
    /// What the VMM held is in files ([`ServerRecord::suspended`]); it has ended or is being ended.
    Suspended,
    /// No VMM, and none is wanted.
    Stopped,
    /// No VMM, and this agent will not start one until something changes.
    Failed,
    /// Everything of it is being removed.
    Removing,
}

/// What is known of one server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerRecord {
    /// Format of this file.
    pub version: u32,
    /// Server.
    pub id: ServerId,
    /// Where it is in its life.
    pub phase: Phase,
    /// When that was entered.
    pub since: Timestamp,
    /// One line for a person.
    pub message: Option<String>,
    /// The run generation that the last VMM was started for; 0 before the first.
    pub run_generation: u64,
    /// The newest run generation that was acted upon, whatever came of it.
    pub attempted: u64,
    /// [`fingerprint`] of the specification that was acted upon.
    pub fingerprint: Option<String>,
    /// The last VMM that was started.
    pub process: Option<ProcessIdentity>,
    /// When it was started.
    pub started_at: Option<Timestamp>,
    /// `Stopped` by the guest's own power-off, not by this host.
    pub stopped_by_guest: bool,
    /// How often in a row the VMM failed soon after its start.
    pub quick_failures: u32,
    /// How often in a row the guest rebooted soon after its start.
    pub quick_reboots: u32,
    /// Don't start before this.
    pub not_before: Option<Timestamp>,
    /// Networks that its ports were wired to.
    pub networks: BTreeSet<NetworkId>,
    /// Whether its VMM was told to hold the guest; none while it is being told.
    #[serde(default = "runs")]
    pub paused: Option<bool>,
    /// The files of its suspended VMM are complete, and no guest has run since they were made.
    #[serde(default)]
    pub suspended: bool,
    /// The devices of its VMM are on a PCI bus, where they come and go; before that version they were behind mmio registers.
    #[serde(default)]
    pub pci: bool,
    /// The ports of the NICs in the files of its suspended VMM; none: those that were wanted, by number, as it was before NICs
    /// could be changed.
    #[serde(default)]
    pub suspended_ports: Option<BTreeSet<PortId>>,
}

/// [`ServerRecord::paused`] of a record that knows of no pause.
#[expect(clippy::unnecessary_wraps, reason = "serde wants the field's type")]
fn runs() -> Option<bool> {
    Some(false)
}

impl ServerRecord {
    /// A new server.
    pub fn new(id: ServerId, now: Timestamp) -> Self {
        Self {
            version: VERSION,
            id,
            phase: Phase::Preparing,
            since: now,
            message: None,
            run_generation: 0,
            attempted: 0,
            fingerprint: None,
            process: None,
            started_at: None,
            stopped_by_guest: false,
            quick_failures: 0,
            quick_reboots: 0,
            not_before: None,
            networks: BTreeSet::new(),
            paused: runs(),
            suspended: false,
            pci: false,
            suspended_ports: None,
        }
    }

    /// Enters a phase.
    pub fn enter(&mut self, phase: Phase, message: Option<String>, now: Timestamp) {
        if self.phase != phase {
            self.since = now;
        }
        self.phase = phase;
        self.message = message;
    }

    /// How it is reported to the controller.
    pub fn observed(&self, disks: BTreeSet<u32>) -> ObservedServer {
        let state = match self.phase {
            Phase::Preparing | Phase::Starting => ServerState::Preparing,
            Phase::Running if self.paused == Some(true) => ServerState::Paused,
            Phase::Running | Phase::Stopping => ServerState::Running,
            // Until its VMM has ended, its memory isn't free.
            Phase::Suspended if self.process.is_some() => ServerState::Running,
            Phase::Suspended => ServerState::Suspended,
            Phase::Stopped => ServerState::Stopped,
            Phase::Failed => ServerState::Failed,
            Phase::Removing => ServerState::Removing,
        };
        ObservedServer {
            id: self.id,
            state,
            run_generation: self.run_generation,
            disks,
            ports: None,
            since: self.since,
            message: self.message.clone(),
            given_up: Vec::new(),
        }
    }

    /// After a crash of the host, an older record (or none) may be back unless it was written durably. No VMM survives such
    /// a crash, so what is to be done follows from the desired state alone, except that a server that had ended must not be
    /// started again, and one that is suspended goes on from its files.
    fn durability(&self) -> Durability {
        match self.phase {
            Phase::Stopped | Phase::Failed | Phase::Suspended => Durability::Host,
            _ => Durability::Process,
        }
    }
}

/// Identifies what a server's VMM is made of: a change of anything else (name, metadata, policy) starts nothing anew.
pub fn fingerprint(spec: &ServerSpec) -> String {
    let parts = (spec.vcpus, spec.memory_mib, spec.root_disk_gib, &spec.ports, &spec.boot.command_line);
    let images = |boot: &BootSpec| -> Vec<String> {
        let images = [Some(&boot.disk), boot.kernel.as_ref(), boot.ramdisk.as_ref()];
        images.into_iter().map(|image| image.map_or_else(String::new, |image| image.sha256.clone())).collect()
    };
    let rescue =
        spec.rescue.as_ref().map(|rescue| (rescue.disk, images(&rescue.boot), &rescue.boot.command_line));
    let mut text = serde_json::to_vec(&(parts, images(&spec.boot), spec.disk, rescue))
        .expect("numbers, strings and ids always serialize");
    if !spec.local_disks.is_empty() {
        text.extend(serde_json::to_vec(&spec.local_disks).expect("numbers always serialize"));
    }
    hex::encode(&Sha256::digest(text)[..16])
}

/// The ledger of all servers, on disk.
#[derive(Debug, Clone)]
pub struct Ledger {
    state: StateDir,
}

/// What was found on disk at start.
#[derive(Debug, Default)]
pub struct Found {
    /// One per server directory.
    pub records: Vec<ServerRecord>,
}

impl Ledger {
    /// The ledger under a state directory, which is created.
    ///
    /// # Errors
    /// [`FileError::CreateDir`].
    pub fn open(state: StateDir) -> Result<Self, FileError> {
        files::create_private_dir(&state.servers())?;
        Ok(Self { state })
    }

    /// Writes a record; the first one makes the server's directories.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn write(&self, record: &ServerRecord) -> Result<(), FileError> {
        let dir = self.state.server(record.id);
        if !dir.vm().is_dir() {
            jail::make_directories(record.id, &dir)?;
        }
        files::replace_json(&dir.ledger(), record, record.durability())
    }

    /// Removes a server's directory: first renamed, so that no half of it can be mistaken for a server.
    ///
    /// # Errors
    /// [`FileError::Remove`].
    pub fn remove(&self, id: ServerId) -> Result<(), FileError> {
        let (from, to) = (self.state.server(id).path().to_owned(), self.state.removed(id));
        files::remove_dir(&to)?;
        match fs::rename(&from, &to) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(FileError::Remove { path: from, source: e });
            }
            _ => {}
        }
        files::remove_dir(&to)
    }

    /// Reads every record and finishes what an earlier process left half done: deletions, unfinished disks. A server
    /// directory without a readable record counts as one whose preparation was cut short.
    ///
    /// # Errors
    /// [`FileError`] of the directory itself; a single broken record is logged and repaired.
    pub fn load(&self, now: Timestamp) -> Result<Found, FileError> {
        let servers = self.state.servers();
        let read = |source| FileError::Read { path: servers.clone(), source };
        let mut found = Found::default();
        for entry in fs::read_dir(&servers).map_err(read)? {
            let entry = entry.map_err(read)?;
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            if name.starts_with(REMOVED_PREFIX) {
                files::remove_dir(&entry.path())?;
            } else if let Ok(id) = name.parse::<ServerId>() {
                self.check_disk(id)?;
                files::remove_dir(&self.state.server(id).suspended_unfinished())?;
                found.records.push(self.read(id, now));
            } else {
                tracing::warn!(path = %entry.path().display(), "not a server directory; left alone");
            }
        }
        Ok(found)
    }

    /// A disk that is unfinished, or was made but not yet synced when the host went down, is made again.
    fn check_disk(&self, id: ServerId) -> Result<(), FileError> {
        let dir = self.state.server(id);
        for number in dir.traces_of_disks() {
            files::remove_file(&dir.disk_unfinished(number))?;
            match files::read_json::<String>(&dir.disk_unsynced(number)) {
                Ok(None) => {}
                Ok(Some(boot)) if boot == boot_id() => {}
                Ok(Some(_)) | Err(_) => {
                    tracing::warn!(server = %id, number, "its disk was just made when the host went down; it is made again");
                    files::remove_file(&dir.disk(number))?;
                    files::remove_file(&dir.disk_unsynced(number))?;
                }
            }
        }
        Ok(())
    }

    fn read(&self, id: ServerId, now: Timestamp) -> ServerRecord {
        let path: PathBuf = self.state.server(id).ledger();
        match files::read_json::<ServerRecord>(&path) {
            Ok(Some(record)) if record.version == VERSION && record.id == id => return record,
            Ok(None) => {
                tracing::info!(server = %id, "directory without a record: its preparation was cut short")
            }
            Ok(Some(record)) => {
                tracing::error!(server = %id, version = record.version, "record of another version or server; started over");
            }
            Err(e) => tracing::error!(server = %id, error = one_line(&e), "unreadable record; started over"),
        }
        ServerRecord::new(id, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> (tempfile::TempDir, Ledger) {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(StateDir::new(dir.path())).unwrap();
        (dir, ledger)
    }

    #[test]
    fn what_is_written_is_found_and_what_is_removed_is_not() {
        let (_dir, ledger) = ledger();
        let mut record = ServerRecord::new(ServerId::new(), Timestamp::UNIX_EPOCH);
        record.enter(Phase::Running, Some("x".into()), Timestamp::UNIX_EPOCH);
        ledger.write(&record).unwrap();
        assert_eq!(ledger.load(Timestamp::UNIX_EPOCH).unwrap().records, vec![record.clone()]);
        ledger.remove(record.id).unwrap();
        ledger.remove(record.id).unwrap();
        assert!(ledger.load(Timestamp::UNIX_EPOCH).unwrap().records.is_empty());
        assert_eq!(fs::read_dir(ledger.state.servers()).unwrap().count(), 0);
    }

    #[test]
    fn half_done_work_of_an_earlier_process_is_finished_at_load() {
        let (_dir, ledger) = ledger();
        let (broken, empty, removed) = (ServerId::new(), ServerId::new(), ServerId::new());
        for id in [broken, empty] {
            fs::create_dir_all(ledger.state.server(id).vm()).unwrap();
        }
        fs::write(ledger.state.server(broken).ledger(), b"{\"version\":").unwrap();
        fs::write(ledger.state.server(empty).disk_unfinished(1), b"x").unwrap();
        fs::create_dir(ledger.state.removed(removed)).unwrap();
        fs::write(ledger.state.removed(removed).join("root.img"), b"x").unwrap();

        let found = ledger.load(Timestamp::UNIX_EPOCH).unwrap();
        let mut ids: Vec<_> = found.records.iter().map(|r| (r.id, r.phase)).collect();
        ids.sort();
        let mut expected = vec![(broken, Phase::Preparing), (empty, Phase::Preparing)];
        expected.sort();
        assert_eq!(ids, expected);
        assert!(!ledger.state.server(empty).disk_unfinished(1).exists());
        assert!(!ledger.state.removed(removed).exists());
    }
}
