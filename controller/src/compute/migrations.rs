//! `os-migrations`: changes of flavor, the only way a server moves here (from a flavor to another, on its host). For admins.
//!
//! A record begins with `resize` as `migrating`, is `finished` when the server runs with its new flavor, and ends as
//! `confirmed`, `reverted` or `error`. It goes with its server.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, post},
};
use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    servers::records::{moment, time},
    state::{Change, TaskState, VmState},
    versions::Version,
};
use crate::{
    app::App,
    db::{Conn, Db, now_us},
    http::{context::Ctx, error::ApiError, query::Params},
};

/// Largest page of a list, Nova's `max_limit`.
const MAX_PAGE: u64 = 1000;
/// Records that are kept of one server.
const KEPT_OF_SERVER: i64 = 100;
/// Nova's kinds.
const KINDS: [&str; 4] = ["evacuation", "live-migration", "migration", "resize"];

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/os-migrations", get(list))
        .route("/servers/{id}/migrations", get(live))
        .route("/servers/{id}/migrations/{migration}", get(no_live).delete(no_live))
        .route("/servers/{id}/migrations/{migration}/action", post(no_live))
}

#[derive(Debug, FromRow)]
struct Row {
    id: i64,
    uuid: String,
    server_id: String,
    project_id: String,
    user_id: String,
    host: String,
    old_flavor_id: String,
    new_flavor_id: String,
    status: String,
    created_us: i64,
    updated_us: i64,
}

impl Row {
    fn document(&self, version: Version) -> Value {
        // Nova's are numbers, as most flavors' ids are.
        let flavor = |id: &str| id.parse::<i64>().map_or_else(|_| json!(id), |number| json!(number));
        let mut document = json!({
            "id": self.id, "instance_uuid": self.server_id, "status": self.status,
            "source_compute": self.host, "source_node": self.host,
            "dest_compute": self.host, "dest_node": self.host, "dest_host": null, // hosts are not reached: they ask
            "old_instance_type_id": flavor(&self.old_flavor_id), "new_instance_type_id": flavor(&self.new_flavor_id),
            "created_at": time(self.created_us), "updated_at": time(self.updated_us),
        });
        if version.has(23) {
            document["migration_type"] = json!("resize");
        }
        if version.has(59) {
            document["uuid"] = json!(self.uuid);
        }
        if version.has(80) {
            document["project_id"] = json!(self.project_id);
            document["user_id"] = json!(self.user_id);
        }
        document
    }
}

/// A change of flavor that begins.
pub(super) struct New<'a> {
    /// Server.
    pub(super) server_id: &'a str,
    /// Its project.
    pub(super) project_id: &'a str,
    /// Its host's name.
    pub(super) host: &'a str,
    /// Flavor of before.
    pub(super) old_flavor_id: &'a str,
    /// Flavor wanted.
    pub(super) new_flavor_id: &'a str,
}

/// Writes down that a server's flavor changes.
pub(super) async fn begin(tx: &mut Conn, ctx: &Ctx, new: &New<'_>) -> Result<(), ApiError> {
    sqlx::query(
        "INSERT INTO migrations (id, uuid, server_id, project_id, user_id, host, old_flavor_id, new_flavor_id, status,
             created_us, updated_us)
         VALUES ((SELECT COALESCE(MAX(id), 0) + 1 FROM migrations), $1, $2, $3, $4, $5, $6, $7, 'migrating', $8, $8)",
    )
    .bind(Uuid::new_v4().to_string())
    .bind(new.server_id)
    .bind(new.project_id)
    .bind(&ctx.user_id)
    .bind(new.host)
    .bind(new.old_flavor_id)
    .bind(new.new_flavor_id)
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    sqlx::query(
        "DELETE FROM migrations WHERE server_id = $1 AND id NOT IN
             (SELECT id FROM migrations WHERE server_id = $1 ORDER BY id DESC LIMIT $2)",
    )
    .bind(new.server_id)
    .bind(KEPT_OF_SERVER)
    .execute(tx)
    .await?;
    Ok(())
}

/// Moves the record that is under way.
pub(super) async fn becomes(
    tx: &mut Conn,
    server_id: &str,
    from: &str,
    status: &str,
) -> Result<(), ApiError> {
    sqlx::query("UPDATE migrations SET status = $3, updated_us = $4 WHERE server_id = $1 AND status = $2")
        .bind(server_id)
        .bind(from)
        .bind(status)
        .bind(now_us())
        .execute(tx)
        .await?;
    Ok(())
}

/// What a host's report of a server means for the record that is under way.
pub(crate) async fn follow(
    tx: &mut Conn,
    server_id: &str,
    task: Option<TaskState>,
    change: &Change,
) -> Result<(), ApiError> {
    let from = match task {
        Some(TaskState::ResizeFinish) => "migrating",
        Some(TaskState::ResizeReverting) => "reverting",
        _ => return Ok(()),
    };
    let status = match (change.vm_state, change.task_state) {
        (VmState::Error, _) => "error",
        (_, None) if from == "migrating" => "finished",
        (_, None) => "reverted",
        _ => return Ok(()),
    };
    becomes(tx, server_id, from, status).await
}

const FILTERS: [(&str, &str); 4] =
    [("host", "host"), ("source_compute", "host"), ("status", "status"), ("instance_uuid", "server_id")];

/// What is asked for, without the page.
fn filtered(version: Version, params: &Params) -> Result<QueryBuilder<Db>, ApiError> {
    let mut query = QueryBuilder::<Db>::new("SELECT * FROM migrations WHERE 1 = 1");
    let owners = [("user_id", "user_id"), ("project_id", "project_id")];
    for (name, column) in FILTERS.iter().chain(owners.iter().filter(|_| version.has(80))) {
        if let Some(value) = params.get(name) {
            query.push(format!(" AND {column} = ")).push_bind(value.to_owned());
        }
    }
    if let Some(kind) = params.get("migration_type") {
        if version.has(59) && !KINDS.contains(&kind) {
            return Err(ApiError::BadRequest(format!("migration_type must be one of {}.", KINDS.join(", "))));
        }
        query.push(if kind == "resize" { "" } else { " AND 1 = 0" });
    }
    if params.boolean("hidden")? == Some(true) {
        query.push(" AND 1 = 0"); // none is hidden
    }
    if version.has(59) {
        let since = moment(params, "changes-since")?;
        let before = if version.has(66) { moment(params, "changes-before")? } else { None };
        if since.zip(before).is_some_and(|(since, before)| since > before) {
            let text = "The value of changes-since must be less than or equal to changes-before.";
            return Err(ApiError::BadRequest(text.into()));
        }
        if let Some(since) = since {
            query.push(" AND updated_us >= ").push_bind(since);
        }
        if let Some(before) = before {
            query.push(" AND updated_us <= ").push_bind(before);
        }
    }
    Ok(query)
}

fn refuse_unknown(version: Version, params: &Params) -> Result<(), ApiError> {
    let known = |name: &str| {
        FILTERS.iter().any(|(known, _)| *known == name)
            || ["migration_type", "hidden", "limit", "marker", "changes-since"].contains(&name)
            || (version.has(66) && name == "changes-before")
            || (version.has(80) && ["user_id", "project_id"].contains(&name))
    };
    match params.iter().find(|(name, _)| version.has(59) && !known(name)) {
        Some((name, _)) => {
            let name: String = name.chars().take(64).collect();
            Err(ApiError::BadRequest(format!("There is no query parameter '{name}' here.")))
        }
        None => Ok(()),
    }
}

async fn list(
    State(app): State<App>,
    _ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    refuse_unknown(version, &params)?;
    let mut query = filtered(version, &params)?;
    let mut db = app.db.acquire().await?;
    let mut limit = MAX_PAGE;
    if version.has(59) {
        limit = params.number("limit")?.unwrap_or(MAX_PAGE).min(MAX_PAGE);
        if let Some(marker) = params.get("marker") {
            let found: Option<(i64, i64)> =
                sqlx::query_as("SELECT created_us, id FROM migrations WHERE uuid = $1")
                    .bind(marker)
                    .fetch_optional(&mut *db)
                    .await?;
            let shown: String = marker.chars().take(64).collect();
            let (created_us, id) =
                found.ok_or_else(|| ApiError::BadRequest(format!("Marker {shown} could not be found.")))?;
            query.push(" AND (created_us, id) < (").push_bind(created_us).push(", ").push_bind(id).push(")");
        }
    }
    let more = i64::try_from(limit + 1).unwrap_or(i64::MAX);
    query.push(" ORDER BY created_us DESC, id DESC LIMIT ").push_bind(more);
    let mut rows: Vec<Row> = query.build_query_as().fetch_all(&mut *db).await?;
    let more = rows.len() as u64 > limit;
    rows.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    let documents: Vec<Value> = rows.iter().map(|row| row.document(version)).collect();
    let mut answer = json!({ "migrations": documents });
    if let (true, true, Some(last)) = (version.has(59), more, rows.last()) {
        let path = format!("{}/compute/v2.1/os-migrations", app.config.public_url);
        answer["migrations_links"] = json!([{"rel": "next", "href": params.link(&path, Some(&last.uuid))}]);
    }
    Ok(Json(answer))
}

/// Live migrations under way (2.23): there are none, since servers stay on their host.
async fn live(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    super::servers::exists(&app, &ctx, &id).await?;
    match version.has(23) {
        true => Ok(Json(json!({"migrations": []}))),
        false => Err(ApiError::NotFound("The resource could not be found.".into())),
    }
}

async fn no_live(
    State(app): State<App>,
    ctx: Ctx,
    Path((id, migration)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    super::servers::exists(&app, &ctx, &id).await?;
    let migration: String = migration.chars().take(64).collect();
    Err(ApiError::NotFound(format!("In-progress live migration {migration} is not found for server {id}.")))
}
