//! `/v2/metadefs/namespaces`.

use axum::{
    Json,
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use http::{StatusCode, header};
use serde_json::{Map, Value, json};

use super::{
    MAX_NAMESPACES, Sortable, find, page,
    parts::{self, Objects, Part, PartRow, Properties, Tags},
    present, refuse_read_only, resource_types, time_key,
};
use crate::{
    app::App,
    db::{self, Conn},
    http::{
        context::Ctx,
        error::ApiError,
        json::JsonBody,
        query::{Params, escaped},
    },
};

/// Namespaces on a page if the client doesn't say.
const DEFAULT_LIMIT: u64 = 25;

/// A stored namespace.
#[derive(Debug, sqlx::FromRow)]
pub(super) struct NamespaceRow {
    pub(super) id: String,
    pub(super) namespace: String,
    display_name: Option<String>,
    description: Option<String>,
    visibility: String,
    protected: bool,
    owner: String,
    created_us: i64,
    updated_us: i64,
}

impl NamespaceRow {
    fn json(&self) -> Value {
        present(json!({
            "namespace": self.namespace,
            "display_name": self.display_name,
            "description": self.description,
            "visibility": self.visibility,
            "protected": self.protected,
            "owner": self.owner,
            "created_at": db::rfc3339_s(self.created_us),
            "updated_at": db::rfc3339_s(self.updated_us),
            "self": format!("/v2/metadefs/namespaces/{}", self.namespace),
            "schema": "/v2/schemas/metadefs/namespace",
        }))
    }

    pub(super) fn is_visible_to(&self, ctx: &Ctx) -> bool {
        ctx.is_admin || self.visibility == "public" || ctx.project_id.as_deref() == Some(self.owner.as_str())
    }

    /// What is protected loses nothing.
    ///
    /// # Errors
    /// 403.
    pub(super) fn require_unprotected(&self) -> Result<(), ApiError> {
        match self.protected {
            true => Err(ApiError::Forbidden(format!(
                "Metadata definition namespace {} is protected and cannot be deleted, nor what is in it.",
                self.namespace
            ))),
            false => Ok(()),
        }
    }

    /// Takes all that a namespace says of itself; what isn't there is as in a new one.
    fn apply(&mut self, body: &Map<String, Value>, ctx: &Ctx) -> Result<(), ApiError> {
        refuse_read_only(body)?;
        let text = |name: &str| body.get(name).and_then(Value::as_str).map(str::to_owned);
        self.namespace = text("namespace").unwrap_or_default();
        self.display_name = text("display_name");
        self.description = text("description");
        self.visibility = text("visibility").unwrap_or_else(|| "private".into());
        self.protected = body.get("protected").and_then(Value::as_bool).unwrap_or(false);
        self.owner = match text("owner") {
            Some(owner) => owner,
            None => ctx.require_project()?.to_owned(),
        };
        Ok(())
    }
}

impl Sortable for NamespaceRow {
    fn key(&self, name: &str) -> Option<String> {
        match name {
            "created_at" => Some(time_key(self.created_us)),
            "updated_at" => Some(time_key(self.updated_us)),
            "namespace" => Some(self.namespace.clone()),
            "display_name" => Some(self.display_name.clone().unwrap_or_default()),
            "visibility" => Some(self.visibility.clone()),
            "owner" => Some(self.owner.clone()),
            _ => None,
        }
    }

    fn name(&self) -> &str {
        &self.namespace
    }

    fn created_us(&self) -> i64 {
        self.created_us
    }
}

/// `GET /v2/metadefs/namespaces`.
///
/// # Errors
/// 400 for impossible parameters, 404 for an unknown marker.
pub(super) async fn index(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    let visibility = params.get("visibility");
    if visibility.is_some_and(|visibility| !["public", "private"].contains(&visibility)) {
        return Err(ApiError::BadRequest("Invalid visibility value: it is public or private.".into()));
    }
    let mut conn = app.db.acquire().await?;
    let mut rows: Vec<NamespaceRow> =
        sqlx::query_as("SELECT * FROM metadef_namespaces WHERE CAST($1 AS TEXT) IS NULL OR visibility = $1")
            .bind(visibility)
            .fetch_all(&mut *conn)
            .await?;
    rows.retain(|row| row.is_visible_to(&ctx));
    let associations = resource_types::all(&mut conn).await?;
    if let Some(types) = params.get("resource_types") {
        let types: Vec<&str> = types.split(',').collect();
        rows.retain(|row| associations.iter().any(|one| one.is_of(&row.id) && types.contains(&one.name())));
    }
    let (rows, is_full) = page(&params, rows, DEFAULT_LIMIT)?;
    let shown = rows.iter().map(|row| {
        let mut shown = row.json();
        let of_it: Vec<Value> =
            associations.iter().filter(|one| one.is_of(&row.id)).map(|one| one.json()).collect();
        if !of_it.is_empty() {
            shown["resource_type_associations"] = Value::Array(of_it);
        }
        shown
    });
    let path = "/v2/metadefs/namespaces";
    let mut body = json!({
        "namespaces": shown.collect::<Vec<_>>(),
        "first": params.link(path, None),
        "schema": "/v2/schemas/metadefs/namespaces",
    });
    if let (true, Some(last)) = (is_full, rows.last()) {
        body["next"] = json!(params.link(path, Some(&last.namespace)));
    }
    Ok(Json(body))
}

/// `GET /v2/metadefs/namespaces/{namespace}`, with all that is in it.
///
/// # Errors
/// 404.
pub(super) async fn show(
    State(app): State<App>,
    ctx: Ctx,
    Path(name): Path<String>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let row = find(&mut conn, &ctx, &name).await?;
    Ok(Json(whole(&mut conn, &row, params.get("resource_type")).await?))
}

/// A namespace with what is in it, whose properties have the prefix of a kind of thing.
async fn whole(conn: &mut Conn, row: &NamespaceRow, of_type: Option<&str>) -> Result<Value, ApiError> {
    let mut shown = row.json();
    let associations = resource_types::of(conn, &row.id).await?;
    let prefix = associations.iter().find(|one| Some(one.name()) == of_type).and_then(|one| one.prefix());
    let prefixed = |name: &str| format!("{}{name}", prefix.unwrap_or_default());
    let objects = parts::of::<Objects>(conn, &row.id).await?;
    let objects = objects.iter().map(|object| {
        let mut shown = Objects::shown(&row.namespace, object);
        if let Some(Value::Object(properties)) = shown.get_mut("properties").map(Value::take) {
            shown["properties"] =
                properties.into_iter().map(|(name, value)| (prefixed(&name), value)).collect();
        }
        if let Some(Value::Array(required)) = shown.get_mut("required") {
            for name in required {
                *name = json!(prefixed(name.as_str().unwrap_or_default()));
            }
        }
        shown
    });
    let properties = parts::of::<Properties>(conn, &row.id).await?;
    let properties = properties.iter().map(|one| (prefixed(&one.name), Value::Object(one.document())));
    let tags = parts::of::<Tags>(conn, &row.id).await?;
    let all: [(&str, Value); 4] = [
        ("objects", objects.collect()),
        ("properties", properties.collect()),
        ("resource_type_associations", associations.iter().map(|one| one.json()).collect()),
        ("tags", tags.iter().map(|tag| json!({"name": tag.name})).collect()),
    ];
    for (name, value) in all {
        let is_empty = value.as_array().is_some_and(Vec::is_empty) || value == json!({});
        if !is_empty {
            shown[name] = value;
        }
    }
    Ok(shown)
}

fn conflict(error: sqlx::Error, name: &str) -> ApiError {
    match db::is_unique_violation(&error) {
        true => ApiError::Conflict(format!("The metadata definition namespace={name} already exists.")),
        false => error.into(),
    }
}

/// `POST /v2/metadefs/namespaces`, with or without what shall be in it.
///
/// # Errors
/// 409 if there is one of that name.
pub(super) async fn create(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<Map<String, Value>>,
) -> Result<Response, ApiError> {
    let now = db::now_us();
    let mut row = NamespaceRow {
        id: uuid::Uuid::new_v4().to_string(),
        namespace: String::new(),
        display_name: None,
        description: None,
        visibility: String::new(),
        protected: false,
        owner: String::new(),
        created_us: now,
        updated_us: now,
    };
    row.apply(&body, &ctx)?;
    let mut tx = app.begin().await?;
    let there: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM metadef_namespaces").fetch_one(&mut *tx).await?;
    if there >= MAX_NAMESPACES {
        return Err(ApiError::OverQuota(format!("There can be at most {MAX_NAMESPACES} namespaces.")));
    }
    insert(&mut tx, &row).await?;
    let list = |name: &str| body.get(name).and_then(Value::as_array).into_iter().flatten();
    for association in list("resource_type_associations") {
        resource_types::insert(&mut tx, &row, association).await?;
    }
    for object in list("objects") {
        parts::insert::<Objects>(&mut tx, &row, PartRow::of_body::<Objects>(&row.id, object.clone())?)
            .await?;
    }
    for tag in list("tags") {
        parts::insert::<Tags>(&mut tx, &row, PartRow::of_body::<Tags>(&row.id, tag.clone())?).await?;
    }
    for (name, property) in body.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let mut property = property.clone();
        property["name"] = json!(name);
        parts::insert::<Properties>(&mut tx, &row, PartRow::of_body::<Properties>(&row.id, property)?)
            .await?;
    }
    let shown = whole(&mut tx, &row, None).await?;
    tx.commit().await?;
    let name = escaped(&row.namespace);
    let url = format!("{}/image/v2/metadefs/namespaces/{name}", app.config.public_url);
    Ok((StatusCode::CREATED, [(header::LOCATION, url)], Json(shown)).into_response())
}

async fn insert(conn: &mut Conn, row: &NamespaceRow) -> Result<(), ApiError> {
    sqlx::query(
        "INSERT INTO metadef_namespaces (id, namespace, display_name, description, visibility, protected, owner,
             created_us, updated_us) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8)",
    )
    .bind(&row.id)
    .bind(&row.namespace)
    .bind(&row.display_name)
    .bind(&row.description)
    .bind(&row.visibility)
    .bind(row.protected)
    .bind(&row.owner)
    .bind(row.created_us)
    .execute(conn)
    .await
    .map_err(|error| conflict(error, &row.namespace))?;
    Ok(())
}

/// `PUT /v2/metadefs/namespaces/{namespace}`: all that it says of itself anew; what is in it stays.
///
/// # Errors
/// 404, 409 if another has the new name.
pub(super) async fn update(
    State(app): State<App>,
    ctx: Ctx,
    Path(name): Path<String>,
    JsonBody(body): JsonBody<Map<String, Value>>,
) -> Result<Json<Value>, ApiError> {
    let mut tx = app.begin().await?;
    let mut row = find(&mut tx, &ctx, &name).await?;
    row.apply(&body, &ctx)?;
    row.updated_us = db::now_us();
    sqlx::query(
        "UPDATE metadef_namespaces SET namespace = $2, display_name = $3, description = $4, visibility = $5,
             protected = $6, owner = $7, updated_us = $8 WHERE id = $1",
    )
    .bind(&row.id)
    .bind(&row.namespace)
    .bind(&row.display_name)
    .bind(&row.description)
    .bind(&row.visibility)
    .bind(row.protected)
    .bind(&row.owner)
    .bind(row.updated_us)
    .execute(&mut *tx)
    .await
    .map_err(|error| conflict(error, &row.namespace))?;
    tx.commit().await?;
    Ok(Json(row.json()))
}

/// `DELETE /v2/metadefs/namespaces/{namespace}`, with all that is in it.
///
/// # Errors
/// 404, 403 if it is protected.
pub(super) async fn delete(
    State(app): State<App>,
    ctx: Ctx,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    let mut tx = app.begin().await?;
    let row = find(&mut tx, &ctx, &name).await?;
    row.require_unprotected()?;
    sqlx::query("DELETE FROM metadef_namespaces WHERE id = $1").bind(&row.id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
