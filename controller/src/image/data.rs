//! `/v2/images/{id}/file`: bytes in and out.

use std::{
    io::{self, SeekFrom, Write},
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
    format::{self, FormatError, PROBE_BYTES},
    kernel::{KernelError, check_kernel},
    store::{Store, StoreError, Writer},
};
use tokio::{
    io::{AsyncReadExt, AsyncSeekExt},
    sync::mpsc,
};
use tokio_util::io::ReaderStream;
use uuid::Uuid;

use super::{
    blobs::{self, blocking},
    record::{self, Image, Status},
    require_owner,
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
/// Bytes read from the store at a time.
const READ_BYTES: usize = 256 << 10;

/// An upload that has the image to itself.
struct Upload {
    image_id: String,
    upload_id: String,
    disk_format: String,
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
    let octets = headers.get(header::CONTENT_TYPE).is_some_and(|value| value == "application/octet-stream");
    if !octets {
        return Err(ApiError::UnsupportedMedia("The bytes must be sent as application/octet-stream.".into()));
    }
    let announced = announced_size(&headers, app.config.max_image_bytes)?;
    let upload = begin(&app, &ctx, &id).await?;
    tokio::spawn(run(app, upload, body, announced)).await.map_err(ApiError::internal)??;
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

/// queued → saving.
async fn begin(app: &App, ctx: &Ctx, id: &str) -> Result<Upload, ApiError> {
    let mut tx = app.begin().await?;
    let image = record::find(&mut tx, id, ctx).await?;
    require_owner(&image, ctx)?;
    if image.status != Status::Queued {
        let text = format!(
            "Image status transition from {} to saving is not allowed: the image has its bytes or is getting them.",
            image.status.as_str()
        );
        return Err(ApiError::Conflict(text));
    }
    let (Some(disk_format), Some(_)) = (image.disk_format, image.container_format) else {
        let text = "The image needs a disk_format and a container_format before its bytes are sent.";
        return Err(ApiError::BadRequest(text.into()));
    };
    // Whose upload it is: `blobs::recover` leaves those of living controllers alone.
    let upload_id = format!("{}:{}", app.presence.number, Uuid::new_v4());
    sqlx::query("UPDATE images SET status = 'saving', upload_id = $2, updated_us = $3 WHERE id = $1")
        .bind(id)
        .bind(&upload_id)
        .bind(db::now_us())
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(Upload { image_id: image.id, upload_id, disk_format })
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
    let upload_id = Uuid::new_v4().to_string();
    let mut tx = app.begin().await?;
    let status: Option<String> = sqlx::query_scalar("SELECT status FROM images WHERE id = $1")
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
    sqlx::query("UPDATE images SET status = 'saving', upload_id = $2, updated_us = $3 WHERE id = $1")
        .bind(image_id)
        .bind(&upload_id)
        .bind(db::now_us())
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    let upload = Upload { image_id: image_id.to_owned(), upload_id, disk_format: "raw".into() };
    // A task of its own, so that it ends in a state that is one even if the host goes away.
    tokio::spawn(run(app.clone(), upload, body, announced)).await.map_err(ApiError::internal)?
}

async fn run(app: App, upload: Upload, body: Body, announced: Option<u64>) -> Result<(), ApiError> {
    let stored = store(&app, &upload, body, announced).await;
    if stored.is_err()
        && let Err(error) = abandon(&app, &upload).await
    {
        tracing::error!(image = upload.image_id, %error, "the image stays in state saving until the next start");
    }
    stored
}

/// saving → queued.
async fn abandon(app: &App, upload: &Upload) -> Result<(), ApiError> {
    let mut tx = app.begin().await?;
    sqlx::query("UPDATE images SET status = 'queued', upload_id = NULL WHERE id = $1 AND upload_id = $2")
        .bind(&upload.image_id)
        .bind(&upload.upload_id)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(())
}

async fn store(app: &App, upload: &Upload, body: Body, announced: Option<u64>) -> Result<(), ApiError> {
    let writer = receive(app, upload, body).await?;
    if announced.is_some_and(|bytes| bytes != writer.size()) {
        return Err(ApiError::BadRequest("The body has another size than its headers say.".into()));
    }
    let disk_format = upload.disk_format.clone();
    let writer = blocking(move || check_whole(writer, &disk_format)).await??;
    // Bytes and record together, while nobody removes bytes.
    let _turn = app.blob_turn().await?;
    let digest = blocking(move || writer.commit(None)).await??;
    let mut tx = app.begin().await?;
    let done = sqlx::query(
        "UPDATE images SET status = 'active', upload_id = NULL, size = $3, sha256 = $4, sha512 = $5, md5 = $6,
             updated_us = $7 WHERE id = $1 AND upload_id = $2",
    )
    .bind(&upload.image_id)
    .bind(&upload.upload_id)
    .bind(i64::try_from(digest.size).map_err(ApiError::internal)?)
    .bind(&digest.sha256)
    .bind(&digest.sha512)
    .bind(&digest.md5)
    .bind(db::now_us())
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    if done.rows_affected() == 0 {
        blobs::release_in_turn(app, &[digest.sha256]).await?;
        return Err(ApiError::Gone(format!("Image {} was deleted during the upload.", upload.image_id)));
    }
    Ok(())
}

/// Takes the body to the disk; the head is looked at as soon as it is there.
async fn receive(app: &App, upload: &Upload, mut body: Body) -> Result<Writer, ApiError> {
    let (pieces, queue) = mpsc::channel(QUEUED_PIECES);
    let (store, max, disk_format) =
        (app.images.clone(), app.config.max_image_bytes, upload.disk_format.clone());
    let writing = tokio::task::spawn_blocking(move || write(&store, max, &disk_format, queue));
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
    disk_format: &str,
    mut queue: mpsc::Receiver<Bytes>,
) -> Result<Writer, ApiError> {
    let mut writer = store.writer()?.limit(max);
    let mut head = Vec::with_capacity(PROBE_BYTES);
    let mut looked = false;
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

fn write_error(error: io::Error, max: u64) -> ApiError {
    match error.kind() {
        io::ErrorKind::FileTooLarge => too_large(max),
        io::ErrorKind::StorageFull => ApiError::TooLarge("The image store is full.".into()),
        _ => ApiError::internal(error),
    }
}

fn check_head(head: &[u8], disk_format: &str) -> Result<(), ApiError> {
    format::check_declared(disk_format, format::probe(head))
        .map_err(|error: FormatError| ApiError::BadRequest(format!("The image was refused: {error}.")))
}

/// What can be checked only with all bytes; and brings them to the disk, so that the commit in turn is short.
fn check_whole(mut writer: Writer, disk_format: &str) -> Result<Writer, ApiError> {
    let path = writer.flushed_path()?;
    if disk_format == "aki" {
        check_kernel(path).map_err(|error| match error {
            KernelError::Io { .. } => ApiError::internal(error),
            refused => ApiError::BadRequest(format!("The image was refused: {refused}.")),
        })?;
    }
    let synced = std::fs::File::open(path).and_then(|file| file.sync_all());
    synced.map_err(|source| StoreError::Io { operation: "sync", path: path.to_owned(), source })?;
    Ok(writer)
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
    let mut response = send(&app.images, &content.sha256, range.clone().unwrap_or(0..content.size)).await?;
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
pub(crate) async fn send(store: &Store, sha256: &str, part: Range<u64>) -> Result<Response, ApiError> {
    let path = store.path(sha256).ok_or_else(|| ApiError::NotFound("The image has no data.".into()))?;
    let mut file = tokio::fs::File::open(path).await.map_err(ApiError::internal)?;
    file.seek(SeekFrom::Start(part.start)).await.map_err(ApiError::internal)?;
    let length = part.end - part.start;
    let body = Body::from_stream(ReaderStream::with_capacity(file.take(length), READ_BYTES));
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
