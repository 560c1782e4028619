//! `prepare`: images here, disk made.

use std::{fs, path::PathBuf};

use mote_host_api::{ImageSpec, ServerSpec};
use mote_images::disk::{DiskError, clone_sparse};

use super::{TaskError, TaskEvent, Work};
use crate::{
    errors::one_line,
    files::{self, Durability},
    ledger::Phase,
    process::boot_id,
};

/// Bytes of one GiB.
const GIB: u64 = 1 << 30;

impl Work {
    pub(super) async fn prepare(&mut self) -> Result<(), TaskError> {
        let spec = self.wanted()?.spec;
        self.note_attempt(&spec);
        self.enter(Phase::Preparing, Some("fetching images".to_owned())).await?;
        let image = self.image(&spec.boot.disk).await?;
        self.image(&spec.boot.kernel).await?;
        if let Some(ramdisk) = &spec.boot.ramdisk {
            self.image(ramdisk).await?;
        }
        self.make_disk(&spec, image).await?;
        self.tell(TaskEvent::DiskReady(self.record.id)).await;
        self.enter(Phase::Preparing, None).await
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

    async fn make_disk(&self, spec: &ServerSpec, image: PathBuf) -> Result<(), TaskError> {
        let _slot = self.slots.disk.acquire().await.map_err(|_| TaskError::Cancelled)?;
        self.check_cancelled()?;
        let dir = self.parts.state.server(self.record.id);
        let size = match u64::from(spec.root_disk_gib) * GIB {
            0 => spec.boot.disk.size,
            size => size,
        };
        self.reach("before disk").await;
        self.blocking(move || {
            // Until it was synced once, a disk doesn't survive a crash of the host: see Ledger::load. The mark need not be
            // synced: file systems keep the order of names in a directory, and an empty mark is one, too.
            files::replace_json(&dir.disk_unsynced(), &boot_id(), Durability::Process)?;
            clone_sparse(&image, &dir.disk(), size).map_err(|e| disk_error(&e))
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
            if !dir.disk_unsynced().exists() {
                return;
            }
            let synced = fs::File::open(dir.disk()).and_then(|disk| disk.sync_all());
            let synced = synced.and_then(|()| fs::remove_file(dir.disk_unsynced()));
            if let Err(e) = synced {
                // The server may have been removed meanwhile. If not, the next start tries again.
                tracing::debug!(server = %id, error = %e, "disk not synced");
            }
        });
    }
}

fn disk_error(e: &DiskError) -> TaskError {
    let message = format!("its disk cannot be made: {}", one_line(e));
    match e {
        DiskError::TooSmall { .. } => TaskError::Permanent(message),
        DiskError::Io { .. } => TaskError::Local(message),
    }
}
