//! `/v2/schemas/metadefs/{name}`: what namespaces and what is in them look like, as JSON schemas.

use axum::{Json, extract::Path};
use serde_json::{Value, json};

use crate::{
    http::{context::Ctx, error::ApiError},
    image::info,
};

/// Types that a property can have.
const TYPES: [&str; 6] = ["array", "boolean", "integer", "number", "object", "string"];

/// `GET /v2/schemas/metadefs/{name}`.
///
/// # Errors
/// 404 for another name.
pub(super) async fn show(_ctx: Ctx, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let schema = match name.as_str() {
        "namespace" => namespace(),
        "namespaces" => info::list("namespaces", &namespace()),
        "resource_type" => association(),
        "resource_types" => info::list("resource_type_associations", &association()),
        "property" => property(&["type", "title", "name"]),
        "properties" => by_name(),
        "object" => object(),
        "objects" => info::list("objects", &object()),
        "tag" => tag(),
        "tags" => info::list("tags", &tag()),
        _ => return Err(ApiError::NotFound("There is no such schema.".into())),
    };
    Ok(Json(schema))
}

fn text(most: u32) -> Value {
    json!({"type": "string", "maxLength": most})
}

fn fixed() -> Value {
    json!({"type": "string", "readOnly": true})
}

fn time() -> Value {
    json!({"type": "string", "format": "date-time", "readOnly": true})
}

fn texts() -> Value {
    json!({"type": "array", "items": {"type": "string"}, "uniqueItems": true})
}

fn property_members() -> Value {
    let number = || json!({"type": "integer", "minimum": 0});
    json!({
        "name": text(80),
        "title": {"type": "string"},
        "description": {"type": "string"},
        "type": {"type": "string", "enum": TYPES},
        "operators": {"type": "array", "items": {"type": "string"}},
        "required": texts(),
        "default": {},
        "readonly": {"type": "boolean"},
        "confidential": {"type": "boolean"},
        "enum": {"type": "array"},
        "pattern": {"type": "string", "format": "regex"},
        "minimum": {"type": "number"},
        "maximum": {"type": "number"},
        "minLength": number(),
        "maxLength": number(),
        "items": {"type": "object", "properties": {"type": {"type": "string", "enum": TYPES}, "enum": {"type": "array"}}},
        "minItems": number(),
        "maxItems": number(),
        "uniqueItems": {"type": "boolean", "default": false},
        "additionalItems": {"type": "boolean"},
    })
}

fn property(required: &[&str]) -> Value {
    json!({
        "name": "property",
        "properties": property_members(),
        "required": required,
        "additionalProperties": false,
    })
}

fn properties() -> Value {
    let one = json!({"type": "object", "properties": property_members(), "required": ["title", "type"]});
    json!({"type": "object", "additionalProperties": one})
}

fn by_name() -> Value {
    let mut schema = info::list("properties", &Value::Null);
    let one = property(&["type", "title"]);
    schema["properties"]["properties"] = json!({"type": "object", "additionalProperties": one});
    schema
}

fn object() -> Value {
    json!({
        "name": "object",
        "properties": {
            "name": text(80),
            "description": {"type": "string"},
            "required": texts(),
            "properties": properties(),
            "created_at": time(),
            "updated_at": time(),
            "self": fixed(),
            "schema": fixed(),
        },
        "required": ["name"],
        "additionalProperties": false,
    })
}

fn tag() -> Value {
    json!({
        "name": "tag",
        "properties": {"name": text(80), "created_at": time(), "updated_at": time()},
        "required": ["name"],
        "additionalProperties": false,
    })
}

fn association() -> Value {
    json!({
        "name": "resource_type_association",
        "properties": {
            "name": text(80),
            "prefix": text(80),
            "properties_target": text(80),
            "created_at": time(),
            "updated_at": time(),
        },
        "required": ["name"],
        "additionalProperties": false,
    })
}

fn namespace() -> Value {
    let parts = |of: Value| json!({"type": "array", "items": {"type": "object", "properties": of}});
    json!({
        "name": "namespace",
        "properties": {
            "namespace": text(80),
            "display_name": text(80),
            "description": text(500),
            "visibility": {"type": "string", "enum": ["public", "private"]},
            "protected": {"type": "boolean"},
            "owner": text(255),
            "created_at": time(),
            "updated_at": time(),
            "self": fixed(),
            "schema": fixed(),
            "properties": properties(),
            "objects": parts(object()["properties"].take()),
            "resource_type_associations": parts(association()["properties"].take()),
            "tags": parts(json!({"name": text(80)})),
        },
        "required": ["namespace"],
        "additionalProperties": false,
    })
}
