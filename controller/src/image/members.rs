//! `/v2/images/{id}/members`: projects that an image is shared with. Each sees the image by its id at once, and in lists
//! when it has accepted.

use crate::db::Conn;
use axum::{
    Json,
    extract::{Path, State},
};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    record::{self, Image},
    require_owner,
};
use crate::{
    app::App,
    db,
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// Most members of an image (Glance's `image_member_quota`).
const MAX_MEMBERS: i64 = 128;
/// Longest id of a project.
const MAX_ID_CHARS: usize = 64;

#[derive(Debug, sqlx::FromRow)]
struct Member {
    image_id: String,
    member_id: String,
    status: String,
    created_us: i64,
    updated_us: i64,
}

impl Member {
    fn json(&self) -> Value {
        json!({
            "image_id": self.image_id,
            "member_id": self.member_id,
            "status": self.status,
            "created_at": db::rfc3339_s(self.created_us),
            "updated_at": db::rfc3339_s(self.updated_us),
            "schema": "/v2/schemas/member",
        })
    }
}

/// Body of `POST`.
#[derive(Debug, Deserialize)]
pub struct NewMember {
    member: String,
}

/// Body of `PUT`.
#[derive(Debug, Deserialize)]
pub struct Answer {
    status: String,
}

async fn shared_image(conn: &mut Conn, id: &str, ctx: &Ctx) -> Result<Image, ApiError> {
    let image = record::find(conn, id, ctx).await?;
    match image.visibility == "shared" {
        true => Ok(image),
        false => Err(ApiError::Forbidden("Only shared images have members.".into())),
    }
}

/// All members for the owner; only itself for a member.
async fn visible(conn: &mut Conn, image: &Image, ctx: &Ctx) -> Result<Vec<Member>, sqlx::Error> {
    let sees_all = ctx.is_admin || ctx.project_id.as_deref() == Some(image.owner.as_str());
    sqlx::query_as(
        "SELECT * FROM image_members WHERE image_id = $1 AND ($2 OR member_id = $3) ORDER BY member_id",
    )
    .bind(&image.id)
    .bind(sees_all)
    .bind(ctx.project_id.as_deref())
    .fetch_all(conn)
    .await
}

fn unknown(member: &str) -> ApiError {
    let member: String = member.chars().take(MAX_ID_CHARS).collect();
    ApiError::NotFound(format!("The image has no member {member}."))
}

/// `GET …/members`.
///
/// # Errors
/// 404, or 403 for an image that isn't shared.
pub async fn index(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let image = shared_image(&mut conn, &id, &ctx).await?;
    let members: Vec<Value> = visible(&mut conn, &image, &ctx).await?.iter().map(Member::json).collect();
    Ok(Json(json!({"members": members, "schema": "/v2/schemas/members"})))
}

/// `GET …/members/{project}`.
///
/// # Errors
/// 404.
pub async fn show(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, member)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let image = shared_image(&mut conn, &id, &ctx).await?;
    let members = visible(&mut conn, &image, &ctx).await?;
    let found = members.iter().find(|m| m.member_id == member).ok_or_else(|| unknown(&member))?;
    Ok(Json(found.json()))
}

/// `POST …/members`, by the owner.
///
/// # Errors
/// 409 if it is a member, 413 if there are too many.
pub async fn add(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<NewMember>,
) -> Result<Json<Value>, ApiError> {
    if body.member.is_empty() || body.member.chars().count() > MAX_ID_CHARS {
        return Err(ApiError::BadRequest("member must be the id of a project.".into()));
    }
    let mut tx = app.begin().await?;
    let image = shared_image(&mut tx, &id, &ctx).await?;
    require_owner(&image, &ctx)?;
    let now = db::now_us();
    let member = Member {
        image_id: image.id,
        member_id: body.member,
        status: "pending".into(),
        created_us: now,
        updated_us: now,
    };
    let members: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM image_members WHERE image_id = $1")
        .bind(&member.image_id)
        .fetch_one(&mut *tx)
        .await?;
    if members >= MAX_MEMBERS {
        return Err(ApiError::TooLarge(format!("An image can have at most {MAX_MEMBERS} members.")));
    }
    sqlx::query(
        "INSERT INTO image_members (image_id, member_id, status, created_us, updated_us) VALUES ($1, $2, $3, $4, $4)",
    )
    .bind(&member.image_id)
    .bind(&member.member_id)
    .bind(&member.status)
    .bind(now)
    .execute(&mut *tx)
    .await
    .map_err(|error| match db::is_unique_violation(&error) {
        true => ApiError::Conflict("It is a member already.".into()),
        false => error.into(),
    })?;
    tx.commit().await?;
    Ok(Json(member.json()))
}

/// `PUT …/members/{project}`, by the member.
///
/// # Errors
/// 403 for others.
pub async fn answer(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, member)): Path<(String, String)>,
    JsonBody(body): JsonBody<Answer>,
) -> Result<Json<Value>, ApiError> {
    if !["pending", "accepted", "rejected"].contains(&body.status.as_str()) {
        return Err(ApiError::BadRequest("status must be one of pending, accepted, rejected.".into()));
    }
    let mut tx = app.begin().await?;
    let image = shared_image(&mut tx, &id, &ctx).await?;
    let mut members = visible(&mut tx, &image, &ctx).await?;
    let found = members.iter_mut().find(|m| m.member_id == member).ok_or_else(|| unknown(&member))?;
    if !ctx.is_admin && ctx.project_id.as_deref() != Some(found.member_id.as_str()) {
        return Err(ApiError::Forbidden("Only the member itself can answer.".into()));
    }
    ctx.require_writer()?;
    found.status = body.status;
    found.updated_us = db::now_us();
    sqlx::query(
        "UPDATE image_members SET status = $3, updated_us = $4 WHERE image_id = $1 AND member_id = $2",
    )
    .bind(&found.image_id)
    .bind(&found.member_id)
    .bind(&found.status)
    .bind(found.updated_us)
    .execute(&mut *tx)
    .await?;
    let shown = found.json();
    tx.commit().await?;
    Ok(Json(shown))
}

/// `DELETE …/members/{project}`, by the owner.
///
/// # Errors
/// 404.
pub async fn remove(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, member)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let mut tx = app.begin().await?;
    let image = shared_image(&mut tx, &id, &ctx).await?;
    require_owner(&image, &ctx)?;
    let gone = sqlx::query("DELETE FROM image_members WHERE image_id = $1 AND member_id = $2")
        .bind(&image.id)
        .bind(&member)
        .execute(&mut *tx)
        .await?;
    if gone.rows_affected() == 0 {
        return Err(unknown(&member));
    }
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
