//! What is in a namespace under its own name: properties, objects (groups of properties) and tags. They differ in how they
//! are shown, and in what a body of theirs may be ([`crate::schema`]).

use axum::{
    Json,
    extract::{Path, State},
};
use http::{HeaderMap, StatusCode};
use serde_json::{Map, Value, json};

use super::{
    MAX_LIMIT, MAX_PARTS, Sortable, find, namespaces::NamespaceRow, page, present, refuse_read_only,
    resource_types, time_key, unknown,
};
use crate::{
    app::App,
    db::{self, Conn},
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
};

/// Longest name, in characters (Glance's).
const MAX_NAME_CHARS: usize = 80;

/// A kind of part.
pub(super) trait Part {
    /// In the database and in messages.
    const KIND: &'static str;

    /// As it is shown alone and, in objects' case, in lists.
    fn shown(namespace: &str, row: &PartRow) -> Value;
}

/// Groups of properties.
pub(super) struct Objects;
/// Properties.
pub(super) struct Properties;
/// Tags.
pub(super) struct Tags;

impl Part for Objects {
    const KIND: &'static str = "object";

    fn shown(namespace: &str, row: &PartRow) -> Value {
        let mut shown = row.with_times();
        shown["self"] = json!(format!("/v2/metadefs/namespaces/{namespace}/objects/{}", row.name));
        shown["schema"] = json!("/v2/schemas/metadefs/object");
        shown
    }
}

impl Part for Properties {
    const KIND: &'static str = "property";

    fn shown(_namespace: &str, row: &PartRow) -> Value {
        let mut shown = Value::Object(row.document());
        shown["name"] = json!(row.name);
        shown
    }
}

impl Part for Tags {
    const KIND: &'static str = "tag";

    fn shown(_namespace: &str, row: &PartRow) -> Value {
        row.with_times()
    }
}

/// A stored part.
#[derive(Debug, sqlx::FromRow)]
pub(super) struct PartRow {
    namespace_id: String,
    pub(super) name: String,
    document: String,
    created_us: i64,
    updated_us: i64,
}

impl PartRow {
    /// A new one, as a body has it.
    ///
    /// # Errors
    /// 403 for what the service says itself, 400 without a name.
    pub(super) fn of_body<P: Part>(namespace_id: &str, body: Value) -> Result<Self, ApiError> {
        let mut body = match body {
            Value::Object(body) => body,
            _ => Map::new(),
        };
        refuse_read_only(&body)?;
        let name = match body.remove("name") {
            Some(Value::String(name)) if (1..=MAX_NAME_CHARS).contains(&name.chars().count()) => name,
            _ => {
                let text = format!(
                    "The name of a metadata definition {} has 1 to {MAX_NAME_CHARS} characters.",
                    P::KIND
                );
                return Err(ApiError::BadRequest(text));
            }
        };
        let now = db::now_us();
        Ok(Self {
            namespace_id: namespace_id.to_owned(),
            name,
            document: present(Value::Object(body)).to_string(),
            created_us: now,
            updated_us: now,
        })
    }

    /// All but the name.
    pub(super) fn document(&self) -> Map<String, Value> {
        serde_json::from_str(&self.document).unwrap_or_default()
    }

    fn with_times(&self) -> Value {
        let mut shown = self.document();
        shown.insert("name".into(), json!(self.name));
        shown.insert("created_at".into(), json!(db::rfc3339_s(self.created_us)));
        shown.insert("updated_at".into(), json!(db::rfc3339_s(self.updated_us)));
        Value::Object(shown)
    }
}

impl Sortable for PartRow {
    fn key(&self, name: &str) -> Option<String> {
        match name {
            "created_at" => Some(time_key(self.created_us)),
            "updated_at" => Some(time_key(self.updated_us)),
            "name" => Some(self.name.clone()),
            _ => None,
        }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn created_us(&self) -> i64 {
        self.created_us
    }
}

/// All parts of a kind, by name.
///
/// # Errors
/// Of the database.
pub(super) async fn of<P: Part>(conn: &mut Conn, namespace_id: &str) -> Result<Vec<PartRow>, sqlx::Error> {
    sqlx::query_as(
        "SELECT namespace_id, name, document, created_us, updated_us FROM metadef_parts
         WHERE namespace_id = $1 AND kind = $2 ORDER BY name",
    )
    .bind(namespace_id)
    .bind(P::KIND)
    .fetch_all(conn)
    .await
}

async fn find_part<P: Part>(
    conn: &mut Conn,
    namespace: &NamespaceRow,
    name: &str,
) -> Result<PartRow, ApiError> {
    let row: Option<PartRow> = sqlx::query_as(
        "SELECT namespace_id, name, document, created_us, updated_us FROM metadef_parts
         WHERE namespace_id = $1 AND kind = $2 AND name = $3",
    )
    .bind(&namespace.id)
    .bind(P::KIND)
    .bind(name)
    .fetch_optional(conn)
    .await?;
    row.ok_or_else(|| unknown(&format!("The metadata definition {}", P::KIND), name))
}

fn conflict<P: Part>(error: sqlx::Error, name: &str, namespace: &NamespaceRow) -> ApiError {
    match db::is_unique_violation(&error) {
        true => ApiError::Conflict(format!(
            "A metadata definition {} with name={name} already exists in namespace={}.",
            P::KIND,
            namespace.namespace
        )),
        false => error.into(),
    }
}

/// Keeps a new part.
///
/// # Errors
/// 409 if there is one of that name, 413 if there are too many.
pub(super) async fn insert<P: Part>(
    conn: &mut Conn,
    namespace: &NamespaceRow,
    row: PartRow,
) -> Result<PartRow, ApiError> {
    let there: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM metadef_parts WHERE namespace_id = $1 AND kind = $2")
            .bind(&namespace.id)
            .bind(P::KIND)
            .fetch_one(&mut *conn)
            .await?;
    if there >= MAX_PARTS {
        return Err(ApiError::OverQuota(format!("A namespace can have at most {MAX_PARTS} of a kind.")));
    }
    sqlx::query(
        "INSERT INTO metadef_parts (namespace_id, kind, name, document, created_us, updated_us)
         VALUES ($1, $2, $3, $4, $5, $5)",
    )
    .bind(&row.namespace_id)
    .bind(P::KIND)
    .bind(&row.name)
    .bind(&row.document)
    .bind(row.created_us)
    .execute(conn)
    .await
    .map_err(|error| conflict::<P>(error, &row.name, namespace))?;
    Ok(row)
}

type InNamespace = Path<(String, String)>;

/// `GET …/objects`.
///
/// # Errors
/// 404 for an unknown namespace or marker.
pub(super) async fn objects(
    State(app): State<App>,
    ctx: Ctx,
    Path(name): Path<String>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let namespace = find(&mut conn, &ctx, &name).await?;
    let (rows, _) = page(&params, of::<Objects>(&mut conn, &namespace.id).await?, MAX_LIMIT)?;
    let items: Vec<Value> = rows.iter().map(|row| Objects::shown(&namespace.namespace, row)).collect();
    Ok(Json(json!({"objects": items, "schema": "v2/schemas/metadefs/objects"})))
}

/// `GET …/properties`: all, by name.
///
/// # Errors
/// 404 for an unknown namespace.
pub(super) async fn properties(
    State(app): State<App>,
    ctx: Ctx,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let namespace = find(&mut conn, &ctx, &name).await?;
    let rows = of::<Properties>(&mut conn, &namespace.id).await?;
    let items: Map<String, Value> =
        rows.iter().map(|row| (row.name.clone(), Value::Object(row.document()))).collect();
    Ok(Json(json!({ "properties": items })))
}

/// `GET …/tags`: names.
///
/// # Errors
/// 404 for an unknown namespace or marker.
pub(super) async fn tags(
    State(app): State<App>,
    ctx: Ctx,
    Path(name): Path<String>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let namespace = find(&mut conn, &ctx, &name).await?;
    let (rows, _) = page(&params, of::<Tags>(&mut conn, &namespace.id).await?, MAX_LIMIT)?;
    let items: Vec<Value> = rows.iter().map(|row| json!({"name": row.name})).collect();
    Ok(Json(json!({ "tags": items })))
}

/// `GET …/objects/{object}` and `GET …/tags/{tag}`.
///
/// # Errors
/// 404.
pub(super) async fn show<P: Part>(
    State(app): State<App>,
    ctx: Ctx,
    Path((namespace, name)): InNamespace,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let namespace = find(&mut conn, &ctx, &namespace).await?;
    let row = find_part::<P>(&mut conn, &namespace, &name).await?;
    Ok(Json(P::shown(&namespace.namespace, &row)))
}

/// `GET …/properties/{property}`: with the name that it has on a kind of thing, if one is named.
///
/// # Errors
/// 404, also if the name has not the prefix of that kind.
pub(super) async fn property(
    State(app): State<App>,
    ctx: Ctx,
    Path((namespace, name)): InNamespace,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let namespace = find(&mut conn, &ctx, &namespace).await?;
    let mut within = name.as_str();
    if let Some(of_type) = params.get("resource_type") {
        let associations = resource_types::of(&mut conn, &namespace.id).await?;
        let association = associations.iter().find(|one| one.name() == of_type);
        let association = association.ok_or_else(|| unknown("Resource type association", of_type))?;
        let prefix = association.prefix().unwrap_or_default();
        within = name.strip_prefix(prefix).filter(|_| !prefix.is_empty()).ok_or_else(|| {
            ApiError::NotFound(format!(
                "Property does not start with the expected resource type association prefix of '{prefix}'."
            ))
        })?;
    }
    let row = find_part::<Properties>(&mut conn, &namespace, within).await?;
    Ok(Json(Properties::shown(&namespace.namespace, &row)))
}

/// `POST …/objects` and `POST …/properties`.
///
/// # Errors
/// 404, 409.
pub(super) async fn create<P: Part>(
    State(app): State<App>,
    ctx: Ctx,
    Path(namespace): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    add::<P>(&app, &ctx, &namespace, body).await
}

/// `POST …/tags/{tag}`.
///
/// # Errors
/// 404, 409.
pub(super) async fn create_tag(
    State(app): State<App>,
    ctx: Ctx,
    Path((namespace, name)): InNamespace,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    add::<Tags>(&app, &ctx, &namespace, json!({ "name": name })).await
}

async fn add<P: Part>(
    app: &App,
    ctx: &Ctx,
    namespace: &str,
    body: Value,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut tx = app.begin().await?;
    let namespace = find(&mut tx, ctx, namespace).await?;
    let row = insert::<P>(&mut tx, &namespace, PartRow::of_body::<P>(&namespace.id, body)?).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(P::shown(&namespace.namespace, &row))))
}

/// `POST …/tags`: these in place of those that were, or beside them with `X-Openstack-Append: true`.
///
/// # Errors
/// 404, 409.
pub(super) async fn set_tags(
    State(app): State<App>,
    ctx: Ctx,
    Path(namespace): Path<String>,
    headers: HeaderMap,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let appends = headers.get("x-openstack-append").is_some_and(|value| {
        let value = value.as_bytes().to_ascii_lowercase();
        ["1", "t", "true", "on", "y", "yes"].iter().any(|yes| yes.as_bytes() == value)
    });
    let mut tx = app.begin().await?;
    let namespace = find(&mut tx, &ctx, &namespace).await?;
    let tags = body["tags"].as_array().cloned().unwrap_or_default();
    if !appends && !tags.is_empty() {
        remove_all::<Tags>(&mut tx, &namespace).await?;
    }
    let mut made = Vec::with_capacity(tags.len());
    for tag in tags {
        let row = insert::<Tags>(&mut tx, &namespace, PartRow::of_body::<Tags>(&namespace.id, tag)?).await?;
        made.push(json!({"name": row.name}));
    }
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({ "tags": made }))))
}

/// `PUT` of a part: all of it anew, also its name.
///
/// # Errors
/// 404, 409 if another has the new name.
pub(super) async fn update<P: Part>(
    State(app): State<App>,
    ctx: Ctx,
    Path((namespace, name)): InNamespace,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut tx = app.begin().await?;
    let namespace = find(&mut tx, &ctx, &namespace).await?;
    let before = find_part::<P>(&mut tx, &namespace, &name).await?;
    let mut row = PartRow::of_body::<P>(&namespace.id, body)?;
    row.created_us = before.created_us;
    sqlx::query(
        "UPDATE metadef_parts SET name = $4, document = $5, updated_us = $6
         WHERE namespace_id = $1 AND kind = $2 AND name = $3",
    )
    .bind(&namespace.id)
    .bind(P::KIND)
    .bind(&before.name)
    .bind(&row.name)
    .bind(&row.document)
    .bind(row.updated_us)
    .execute(&mut *tx)
    .await
    .map_err(|error| conflict::<P>(error, &row.name, &namespace))?;
    tx.commit().await?;
    Ok(Json(P::shown(&namespace.namespace, &row)))
}

/// `DELETE` of a part.
///
/// # Errors
/// 404, 403 if the namespace is protected.
pub(super) async fn delete<P: Part>(
    State(app): State<App>,
    ctx: Ctx,
    Path((namespace, name)): InNamespace,
) -> Result<StatusCode, ApiError> {
    let mut tx = app.begin().await?;
    let namespace = find(&mut tx, &ctx, &namespace).await?;
    let row = find_part::<P>(&mut tx, &namespace, &name).await?;
    namespace.require_unprotected()?;
    sqlx::query("DELETE FROM metadef_parts WHERE namespace_id = $1 AND kind = $2 AND name = $3")
        .bind(&namespace.id)
        .bind(P::KIND)
        .bind(&row.name)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn remove_all<P: Part>(conn: &mut Conn, namespace: &NamespaceRow) -> Result<(), sqlx::Error> {
    sqlx::query("DELETE FROM metadef_parts WHERE namespace_id = $1 AND kind = $2")
        .bind(&namespace.id)
        .bind(P::KIND)
        .execute(conn)
        .await
        .map(drop)
}

/// `DELETE` of all parts of a kind.
///
/// # Errors
/// 404, 403 if the namespace is protected.
pub(super) async fn clear<P: Part>(
    State(app): State<App>,
    ctx: Ctx,
    Path(namespace): Path<String>,
) -> Result<StatusCode, ApiError> {
    let mut tx = app.begin().await?;
    let namespace = find(&mut tx, &ctx, &namespace).await?;
    namespace.require_unprotected()?;
    remove_all::<P>(&mut tx, &namespace).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
