//! `suspend`, and `start` of a server that is suspended: its VMM's state and its guest's memory in files.
//!
//! The files are of one moment, and so are the disks: as soon as a guest goes on, the files must never be used again. So a
//! VMM that is made of them stands still until they are gone for good; only then its guest goes on. And they count only
//! while the record says so, which it does after they and the disks were synced.

use std::{fs, os::fd::AsRawFd, os::fd::OwnedFd, path::Path};

use mote_host_api::{DesiredPower, NetworkId, PortId, PortSpec};
use mote_vmm_api::{MemoryBackend, MemoryBackendType, NetworkOverride, SnapshotLoad, VmConfig};

use super::{
    TaskError, Wanted, Work,
    nics::{interface_id, ports_of},
    start::serial,
};
use crate::{
    files::{self, FileError},
    jail,
    ledger::Phase,
    parts::{MEMORY_FILE, STATE_FILE},
    paths::ServerDir,
};

/// A port with its network and MTU.
type WiredPort = (NetworkId, u16, PortSpec);
/// A NIC's id and its port.
type SavedNic = (String, WiredPort);

impl Work {
    /// Writes the files, then ends the VMM.
    pub(super) async fn suspend(&mut self) -> Result<(), TaskError> {
        if self.record.phase != Phase::Suspended {
            self.write_suspended().await?;
            self.record.suspended = true;
            self.enter(Phase::Suspended, None).await?;
        }
        self.end_processes(&self.alive).await?;
        self.remove_sockets().await?;
        self.record.process = None;
        tracing::info!(server = %self.record.id, "suspended");
        self.save().await
    }

    async fn write_suspended(&mut self) -> Result<(), TaskError> {
        let (parts, id) = (self.parts.clone(), self.record.id);
        self.record.paused = None;
        self.save().await?;
        self.reach("before pause").await;
        parts.vmms.set_paused(id, true).await?;
        let interfaces = parts.vmms.interfaces(id).await?;
        self.record.suspended_ports = ports_of(interfaces.iter().map(String::as_str));
        let dir = parts.state.server(id);
        let (suspended, unfinished) = (dir.suspended(), dir.suspended_unfinished());
        if let Err(error) = self.write_files(&dir).await {
            // It goes on until the next attempt. The files are of a moment that is over then; as long as the record doesn't
            // count on them, a removal that fails leaves only what the next attempt removes.
            let removed = self
                .blocking(move || files::remove_dir(&unfinished).and_then(|()| files::remove_dir(&suspended)))
                .await?;
            parts.vmms.set_paused(id, false).await?;
            self.record.paused = Some(false);
            self.save().await?;
            removed?;
            return Err(error);
        }
        self.reach("after files").await;
        Ok(())
    }

    /// The files, complete and synced with the disks that go with them.
    async fn write_files(&self, dir: &ServerDir) -> Result<(), TaskError> {
        let id = self.record.id;
        let (old, new) = (dir.suspended(), dir.suspended_unfinished());
        self.blocking(move || {
            files::remove_dir(&old)?;
            files::remove_dir(&new)?;
            jail::make_writable(id, &new)
        })
        .await??;
        self.reach("before snapshot").await;
        let written = self.parts.vmms.snapshot(id, dir.suspended_unfinished()).await;
        self.reach("after snapshot").await;
        written?;
        let dir = dir.clone();
        self.blocking(move || {
            sync_disks(&dir)?;
            rename(&dir.suspended_unfinished(), &dir.suspended())?;
            sync(&dir.vm())
        })
        .await??;
        Ok(())
    }

    /// Whether a start goes on from the files: they are there, and nobody asked for a new run.
    pub(super) fn goes_on(&self, wanted: &Wanted) -> bool {
        self.record.suspended
            && self.record.attempted >= wanted.spec.run_generation
            && self.parts.state.server(self.record.id).suspended().is_dir()
    }

    /// A VMM made of the files.
    pub(super) async fn resume(&mut self, wanted: &Wanted) -> Result<(), TaskError> {
        let slots = self.slots.clone();
        let _slot = slots.start.acquire().await.map_err(|_| TaskError::Cancelled)?;
        self.check_cancelled()?;
        self.clean_up_before_start().await?;
        self.record.paused = None;
        self.enter_start(wanted).await?;
        let nics = self.saved_nics(wanted)?;
        let ports: Vec<_> = nics.iter().map(|(_, port)| port.clone()).collect();
        let taps = self.open_taps(&ports).await?;
        let config = self.load_config(&nics, &taps);
        self.launch(config, taps).await
    }

    /// The NICs in the files, by their ids, with their ports.
    fn saved_nics(&self, wanted: &Wanted) -> Result<Vec<SavedNic>, TaskError> {
        let Some(saved) = &self.record.suspended_ports else {
            let named = |(index, port): (usize, &WiredPort)| (format!("eth{index}"), port.clone());
            return Ok(wanted.ports.iter().enumerate().map(named).collect());
        };
        let find = |id: &PortId| {
            let port = wanted.ports.iter().chain(&wanted.leaving).find(|(.., port)| port.id == *id);
            let gone =
                || TaskError::Permanent(format!("port {id}, which it had when it was suspended, is gone"));
            Ok((interface_id(*id), port.cloned().ok_or_else(gone)?))
        };
        saved.iter().map(find).collect()
    }

    fn load_config(&self, nics: &[SavedNic], taps: &[OwnedFd]) -> VmConfig {
        let dir = self.parts.state.server(self.record.id);
        let files = dir.inside(&dir.suspended());
        let network_overrides = nics.iter().zip(taps);
        let network_overrides = network_overrides.map(|((id, (.., port)), tap)| NetworkOverride {
            iface_id: id.clone(),
            host_dev_name: mote_network::names::tap_name(port.id),
            tap_fd: Some(tap.as_raw_fd()),
        });
        let load = SnapshotLoad {
            snapshot_path: files.join(STATE_FILE),
            mem_backend: Some(MemoryBackend {
                backend_type: MemoryBackendType::File,
                backend_path: files.join(MEMORY_FILE),
            }),
            mem_file_path: None,
            enable_diff_snapshots: false,
            track_dirty_pages: false,
            resume_vm: false,
            network_overrides: network_overrides.collect(),
            vsock_override: None,
            clock_realtime: false,
            huge_pages: mote_vmm_api::SnapshotHugePages::Snapshot,
            drive_overrides: Vec::new(),
            serial_override: Some(serial(&dir)),
        };
        VmConfig { snapshot_load: Some(load), ..VmConfig::default() }
    }

    /// A VMM was made of the files and stands still. They go, then its guest goes on.
    pub(super) async fn go_on(&mut self) -> Result<(), TaskError> {
        let paused = self.wanted()?.spec.power == DesiredPower::Paused;
        self.forget_suspended().await?;
        self.record.paused = None;
        self.save().await?;
        self.reach("before resume").await;
        self.parts.vmms.set_paused(self.record.id, paused).await?;
        self.reach("after resume").await;
        self.record.paused = Some(paused);
        tracing::info!(server = %self.record.id, "resumed");
        self.enter(Phase::Running, None).await
    }

    /// The files go, and do not come back after a crash of the host. The record is written by the caller.
    pub(super) async fn forget_suspended(&mut self) -> Result<(), TaskError> {
        let dir = self.parts.state.server(self.record.id);
        self.blocking(move || {
            let (suspended, unfinished) = (dir.suspended(), dir.suspended_unfinished());
            if suspended.is_dir() {
                files::remove_dir(&unfinished)?;
                rename(&suspended, &unfinished)?;
                sync(&dir.vm())?;
            }
            files::remove_dir(&unfinished)
        })
        .await??;
        self.reach("after files").await;
        self.record.suspended = false;
        Ok(())
    }
}

/// What the guest had written must be on the disk when its memory counts on it, and no disk may be made anew after a crash
/// of the host.
fn sync_disks(dir: &ServerDir) -> Result<(), FileError> {
    for number in dir.disks() {
        sync(&dir.disk(number))?;
        files::remove_file(&dir.disk_unsynced(number))?;
    }
    Ok(())
}

fn sync(path: &Path) -> Result<(), FileError> {
    let synced = fs::File::open(path).and_then(|file| file.sync_all());
    synced.map_err(|source| FileError::Write { path: path.to_owned(), source })
}

fn rename(from: &Path, to: &Path) -> Result<(), FileError> {
    fs::rename(from, to).map_err(|source| FileError::Write { path: to.to_owned(), source })
}
