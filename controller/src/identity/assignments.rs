//! Role assignments: `/v3/{projects,domains}/{target}/users/{user}/roles/{role}` and `/v3/role_assignments`.

use crate::db::Conn;
use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, put},
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{MAX_LIST, list, not_found, roles::RoleRow};
use crate::{
    app::App,
    http::{context::Ctx, error::ApiError, query::Params},
};

/// Routes.
pub fn router() -> Router<App> {
    Router::new()
        .route("/v3/{kinds}/{target}/users/{user}/roles", get(index))
        .route(
            "/v3/{kinds}/{target}/users/{user}/roles/{role}",
            put(grant).get(check).head(check).delete(revoke),
        )
        .route("/v3/role_assignments", get(assignments))
}

/// Where a role is given to whom.
#[derive(Debug)]
struct Place {
    /// `project` or `domain`.
    kind: &'static str,
    target_id: String,
    user_id: String,
}

/// Of the path; 404 unless target and user exist.
async fn place(conn: &mut Conn, kinds: &str, target_id: String, user_id: String) -> Result<Place, ApiError> {
    let (kind, target): (_, Option<i32>) = match kinds {
        "projects" => {
            let query = sqlx::query_scalar("SELECT 1 FROM projects WHERE id = $1").bind(&target_id);
            ("project", query.fetch_optional(&mut *conn).await?)
        }
        "domains" => {
            let query = sqlx::query_scalar("SELECT 1 FROM domains WHERE id = $1").bind(&target_id);
            ("domain", query.fetch_optional(&mut *conn).await?)
        }
        _ => return Err(ApiError::NotFound("The resource could not be found.".into())),
    };
    target.ok_or_else(|| not_found(kind, &target_id))?;
    let user: Option<i32> =
        sqlx::query_scalar("SELECT 1 FROM users WHERE id = $1").bind(&user_id).fetch_optional(conn).await?;
    user.ok_or_else(|| not_found("user", &user_id))?;
    Ok(Place { kind, target_id, user_id })
}

type RolePath = Path<(String, String, String, String)>;

async fn index(
    State(app): State<App>,
    ctx: Ctx,
    Path((kinds, target, user)): Path<(String, String, String)>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let mut conn = app.db.acquire().await?;
    let path = format!("/v3/{kinds}/{target}/users/{user}/roles");
    let place = place(&mut conn, &kinds, target, user).await?;
    let rows: Vec<RoleRow> = sqlx::query_as(
        "SELECT r.* FROM roles r JOIN role_assignments a ON a.role_id = r.id
         WHERE a.user_id = $1 AND a.target_kind = $2 AND a.target_id = $3 ORDER BY r.name LIMIT $4",
    )
    .bind(&place.user_id)
    .bind(place.kind)
    .bind(&place.target_id)
    .bind(MAX_LIST + 1)
    .fetch_all(&mut *conn)
    .await?;
    let items = rows.iter().map(|row| row.json(&app)).collect();
    Ok(Json(list(&app, "roles", &path, items)))
}

async fn grant(
    State(app): State<App>,
    ctx: Ctx,
    Path((kinds, target, user, role)): RolePath,
) -> Result<StatusCode, ApiError> {
    ctx.require_admin()?;
    let mut tx = app.begin().await?;
    let place = place(&mut tx, &kinds, target, user).await?;
    let there: Option<i32> =
        sqlx::query_scalar("SELECT 1 FROM roles WHERE id = $1").bind(&role).fetch_optional(&mut *tx).await?;
    there.ok_or_else(|| not_found("role", &role))?;
    assign(&mut tx, &place.user_id, &role, place.kind, &place.target_id).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Gives a role; giving it twice changes nothing.
///
/// # Errors
/// Of the database.
pub async fn assign(
    conn: &mut Conn,
    user_id: &str,
    role_id: &str,
    target_kind: &str,
    target_id: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO role_assignments (user_id, role_id, target_kind, target_id) VALUES ($1, $2, $3, $4)
         ON CONFLICT DO NOTHING",
    )
    .bind(user_id)
    .bind(role_id)
    .bind(target_kind)
    .bind(target_id)
    .execute(conn)
    .await?;
    Ok(())
}

async fn check(
    State(app): State<App>,
    ctx: Ctx,
    Path((kinds, target, user, role)): RolePath,
) -> Result<StatusCode, ApiError> {
    ctx.require_admin()?;
    let mut conn = app.db.acquire().await?;
    let place = place(&mut conn, &kinds, target, user).await?;
    let there: Option<i32> = sqlx::query_scalar(
        "SELECT 1 FROM role_assignments
         WHERE user_id = $1 AND target_kind = $2 AND target_id = $3 AND role_id = $4",
    )
    .bind(&place.user_id)
    .bind(place.kind)
    .bind(&place.target_id)
    .bind(&role)
    .fetch_optional(&mut *conn)
    .await?;
    there.map(|_| StatusCode::NO_CONTENT).ok_or_else(|| no_such_assignment(&place, &role))
}

async fn revoke(
    State(app): State<App>,
    ctx: Ctx,
    Path((kinds, target, user, role)): RolePath,
) -> Result<StatusCode, ApiError> {
    ctx.require_admin()?;
    let mut tx = app.begin().await?;
    let place = place(&mut tx, &kinds, target, user).await?;
    let gone = sqlx::query(
        "DELETE FROM role_assignments
         WHERE user_id = $1 AND target_kind = $2 AND target_id = $3 AND role_id = $4",
    )
    .bind(&place.user_id)
    .bind(place.kind)
    .bind(&place.target_id)
    .bind(&role)
    .execute(&mut *tx)
    .await?;
    if gone.rows_affected() == 0 {
        return Err(no_such_assignment(&place, &role));
    }
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

fn no_such_assignment(place: &Place, role: &str) -> ApiError {
    let what =
        format!("role assignment of user {} on {} {}, role", place.user_id, place.kind, place.target_id);
    not_found(&what, role)
}

/// One assignment with all names.
#[derive(Debug, sqlx::FromRow)]
struct AssignmentRow {
    user_id: String,
    user_name: String,
    user_domain_id: String,
    user_domain_name: String,
    role_id: String,
    role_name: String,
    target_kind: String,
    target_id: String,
    target_name: Option<String>,
    target_domain_id: Option<String>,
    target_domain_name: Option<String>,
}

impl AssignmentRow {
    fn json(&self, app: &App, with_names: bool) -> Value {
        let mut user = json!({"id": self.user_id});
        let mut role = json!({"id": self.role_id});
        let mut target = json!({"id": self.target_id});
        if with_names {
            user["name"] = json!(self.user_name);
            user["domain"] = json!({"id": self.user_domain_id, "name": self.user_domain_name});
            role["name"] = json!(self.role_name);
            target["name"] = json!(self.target_name);
            if self.target_kind == "project" {
                target["domain"] = json!({"id": self.target_domain_id, "name": self.target_domain_name});
            }
        }
        let url = format!(
            "{}/identity/v3/{}s/{}/users/{}/roles/{}",
            app.config.public_url, self.target_kind, self.target_id, self.user_id, self.role_id
        );
        json!({
            "user": user, "role": role, "scope": { self.target_kind.as_str(): target },
            "links": {"assignment": url},
        })
    }
}

/// Everybody may list what concerns only himself or herself.
async fn assignments(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    if params.get("user.id") != Some(&ctx.user_id) {
        ctx.require_admin()?;
    }
    let path = "/v3/role_assignments";
    if params.get("group.id").is_some() || params.get("scope.system").is_some() {
        return Ok(Json(list(&app, "role_assignments", path, Vec::new())));
    }
    let rows: Vec<AssignmentRow> = sqlx::query_as(
        "WITH effective AS (
             SELECT user_id, role_id, target_kind, target_id FROM role_assignments
             UNION
             SELECT a.user_id, i.implied_role_id, a.target_kind, a.target_id FROM role_assignments a
             JOIN role_implications i ON i.prior_role_id = a.role_id WHERE $5)
         SELECT a.user_id, u.name AS user_name, u.domain_id AS user_domain_id, ud.name AS user_domain_name,
                a.role_id, r.name AS role_name, a.target_kind, a.target_id,
                COALESCE(p.name, d.name) AS target_name,
                p.domain_id AS target_domain_id, pd.name AS target_domain_name
         FROM effective a
         JOIN users u ON u.id = a.user_id JOIN domains ud ON ud.id = u.domain_id
         JOIN roles r ON r.id = a.role_id
         LEFT JOIN projects p ON a.target_kind = 'project' AND p.id = a.target_id
         LEFT JOIN domains pd ON pd.id = p.domain_id
         LEFT JOIN domains d ON a.target_kind = 'domain' AND d.id = a.target_id
         WHERE (CAST($1 AS TEXT) IS NULL OR a.user_id = $1) AND (CAST($2 AS TEXT) IS NULL OR a.role_id = $2)
           AND (CAST($3 AS TEXT) IS NULL OR (a.target_kind = 'project' AND a.target_id = $3))
           AND (CAST($4 AS TEXT) IS NULL OR (a.target_kind = 'domain' AND a.target_id = $4))
         ORDER BY u.name, a.user_id, a.target_kind, a.target_id, r.name LIMIT $6",
    )
    .bind(params.get("user.id"))
    .bind(params.get("role.id"))
    .bind(params.get("scope.project.id"))
    .bind(params.get("scope.domain.id"))
    .bind(params.flag("effective"))
    .bind(MAX_LIST + 1)
    .fetch_all(&app.db)
    .await?;
    let with_names = params.flag("include_names");
    let items = rows.iter().map(|row| row.json(&app, with_names)).collect();
    Ok(Json(list(&app, "role_assignments", path, items)))
}
