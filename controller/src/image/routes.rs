//! `/v2/images`: records.

use std::collections::{BTreeMap, BTreeSet};

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State, rejection::BytesRejection},
    response::{IntoResponse, Response},
};
use http::{HeaderMap, StatusCode, header};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{
    attributes, blobs, import,
    patch::{self, OldOperation, Operation},
    record::{self, Image, Status},
    require_owner,
};
use crate::{
    app::App,
    db,
    http::{
        context::Ctx,
        error::ApiError,
        json::{self, JsonBody},
    },
    schema::Expected,
};

/// Most images of a project.
pub const MAX_IMAGES_OF_PROJECT: i64 = 1000;

/// `POST /v2/images`.
///
/// # Errors
/// 400 or 403 for impossible attributes, 409 if the id is taken.
pub async fn create(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(mut body): JsonBody<Map<String, Value>>,
) -> Result<Response, ApiError> {
    ctx.require_writer()?;
    let now = db::now_us();
    let mut image = Image {
        id: new_id(body.remove("id"))?,
        owner: ctx.require_project()?.to_owned(),
        name: None,
        status: Status::Queued,
        visibility: "shared".into(),
        protected: false,
        hidden: false,
        disk_format: None,
        container_format: None,
        min_disk_gib: 0,
        min_ram_mib: 0,
        content: None,
        staged: None,
        properties: BTreeMap::new(),
        tags: BTreeSet::new(),
        created_us: now,
        updated_us: now,
    };
    for (name, value) in &body {
        attributes::set(&mut image, name, value, &ctx)?;
    }
    attributes::check(&image)?;
    let mut tx = app.begin().await?;
    let owned: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM images WHERE owner = $1")
        .bind(&image.owner)
        .fetch_one(&mut *tx)
        .await?;
    if owned >= MAX_IMAGES_OF_PROJECT {
        return Err(ApiError::OverQuota(format!(
            "A project can have at most {MAX_IMAGES_OF_PROJECT} images."
        )));
    }
    record::insert(&mut tx, &image).await.map_err(|error| match db::is_unique_violation(&error) {
        true => ApiError::Conflict(format!("Image ID {} already exists!", image.id)),
        false => error.into(),
    })?;
    tx.commit().await?;
    let url = format!("{}/image/v2/images/{}", app.config.public_url, image.id);
    // By this header clients learn that, and how, bytes can be imported.
    let methods = import::methods(&app).join(",");
    let headers = [(header::LOCATION, url), (import::METHODS_HEADER, methods)];
    Ok((StatusCode::CREATED, headers, Json(image.json())).into_response())
}

/// The client's id if it gave one.
fn new_id(given: Option<Value>) -> Result<String, ApiError> {
    match given {
        None => Ok(Uuid::new_v4().to_string()),
        Some(Value::String(id)) if id.len() == 36 && id.parse::<Uuid>().is_ok() => {
            Ok(id.to_ascii_lowercase())
        }
        Some(_) => Err(ApiError::BadRequest("The id must be a UUID.".into())),
    }
}

/// `GET /v2/images/{id}`.
///
/// # Errors
/// 404.
pub async fn show(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let image = record::find(&mut *app.db.acquire().await?, &id, &ctx).await?;
    Ok(Json(image.json()))
}

/// `PATCH /v2/images/{id}`.
///
/// # Errors
/// See [`patch::apply`].
pub async fn update(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    headers: HeaderMap,
    expected: Expected,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    let kind = headers.get(header::CONTENT_TYPE);
    let is = |media_type: &str| kind.is_some_and(|value| value == media_type);
    let operations: Vec<Operation> = if is(patch::MEDIA_TYPE) {
        json::parse_as(&body.map_err(json::body_error)?, &expected)?
    } else if is(patch::OLD_MEDIA_TYPE) {
        let operations: Vec<OldOperation> = json::parse(&body.map_err(json::body_error)?)?;
        operations.into_iter().map(Operation::try_from).collect::<Result<_, _>>()?
    } else {
        return Err(ApiError::UnsupportedMedia(format!("The body must be of type {}.", patch::MEDIA_TYPE)));
    };
    let mut tx = app.begin().await?;
    let mut image = record::find(&mut tx, &id, &ctx).await?;
    require_owner(&image, &ctx)?;
    patch::apply(&mut image, &operations, &ctx)?;
    record::update(&mut tx, &mut image).await?;
    tx.commit().await?;
    Ok(Json(image.json()))
}

/// `DELETE /v2/images/{id}`: the record, then its bytes if nothing else needs them.
///
/// # Errors
/// 403 for a protected image.
pub async fn delete(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let mut tx = app.begin().await?;
    let image = record::find(&mut tx, &id, &ctx).await?;
    require_owner(&image, &ctx)?;
    if image.protected {
        return Err(ApiError::Forbidden(format!("Image {id} is protected and cannot be deleted.")));
    }
    sqlx::query("DELETE FROM images WHERE id = $1").bind(&image.id).execute(&mut *tx).await?;
    tx.commit().await?;
    let digests = image.digests();
    if !digests.is_empty() {
        // The image is gone whatever comes now; bytes that stay are removed at the next start.
        if let Err(error) = blobs::release(&app, &digests).await {
            tracing::error!(image = id, error = %crate::http::error::chain(&error), "bytes of a deleted image stay");
        }
    }
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v2/images/{id}/actions/{deactivate,reactivate}`, by the owner's members and administrators.
///
/// # Errors
/// 403 if the image has no bytes.
pub async fn act(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, action)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let mut tx = app.begin().await?;
    let mut image = record::find(&mut tx, &id, &ctx).await?;
    let status = match action.as_str() {
        "deactivate" => Status::Deactivated,
        "reactivate" => Status::Active,
        _ => return Err(ApiError::NotFound("There is no such action.".into())),
    };
    require_owner(&image, &ctx)?;
    if !matches!(image.status, Status::Active | Status::Deactivated) {
        let text = format!("Not allowed to {action} image in status '{}'", image.status.as_str());
        return Err(ApiError::Forbidden(text));
    }
    image.status = status;
    record::update(&mut tx, &mut image).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `PUT /v2/images/{id}/tags/{tag}`.
///
/// # Errors
/// 413 if there are too many.
pub async fn add_tag(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, tag)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    change_tags(&app, &ctx, &id, |image| {
        image.tags.insert(attributes::checked_tag(&tag)?);
        attributes::check(image)
    })
    .await
}

/// `DELETE /v2/images/{id}/tags/{tag}`.
///
/// # Errors
/// 404 if it hasn't that tag.
pub async fn remove_tag(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, tag)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let unknown = || ApiError::NotFound("The image does not have this tag.".into());
    change_tags(&app, &ctx, &id, |image| image.tags.remove(&tag).then_some(()).ok_or_else(unknown)).await
}

async fn change_tags(
    app: &App,
    ctx: &Ctx,
    id: &str,
    change: impl FnOnce(&mut Image) -> Result<(), ApiError>,
) -> Result<StatusCode, ApiError> {
    let mut tx = app.begin().await?;
    let mut image = record::find(&mut tx, id, ctx).await?;
    require_owner(&image, ctx)?;
    change(&mut image)?;
    record::update(&mut tx, &mut image).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
