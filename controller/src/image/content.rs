//! Bytes that have come become an image's content: looked at, converted for hosts, committed together with the record.

use std::{fs::File, path::Path};

use mote_images::{
    Digest,
    format::{self, FormatError, probe_file},
    kernel::{KernelError, check_kernel},
    qcow2::{Qcow2, Qcow2Error},
    store::{Store, StoreError, Writer},
};
use sqlx::{Database, query::Query};
use tokio::sync::Semaphore;

use super::{
    blobs::{self, blocking},
    data::{Upload, write_error},
    store::{Kept, LocalFile},
};
use crate::{
    app::App,
    db::{self, Db},
    http::error::ApiError,
};

/// Disks that are converted at the same time: each takes a processor for as long as it takes.
static CONVERSIONS: Semaphore = Semaphore::const_new(2);

/// Bytes of an image on this machine.
pub(super) enum Bytes {
    /// Just written.
    New(Box<Writer>),
    /// In the store already.
    Stored(Digest),
}

/// Makes the bytes the content of the image that is being uploaded; saving → active.
///
/// # Errors
/// 400 for content that isn't what it was declared, 410 if the image is gone; the image stays as it is.
pub(super) async fn finish(app: &App, upload: &Upload, bytes: Bytes) -> Result<(), ApiError> {
    let (bytes, raw) = prepare(app, &upload.disk_format, bytes).await?;
    let store = &app.image_store;
    let bytes = match bytes {
        Bytes::New(writer) => store.keep(*writer).await?,
        Bytes::Stored(digest) => Kept::Stored(digest),
    };
    let raw = match raw {
        Some(writer) => Some(store.keep(writer).await?),
        None => None,
    };
    // Bytes and record together, while nobody removes bytes.
    let _turn = app.blob_turn().await?;
    let digest = store.settle(bytes).await?;
    let raw = match raw {
        Some(raw) => Some(store.settle(raw).await?),
        None => None,
    };
    let mut tx = app.begin().await?;
    let sql =
        "UPDATE images SET status = 'active', upload_id = NULL, import_state = NULL, size = $3, sha256 = $4,
             sha512 = $5, md5 = $6, updated_us = $7, raw_sha256 = $8, virtual_size = $9
         WHERE id = $1 AND upload_id = $2";
    let done = received(sql, upload, &digest)?
        .bind(raw.as_ref().map(|raw| raw.sha256.as_str()))
        .bind(raw.as_ref().map(|raw| number(raw.size)).transpose()?)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    if done.rows_affected() == 0 {
        let made: Vec<String> = std::iter::once(digest.sha256).chain(raw.map(|raw| raw.sha256)).collect();
        blobs::release_in_turn(app, &made).await?;
        return Err(ApiError::Gone(format!("Image {} was deleted during the upload.", upload.image_id)));
    }
    Ok(())
}

/// Keeps the bytes for an import; saving → uploading.
///
/// # Errors
/// 410 if the image is gone.
pub(super) async fn stage(app: &App, upload: &Upload, mut writer: Writer) -> Result<(), ApiError> {
    let writer = blocking(move || sync(writer.flushed_path()?).map(|()| writer)).await??;
    let kept = app.image_store.keep(writer).await?;
    let _turn = app.blob_turn().await?;
    let digest = app.image_store.settle(kept).await?;
    let mut tx = app.begin().await?;
    let sql = "UPDATE images SET status = 'queued', upload_id = NULL, size = $3, sha256 = $4, sha512 = $5, md5 = $6,
             updated_us = $7 WHERE id = $1 AND upload_id = $2";
    let done = received(sql, upload, &digest)?.execute(&mut *tx).await?;
    tx.commit().await?;
    let gone = done.rows_affected() == 0;
    // What was staged before, and these bytes if nobody wants them.
    let unneeded: Vec<String> =
        upload.replaced.iter().cloned().chain(gone.then_some(digest.sha256)).collect();
    blobs::release_in_turn(app, &unneeded).await?;
    match gone {
        true => Err(ApiError::Gone(format!("Image {} was deleted during the upload.", upload.image_id))),
        false => Ok(()),
    }
}

/// A change of the image that is being uploaded: its id and the upload's are $1 and $2, then size, SHA-256, SHA-512, MD5 and
/// the time.
fn received<'q>(
    sql: &'static str,
    upload: &'q Upload,
    digest: &'q Digest,
) -> Result<Query<'q, Db, <Db as Database>::Arguments>, ApiError> {
    Ok(sqlx::query(sql)
        .bind(&upload.image_id)
        .bind(&upload.upload_id)
        .bind(number(digest.size)?)
        .bind(&digest.sha256)
        .bind(&digest.sha512)
        .bind(&digest.md5)
        .bind(db::now_us()))
}

fn number(bytes: u64) -> Result<i64, ApiError> {
    i64::try_from(bytes).map_err(ApiError::internal)
}

/// What can be checked only with all bytes, and the raw disk if the content isn't what hosts read. All is on the disk
/// afterwards, so that the commit in turn is short.
async fn prepare(app: &App, disk_format: &str, bytes: Bytes) -> Result<(Bytes, Option<Writer>), ApiError> {
    let _permit = match disk_format {
        "qcow2" => Some(CONVERSIONS.acquire().await.map_err(ApiError::internal)?),
        _ => None,
    };
    let local = match &bytes {
        Bytes::New(_) => None,
        Bytes::Stored(digest) => Some(app.image_store.local(digest).await?),
    };
    let (store, max, disk_format) = (app.images.clone(), app.config.max_image_bytes, disk_format.to_owned());
    blocking(move || {
        let (mut bytes, mut local) = (bytes, local);
        let path = match (&mut bytes, &mut local) {
            (Bytes::New(writer), _) | (_, Some(LocalFile::Copy(writer))) => writer.flushed_path()?,
            (_, Some(LocalFile::Stored(path))) => path,
            (Bytes::Stored(digest), None) => return Err(StoreError::Missing(digest.sha256.clone()).into()),
        };
        sync(path)?;
        let raw = check_and_convert(&store, path, &disk_format, max)?;
        Ok((bytes, raw))
    })
    .await?
}

fn sync(path: &Path) -> Result<(), StoreError> {
    let synced = File::open(path).and_then(|file| file.sync_all());
    synced.map_err(|source| StoreError::Io { operation: "sync", path: path.to_owned(), source })
}

fn refused(error: impl std::fmt::Display) -> ApiError {
    ApiError::BadRequest(format!("The image was refused: {error}."))
}

fn check_and_convert(
    store: &Store,
    path: &Path,
    disk_format: &str,
    max: u64,
) -> Result<Option<Writer>, ApiError> {
    check_declared(disk_format, probe_file(path).map_err(ApiError::internal)?)?;
    match disk_format {
        "aki" => {
            check_kernel(path).map_err(|error| match error {
                KernelError::Io { .. } => ApiError::internal(error),
                error => refused(error),
            })?;
            Ok(None)
        }
        "qcow2" => convert(store, path, max).map(Some),
        _ => Ok(None),
    }
}

/// Whether the content is what its owner declared.
pub(super) fn check_declared(disk_format: &str, found: format::Format) -> Result<(), ApiError> {
    format::check_declared(disk_format, found).map_err(|error: FormatError| refused(error))
}

fn convert(store: &Store, path: &Path, max: u64) -> Result<Writer, ApiError> {
    let mut raw = store.writer()?.limit(max);
    let convert = |raw: &mut Writer| Qcow2::open(File::open(path)?, max)?.write_raw(raw);
    convert(&mut raw).map_err(|error| match error {
        Qcow2Error::Io(source) => write_error(source, max),
        error => refused(error),
    })?;
    let raw_path = raw.flushed_path()?;
    sync(raw_path)?;
    // A disk in a disk is read by nobody: but who mistakes it for one would open what it names.
    let inside = probe_file(raw_path).map_err(ApiError::internal)?;
    format::check_declared("raw", inside)
        .map_err(|_| refused(format!("inside the qcow2 disk is {inside}")))?;
    Ok(raw)
}
