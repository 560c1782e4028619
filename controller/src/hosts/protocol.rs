//! The smaller calls of hosts: bytes of images, and questions with their answers.

use axum::{
    Json,
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use http::StatusCode;
use mote_host_api::{BootSpec, HostReply, RequestId};

use super::{desired::wait, observed::boots, secrets::Speaker};
use crate::{
    app::App,
    http::{error::ApiError, json::JsonBody, query::Params},
    image,
};

/// Hex digits of a SHA-256.
const DIGEST_DIGITS: usize = 64;

/// `GET /hosts/{id}/images/{sha256}`: only of what a server on this host boots.
pub(super) async fn image(
    speaker: Speaker,
    State(app): State<App>,
    Path((_, sha256)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let not_found = || ApiError::NotFound("No server on this host boots that image.".into());
    let is_digest = sha256.len() == DIGEST_DIGITS
        && sha256.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    if !is_digest {
        return Err(not_found());
    }
    let found: Option<(String, Option<String>)> = sqlx::query_as(
        "SELECT boot, rescue FROM servers WHERE host_id = $1
             AND (boot LIKE '%\"' || $2 || '\"%' OR rescue LIKE '%\"' || $2 || '\"%') LIMIT 1",
    )
    .bind(&speaker.key)
    .bind(&sha256)
    .fetch_optional(&app.db)
    .await?;
    let (boot, rescue) = found.ok_or_else(not_found)?;
    let boots = boots(&boot, rescue.as_deref())?;
    let mut parts = boots.iter().flat_map(BootSpec::images);
    let part = parts.find(|part| part.sha256 == sha256).ok_or_else(not_found)?;
    image::data::send(&app.image_store, &sha256, 0..part.size).await
}

/// `GET /hosts/{id}/requests?wait=`.
pub(super) async fn requests(
    speaker: Speaker,
    State(app): State<App>,
    params: Params,
) -> Result<Response, ApiError> {
    let requests = app.hub.requests(speaker.id, wait(&params)?).await;
    match requests.is_empty() {
        true => Ok(StatusCode::NO_CONTENT.into_response()),
        false => Ok(Json(requests).into_response()),
    }
}

/// `POST /hosts/{id}/requests/{request_id}`.
pub(super) async fn reply(
    speaker: Speaker,
    State(app): State<App>,
    Path((_, request)): Path<(String, String)>,
    JsonBody(reply): JsonBody<HostReply>,
) -> Result<StatusCode, ApiError> {
    let not_found = || ApiError::NotFound("Nobody waits for this answer (any more).".into());
    let request: RequestId = request.parse().map_err(|_| not_found())?;
    match app.hub.reply(speaker.id, request, reply) {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(not_found()),
    }
}
