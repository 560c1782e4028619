//! `prepare`: images here, disks made; `prune`: disks that nothing names any more removed; `capture`: a copy of the root
//! disk.

use std::{
    fs, io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::PathBuf,
};

use mote_host_api::{BootSpec, DiskSpec, ImageId, ImageSpec, LocalDiskSpec, ServerSpec};
use mote_images::disk::{DiskError, clone_sparse};

use super::{TaskError, TaskEvent, Work};
use crate::{
    config_drive::{self, ConfigDriveError},
    errors::one_line,
    files::{self, Durability},
    ledger::Phase,
    paths::ServerDir,
    process::boot_id,
    reconcile::needed_disks,
    swap,
};

/// Bytes of one GiB.
const GIB: u64 = 1 << 30;
/// Bytes of one MiB.
const MIB: u64 = 1 << 20;

impl Work {
    pub(super) async fn prepare(&mut self) -> Result<(), TaskError> {
        let spec = self.wanted()?.spec;
        self.note_attempt(&spec);
        self.enter(Phase::Preparing, Some("fetching images".to_owned())).await?;
        let boot = boot(&spec);
        for image in boot.kernel.iter().chain(&boot.ramdisk) {
            self.image(image).await?;
        }
        let dir = self.parts.state.server(self.record.id);
        if !dir.disks().contains(&spec.disk.number) {
            match spec.disk.copy_of {
                Some(source) => self.copy_disk(&spec, source).await?,
                None => self.make_disk(spec.disk.number, &spec.boot.disk, root_size(&spec)).await?,
            }
        }
        if let Some(rescue) = &spec.rescue
            && !dir.disks().contains(&rescue.disk)
        {
            self.make_disk(rescue.disk, &rescue.boot.disk, rescue.boot.disk.size).await?;
        }
        for local in &spec.local_disks {
            if !dir.disks().contains(&local.number) {
                self.make_local_disk(*local).await?;
            }
        }
        self.ensure_config_drive().await?;
        self.tell_disks().await;
        self.enter(Phase::Preparing, None).await
    }

    /// Makes the config drive unless it is there, and removes what is left of others. No VMM may run, and none may be
    /// suspended with another one. It is made again of nothing but what is wanted now, so it must be there as a whole and
    /// for good once it has its name.
    pub(super) async fn ensure_config_drive(&self) -> Result<(), TaskError> {
        let wanted = self.wanted()?;
        let (Some(number), Some(guest)) = (wanted.spec.config_drive, wanted.guest) else { return Ok(()) };
        let dir = self.parts.state.server(self.record.id);
        self.reach("before config drive").await;
        self.blocking(move || -> Result<(), TaskError> {
            let path = dir.config_drive(number);
            if !path.exists() {
                let drive = config_drive::image(&guest).map_err(|e| match &e {
                    ConfigDriveError::TooLarge { .. } => TaskError::Permanent(one_line(&e)),
                    ConfigDriveError::Write { .. } => TaskError::Local(one_line(&e)),
                })?;
                files::replace(&path, &drive, Durability::Host)?;
            }
            dir.other_config_drives(number).iter().try_for_each(|other| Ok(files::remove_file(other)?))
        })
        .await??;
        self.reach("after config drive").await;
        Ok(())
    }

    /// Removes disks that the specification does not name, and captures that nobody waits for.
    pub(super) async fn prune(&mut self) -> Result<(), TaskError> {
        let spec = self.wanted()?.spec;
        let dir = self.parts.state.server(self.record.id);
        self.blocking(move || -> Result<(), TaskError> {
            for number in dir.disks().difference(&needed_disks(&spec, &dir.disks())) {
                files::remove_file(&dir.disk(*number))?;
                files::remove_file(&dir.disk_unsynced(*number))?;
            }
            for image in dir.captures() {
                if !spec.captures.iter().any(|capture| capture.image_id == image) {
                    files::remove_file(&dir.capture(image))?;
                }
            }
            Ok(())
        })
        .await??;
        self.tell_disks().await;
        Ok(())
    }

    /// Copies the root disk while no vCPU runs: what a guest had written (and flushed) is in it, as after a loss of power.
    pub(super) async fn capture(&mut self, image: ImageId) -> Result<(), TaskError> {
        let spec = self.wanted()?.spec;
        let held = !self.alive.is_empty();
        if held {
            self.record.paused = None;
            self.save().await?;
            self.parts.vmms.set_paused(self.record.id, true).await?;
        }
        let _slot = self.slots.clone();
        let dir = self.parts.state.server(self.record.id);
        self.reach("before capture").await;
        let copied = self
            .blocking(move || {
                let (from, to) = (dir.disk(spec.disk.number), dir.capture(image));
                let size = fs::metadata(&from).map(|disk| disk.len()).map_err(|source| DiskError::Io {
                    operation: "examine",
                    path: from.clone(),
                    source,
                })?;
                clone_sparse(&from, &to, size).map(drop)
            })
            .await;
        self.reach("after capture").await;
        if held {
            let paused = self.wanted()?.spec.power == mote_host_api::DesiredPower::Paused;
            self.parts.vmms.set_paused(self.record.id, paused).await?;
            self.record.paused = Some(paused);
            self.save().await?;
        }
        copied?.map_err(|e| TaskError::Local(format!("its disk cannot be copied: {}", one_line(&e))))?;
        self.tell_disks().await;
        Ok(())
    }

    async fn tell_disks(&self) {
        let dir = self.parts.state.server(self.record.id);
        self.tell(TaskEvent::Disks(self.record.id, dir.disks(), dir.captures())).await;
    }

    /// An image of the cache; gives up at once when cancelled, since a fetch can take long.
    pub(super) async fn image(&self, image: &ImageSpec) -> Result<PathBuf, TaskError> {
        self.reach("before image").await;
        let path = tokio::select! {
            () = self.cancel.cancelled() => return Err(TaskError::Cancelled),
            path = self.parts.images.ensure(image) => path?,
        };
        self.reach("after image").await;
        Ok(path)
    }

    async fn make_disk(&self, number: u32, image: &ImageSpec, size: u64) -> Result<(), TaskError> {
        let image = self.image(image).await?;
        let _slot = self.slots.disk.acquire().await.map_err(|_| TaskError::Cancelled)?;
        self.check_cancelled()?;
        let dir = self.parts.state.server(self.record.id);
        self.reach("before disk").await;
        self.blocking(move || {
            // Until it was synced once, a disk doesn't survive a crash of the host: see Ledger::load. The mark need not be
            // synced: file systems keep the order of names in a directory, and an empty mark is one, too.
            files::replace_json(&dir.disk_unsynced(number), &boot_id(), Durability::Process)?;
            clone_sparse(&image, &dir.disk(number), size).map_err(|e| disk_error(&e))
        })
        .await??;
        self.reach("after disk").await;
        Ok(())
    }

    /// A disk that begins as another one. Its content is nowhere else once that one goes, so it is synced at once.
    async fn copy_disk(&self, spec: &ServerSpec, source: u32) -> Result<(), TaskError> {
        let _slot = self.slots.disk.acquire().await.map_err(|_| TaskError::Cancelled)?;
        self.check_cancelled()?;
        let dir = self.parts.state.server(self.record.id);
        let DiskSpec { number, .. } = spec.disk;
        let size = root_size(spec);
        self.reach("before disk").await;
        self.blocking(move || copy(&dir, source, number, size)).await??;
        self.reach("after disk").await;
        Ok(())
    }

    /// A disk beside the root disk.
    async fn make_local_disk(&self, local: LocalDiskSpec) -> Result<(), TaskError> {
        let _slot = self.slots.disk.acquire().await.map_err(|_| TaskError::Cancelled)?;
        self.check_cancelled()?;
        let dir = self.parts.state.server(self.record.id);
        let size = local.size_mib.saturating_mul(MIB);
        self.reach("before disk").await;
        self.blocking(move || match local.copy_of {
            Some(source) => copy(&dir, source, local.number, size),
            None => {
                files::replace_json(&dir.disk_unsynced(local.number), &boot_id(), Durability::Process)?;
                let made = empty(&dir, local, size);
                made.map_err(|e| TaskError::Local(format!("its disk cannot be made: {}", one_line(&e))))
            }
        })
        .await??;
        self.reach("after disk").await;
        Ok(())
    }

    /// Syncs the disk in the background, once.
    pub(super) fn sync_disk_later(&self) {
        let dir = self.parts.state.server(self.record.id);
        let id = self.record.id;
        tokio::task::spawn_blocking(move || {
            for number in dir.disks() {
                if !dir.disk_unsynced(number).exists() {
                    continue;
                }
                let synced = fs::File::open(dir.disk(number)).and_then(|disk| disk.sync_all());
                let synced = synced.and_then(|()| fs::remove_file(dir.disk_unsynced(number)));
                if let Err(e) = synced {
                    // The server may have been removed meanwhile. If not, the next start tries again.
                    tracing::debug!(server = %id, error = %e, "disk not synced");
                }
            }
        });
    }
}

/// What a server boots now.
pub(super) fn boot(spec: &ServerSpec) -> &BootSpec {
    spec.rescue.as_ref().map_or(&spec.boot, |rescue| &rescue.boot)
}

fn root_size(spec: &ServerSpec) -> u64 {
    match u64::from(spec.root_disk_gib) * GIB {
        0 => spec.boot.disk.size,
        size => size,
    }
}

fn copy(dir: &ServerDir, source: u32, number: u32, size: u64) -> Result<(), TaskError> {
    let (from, to) = (dir.disk(source), dir.disk(number));
    files::replace_json(&dir.disk_unsynced(number), &boot_id(), Durability::Process)?;
    let old = fs::metadata(&from).map(|disk| disk.len()).unwrap_or(0);
    clone_sparse(&from, &to, size.max(old)).map_err(|e| disk_error(&e))?;
    let synced = fs::File::open(&to).and_then(|disk| disk.sync_all());
    synced.map_err(|e| TaskError::Local(format!("its disk cannot be written: {}", one_line(&e))))?;
    files::remove_file(&dir.disk_unsynced(number)).map_err(TaskError::from)
}

/// A disk of nothing but holes, and the header of swap space where that is wanted.
fn empty(dir: &ServerDir, local: LocalDiskSpec, size: u64) -> io::Result<()> {
    let unfinished = dir.disk_unfinished(local.number);
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    file.set_len(size)?;
    if local.swap {
        file.write_all_at(&swap::header(size), 0)?;
    }
    fs::rename(&unfinished, dir.disk(local.number))
}

fn disk_error(e: &DiskError) -> TaskError {
    let message = format!("its disk cannot be made: {}", one_line(e));
    match e {
        DiskError::TooSmall { .. } => TaskError::Permanent(message),
        DiskError::Io { .. } => TaskError::Local(message),
    }
}
