//! Root disks that become images: hosts send them here.

use axum::{
    body::Body,
    extract::{Path, State},
};
use http::{HeaderMap, StatusCode};

use super::{Touched, secrets::Speaker, touch};
use crate::{
    app::App,
    compute::state::TaskState,
    db::{Conn, now_us},
    http::error::ApiError,
    image,
};

/// Most images that go when a backup comes; what is left goes with the next ones.
const MAX_ROTATED: i64 = 1000;

/// `PUT /hosts/{id}/captures/{image_id}`.
pub(super) async fn receive(
    speaker: Speaker,
    State(app): State<App>,
    Path((_, image_id)): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let not_found = || ApiError::NotFound("No copy of a disk is wanted for that image (any more).".into());
    wanted(&mut *app.db.acquire().await?, &speaker.key, &image_id).await?.ok_or_else(not_found)?;
    let status: Option<String> = sqlx::query_scalar("SELECT status FROM images WHERE id = $1")
        .bind(&image_id)
        .fetch_optional(&app.db)
        .await?;
    match status.as_deref() {
        // A copy that was received when this controller went down before it could say so.
        Some("active") => {}
        Some(_) => {
            let received = image::data::receive_capture(&app, &image_id, &headers, body).await;
            if let Err(
                error @ (ApiError::BadRequest(_)
                | ApiError::TooLarge(_)
                | ApiError::Gone(_)
                | ApiError::NotFound(_)),
            ) = received
            {
                // It will never be taken, or its user deleted the image meanwhile: better no image than a host that
                // sends it for ever, and a server that waits for it.
                end(&app, &speaker.key, &image_id, false).await?;
                return Err(error);
            }
            received?;
        }
        // The user deleted the image: there is nothing to be sent for.
        None => {}
    }
    end(&app, &speaker.key, &image_id, status.is_some()).await?;
    match status {
        Some(_) => Ok(StatusCode::NO_CONTENT),
        None => Err(not_found()),
    }
}

async fn end(app: &App, host: &str, image_id: &str, is_there: bool) -> Result<(), ApiError> {
    let mut tx = app.begin().await?;
    let released = if is_there { rotate(&mut tx, image_id).await? } else { Vec::new() };
    let touched = finish(&mut tx, host, image_id, is_there).await?;
    tx.commit().await?;
    app.hub.wake_all(touched);
    if !released.is_empty()
        && let Err(error) = image::blobs::release(app, &released).await
    {
        tracing::error!(%error, "the bytes of rotated backups stay until the next start");
    }
    Ok(())
}

/// A backup is there: of its kind, its server's images but the newest so many go, save those that are protected. Gives the
/// digests that may be nobody's any more.
async fn rotate(tx: &mut Conn, image_id: &str) -> Result<Vec<String>, ApiError> {
    let backup: Option<(String, String, String, i64)> = sqlx::query_as(
        "SELECT c.server_id, s.project_id, c.backup_type, c.backup_rotation
         FROM server_captures c JOIN servers s ON s.id = c.server_id
         WHERE c.image_id = $1 AND c.backup_type IS NOT NULL",
    )
    .bind(image_id)
    .fetch_optional(&mut *tx)
    .await?;
    let Some((server, project, kind, rotation)) = backup else { return Ok(Vec::new()) };
    let excess: Vec<(String, Option<String>, bool)> = sqlx::query_as(
        "SELECT i.id, i.sha256, i.protected
         FROM images i
         JOIN image_properties o ON o.image_id = i.id AND o.name = 'instance_uuid' AND o.value = $1
         JOIN image_properties t ON t.image_id = i.id AND t.name = 'image_type' AND t.value = 'backup'
         JOIN image_properties b ON b.image_id = i.id AND b.name = 'backup_type' AND b.value = $2
         WHERE i.owner = $3 ORDER BY i.created_us DESC, i.id DESC LIMIT $4 OFFSET $5",
    )
    .bind(server)
    .bind(kind)
    .bind(project)
    .bind(MAX_ROTATED)
    .bind(rotation)
    .fetch_all(&mut *tx)
    .await?;
    let mut released = Vec::new();
    for (id, digest, _) in excess.into_iter().filter(|(.., protected)| !protected) {
        sqlx::query("DELETE FROM images WHERE id = $1").bind(id).execute(&mut *tx).await?;
        released.extend(digest);
    }
    Ok(released)
}

async fn wanted(conn: &mut Conn, host: &str, image_id: &str) -> Result<Option<(String, bool)>, ApiError> {
    let sql = "SELECT c.server_id, c.shelving FROM server_captures c JOIN servers s ON s.id = c.server_id
         WHERE c.image_id = $1 AND s.host_id = $2";
    Ok(sqlx::query_as(sql).bind(image_id).bind(host).fetch_optional(conn).await?)
}

/// The copy is no longer wanted; a server that is being shelved leaves its host now, unless there is no image after all.
pub(super) async fn finish(
    tx: &mut Conn,
    host: &str,
    image_id: &str,
    is_there: bool,
) -> Result<Option<Touched>, ApiError> {
    let Some((server, shelving)) = wanted(tx, host, image_id).await? else { return Ok(None) };
    sqlx::query("DELETE FROM server_captures WHERE image_id = $1").bind(image_id).execute(&mut *tx).await?;
    if !is_there {
        image::snapshot::abandon(tx, image_id).await?;
    }
    let (touched, generation) = touch(tx, host).await?;
    let (from, to) = match shelving {
        true => (TaskState::ShelvingImageUploading, is_there.then_some(TaskState::ShelvingOffloading)),
        false => (TaskState::ImageUploading, None),
    };
    sqlx::query(
        "UPDATE servers SET task_state = $3, offloading = $4, changed_generation = $5, updated_us = $6
         WHERE id = $1 AND task_state = $2 AND NOT deleting",
    )
    .bind(&server)
    .bind(from.word())
    .bind(to.map(TaskState::word))
    .bind(to.is_some())
    .bind(generation)
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(Some(touched))
}
