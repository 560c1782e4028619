//! The bytes below the images: when they can go, and what a crash left.
//!
//! Bytes are named by their SHA-256 and needed as long as an image or a server names them. A new image's record is
//! written after its bytes, a deleted image's bytes are removed after its record: a crash in between leaves bytes that
//! nobody needs, never a record without bytes. [`App::blob_turn`] keeps the two from crossing each other.

use crate::db::Conn;
use mote_images::store::StoreError;

use super::tasks;
use crate::{app::App, http::error::ApiError};

/// Removes these bytes (SHA-256, hex) if nothing needs them any more. To be called after the transaction that removed
/// the image or the server.
///
/// # Errors
/// Of the database or the store; the next start removes what stayed.
pub async fn release(app: &App, digests: &[String]) -> Result<(), ApiError> {
    let _turn = app.blob_turn().await?;
    release_in_turn(app, digests).await
}

/// As [`release`], by who has the turn.
pub(super) async fn release_in_turn(app: &App, digests: &[String]) -> Result<(), ApiError> {
    let mut conn = app.db.acquire().await?;
    for digest in digests {
        if in_use(&mut conn, digest).await? {
            continue;
        }
        app.image_store.remove(digest).await?;
    }
    Ok(())
}

/// Once at the start, before requests: uploads of controllers that are no more begin anew, and bytes that nobody needs are removed.
///
/// # Errors
/// Of the database or the store.
pub async fn recover(app: &App) -> Result<(), ApiError> {
    let mut tx = app.begin().await?;
    let uploads: Vec<(String, Option<String>)> =
        sqlx::query_as("SELECT id, upload_id FROM images WHERE status = 'saving'")
            .fetch_all(&mut *tx)
            .await?;
    let mut broken = 0;
    for (image, upload) in uploads {
        let whose =
            upload.as_deref().and_then(|id| id.split(':').next()).and_then(|number| number.parse().ok());
        if let Some(number) = whose
            && app.presence.is_alive(&mut tx, number).await?
        {
            continue;
        }
        broken += sqlx::query(ABANDON).bind(image).bind(&upload).execute(&mut *tx).await?.rows_affected();
        tasks::fail(&mut tx, upload.as_deref(), "The controller that worked on it was stopped.").await?;
    }
    tx.commit().await?;
    if broken > 0 {
        tracing::warn!(images = broken, "uploads were broken off by the last stop of the controller");
    }
    let digests = app.image_store.list_at_start().await?;
    release(app, &digests).await
}

/// saving → queued; bytes that were staged are given up.
pub(super) const ABANDON: &str =
    "UPDATE images SET status = 'queued', upload_id = NULL, import_state = NULL, size = NULL,
         sha256 = NULL, sha512 = NULL, md5 = NULL
     WHERE id = $1 AND upload_id = $2 AND status = 'saving'";

/// An image or a server names these bytes. A server has them in its boot specification (JSON), so that it can be built
/// anew on another host after its image was deleted.
async fn in_use(conn: &mut Conn, digest: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM images WHERE sha256 = $1 OR raw_sha256 = $1)
             OR EXISTS (SELECT 1 FROM servers
                        WHERE boot LIKE '%\"' || $1 || '\"%' OR rescue LIKE '%\"' || $1 || '\"%')",
    )
    .bind(digest)
    .fetch_one(conn)
    .await
}

/// Runs what blocks on a thread for that.
///
/// # Errors
/// If it panics.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(ApiError::internal)
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                Self::TooLarge("The image store is full.".into())
            }
            _ => Self::internal(error),
        }
    }
}
