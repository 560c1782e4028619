//! Role assignments: who (a user or a group) has which role where (a project, a domain, or the system), there or, inherited,
//! on all projects below.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, put},
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{MAX_LIST, begin, list, not_found, principal::SYSTEM, roles::RoleRow};
use crate::{
    app::App,
    db::Conn,
    http::{context::Ctx, error::ApiError, query::Params},
    policy,
};

/// Routes.
pub fn router() -> Router<App> {
    let inherited = "/v3/OS-INHERIT/{kinds}/{target}/{actors}/{actor}/roles";
    Router::new()
        .route("/v3/{kinds}/{target}/{actors}/{actor}/roles", get(index))
        .route(
            "/v3/{kinds}/{target}/{actors}/{actor}/roles/{role}",
            put(grant).get(check).head(check).delete(revoke),
        )
        .route(&format!("{inherited}/inherited_to_projects"), get(index_inherited))
        .route(
            &format!("{inherited}/{{role}}/inherited_to_projects"),
            put(grant_inherited).get(check_inherited).head(check_inherited).delete(revoke_inherited),
        )
        .route("/v3/system/{actors}/{actor}/roles", get(index_system))
        .route(
            "/v3/system/{actors}/{actor}/roles/{role}",
            put(grant_system).get(check_system).head(check_system).delete(revoke_system),
        )
        .route("/v3/role_assignments", get(assignments))
}

/// Who has, or shall have, roles where.
#[derive(Debug)]
struct Place {
    /// `project`, `domain` or `system`.
    target_kind: &'static str,
    target_id: String,
    /// `user` or `group`.
    actor_kind: &'static str,
    actor_id: String,
    inherited: bool,
}

/// As the path names it.
struct Named {
    kinds: String,
    target: String,
    actors: String,
    actor: String,
    inherited: bool,
}

impl Named {
    fn system(actors: String, actor: String) -> Self {
        Self { kinds: "system".into(), target: SYSTEM.into(), actors, actor, inherited: false }
    }

    /// 404 unless both exist.
    async fn place(self, conn: &mut Conn) -> Result<Place, ApiError> {
        let no_such_path = || ApiError::NotFound("The resource could not be found.".into());
        let (target_kind, sql) = match self.kinds.as_str() {
            "projects" => ("project", "SELECT EXISTS (SELECT 1 FROM projects WHERE id = $1)"),
            "domains" => ("domain", "SELECT EXISTS (SELECT 1 FROM domains WHERE id = $1)"),
            "system" => ("system", "SELECT $1 = 'all'"),
            _ => return Err(no_such_path()),
        };
        let there: bool = sqlx::query_scalar(sql).bind(&self.target).fetch_one(&mut *conn).await?;
        there.then_some(()).ok_or_else(|| not_found(target_kind, &self.target))?;
        let (actor_kind, sql) = match self.actors.as_str() {
            "users" => ("user", "SELECT EXISTS (SELECT 1 FROM users WHERE id = $1)"),
            "groups" => ("group", "SELECT EXISTS (SELECT 1 FROM groups WHERE id = $1)"),
            _ => return Err(no_such_path()),
        };
        let there: bool = sqlx::query_scalar(sql).bind(&self.actor).fetch_one(conn).await?;
        there.then_some(()).ok_or_else(|| not_found(actor_kind, &self.actor))?;
        let Self { target: target_id, actor: actor_id, inherited, .. } = self;
        Ok(Place { target_kind, target_id, actor_kind, actor_id, inherited })
    }
}

type Four = Path<(String, String, String, String)>;
type Five = Path<(String, String, String, String, String)>;

fn named((kinds, target, actors, actor): (String, String, String, String), inherited: bool) -> Named {
    Named { kinds, target, actors, actor, inherited }
}

fn named_with_role(
    (kinds, target, actors, actor, role): (String, String, String, String, String),
    inherited: bool,
) -> (Named, String) {
    (Named { kinds, target, actors, actor, inherited }, role)
}

async fn index(State(app): State<App>, _ctx: Ctx, Path(path): Four) -> Result<Json<Value>, ApiError> {
    list_roles(&app, named(path, false)).await
}

async fn index_inherited(
    State(app): State<App>,
    _ctx: Ctx,
    Path(path): Four,
) -> Result<Json<Value>, ApiError> {
    list_roles(&app, named(path, true)).await
}

async fn index_system(
    State(app): State<App>,
    _ctx: Ctx,
    Path((actors, actor)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    list_roles(&app, Named::system(actors, actor)).await
}

async fn list_roles(app: &App, named: Named) -> Result<Json<Value>, ApiError> {
    let mut conn = app.db.acquire().await?;
    let path = format!("/v3/{}/{}/{}/{}/roles", named.kinds, named.target, named.actors, named.actor);
    let place = named.place(&mut conn).await?;
    let rows: Vec<RoleRow> = sqlx::query_as(
        "SELECT r.* FROM roles r JOIN grants g ON g.role_id = r.id
         WHERE g.actor_kind = $1 AND g.actor_id = $2 AND g.target_kind = $3 AND g.target_id = $4
           AND g.inherited = $5 ORDER BY r.name LIMIT $6",
    )
    .bind(place.actor_kind)
    .bind(&place.actor_id)
    .bind(place.target_kind)
    .bind(&place.target_id)
    .bind(place.inherited)
    .bind(MAX_LIST + 1)
    .fetch_all(&mut *conn)
    .await?;
    Ok(Json(list(app, "roles", &path, rows.iter().map(|row| row.json(app)).collect())))
}

async fn grant(State(app): State<App>, _ctx: Ctx, Path(path): Five) -> Result<StatusCode, ApiError> {
    give(&app, named_with_role(path, false)).await
}

async fn grant_inherited(
    State(app): State<App>,
    _ctx: Ctx,
    Path(path): Five,
) -> Result<StatusCode, ApiError> {
    give(&app, named_with_role(path, true)).await
}

async fn grant_system(
    State(app): State<App>,
    _ctx: Ctx,
    Path((actors, actor, role)): Path<(String, String, String)>,
) -> Result<StatusCode, ApiError> {
    give(&app, (Named::system(actors, actor), role)).await
}

async fn give(app: &App, (named, role): (Named, String)) -> Result<StatusCode, ApiError> {
    let mut tx = begin(app).await?;
    let place = named.place(&mut tx).await?;
    let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM roles WHERE id = $1)")
        .bind(&role)
        .fetch_one(&mut *tx)
        .await?;
    there.then_some(()).ok_or_else(|| not_found("role", &role))?;
    insert(&mut tx, &place, &role).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Gives a role; giving it twice changes nothing.
async fn insert(conn: &mut Conn, place: &Place, role: &str) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO grants (actor_kind, actor_id, role_id, target_kind, target_id, inherited)
         VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING",
    )
    .bind(place.actor_kind)
    .bind(&place.actor_id)
    .bind(role)
    .bind(place.target_kind)
    .bind(&place.target_id)
    .bind(place.inherited)
    .execute(conn)
    .await?;
    Ok(())
}

/// Gives a user a role on a `project`, a `domain` or the `system`.
///
/// # Errors
/// Of the database.
pub async fn assign(
    conn: &mut Conn,
    user_id: &str,
    role_id: &str,
    target_kind: &'static str,
    target_id: &str,
) -> Result<(), sqlx::Error> {
    let (target_id, actor_id) = (target_id.to_owned(), user_id.to_owned());
    let place = Place { target_kind, target_id, actor_kind: "user", actor_id, inherited: false };
    insert(conn, &place, role_id).await
}

/// Takes all grants of or on something that is deleted.
///
/// # Errors
/// Of the database.
pub async fn forget(conn: &mut Conn, kind: &str, id: &str) -> Result<(), sqlx::Error> {
    sqlx::query(
        "DELETE FROM grants WHERE (actor_kind = $1 AND actor_id = $2) OR (target_kind = $1 AND target_id = $2)",
    )
    .bind(kind)
    .bind(id)
    .execute(conn)
    .await?;
    Ok(())
}

async fn check(State(app): State<App>, _ctx: Ctx, Path(path): Five) -> Result<StatusCode, ApiError> {
    look(&app, named_with_role(path, false)).await
}

async fn check_inherited(
    State(app): State<App>,
    _ctx: Ctx,
    Path(path): Five,
) -> Result<StatusCode, ApiError> {
    look(&app, named_with_role(path, true)).await
}

async fn check_system(
    State(app): State<App>,
    _ctx: Ctx,
    Path((actors, actor, role)): Path<(String, String, String)>,
) -> Result<StatusCode, ApiError> {
    look(&app, (Named::system(actors, actor), role)).await
}

async fn look(app: &App, (named, role): (Named, String)) -> Result<StatusCode, ApiError> {
    let mut conn = app.db.acquire().await?;
    let place = named.place(&mut conn).await?;
    let there: bool = sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM grants WHERE actor_kind = $1 AND actor_id = $2 AND target_kind = $3
             AND target_id = $4 AND inherited = $5 AND role_id = $6)",
    )
    .bind(place.actor_kind)
    .bind(&place.actor_id)
    .bind(place.target_kind)
    .bind(&place.target_id)
    .bind(place.inherited)
    .bind(&role)
    .fetch_one(&mut *conn)
    .await?;
    there.then_some(StatusCode::NO_CONTENT).ok_or_else(|| no_such_assignment(&place, &role))
}

async fn revoke(State(app): State<App>, _ctx: Ctx, Path(path): Five) -> Result<StatusCode, ApiError> {
    take(&app, named_with_role(path, false)).await
}

async fn revoke_inherited(
    State(app): State<App>,
    _ctx: Ctx,
    Path(path): Five,
) -> Result<StatusCode, ApiError> {
    take(&app, named_with_role(path, true)).await
}

async fn revoke_system(
    State(app): State<App>,
    _ctx: Ctx,
    Path((actors, actor, role)): Path<(String, String, String)>,
) -> Result<StatusCode, ApiError> {
    take(&app, (Named::system(actors, actor), role)).await
}

async fn take(app: &App, (named, role): (Named, String)) -> Result<StatusCode, ApiError> {
    let mut tx = begin(app).await?;
    let place = named.place(&mut tx).await?;
    let gone = sqlx::query(
        "DELETE FROM grants WHERE actor_kind = $1 AND actor_id = $2 AND target_kind = $3 AND target_id = $4
             AND inherited = $5 AND role_id = $6",
    )
    .bind(place.actor_kind)
    .bind(&place.actor_id)
    .bind(place.target_kind)
    .bind(&place.target_id)
    .bind(place.inherited)
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
    let what = format!(
        "role assignment of {} {} on {} {}, role",
        place.actor_kind, place.actor_id, place.target_kind, place.target_id
    );
    not_found(&what, role)
}

/// One assignment with all names.
#[derive(Debug, sqlx::FromRow)]
struct AssignmentRow {
    actor_kind: String,
    actor_id: String,
    actor_name: Option<String>,
    actor_domain_id: Option<String>,
    actor_domain_name: Option<String>,
    role_id: String,
    role_name: String,
    target_kind: String,
    target_id: String,
    target_name: Option<String>,
    target_domain_id: Option<String>,
    target_domain_name: Option<String>,
    inherited: bool,
}

impl AssignmentRow {
    fn json(&self, app: &App, with_names: bool) -> Value {
        let mut actor = json!({"id": self.actor_id});
        let mut role = json!({"id": self.role_id});
        let mut target = json!({"id": self.target_id});
        if with_names {
            actor["name"] = json!(self.actor_name);
            actor["domain"] = json!({"id": self.actor_domain_id, "name": self.actor_domain_name});
            role["name"] = json!(self.role_name);
            target["name"] = json!(self.target_name);
            if self.target_kind == "project" {
                target["domain"] = json!({"id": self.target_domain_id, "name": self.target_domain_name});
            }
        }
        let place = match self.target_kind.as_str() {
            "system" => "system".to_owned(),
            kind => format!("{kind}s/{}", self.target_id),
        };
        let (before, after) =
            if self.inherited { ("OS-INHERIT/", "/inherited_to_projects") } else { ("", "") };
        let url = format!(
            "{}/identity/v3/{before}{place}/{}s/{}/roles/{}{after}",
            app.config.public_url, self.actor_kind, self.actor_id, self.role_id
        );
        let mut scope = match self.target_kind.as_str() {
            "system" => json!({"system": {"all": true}}),
            kind => json!({ kind: target }),
        };
        if self.inherited {
            scope["OS-INHERIT:inherited_to"] = json!("projects");
        }
        json!({
            self.actor_kind.as_str(): actor, "role": role, "scope": scope, "links": {"assignment": url},
        })
    }
}

/// Everybody may list what concerns only himself or herself.
async fn assignments(State(app): State<App>, ctx: Ctx, params: Params) -> Result<Json<Value>, ApiError> {
    if params.get("user.id") != Some(&ctx.user_id) && !policy::may_read(&ctx) {
        let text = "You may list role assignments only with user.id of yourself.";
        return Err(ApiError::Forbidden(text.into()));
    }
    let effective = params.flag("effective");
    if effective && params.get("group.id").is_some() {
        let text = "effective takes groups apart into their members: it can't be combined with group.id.";
        return Err(ApiError::BadRequest(text.into()));
    }
    let system = match params.get("scope.system") {
        None => None,
        Some("all") => Some("all"),
        Some(_) => return Err(ApiError::BadRequest("scope.system must be all.".into())),
    };
    let inherited = match params.get("scope.OS-INHERIT:inherited_to") {
        None => None,
        Some("projects") => Some(true),
        Some(_) => {
            return Err(ApiError::BadRequest("scope.OS-INHERIT:inherited_to must be projects.".into()));
        }
    };
    let rows: Vec<AssignmentRow> = sqlx::query_as(LIST)
        .bind(effective)
        .bind(params.get("user.id"))
        .bind(params.get("group.id"))
        .bind(params.get("role.id"))
        .bind(params.get("scope.project.id"))
        .bind(params.get("scope.domain.id"))
        .bind(system)
        .bind(inherited)
        .bind(params.flag("include_subtree"))
        .bind(MAX_LIST + 1)
        .fetch_all(&app.db)
        .await?;
    let with_names = params.flag("include_names");
    let items = rows.iter().map(|row| row.json(&app, with_names)).collect();
    Ok(Json(list(&app, "role_assignments", "/v3/role_assignments", items)))
}

const LIST: &str = "WITH found AS (
     SELECT actor_kind, actor_id, role_id, target_kind, target_id, inherited FROM grants WHERE NOT $1
     UNION
     SELECT 'user', user_id, role_id, target_kind, target_id, FALSE FROM effective_roles WHERE $1)
 SELECT a.actor_kind, a.actor_id, COALESCE(u.name, g.name) AS actor_name, ad.id AS actor_domain_id,
        ad.name AS actor_domain_name, a.role_id, r.name AS role_name, a.target_kind, a.target_id,
        COALESCE(p.name, d.name) AS target_name, p.domain_id AS target_domain_id, pd.name AS target_domain_name,
        a.inherited
 FROM found a
 JOIN roles r ON r.id = a.role_id
 LEFT JOIN users u ON a.actor_kind = 'user' AND u.id = a.actor_id
 LEFT JOIN groups g ON a.actor_kind = 'group' AND g.id = a.actor_id
 LEFT JOIN domains ad ON ad.id = COALESCE(u.domain_id, g.domain_id)
 LEFT JOIN projects p ON a.target_kind = 'project' AND p.id = a.target_id
 LEFT JOIN domains pd ON pd.id = p.domain_id
 LEFT JOIN domains d ON a.target_kind = 'domain' AND d.id = a.target_id
 WHERE (CAST($2 AS TEXT) IS NULL OR (a.actor_kind = 'user' AND a.actor_id = $2))
   AND (CAST($3 AS TEXT) IS NULL OR (a.actor_kind = 'group' AND a.actor_id = $3))
   AND (CAST($4 AS TEXT) IS NULL OR a.role_id = $4)
   AND (CAST($5 AS TEXT) IS NULL OR (a.target_kind = 'project' AND (a.target_id = $5 OR ($9 AND a.target_id IN (
            SELECT project_id FROM project_ancestors WHERE ancestor_id = $5)))))
   AND (CAST($6 AS TEXT) IS NULL OR (a.target_kind = 'domain' AND a.target_id = $6))
   AND (CAST($7 AS TEXT) IS NULL OR (a.target_kind = 'system' AND a.target_id = $7))
   AND (CAST($8 AS BOOLEAN) IS NULL OR a.inherited = $8)
 ORDER BY actor_name, a.actor_id, a.target_kind, a.target_id, role_name, a.inherited LIMIT $10";
