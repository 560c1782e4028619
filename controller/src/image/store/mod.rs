//! Where images' bytes are: a directory of this controller, or a bucket that all controllers share.
//!
//! With a bucket the directory is only where bytes are looked at before they are sent; nothing stays in it. New content is
//! stored in two steps, since sending takes long and nobody may remove bytes while they and their record are made
//! ([`App::blob_turn`](crate::app::App)): [`ImageStore::keep`] before the turn, [`ImageStore::settle`] in it.

use std::{
    fs::File,
    io::{self, SeekFrom, Write as _},
    ops::Range,
    path::PathBuf,
    sync::Arc,
};

use axum::body::Body;
use http_body_util::BodyExt;
use mote_images::{
    Digest,
    store::{Store, StoreError, Writer},
};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

mod s3;
pub(crate) mod sign;
#[cfg(test)]
mod tests;

use super::blobs::blocking;
use crate::{db, http::error::ApiError};
pub use s3::{Bucket, BucketError};

/// Bytes read from a file at a time.
const READ_BYTES: usize = 256 << 10;

/// The store; cheap to clone.
#[derive(Clone, Debug)]
pub struct ImageStore {
    /// The content, or what is on its way to the bucket.
    directory: Store,
    bucket: Option<Arc<Bucket>>,
}

/// Content on its way into the store.
pub enum Kept {
    /// For the directory: not there yet.
    Written(Box<Writer>),
    /// In the bucket, unless it is removed before its record is there; the file is where it is sent from again.
    Sent(Digest, Arc<File>),
    /// In the store.
    Stored(Digest),
}

/// Content as a file of this machine.
pub enum LocalFile {
    /// In the directory.
    Stored(PathBuf),
    /// A copy that goes when this is dropped.
    Copy(Box<Writer>),
}

impl ImageStore {
    /// The store in a directory, or with that as its place for work in a bucket.
    pub fn new(directory: Store, bucket: Option<Bucket>) -> Self {
        Self { directory, bucket: bucket.map(Arc::new) }
    }

    /// Makes sure that a bucket belongs to the cloud of this database.
    ///
    /// # Errors
    /// If it belongs to another, or can't be used.
    pub async fn claim(&self, writer: &db::Pool) -> Result<(), ApiError> {
        let Some(bucket) = &self.bucket else { return Ok(()) };
        let mut tx = db::begin_immediate(writer).await?;
        let known: Option<String> =
            sqlx::query_scalar("SELECT cloud FROM image_store").fetch_optional(&mut *tx).await?;
        let cloud = match known {
            Some(cloud) => cloud,
            None => {
                let cloud = uuid::Uuid::new_v4().to_string();
                sqlx::query("INSERT INTO image_store (cloud) VALUES ($1)")
                    .bind(&cloud)
                    .execute(&mut *tx)
                    .await?;
                cloud
            }
        };
        tx.commit().await?;
        bucket.claim(&cloud).await
    }

    /// Glance's name of the store, its kind, and for people where it is.
    pub fn names(&self) -> (&'static str, &'static str, String) {
        match &self.bucket {
            Some(bucket) => ("s3", "s3", bucket.place()),
            None => ("local", "file", "Files of the controller".into()),
        }
    }

    /// Stores content as far as it can be done while others remove content.
    ///
    /// # Errors
    /// If it can't be written.
    pub async fn keep(&self, writer: Writer) -> Result<Kept, ApiError> {
        let Some(bucket) = &self.bucket else { return Ok(Kept::Written(Box::new(writer))) };
        let directory = self.directory.clone();
        let (digest, file) = blocking(move || -> Result<_, StoreError> {
            let mut writer = writer;
            let path = writer.flushed_path()?;
            let opened = File::open(path);
            let file = opened.map_err(|source| StoreError::Io {
                operation: "open",
                path: path.to_owned(),
                source,
            })?;
            // The file in hand can be read although its name goes.
            let digest = writer.commit(None)?;
            directory.remove(&digest.sha256)?;
            Ok((digest, Arc::new(file)))
        })
        .await??;
        if !bucket.has(&digest.sha256).await? {
            bucket.put(&digest.sha256, file.clone(), digest.size).await?;
        }
        Ok(Kept::Sent(digest, file))
    }

    /// Makes kept content part of the store; in a turn.
    ///
    /// # Errors
    /// If it can't be written.
    pub async fn settle(&self, kept: Kept) -> Result<Digest, ApiError> {
        match kept {
            Kept::Written(writer) => Ok(blocking(move || writer.commit(None)).await??),
            Kept::Stored(digest) => Ok(digest),
            Kept::Sent(digest, file) => {
                if let Some(bucket) = &self.bucket
                    && !bucket.has(&digest.sha256).await?
                {
                    bucket.put(&digest.sha256, file, digest.size).await?;
                }
                Ok(digest)
            }
        }
    }

    /// A part of the content as a stream.
    ///
    /// # Errors
    /// 404 if it isn't in the store.
    pub async fn read(&self, sha256: &str, part: Range<u64>) -> Result<Body, ApiError> {
        if let Some(bucket) = &self.bucket {
            return bucket.get(sha256, part.start, part.end.saturating_sub(1)).await;
        }
        let path = self.directory.path(sha256);
        let path = path.ok_or_else(|| ApiError::NotFound("The image has no data.".into()))?;
        let mut file = tokio::fs::File::open(path).await.map_err(ApiError::internal)?;
        file.seek(SeekFrom::Start(part.start)).await.map_err(ApiError::internal)?;
        let stream = ReaderStream::with_capacity(file.take(part.end - part.start), READ_BYTES);
        Ok(Body::from_stream(stream))
    }

    /// The content as a file.
    ///
    /// # Errors
    /// If it isn't in the store, or can't be copied.
    pub async fn local(&self, digest: &Digest) -> Result<LocalFile, ApiError> {
        if let Some(path) = self.directory.path(&digest.sha256) {
            return Ok(LocalFile::Stored(path));
        }
        let mut body = self.read(&digest.sha256, 0..digest.size).await?;
        let mut writer = self.directory.writer()?.limit(digest.size);
        while let Some(frame) = body.frame().await {
            let Ok(bytes) = frame.map_err(ApiError::internal)?.into_data() else { continue };
            writer = blocking(move || writer.write_all(&bytes).map(|()| writer))
                .await?
                .map_err(ApiError::internal)?;
        }
        match writer.size() == digest.size {
            true => Ok(LocalFile::Copy(Box::new(writer))),
            false => Err(ApiError::internal(io::Error::from(io::ErrorKind::UnexpectedEof))),
        }
    }

    /// Removes content; in a turn.
    ///
    /// # Errors
    /// If it can't be removed.
    pub async fn remove(&self, sha256: &str) -> Result<(), ApiError> {
        if let Some(bucket) = &self.bucket {
            return bucket.remove(sha256).await;
        }
        let (directory, sha256) = (self.directory.clone(), sha256.to_owned());
        blocking(move || directory.remove(&sha256)).await??;
        Ok(())
    }

    /// SHA-256 of all content. Once at the start: what a crash left on its way to a bucket goes.
    ///
    /// # Errors
    /// If it can't be listed.
    pub async fn list_at_start(&self) -> Result<Vec<String>, ApiError> {
        let (directory, is_work) = (self.directory.clone(), self.bucket.is_some());
        let here = blocking(move || -> Result<Vec<String>, StoreError> {
            let here: Vec<String> = directory.list()?.into_iter().map(|entry| entry.sha256).collect();
            for sha256 in here.iter().filter(|_| is_work) {
                directory.remove(sha256)?;
            }
            Ok(here)
        })
        .await??;
        match &self.bucket {
            Some(bucket) => bucket.list().await,
            None => Ok(here),
        }
    }
}
