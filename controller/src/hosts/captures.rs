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
    let touched = finish(&mut tx, host, image_id, is_there).await?;
    tx.commit().await?;
    app.hub.wake_all(touched);
    Ok(())
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
