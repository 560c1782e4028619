//! Version documents, schemas, and what this Glance can do.

use axum::{
    Json,
    extract::{OriginalUri, Path, State},
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{attributes, routes::MAX_IMAGES_OF_PROJECT};
use crate::{
    app::App,
    http::{context::Ctx, error::ApiError},
};

/// 2.7 brought hidden images and `os_hash_*`; 2.8 and later are about several stores, which Mote does not have.
const CURRENT: &str = "v2.7";
/// Versions that are contained in it.
const SUPPORTED: [&str; 7] = ["v2.6", "v2.5", "v2.4", "v2.3", "v2.2", "v2.1", "v2.0"];

/// `GET /image` (300) and `/image/versions` (200).
pub async fn versions(State(app): State<App>, OriginalUri(uri): OriginalUri) -> (StatusCode, Json<Value>) {
    let entry = |id: &str, status: &str| {
        let links = [json!({"rel": "self", "href": format!("{}/image/v2/", app.config.public_url)})];
        json!({"id": id, "status": status, "links": links})
    };
    let mut versions = vec![entry(CURRENT, "CURRENT")];
    versions.extend(SUPPORTED.iter().map(|id| entry(id, "SUPPORTED")));
    let status = match uri.path().ends_with("versions") {
        true => StatusCode::OK,
        false => StatusCode::MULTIPLE_CHOICES,
    };
    (status, Json(json!({ "versions": versions })))
}

/// `GET /v2/info/stores`: the only one.
pub async fn stores(State(app): State<App>, _ctx: Ctx) -> Json<Value> {
    // Where the bucket is, is the administrators' business.
    let (id, kind, _) = app.image_store.names();
    let store = json!({"id": id, "description": format!("The cloud's own ({kind})"), "default": "true"});
    Json(json!({ "stores": [store] }))
}

/// `GET /v2/info/stores/detail`, for administrators.
///
/// # Errors
/// 403 for others.
pub async fn stores_detail(State(app): State<App>, ctx: Ctx) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let (id, kind, description) = app.image_store.names();
    let directory = app.config.state_dir.join("images");
    let store = json!({
        "id": id, "type": kind, "description": description, "default": "true",
        "properties": {"data_dir": directory, "max_image_bytes": app.config.max_image_bytes},
    });
    Ok(Json(json!({ "stores": [store] })))
}

/// `GET /v2/info/usage`: what the asker's project has of what is limited; -1 is no limit.
///
/// # Errors
/// 403 without a project.
pub async fn usage(State(app): State<App>, ctx: Ctx) -> Result<Json<Value>, ApiError> {
    let project = ctx.require_project()?;
    let (count, coming, size, staged): (i64, i64, i64, i64) = sqlx::query_as(
        "SELECT COUNT(*), COUNT(CASE WHEN import_state IS NOT NULL OR status = 'saving' THEN 1 END),
             CAST(COALESCE(SUM(CASE WHEN status IN ('active', 'deactivated') THEN size END), 0) AS BIGINT),
             CAST(COALESCE(SUM(CASE WHEN import_state IS NOT NULL THEN size END), 0) AS BIGINT)
         FROM images WHERE owner = $1",
    )
    .bind(project)
    .fetch_one(&app.db)
    .await?;
    let of = |limit: i64, usage: i64| json!({"limit": limit, "usage": usage});
    Ok(Json(json!({"usage": {
        "image_size_total": of(-1, size),
        "image_stage_total": of(-1, staged),
        "image_count_total": of(MAX_IMAGES_OF_PROJECT, count),
        "image_count_uploading": of(-1, coming),
    }})))
}

/// `GET /v2/schemas/{image,images,member,members,task,tasks}`.
///
/// # Errors
/// 404 for another name.
pub async fn schema(_ctx: Ctx, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let schema = match name.as_str() {
        "image" => image(),
        "images" => list("images", &image()),
        "member" => member(),
        "members" => list("members", &member()),
        "task" => task(),
        "tasks" => list("tasks", &task()),
        _ => return Err(ApiError::NotFound("There is no such schema.".into())),
    };
    Ok(Json(schema))
}

/// The schema of a list.
pub(super) fn list(name: &str, item: &Value) -> Value {
    json!({
        "name": name,
        "properties": {
            name: {"type": "array", "items": item},
            "schema": {"type": "string"},
            "first": {"type": "string"},
            "next": {"type": "string"},
        },
        "links": [
            {"rel": "first", "href": "{first}"},
            {"rel": "next", "href": "{next}"},
            {"rel": "describedby", "href": "{schema}"},
        ],
    })
}

fn image() -> Value {
    let text = || json!({"type": ["null", "string"], "maxLength": 255});
    let fixed = |kind: Value| json!({"type": kind, "readOnly": true});
    let number = || json!({"type": "integer", "minimum": 0, "maximum": i32::MAX});
    json!({
        "name": "image",
        "properties": {
            "id": {"type": "string", "pattern": "^([0-9a-fA-F]){8}-([0-9a-fA-F]){4}-([0-9a-fA-F]){4}-([0-9a-fA-F]){4}-([0-9a-fA-F]){12}$"},
            "name": text(),
            "status": {"type": "string", "readOnly": true, "enum": ["queued", "uploading", "importing", "saving", "active", "deactivated"]},
            "visibility": {"type": "string", "enum": ["community", "public", "private", "shared"]},
            "protected": {"type": "boolean"},
            "os_hidden": {"type": "boolean"},
            "owner": text(),
            "disk_format": {"type": ["null", "string"], "enum": or_null(&attributes::DISK_FORMATS)},
            "container_format": {"type": ["null", "string"], "enum": or_null(&attributes::CONTAINER_FORMATS)},
            "min_disk": number(),
            "min_ram": number(),
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 255}},
            "kernel_id": {"type": ["null", "string"], "is_base": false},
            "ramdisk_id": {"type": ["null", "string"], "is_base": false},
            "os_command_line": {"type": ["null", "string"], "is_base": false},
            "checksum": fixed(json!(["null", "string"])),
            "os_hash_algo": fixed(json!(["null", "string"])),
            "os_hash_value": fixed(json!(["null", "string"])),
            "size": fixed(json!(["null", "integer"])),
            "virtual_size": fixed(json!(["null", "integer"])),
            "created_at": fixed(json!("string")),
            "updated_at": fixed(json!("string")),
            "self": fixed(json!("string")),
            "file": fixed(json!("string")),
            "schema": fixed(json!("string")),
        },
        "additionalProperties": {"type": "string"},
        "links": [
            {"rel": "self", "href": "{self}"},
            {"rel": "enclosure", "href": "{file}"},
            {"rel": "describedby", "href": "{schema}"},
        ],
    })
}

fn or_null(words: &[&str]) -> Value {
    std::iter::once(Value::Null).chain(words.iter().map(|word| json!(word))).collect()
}

fn task() -> Value {
    let text = || json!({"type": "string"});
    let perhaps = || json!({"type": ["null", "string"]});
    json!({
        "name": "task",
        "properties": {
            "id": text(),
            "type": {"type": "string", "enum": ["api_image_import"]},
            "status": {"type": "string", "enum": ["pending", "processing", "success", "failure"]},
            "input": {"type": ["null", "object"]},
            "result": {"type": ["null", "object"]},
            "owner": text(),
            "message": text(),
            "image_id": text(),
            "user_id": text(),
            "request_id": text(),
            "expires_at": perhaps(),
            "created_at": text(),
            "updated_at": text(),
            "self": {"type": "string", "readOnly": true},
            "schema": {"type": "string", "readOnly": true},
        },
    })
}

fn member() -> Value {
    json!({
        "name": "member",
        "properties": {
            "member_id": {"type": "string"},
            "image_id": {"type": "string"},
            "status": {"type": "string", "enum": ["pending", "accepted", "rejected"]},
            "created_at": {"type": "string"},
            "updated_at": {"type": "string"},
            "schema": {"type": "string", "readOnly": true},
        },
    })
}
