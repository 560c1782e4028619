//! `/v2/metadefs/resource_types`, and which of them a namespace is for.

use axum::{
    Json,
    extract::{Path, State},
};
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::{MAX_PARTS, find, namespaces::NamespaceRow, present, refuse_read_only, unknown};
use crate::{
    app::App,
    db::{self, Conn},
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// That a namespace is for a kind of thing.
#[derive(Debug, sqlx::FromRow)]
pub(super) struct AssociationRow {
    namespace_id: String,
    resource_type: String,
    prefix: Option<String>,
    properties_target: Option<String>,
    created_us: i64,
    updated_us: i64,
}

impl AssociationRow {
    pub(super) fn json(&self) -> Value {
        present(json!({
            "name": self.resource_type,
            "prefix": self.prefix,
            "properties_target": self.properties_target,
            "created_at": db::rfc3339_s(self.created_us),
            "updated_at": db::rfc3339_s(self.updated_us),
        }))
    }

    /// The kind of thing.
    pub(super) fn name(&self) -> &str {
        &self.resource_type
    }

    /// What names of properties begin with there.
    pub(super) fn prefix(&self) -> Option<&str> {
        self.prefix.as_deref()
    }

    pub(super) fn is_of(&self, namespace_id: &str) -> bool {
        self.namespace_id == namespace_id
    }
}

/// Those of all namespaces.
///
/// # Errors
/// Of the database.
pub(super) async fn all(conn: &mut Conn) -> Result<Vec<AssociationRow>, sqlx::Error> {
    sqlx::query_as("SELECT * FROM metadef_associations ORDER BY resource_type").fetch_all(conn).await
}

/// Those of a namespace.
///
/// # Errors
/// Of the database.
pub(super) async fn of(conn: &mut Conn, namespace_id: &str) -> Result<Vec<AssociationRow>, sqlx::Error> {
    sqlx::query_as("SELECT * FROM metadef_associations WHERE namespace_id = $1 ORDER BY resource_type")
        .bind(namespace_id)
        .fetch_all(conn)
        .await
}

/// `GET /v2/metadefs/resource_types`.
///
/// # Errors
/// Of the database.
pub(super) async fn index(State(app): State<App>, _ctx: Ctx) -> Result<Json<Value>, ApiError> {
    let rows: Vec<(String, i64, i64)> =
        sqlx::query_as("SELECT name, created_us, updated_us FROM metadef_resource_types ORDER BY name")
            .fetch_all(&app.db)
            .await?;
    let shown = |(name, created, updated): (String, i64, i64)| json!({"name": name, "created_at": db::rfc3339_s(created), "updated_at": db::rfc3339_s(updated)});
    Ok(Json(json!({"resource_types": rows.into_iter().map(shown).collect::<Vec<_>>()})))
}

/// `GET …/{namespace}/resource_types`.
///
/// # Errors
/// 404.
pub(super) async fn of_namespace(
    State(app): State<App>,
    ctx: Ctx,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let namespace = find(&mut conn, &ctx, &name).await?;
    let items: Vec<Value> = of(&mut conn, &namespace.id).await?.iter().map(AssociationRow::json).collect();
    Ok(Json(json!({ "resource_type_associations": items })))
}

/// Says that a namespace is for a kind of thing, which is made if it isn't known.
///
/// # Errors
/// 409 if it is already.
pub(super) async fn insert(
    conn: &mut Conn,
    namespace: &NamespaceRow,
    body: &Value,
) -> Result<AssociationRow, ApiError> {
    let text = |name: &str| body[name].as_str().map(str::to_owned);
    let now = db::now_us();
    let row = AssociationRow {
        namespace_id: namespace.id.clone(),
        resource_type: text("name").unwrap_or_default(),
        prefix: text("prefix"),
        properties_target: text("properties_target"),
        created_us: now,
        updated_us: now,
    };
    if of(conn, &namespace.id).await?.len() >= usize::try_from(MAX_PARTS).unwrap_or(usize::MAX) {
        return Err(ApiError::OverQuota(format!(
            "A namespace can be for at most {MAX_PARTS} resource types."
        )));
    }
    sqlx::query(
        "INSERT INTO metadef_resource_types (name, created_us, updated_us) VALUES ($1, $2, $2)
         ON CONFLICT DO NOTHING",
    )
    .bind(&row.resource_type)
    .bind(now)
    .execute(&mut *conn)
    .await?;
    sqlx::query(
        "INSERT INTO metadef_associations (namespace_id, resource_type, prefix, properties_target, created_us,
             updated_us) VALUES ($1, $2, $3, $4, $5, $5)",
    )
    .bind(&row.namespace_id)
    .bind(&row.resource_type)
    .bind(&row.prefix)
    .bind(&row.properties_target)
    .bind(now)
    .execute(conn)
    .await
    .map_err(|error| match db::is_unique_violation(&error) {
        true => ApiError::Conflict(format!(
            "The metadata definition resource-type association of resource-type={} to namespace={} already exists.",
            row.resource_type, namespace.namespace
        )),
        false => error.into(),
    })?;
    Ok(row)
}

/// `POST …/{namespace}/resource_types`.
///
/// # Errors
/// 404, 409.
pub(super) async fn associate(
    State(app): State<App>,
    ctx: Ctx,
    Path(name): Path<String>,
    JsonBody(body): JsonBody<Map<String, Value>>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    refuse_read_only(&body)?;
    let mut tx = app.begin().await?;
    let namespace = find(&mut tx, &ctx, &name).await?;
    let row = insert(&mut tx, &namespace, &Value::Object(body)).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(row.json())))
}

/// `DELETE …/{namespace}/resource_types/{resource_type}`. The kind of thing itself stays known.
///
/// # Errors
/// 404, 403 if the namespace is protected.
pub(super) async fn dissociate(
    State(app): State<App>,
    ctx: Ctx,
    Path((name, of_type)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let mut tx = app.begin().await?;
    let namespace = find(&mut tx, &ctx, &name).await?;
    let gone = sqlx::query("DELETE FROM metadef_associations WHERE namespace_id = $1 AND resource_type = $2")
        .bind(&namespace.id)
        .bind(&of_type)
        .execute(&mut *tx)
        .await?;
    if gone.rows_affected() == 0 {
        return Err(unknown("Resource type", &of_type));
    }
    namespace.require_unprotected()?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
