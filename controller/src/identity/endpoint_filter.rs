//! `/v3/OS-EP-FILTER`: which endpoints a project's catalog has. A project that is associated with endpoints, one by one or by
//! groups of them, sees those and no others; one that isn't sees all, as with Keystone's `return_all_endpoints_if_no_filter`.

use std::collections::{HashMap, HashSet};

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, patch, post, put},
};
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::{
    MAX_LIST, begin,
    catalog::EndpointRow,
    fields::{Fields, invalid},
    list, new_id, not_found, projects,
    resource::{self, Filters, Resource},
};
use crate::{
    app::App,
    db::{self, Conn},
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// Routes.
pub fn router() -> Router<App> {
    let groups = "/v3/OS-EP-FILTER/endpoint_groups";
    resource::routes::<GroupRow>(post(create), patch(update))
        .route(&format!("{groups}/{{id}}/endpoints"), get(endpoints_of_group))
        .route(&format!("{groups}/{{id}}/projects"), get(projects_of_group))
        .route(
            &format!("{groups}/{{id}}/projects/{{project}}"),
            put(add_group).get(check_group).delete(remove_group),
        )
        .route("/v3/OS-EP-FILTER/endpoints/{endpoint}/projects", get(projects_of_endpoint))
        .route("/v3/OS-EP-FILTER/projects/{project}/endpoints", get(endpoints_of_project))
        .route(
            "/v3/OS-EP-FILTER/projects/{project}/endpoints/{endpoint}",
            put(add_endpoint).get(check_endpoint).delete(remove_endpoint),
        )
        .route("/v3/OS-EP-FILTER/projects/{project}/endpoint_groups", get(groups_of_project))
}

/// A stored group of endpoints.
#[derive(Debug, sqlx::FromRow)]
struct GroupRow {
    id: String,
    name: String,
    description: Option<String>,
    /// A JSON object: which endpoints are in it.
    filters: String,
}

impl Resource for GroupRow {
    const NAME: &'static str = "endpoint_group";
    const PATH: &'static str = "/v3/OS-EP-FILTER/endpoint_groups";
    const TABLE: &'static str = "endpoint_groups";
    const FILTERS: Filters = &["name"];
    const ORDER: &'static str = "name, id";

    fn shown(&self, app: &App) -> Result<Value, ApiError> {
        Ok(self.json(app))
    }
}

impl GroupRow {
    fn json(&self, app: &App) -> Value {
        let url = format!("{}/identity/v3/OS-EP-FILTER/endpoint_groups/{}", app.config.public_url, self.id);
        json!({
            "id": self.id, "name": self.name, "description": self.description, "filters": self.filters(),
            "links": {"self": url},
        })
    }

    fn filters(&self) -> Map<String, Value> {
        serde_json::from_str(&self.filters).unwrap_or_default()
    }
}

/// Whether an endpoint has all that a group's filters ask for.
fn fits(filters: &Map<String, Value>, endpoint: &EndpointRow) -> bool {
    filters.iter().all(|(name, wanted)| match name.as_str() {
        "service_id" => *wanted == json!(endpoint.service_id),
        "region_id" => *wanted == json!(endpoint.region_id),
        "interface" => *wanted == json!(endpoint.interface),
        _ => false,
    })
}

/// By project, the ids of the endpoints that it sees; a project that isn't there sees all.
pub(super) type Chosen = HashMap<String, HashSet<String>>;

/// What all projects are associated with.
///
/// # Errors
/// Of the database.
pub(super) async fn chosen(conn: &mut Conn) -> Result<Chosen, sqlx::Error> {
    let mut chosen = Chosen::new();
    let direct: Vec<(String, String)> =
        sqlx::query_as("SELECT project_id, endpoint_id FROM project_endpoints").fetch_all(&mut *conn).await?;
    for (project, endpoint) in direct {
        chosen.entry(project).or_default().insert(endpoint);
    }
    let by_group: Vec<(String, String)> = sqlx::query_as(
        "SELECT p.project_id, g.filters FROM project_endpoint_groups p
         JOIN endpoint_groups g ON g.id = p.group_id",
    )
    .fetch_all(&mut *conn)
    .await?;
    if by_group.is_empty() {
        return Ok(chosen);
    }
    let endpoints = all_endpoints(conn).await?;
    for (project, filters) in by_group {
        let filters = serde_json::from_str(&filters).unwrap_or_default();
        for endpoint in endpoints.iter().filter(|endpoint| fits(&filters, endpoint)) {
            chosen.entry(project.clone()).or_default().insert(endpoint.id.clone());
        }
    }
    Ok(chosen)
}

async fn all_endpoints(conn: &mut Conn) -> Result<Vec<EndpointRow>, sqlx::Error> {
    sqlx::query_as("SELECT * FROM endpoints ORDER BY service_id, id").fetch_all(conn).await
}

/// Filters that choose something, if there are any.
fn filters(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    match fields.object("filters")? {
        Some(filters) if filters.is_empty() => Err(invalid("filters", "must not be empty")),
        filters => Ok(filters.map(|filters| Value::Object(filters).to_string())),
    }
}

async fn create(
    State(app): State<App>,
    _ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let mut fields = Fields::of(body, "endpoint_group")?;
    let row = GroupRow {
        id: new_id(),
        name: fields.name()?.ok_or_else(|| invalid("name", "is missing"))?,
        description: fields.text("description")?,
        filters: filters(&mut fields)?.ok_or_else(|| invalid("filters", "is missing"))?,
    };
    let mut tx = begin(&app).await?;
    sqlx::query("INSERT INTO endpoint_groups (id, name, description, filters) VALUES ($1, $2, $3, $4)")
        .bind(&row.id)
        .bind(&row.name)
        .bind(&row.description)
        .bind(&row.filters)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({"endpoint_group": row.json(&app)}))))
}

async fn update(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let mut fields = Fields::of(body, "endpoint_group")?;
    let mut tx = begin(&app).await?;
    let mut row: GroupRow = resource::find(&mut tx, &id).await?;
    row.name = fields.name()?.unwrap_or(row.name);
    row.description = fields.nullable_text("description")?.unwrap_or(row.description);
    row.filters = filters(&mut fields)?.unwrap_or(row.filters);
    sqlx::query("UPDATE endpoint_groups SET name = $2, description = $3, filters = $4 WHERE id = $1")
        .bind(&row.id)
        .bind(&row.name)
        .bind(&row.description)
        .bind(&row.filters)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(Json(json!({"endpoint_group": row.json(&app)})))
}

async fn endpoints_of_group(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let filters = resource::find::<GroupRow>(&mut conn, &id).await?.filters();
    let endpoints = all_endpoints(&mut conn).await?;
    let items = endpoints.iter().filter(|one| fits(&filters, one)).map(|one| one.json(&app)).collect();
    let path = format!("/v3/OS-EP-FILTER/endpoint_groups/{id}/endpoints");
    Ok(Json(list(&app, "endpoints", &path, items)))
}

async fn projects_of_group(
    State(app): State<App>,
    _ctx: Ctx,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    resource::find::<GroupRow>(&mut conn, &id).await?;
    let sql = "SELECT p.* FROM projects p JOIN project_endpoint_groups g ON g.project_id = p.id
               WHERE g.group_id = $1 ORDER BY p.name, p.id LIMIT $2";
    let items = projects::with(&app, &mut conn, sql, &id).await?;
    let path = format!("/v3/OS-EP-FILTER/endpoint_groups/{id}/projects");
    Ok(Json(list(&app, "projects", &path, items)))
}

async fn projects_of_endpoint(
    State(app): State<App>,
    _ctx: Ctx,
    Path(endpoint): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    resource::find::<EndpointRow>(&mut conn, &endpoint).await?;
    let sql = "SELECT p.* FROM projects p JOIN project_endpoints e ON e.project_id = p.id
               WHERE e.endpoint_id = $1 ORDER BY p.name, p.id LIMIT $2";
    let items = projects::with(&app, &mut conn, sql, &endpoint).await?;
    let path = format!("/v3/OS-EP-FILTER/endpoints/{endpoint}/projects");
    Ok(Json(list(&app, "projects", &path, items)))
}

/// Those that are its own, and those of its groups.
async fn endpoints_of_project(
    State(app): State<App>,
    _ctx: Ctx,
    Path(project): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    projects::require(&mut conn, &project).await?;
    let chosen = chosen(&mut conn).await?.remove(&project).unwrap_or_default();
    let endpoints = all_endpoints(&mut conn).await?;
    let items = endpoints.iter().filter(|one| chosen.contains(&one.id)).map(|one| one.json(&app)).collect();
    let path = format!("/v3/OS-EP-FILTER/projects/{project}/endpoints");
    Ok(Json(list(&app, "endpoints", &path, items)))
}

async fn groups_of_project(
    State(app): State<App>,
    _ctx: Ctx,
    Path(project): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    projects::require(&mut conn, &project).await?;
    let rows: Vec<GroupRow> = sqlx::query_as(
        "SELECT g.* FROM endpoint_groups g JOIN project_endpoint_groups p ON p.group_id = g.id
         WHERE p.project_id = $1 ORDER BY g.name, g.id LIMIT $2",
    )
    .bind(&project)
    .bind(MAX_LIST + 1)
    .fetch_all(&mut *conn)
    .await?;
    let items = rows.iter().map(|row| row.json(&app)).collect();
    let path = format!("/v3/OS-EP-FILTER/projects/{project}/endpoint_groups");
    Ok(Json(list(&app, "endpoint_groups", &path, items)))
}

/// With what a project is associated.
#[derive(Clone, Copy)]
enum With {
    Endpoint,
    Group,
}

impl With {
    /// 404 unless both are there.
    async fn require(self, conn: &mut Conn, project: &str, id: &str) -> Result<(), ApiError> {
        match self {
            Self::Endpoint => drop(resource::find::<EndpointRow>(conn, id).await?),
            Self::Group => drop(resource::find::<GroupRow>(conn, id).await?),
        }
        projects::require(conn, project).await
    }

    fn missing(self, project: &str, id: &str) -> ApiError {
        let what = match self {
            Self::Endpoint => "endpoint",
            Self::Group => "endpoint group",
        };
        not_found(&format!("association of project {project} with {what}"), id)
    }

    async fn add(self, app: &App, project: &str, id: &str) -> Result<StatusCode, ApiError> {
        let sql = match self {
            Self::Endpoint => "INSERT INTO project_endpoints (project_id, endpoint_id) VALUES ($1, $2)",
            Self::Group => "INSERT INTO project_endpoint_groups (project_id, group_id) VALUES ($1, $2)",
        };
        let mut tx = begin(app).await?;
        self.require(&mut tx, project, id).await?;
        sqlx::query(sql).bind(project).bind(id).execute(&mut *tx).await.map_err(|error| {
            match db::is_unique_violation(&error) {
                true => {
                    ApiError::Conflict("Conflict occurred: the project is associated with it already.".into())
                }
                false => error.into(),
            }
        })?;
        tx.commit().await?;
        Ok(StatusCode::NO_CONTENT)
    }

    async fn check(self, app: &App, project: &str, id: &str) -> Result<(), ApiError> {
        let sql = match self {
            Self::Endpoint => {
                "SELECT EXISTS (SELECT 1 FROM project_endpoints WHERE project_id = $1 AND endpoint_id = $2)"
            }
            Self::Group => {
                "SELECT EXISTS (SELECT 1 FROM project_endpoint_groups WHERE project_id = $1 AND group_id = $2)"
            }
        };
        let mut conn = app.db.acquire().await?;
        self.require(&mut conn, project, id).await?;
        let there: bool = sqlx::query_scalar(sql).bind(project).bind(id).fetch_one(&mut *conn).await?;
        there.then_some(()).ok_or_else(|| self.missing(project, id))
    }

    async fn remove(self, app: &App, project: &str, id: &str) -> Result<StatusCode, ApiError> {
        let sql = match self {
            Self::Endpoint => "DELETE FROM project_endpoints WHERE project_id = $1 AND endpoint_id = $2",
            Self::Group => "DELETE FROM project_endpoint_groups WHERE project_id = $1 AND group_id = $2",
        };
        let mut tx = begin(app).await?;
        let gone = sqlx::query(sql).bind(project).bind(id).execute(&mut *tx).await?;
        if gone.rows_affected() == 0 {
            return Err(self.missing(project, id));
        }
        tx.commit().await?;
        Ok(StatusCode::NO_CONTENT)
    }
}

type Pair = Path<(String, String)>;

async fn add_endpoint(
    State(app): State<App>,
    _ctx: Ctx,
    Path((project, endpoint)): Pair,
) -> Result<StatusCode, ApiError> {
    With::Endpoint.add(&app, &project, &endpoint).await
}

async fn check_endpoint(
    State(app): State<App>,
    _ctx: Ctx,
    Path((project, endpoint)): Pair,
) -> Result<StatusCode, ApiError> {
    With::Endpoint.check(&app, &project, &endpoint).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn remove_endpoint(
    State(app): State<App>,
    _ctx: Ctx,
    Path((project, endpoint)): Pair,
) -> Result<StatusCode, ApiError> {
    With::Endpoint.remove(&app, &project, &endpoint).await
}

async fn add_group(
    State(app): State<App>,
    _ctx: Ctx,
    Path((group, project)): Pair,
) -> Result<StatusCode, ApiError> {
    With::Group.add(&app, &project, &group).await
}

async fn check_group(
    State(app): State<App>,
    _ctx: Ctx,
    Path((group, project)): Pair,
) -> Result<Json<Value>, ApiError> {
    With::Group.check(&app, &project, &group).await?;
    let url = format!("/OS-EP-FILTER/endpoint_groups/{group}/projects/{project}");
    let shown = json!({"endpoint_group_id": group, "project_id": project, "links": {"self": url}});
    Ok(Json(json!({ "project_endpoint_group": shown })))
}

async fn remove_group(
    State(app): State<App>,
    _ctx: Ctx,
    Path((group, project)): Pair,
) -> Result<StatusCode, ApiError> {
    With::Group.remove(&app, &project, &group).await
}
