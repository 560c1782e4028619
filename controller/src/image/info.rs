//! Version documents, schemas, and what this Glance can do.

use axum::{
    Json,
    extract::{OriginalUri, Path, State},
};
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    app::App,
    http::{context::Ctx, error::ApiError},
};

/// 2.7 brought hidden images and `os_hash_*`; 2.8 and later are about several stores, which Mote does not have.
const CURRENT: &str = "v2.7";
/// Versions that are contained in it. (2.6 is image import, of which there is no method.)
const SUPPORTED: [&str; 6] = ["v2.5", "v2.4", "v2.3", "v2.2", "v2.1", "v2.0"];

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

/// `GET /v2/info/import`: no method.
pub async fn import(_ctx: Ctx) -> Json<Value> {
    let methods = json!({"description": "Import methods available.", "type": "array", "value": []});
    Json(json!({"import-methods": methods}))
}

/// `GET /v2/info/stores`: the only one.
pub async fn stores(_ctx: Ctx) -> Json<Value> {
    Json(json!({"stores": [{"id": "local", "description": "Files of the controller", "default": true}]}))
}

/// `GET /v2/schemas/{image,images,member,members}`.
///
/// # Errors
/// 404 for another name.
pub async fn schema(_ctx: Ctx, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let schema = match name.as_str() {
        "image" => image(),
        "images" => list("images", &image()),
        "member" => member(),
        "members" => list("members", &member()),
        _ => return Err(ApiError::NotFound("There is no such schema.".into())),
    };
    Ok(Json(schema))
}

fn list(name: &str, item: &Value) -> Value {
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
            "status": {"type": "string", "readOnly": true, "enum": ["queued", "saving", "active", "deactivated"]},
            "visibility": {"type": "string", "enum": ["community", "public", "private", "shared"]},
            "protected": {"type": "boolean"},
            "os_hidden": {"type": "boolean"},
            "owner": text(),
            "disk_format": {"type": ["null", "string"], "enum": [null, "raw", "aki", "ari"]},
            "container_format": {"type": ["null", "string"], "enum": [null, "bare", "aki", "ari"]},
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
