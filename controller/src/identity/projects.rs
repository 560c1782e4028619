//! `/v3/projects`: trees below domains. A project stays where it was made; its ancestors are rows.

use crate::db::Conn;
use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::{
    MAX_LIST, assignments, begin,
    fields::{Fields, invalid, merge_extra, with_extra},
    list, new_id, not_found,
};
use crate::{
    app::App,
    db,
    http::{context::Ctx, error::ApiError, json::JsonBody, query::Params},
    policy,
};

/// Most tags of a project (Keystone's limit).
const MAX_TAGS: usize = 80;
/// Longest tag in characters (Keystone's limit).
const MAX_TAG_CHARS: usize = 255;
/// Most projects from a root to a leaf (Keystone's `max_project_tree_depth`).
const MAX_DEPTH: i64 = 5;

/// A stored project.
#[derive(Debug, sqlx::FromRow)]
struct ProjectRow {
    id: String,
    domain_id: String,
    name: String,
    description: String,
    enabled: bool,
    tags: String,
    extra: String,
    /// `None`: its domain.
    parent_id: Option<String>,
}

impl ProjectRow {
    fn json(&self, app: &App) -> Value {
        let own = json!({
            "id": self.id,
            "name": self.name,
            "domain_id": self.domain_id,
            "parent_id": self.parent_id.as_ref().unwrap_or(&self.domain_id),
            "is_domain": false,
            "description": self.description,
            "enabled": self.enabled,
            "tags": serde_json::from_str::<Value>(&self.tags).unwrap_or_else(|_| json!([])),
            "options": {},
            "links": {"self": format!("{}/identity/v3/projects/{}", app.config.public_url, self.id)},
        });
        with_extra(&self.extra, own)
    }

    fn tags(&self) -> Vec<String> {
        serde_json::from_str(&self.tags).unwrap_or_default()
    }

    /// Takes from the fields what may be changed.
    fn apply(&mut self, mut fields: Fields) -> Result<(), ApiError> {
        if let Some(name) = fields.short_name()? {
            self.name = name;
        }
        if let Some(description) = fields.nullable_text("description")? {
            self.description = description.unwrap_or_default();
        }
        self.enabled = fields.boolean("enabled")?.unwrap_or(self.enabled);
        if let Some(tags) = fields.texts("tags")? {
            self.tags = checked_tags(tags)?;
        }
        if fields.boolean("is_domain")? == Some(true) {
            return Err(invalid("is_domain", "can't be true: use /v3/domains"));
        }
        self.extra = merge_extra(&self.extra, fields.rest()?);
        Ok(())
    }
}

fn checked_tags(mut tags: Vec<String>) -> Result<String, ApiError> {
    tags.sort();
    tags.dedup();
    let bad =
        |tag: &String| tag.is_empty() || tag.chars().count() > MAX_TAG_CHARS || tag.contains([',', '/']);
    if tags.len() > MAX_TAGS || tags.iter().any(bad) {
        return Err(invalid(
            "tags",
            "must have at most 80 tags of 1 to 255 characters without comma and slash",
        ));
    }
    serde_json::to_string(&tags).map_err(ApiError::internal)
}

/// Routes.
pub fn router() -> Router<App> {
    Router::new()
        .route("/v3/projects", get(index).post(create))
        .route("/v3/projects/{id}", get(show).patch(update).delete(delete))
        .route("/v3/projects/{id}/tags", get(tags).put(set_tags).delete(clear_tags))
        .route("/v3/projects/{id}/tags/{tag}", get(tag).put(add_tag).delete(remove_tag))
}

async fn find(conn: &mut Conn, id: &str) -> Result<ProjectRow, ApiError> {
    sqlx::query_as("SELECT * FROM projects WHERE id = $1")
        .bind(id)
        .fetch_optional(conn)
        .await?
        .ok_or_else(|| not_found("project", id))
}

/// 404 unless the project exists.
///
/// # Errors
/// 404.
pub(super) async fn require(conn: &mut Conn, id: &str) -> Result<(), ApiError> {
    find(conn, id).await.map(drop)
}

/// Projects that are found by an id, as Keystone shows them; the statement's second parameter is how many at most.
///
/// # Errors
/// Of the database.
pub(super) async fn with(
    app: &App,
    conn: &mut Conn,
    sql: &'static str,
    id: &str,
) -> Result<Vec<Value>, ApiError> {
    let rows: Vec<ProjectRow> = sqlx::query_as(sql).bind(id).bind(MAX_LIST + 1).fetch_all(conn).await?;
    Ok(rows.iter().map(|row| row.json(app)).collect())
}

/// The projects in which a user has a role, as Keystone shows them.
///
/// # Errors
/// Of the database.
pub async fn of_user(app: &App, user_id: &str, only_enabled: bool) -> Result<Vec<Value>, ApiError> {
    let rows: Vec<ProjectRow> = sqlx::query_as(
        "SELECT * FROM projects p WHERE (p.enabled OR NOT $2) AND EXISTS (
             SELECT 1 FROM held_roles a
             WHERE a.user_id = $1 AND a.target_kind = 'project' AND a.target_id = p.id)
         ORDER BY p.name, p.id LIMIT $3",
    )
    .bind(user_id)
    .bind(only_enabled)
    .bind(MAX_LIST + 1)
    .fetch_all(&app.db)
    .await?;
    Ok(rows.iter().map(|row| row.json(app)).collect())
}

async fn index(State(app): State<App>, _ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    // Also where there is nothing that it would choose from.
    let enabled = params.boolean("enabled")?;
    if params.flag("is_domain") {
        return Ok(Json(list(&app, "projects", "/v3/projects", Vec::new())));
    }
    let rows: Vec<ProjectRow> = sqlx::query_as(
        "SELECT * FROM projects WHERE (CAST($1 AS TEXT) IS NULL OR name = $1)
         AND (CAST($2 AS TEXT) IS NULL OR domain_id = $2) AND (CAST($3 AS TEXT) IS NULL OR COALESCE(parent_id, domain_id) = $3)
         AND (CAST($4 AS BOOLEAN) IS NULL OR enabled = $4) ORDER BY name, id LIMIT $5",
    )
    .bind(params.get("name"))
    .bind(params.get("domain_id"))
    .bind(params.get("parent_id"))
    .bind(enabled)
    .bind(MAX_LIST + 1)
    .fetch_all(&app.db)
    .await?;
    let items = rows
        .iter()
        .map(|row| row.json(&app))
        .filter(|project| {
            let has = |tag: &&str| project["tags"].as_array().is_some_and(|t| t.contains(&json!(tag)));
            let all = |name: &str| params.get(name).is_none_or(|tags| tags.split(',').all(|tag| has(&tag)));
            let any = |name: &str| params.get(name).is_some_and(|tags| tags.split(',').any(|tag| has(&tag)));
            all("tags")
                && (params.get("tags-any").is_none() || any("tags-any"))
                && (params.get("not-tags").is_none() || !all("not-tags"))
                && !any("not-tags-any")
        })
        .collect();
    Ok(Json(list(&app, "projects", "/v3/projects", items)))
}

async fn create(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut fields = Fields::of(body, "project")?;
    let domain_id = fields.text("domain_id")?;
    let parent_id = fields.text("parent_id")?;
    let mut row = ProjectRow {
        id: new_id(),
        domain_id: domain_id.clone().unwrap_or_else(|| own_domain(&ctx)),
        name: String::new(),
        description: String::new(),
        enabled: true,
        tags: "[]".into(),
        extra: "{}".into(),
        parent_id: None,
    };
    row.apply(fields)?;
    if row.name.is_empty() {
        return Err(ApiError::BadRequest("A project needs a name.".into()));
    }
    let mut tx = begin(&app).await?;
    if let Some(parent) = parent_id.filter(|parent| *parent != row.domain_id) {
        place_below(&mut tx, &mut row, &parent, domain_id.as_deref()).await?;
    }
    require_domain(&mut tx, &row.domain_id).await?;
    insert(&mut tx, &row).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({"project": row.json(&app)}))))
}

/// Under another project, in that one's domain.
async fn place_below(
    conn: &mut Conn,
    row: &mut ProjectRow,
    parent: &str,
    domain: Option<&str>,
) -> Result<(), ApiError> {
    let above: Option<ProjectRow> = sqlx::query_as("SELECT * FROM projects WHERE id = $1")
        .bind(parent)
        .fetch_optional(&mut *conn)
        .await?;
    let Some(above) = above else {
        // Keystone takes a domain's id as well: then the project is a root of that domain.
        require_domain(conn, parent).await.map_err(|_| invalid("parent_id", "names no project"))?;
        if domain.is_some_and(|domain| domain != parent) {
            return Err(invalid("parent_id", "names another domain than domain_id"));
        }
        parent.clone_into(&mut row.domain_id);
        return Ok(());
    };
    if domain.is_some_and(|domain| domain != above.domain_id) {
        return Err(invalid("parent_id", "names a project of another domain"));
    }
    if !above.enabled {
        return Err(ApiError::Forbidden("The parent project is disabled.".into()));
    }
    let depth: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM project_ancestors WHERE project_id = $1")
        .bind(parent)
        .fetch_one(conn)
        .await?;
    if depth + 2 > MAX_DEPTH {
        return Err(ApiError::Forbidden(format!("Projects may be nested {MAX_DEPTH} deep.")));
    }
    row.domain_id = above.domain_id;
    row.parent_id = Some(above.id);
    Ok(())
}

async fn insert(conn: &mut Conn, row: &ProjectRow) -> Result<(), ApiError> {
    sqlx::query(
        "INSERT INTO projects (id, domain_id, name, description, enabled, tags, extra, parent_id)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(&row.id)
    .bind(&row.domain_id)
    .bind(&row.name)
    .bind(&row.description)
    .bind(row.enabled)
    .bind(&row.tags)
    .bind(&row.extra)
    .bind(&row.parent_id)
    .execute(&mut *conn)
    .await
    .map_err(|error| conflict(error, &row.name))?;
    sqlx::query(
        "INSERT INTO project_ancestors (project_id, ancestor_id)
         SELECT $1, id FROM projects WHERE id = $2
         UNION SELECT $1, ancestor_id FROM project_ancestors WHERE project_id = $2",
    )
    .bind(&row.id)
    .bind(&row.parent_id)
    .execute(conn)
    .await?;
    Ok(())
}

fn conflict(error: sqlx::Error, name: &str) -> ApiError {
    match db::is_unique_violation(&error) {
        true => {
            let text =
                format!("Conflict occurred: there is already a project named {name:?} in this domain.");
            ApiError::Conflict(text)
        }
        false => error.into(),
    }
}

/// Where new projects and users go if the request doesn't say: the domain of the token, as in Keystone.
pub fn own_domain(ctx: &Ctx) -> String {
    let scoped = ctx.domain_id.as_ref().or(ctx.project_domain_id.as_ref());
    scoped.unwrap_or(&ctx.user_domain_id).clone()
}

/// 404 unless the domain exists.
///
/// # Errors
/// 404.
pub async fn require_domain(conn: &mut Conn, id: &str) -> Result<(), ApiError> {
    let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM domains WHERE id = $1)")
        .bind(id)
        .fetch_one(conn)
        .await?;
    there.then_some(()).ok_or_else(|| not_found("domain", id))
}

/// The token's own project, or any for who may read all.
async fn visible(conn: &mut Conn, ctx: &Ctx, id: &str) -> Result<ProjectRow, ApiError> {
    if ctx.project_id.as_deref() != Some(id) && !policy::may_read(ctx) {
        return Err(ApiError::Forbidden("Policy does not allow this: it is another project.".into()));
    }
    find(conn, id).await
}

async fn show(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let mut project = visible(&mut conn, &ctx, &id).await?.json(&app);
    for (as_list, as_ids, sql, key) in [
        ("parents_as_list", "parents_as_ids", ABOVE, "parents"),
        ("subtree_as_list", "subtree_as_ids", BELOW, "subtree"),
    ] {
        if !params.flag(as_list) && !params.flag(as_ids) {
            continue;
        }
        let rows: Vec<ProjectRow> =
            sqlx::query_as(sql).bind(&id).bind(MAX_LIST).fetch_all(&mut *conn).await?;
        project[key] = match params.flag(as_list) {
            true => rows.iter().map(|row| json!({"project": row.json(&app)})).collect(),
            false if key == "parents" => parents_as_ids(&rows),
            false => subtree_as_ids(&rows, &id),
        };
    }
    Ok(Json(json!({ "project": project })))
}

/// From the nearest to the root.
const ABOVE: &str = "SELECT p.* FROM projects p JOIN project_ancestors a ON a.ancestor_id = p.id
    WHERE a.project_id = $1
    ORDER BY (SELECT COUNT(*) FROM project_ancestors d WHERE d.project_id = p.id) DESC LIMIT $2";
const BELOW: &str = "SELECT p.* FROM projects p JOIN project_ancestors a ON a.project_id = p.id
    WHERE a.ancestor_id = $1 ORDER BY p.name, p.id LIMIT $2";

/// `{nearest: {next: … null}}`.
fn parents_as_ids(rows: &[ProjectRow]) -> Value {
    rows.iter().rev().fold(Value::Null, |above, row| json!({ row.id.as_str(): above }))
}

/// `{child: {grandchild: null}}`; `null` without any. As deep as [`MAX_DEPTH`].
fn subtree_as_ids(rows: &[ProjectRow], id: &str) -> Value {
    let children: Map<String, Value> = rows
        .iter()
        .filter(|row| row.parent_id.as_deref() == Some(id))
        .map(|row| (row.id.clone(), subtree_as_ids(rows, &row.id)))
        .collect();
    if children.is_empty() { Value::Null } else { Value::Object(children) }
}

type TagPath = Path<(String, String)>;

async fn tags(State(app): State<App>, ctx: Ctx, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let row = visible(&mut *app.db.acquire().await?, &ctx, &id).await?;
    Ok(Json(json!({"tags": row.tags()})))
}

async fn tag(State(app): State<App>, ctx: Ctx, Path((id, tag)): TagPath) -> Result<StatusCode, ApiError> {
    let row = visible(&mut *app.db.acquire().await?, &ctx, &id).await?;
    let there = row.tags().contains(&tag);
    there.then_some(StatusCode::NO_CONTENT).ok_or_else(|| not_found("project tag", &tag))
}

/// Changes the tags of a project.
async fn change_tags(
    app: &App,
    id: &str,
    change: impl FnOnce(&mut Vec<String>) -> Result<(), ApiError>,
) -> Result<Vec<String>, ApiError> {
    let mut tx = app.begin().await?;
    let mut tags = find(&mut tx, id).await?.tags();
    change(&mut tags)?;
    let stored = checked_tags(tags)?;
    sqlx::query("UPDATE projects SET tags = $2 WHERE id = $1")
        .bind(id)
        .bind(&stored)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    serde_json::from_str(&stored).map_err(ApiError::internal)
}

async fn set_tags(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let new: Vec<String> = serde_json::from_value(body["tags"].clone())
        .map_err(|_| invalid("tags", "is not a list of strings"))?;
    let tags = change_tags(&app, &id, |tags| {
        *tags = new;
        Ok(())
    });
    Ok(Json(json!({"tags": tags.await?})))
}

async fn clear_tags(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let clear = |tags: &mut Vec<String>| {
        tags.clear();
        Ok(())
    };
    change_tags(&app, &id, clear).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn add_tag(
    State(app): State<App>,
    _ctx: Ctx,
    Path((id, tag)): TagPath,
) -> Result<StatusCode, ApiError> {
    let add = |tags: &mut Vec<String>| {
        tags.push(tag);
        Ok(())
    };
    change_tags(&app, &id, add).await?;
    Ok(StatusCode::CREATED)
}

async fn remove_tag(
    State(app): State<App>,
    _ctx: Ctx,
    Path((id, tag)): TagPath,
) -> Result<StatusCode, ApiError> {
    let remove = |tags: &mut Vec<String>| {
        let index = tags.iter().position(|one| *one == tag);
        tags.remove(index.ok_or_else(|| not_found("project tag", &tag))?);
        Ok(())
    };
    change_tags(&app, &id, remove).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn update(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of(body, "project")?;
    let mut tx = begin(&app).await?;
    let mut row = find(&mut tx, &id).await?;
    fields.unchanged("domain_id", &row.domain_id)?;
    fields.unchanged("parent_id", row.parent_id.as_ref().unwrap_or(&row.domain_id))?;
    row.apply(fields)?;
    sqlx::query(
        "UPDATE projects SET name = $2, description = $3, enabled = $4, tags = $5, extra = $6 WHERE id = $1",
    )
    .bind(&row.id)
    .bind(&row.name)
    .bind(&row.description)
    .bind(row.enabled)
    .bind(&row.tags)
    .bind(&row.extra)
    .execute(&mut *tx)
    .await
    .map_err(|error| conflict(error, &row.name))?;
    tx.commit().await?;
    Ok(Json(json!({"project": row.json(&app)})))
}

/// Unlike Keystone, refuses while the project owns something: nobody could see or delete it any more.
async fn delete(State(app): State<App>, _ctx: Ctx, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let mut tx = begin(&app).await?;
    find(&mut tx, &id).await?;
    let parent: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM projects WHERE parent_id = $1)")
        .bind(&id)
        .fetch_one(&mut *tx)
        .await?;
    if parent {
        return Err(ApiError::Forbidden("Cannot delete a project that has projects below it.".into()));
    }
    remove(&mut tx, &id).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Removes a project that owns nothing.
///
/// # Errors
/// 409 if it does.
pub(super) async fn remove(conn: &mut Conn, id: &str) -> Result<(), ApiError> {
    let owned: Option<String> = sqlx::query_scalar(
        "SELECT 'servers' FROM servers WHERE project_id = $1 UNION ALL
         SELECT 'networks' FROM networks WHERE project_id = $1 UNION ALL
         SELECT 'ports' FROM ports WHERE project_id = $1 UNION ALL
         SELECT 'images' FROM images WHERE owner = $1 LIMIT 1",
    )
    .bind(id)
    .fetch_optional(&mut *conn)
    .await?;
    if let Some(what) = owned {
        return Err(ApiError::Conflict(format!("The project {id} still owns {what}. Delete them first.")));
    }
    assignments::forget(conn, "project", id).await?;
    sqlx::query("UPDATE users SET default_project_id = NULL WHERE default_project_id = $1")
        .bind(id)
        .execute(&mut *conn)
        .await?;
    sqlx::query("DELETE FROM projects WHERE id = $1").bind(id).execute(&mut *conn).await?;
    Ok(())
}
