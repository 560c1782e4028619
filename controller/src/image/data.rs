//! `/v2/images/{id}/file`: bytes in and out.

use std::{
    io::{self, Write},
    ops::Range,
    time::Duration,
};

use axum::{
    body::Body,
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body_util::BodyExt;
use mote_images::{
    format::{self, PROBE_BYTES},
    store::{Store, Writer},
};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    blobs,
    content::{self, Bytes as Content, check_declared},
    import,
    record::{self, Image, Status},
    require_owner,
    store::ImageStore,
};
use crate::{
    app::App,
    db,
    http::{context::Ctx, error::ApiError},
};

/// Longest pause between two pieces of an upload.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// Pieces between the network and the disk.
const QUEUED_PIECES: usize = 16;
/// How much of a refused upload is still read (and dropped), so that the client comes to read the answer.
const DRAIN_BYTES: u64 = 64 << 20;

/// An upload that has the image to itself.
#[derive(Debug)]
pub(super) struct Upload {
    pub(super) image_id: String,
    pub(super) upload_id: String,
    pub(super) disk_format: String,
    /// SHA-256 of bytes that were staged before.
    pub(super) replaced: Option<String>,
}

/// Where the bytes of an upload go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goal {
    /// They become the image's content.
    Content,
    /// They wait for an import.
    Stage,
}

/// `PUT`: the bytes of a queued image.
///
/// The work is a task of its own: it ends properly, also when the client goes away.
///
/// # Errors
/// 400 for content that isn't what it was declared, 409 if the image has bytes, 413 if they are too many.
pub async fn upload(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, ApiError> {
    take(app, ctx, &id, &headers, body, Goal::Content).await
}

/// `PUT /v2/images/{id}/stage`: bytes that [`import`] will make the image's content. Can be repeated until then.
///
/// # Errors
/// As [`upload`]; what the content is, is looked at by the import.
pub async fn stage(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, ApiError> {
    take(app, ctx, &id, &headers, body, Goal::Stage).await
}

async fn take(
    app: App,
    ctx: Ctx,
    id: &str,
    headers: &HeaderMap,
    body: Body,
    goal: Goal,
) -> Result<StatusCode, ApiError> {
    let octets = headers.get(header::CONTENT_TYPE).is_some_and(|value| value == "application/octet-stream");
    if !octets {
        return Err(ApiError::UnsupportedMedia("The bytes must be sent as application/octet-stream.".into()));
    }
    let store = headers.get("x-image-meta-store").map(|name| String::from_utf8_lossy(name.as_bytes()));
    import::check_stores(&app, store.as_deref())?;
    let announced = announced_size(headers, app.config.max_image_bytes)?;
    let upload = begin(&app, &ctx, id, goal).await?;
    tokio::spawn(run(app, upload, body, announced, goal)).await.map_err(ApiError::internal)??;
    Ok(StatusCode::NO_CONTENT)
}

/// What the headers say of the size.
fn announced_size(headers: &HeaderMap, max: u64) -> Result<Option<u64>, ApiError> {
    let number = |name: &str| -> Result<Option<u64>, ApiError> {
        let Some(value) = headers.get(name) else { return Ok(None) };
        let parsed = value.to_str().ok().and_then(|text| text.parse().ok());
        parsed
            .map(Some)
            .ok_or_else(|| ApiError::BadRequest(format!("The header {name} must be a number of bytes.")))
    };
    let (length, size) = (number("content-length")?, number("x-openstack-image-size")?);
    if let (Some(length), Some(size)) = (length, size)
        && length != size
    {
        return Err(ApiError::BadRequest("Content-Length and X-OpenStack-Image-Size differ.".into()));
    }
    let announced = length.or(size);
    match announced {
        Some(0) => Err(empty()),
        Some(bytes) if bytes > max => Err(too_large(max)),
        _ => Ok(announced),
    }
}

fn empty() -> ApiError {
    ApiError::BadRequest("The image is empty.".into())
}

fn too_large(max: u64) -> ApiError {
    ApiError::TooLarge(format!("An image may have at most {max} bytes."))
}

/// queued → saving, or queued or uploading → uploading.
async fn begin(app: &App, ctx: &Ctx, id: &str, goal: Goal) -> Result<Upload, ApiError> {
    let mut tx = app.begin().await?;
    let image = record::find(&mut tx, id, ctx).await?;
    require_owner(&image, ctx)?;
    let waits = match goal {
        Goal::Content => image.status == Status::Queued,
        // While bytes are on their way to the stage, there are none yet.
        Goal::Stage => image.status == Status::Queued || image.staged.is_some(),
    };
    if !waits || image.status == Status::Importing {
        let wanted = if goal == Goal::Stage { Status::Uploading } else { Status::Saving };
        let text = format!(
            "Image status transition from {} to {} is not allowed: the image has its bytes or is getting them.",
            image.status.as_str(),
            wanted.as_str()
        );
        return Err(ApiError::Conflict(text));
    }
    let (Some(disk_format), Some(_)) = (image.disk_format, image.container_format) else {
        let text = "The image needs a disk_format and a container_format before its bytes are sent.";
        return Err(ApiError::BadRequest(text.into()));
    };
    let state = (goal == Goal::Stage).then_some(Status::Uploading);
    let upload_id = claim(app, &mut tx, id, state).await?;
    tx.commit().await?;
    Ok(Upload { image_id: image.id, upload_id, disk_format, replaced: image.staged })
}

/// Marks an image as one whose bytes are coming, and gives the upload's id.
pub(super) async fn claim(
    app: &App,
    tx: &mut db::Conn,
    id: &str,
    import_state: Option<Status>,
) -> Result<String, ApiError> {
    // Whose upload it is: `blobs::recover` leaves those of living controllers alone.
    let upload_id = format!("{}:{}", app.presence.number, Uuid::new_v4());
    // What was staged before is replaced, not imported.
    sqlx::query(
        "UPDATE images SET status = 'saving', upload_id = $2, updated_us = $3, import_state = $4,
             sha256 = CASE WHEN $5 THEN NULL ELSE sha256 END WHERE id = $1",
    )
    .bind(id)
    .bind(&upload_id)
    .bind(db::now_us())
    .bind(import_state.map(Status::as_str))
    .bind(import_state == Some(Status::Uploading))
    .execute(tx)
    .await?;
    Ok(upload_id)
}

/// The bytes of a root disk that its host sends for an image that was made for them; queued → active.
///
/// # Errors
/// 404 without such an image, 409 if it has its bytes or is getting them; those of an upload.
pub(crate) async fn receive_capture(
    app: &App,
    image_id: &str,
    headers: &HeaderMap,
    body: Body,
) -> Result<(), ApiError> {
    let announced = announced_size(headers, app.config.max_image_bytes)?;
    let mut tx = app.begin().await?;
    let status: Option<String> =
        sqlx::query_scalar("SELECT COALESCE(import_state, status) FROM images WHERE id = $1")
            .bind(image_id)
            .fetch_optional(&mut *tx)
            .await?;
    match status.as_deref() {
        None => return Err(super::not_found(image_id)),
        Some("queued") => {}
        Some(status) => {
            return Err(ApiError::Conflict(format!("Image {image_id} takes no bytes: it is {status}.")));
        }
    }
    let upload_id = claim(app, &mut tx, image_id, None).await?;
    tx.commit().await?;
    let upload =
        Upload { image_id: image_id.to_owned(), upload_id, disk_format: "raw".into(), replaced: None };
    // A task of its own, so that it ends in a state that is one even if the host goes away.
    tokio::spawn(run(app.clone(), upload, body, announced, Goal::Content))
        .await
        .map_err(ApiError::internal)?
}

async fn run(
    app: App,
    upload: Upload,
    body: Body,
    announced: Option<u64>,
    goal: Goal,
) -> Result<(), ApiError> {
    let stored = store(&app, &upload, body, announced, goal).await;
    if stored.is_err()
        && let Err(error) = abandon(&app, &upload).await
    {
        tracing::error!(image = upload.image_id, %error, "the image stays in state saving until the next start");
    }
    stored
}

/// saving → queued, without bytes.
pub(super) async fn abandon(app: &App, upload: &Upload) -> Result<(), ApiError> {
    let mut tx = app.begin().await?;
    sqlx::query(blobs::ABANDON).bind(&upload.image_id).bind(&upload.upload_id).execute(&mut *tx).await?;
    tx.commit().await?;
    match &upload.replaced {
        Some(staged) => blobs::release(app, std::slice::from_ref(staged)).await,
        None => Ok(()),
    }
}

async fn store(
    app: &App,
    upload: &Upload,
    body: Body,
    announced: Option<u64>,
    goal: Goal,
) -> Result<(), ApiError> {
    // Staged bytes are looked at by their import, which may come after the format was changed.
    let disk_format = (goal == Goal::Content).then_some(upload.disk_format.as_str());
    let writer = receive(app, disk_format, body).await?;
    if announced.is_some_and(|bytes| bytes != writer.size()) {
        return Err(ApiError::BadRequest("The body has another size than its headers say.".into()));
    }
    match goal {
        Goal::Content => content::finish(app, upload, Content::New(Box::new(writer))).await,
        Goal::Stage => content::stage(app, upload, writer).await,
    }
}

/// Takes the body to the disk; if the format is known, the head is looked at as soon as it is there.
pub(super) async fn receive(
    app: &App,
    disk_format: Option<&str>,
    mut body: Body,
) -> Result<Writer, ApiError> {
    let (pieces, queue) = mpsc::channel(QUEUED_PIECES);
    let (store, max, disk_format) =
        (app.images.clone(), app.config.max_image_bytes, disk_format.map(str::to_owned));
    let writing = tokio::task::spawn_blocking(move || write(&store, max, disk_format.as_deref(), queue));
    let received = loop {
        match next_piece(&mut body).await {
            Ok(Some(piece)) => {
                if pieces.send(piece).await.is_err() {
                    // The writer has refused; why, it says below.
                    drain(&mut body).await;
                    break Ok(());
                }
            }
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    drop(pieces);
    let written = writing.await.map_err(ApiError::internal)?;
    received.and(written)
}

/// The next bytes, `None` at the end.
async fn next_piece(body: &mut Body) -> Result<Option<Bytes>, ApiError> {
    loop {
        let frame = tokio::time::timeout(IDLE_LIMIT, body.frame())
            .await
            .map_err(|_| ApiError::Timeout(format!("No bytes came for {} s.", IDLE_LIMIT.as_secs())))?;
        match frame {
            None => return Ok(None),
            Some(Err(_)) => return Err(ApiError::BadRequest("The upload broke off.".into())),
            Some(Ok(frame)) => {
                if let Ok(piece) = frame.into_data() {
                    return Ok(Some(piece));
                }
            }
        }
    }
}

async fn drain(body: &mut Body) {
    let mut left = DRAIN_BYTES;
    while let Ok(Some(piece)) = next_piece(body).await {
        left = left.saturating_sub(piece.len() as u64);
        if left == 0 {
            return;
        }
    }
}

/// Runs on a thread of its own until the queue ends.
fn write(
    store: &Store,
    max: u64,
    disk_format: Option<&str>,
    mut queue: mpsc::Receiver<Bytes>,
) -> Result<Writer, ApiError> {
    let mut writer = store.writer()?.limit(max);
    let mut head = Vec::with_capacity(PROBE_BYTES);
    let mut looked = disk_format.is_none();
    while let Some(piece) = queue.blocking_recv() {
        if !looked {
            let missing = PROBE_BYTES - head.len();
            head.extend_from_slice(&piece[..piece.len().min(missing)]);
            if head.len() == PROBE_BYTES {
                check_head(&head, disk_format)?;
                looked = true;
            }
        }
        writer.write_all(&piece).map_err(|error| write_error(error, max))?;
    }
    if writer.size() == 0 {
        return Err(empty());
    }
    if !looked {
        check_head(&head, disk_format)?;
    }
    Ok(writer)
}

pub(super) fn write_error(error: io::Error, max: u64) -> ApiError {
    match error.kind() {
        io::ErrorKind::FileTooLarge => too_large(max),
        io::ErrorKind::StorageFull => ApiError::TooLarge("The image store is full.".into()),
        _ => ApiError::internal(error),
    }
}

fn check_head(head: &[u8], disk_format: Option<&str>) -> Result<(), ApiError> {
    disk_format.map_or(Ok(()), |declared| check_declared(declared, format::probe(head)))
}

/// `GET`: the bytes, or the part of them that `Range` names.
///
/// # Errors
/// 403 for a deactivated image, 416 for a range outside.
pub async fn download(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let image = record::find(&mut *app.db.acquire().await?, &id, &ctx).await?;
    if image.status == Status::Deactivated && !ctx.is_admin {
        return Err(ApiError::Forbidden("The requested image has been deactivated.".into()));
    }
    let Image { content: Some(content), .. } = image else {
        return Ok(StatusCode::NO_CONTENT.into_response());
    };
    let range = match wanted_range(headers.get(header::RANGE), content.size) {
        Ok(range) => range,
        Err(error) => {
            let mut response = error.into_response();
            if let Ok(value) = HeaderValue::from_str(&format!("bytes */{}", content.size)) {
                response.headers_mut().insert(header::CONTENT_RANGE, value);
            }
            return Ok(response);
        }
    };
    let mut response =
        send(&app.image_store, &content.sha256, range.clone().unwrap_or(0..content.size)).await?;
    match range {
        Some(part) => {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let text = format!("bytes {}-{}/{}", part.start, part.end - 1, content.size);
            if let Ok(value) = HeaderValue::from_str(&text) {
                response.headers_mut().insert(header::CONTENT_RANGE, value);
            }
        }
        // Glance sends the digest in hex under this name, and clients check it.
        None => {
            if let Ok(value) = HeaderValue::from_str(&content.md5) {
                response.headers_mut().insert("content-md5", value);
            }
        }
    }
    response.headers_mut().insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    Ok(response)
}

/// Streams a part of stored bytes with its `Content-Length`.
///
/// # Errors
/// 404 if they are not in the store.
pub(crate) async fn send(store: &ImageStore, sha256: &str, part: Range<u64>) -> Result<Response, ApiError> {
    let length = part.end - part.start;
    let body = store.read(sha256, part).await?;
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (header::CONTENT_LENGTH, HeaderValue::from(length)),
    ];
    Ok((headers, body).into_response())
}

/// One range of RFC 9110 §14.1.2; several, or another unit, are answered with all bytes, as the RFC allows.
fn wanted_range(header: Option<&HeaderValue>, size: u64) -> Result<Option<Range<u64>>, ApiError> {
    let Some(spec) =
        header.and_then(|value| value.to_str().ok()).and_then(|text| text.strip_prefix("bytes="))
    else {
        return Ok(None);
    };
    let Some((first, last)) = spec.split_once('-').filter(|(_, last)| !last.contains(',')) else {
        return Ok(None);
    };
    let outside = || ApiError::RangeNotSatisfiable(format!("The image has only {size} bytes."));
    let range = match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), _) if first >= size => return Err(outside()),
        (Ok(first), Ok(last)) if last >= first => first..last.min(size - 1) + 1,
        (Ok(first), Err(_)) if last.is_empty() => first..size,
        (Err(_), Ok(0)) if first.is_empty() => return Err(outside()),
        (Err(_), Ok(count)) if first.is_empty() => size.saturating_sub(count)..size,
        _ => return Ok(None),
    };
    Ok(Some(range))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_rfc_9110_says() {
        let of = |text: &'static str| wanted_range(Some(&HeaderValue::from_static(text)), 10);
        assert_eq!(of("bytes=0-3").unwrap(), Some(0..4));
        assert_eq!(of("bytes=4-").unwrap(), Some(4..10));
        assert_eq!(of("bytes=-3").unwrap(), Some(7..10));
        assert_eq!(of("bytes=-30").unwrap(), Some(0..10));
        assert_eq!(of("bytes=8-99").unwrap(), Some(8..10));
        for all in ["bytes=0-1,4-5", "bytes=3-1", "lines=1-2", "bytes=x-y", "bytes=", "bytes=-"] {
            assert_eq!(of(all).unwrap(), None, "{all}");
        }
        for outside in ["bytes=10-", "bytes=-0", "bytes=18446744073709551615-"] {
            assert!(of(outside).is_err(), "{outside}");
        }
    }
}
