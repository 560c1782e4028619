//! Nova's quotas: `os-quota-sets` of projects, and `os-quota-class-sets/default` of all that have none of their own.
//!
//! Limited are instances, cores, RAM (MiB) and server groups of a project, key pairs of a user, servers of a group. Nova's other resources don't exist here
//! or have a fixed limit, so they are neither shown nor taken.

use crate::db::Conn;
use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use http::StatusCode;
use serde_json::{Map, Value, json};
use sqlx::FromRow;

use super::{servers::input, versions::Version};
use crate::{
    app::App,
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// Nova's largest integer.
const MAX_LIMIT: i64 = 0x7FFF_FFFF;
/// Nova's class of quotas that acts; others never did.
const DEFAULT_CLASS: &str = "default";
/// No project has this id: its limits are those of all that have none of their own.
const NOBODY: &str = "";

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resource {
    /// Servers of a project.
    Instances,
    /// Their vCPUs.
    Cores,
    /// Their memory, MiB.
    Ram,
    /// Key pairs of a user.
    KeyPairs,
    /// Server groups of a project.
    ServerGroups,
    /// Servers of a group.
    ServerGroupMembers,
}

impl Resource {
    /// All of them.
    pub(crate) const ALL: [Resource; 6] = [
        Resource::Instances,
        Resource::Cores,
        Resource::Ram,
        Resource::KeyPairs,
        Resource::ServerGroups,
        Resource::ServerGroupMembers,
    ];

    /// Its name in the API and the database.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Resource::Instances => "instances",
            Resource::Cores => "cores",
            Resource::Ram => "ram",
            Resource::KeyPairs => "key_pairs",
            Resource::ServerGroups => "server_groups",
            Resource::ServerGroupMembers => "server_group_members",
        }
    }

    /// Nova's defaults.
    fn default_limit(self) -> i64 {
        match self {
            Resource::Instances => 10,
            Resource::Cores => 20,
            Resource::Ram => 51_200,
            Resource::KeyPairs => 100,
            Resource::ServerGroups | Resource::ServerGroupMembers => 10,
        }
    }
}

/// What the servers of a project use (those that are being deleted, too: they still hold it).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromRow)]
pub(crate) struct Used {
    /// Servers.
    pub(crate) instances: i64,
    /// vCPUs.
    pub(crate) cores: i64,
    /// Memory, MiB.
    pub(crate) ram: i64,
    /// Server groups.
    pub(crate) server_groups: i64,
}

impl Used {
    /// Of one resource; key pairs count by user, members by group, and both are 0 here, as in Nova.
    fn of(&self, resource: Resource) -> i64 {
        match resource {
            Resource::Instances => self.instances,
            Resource::Cores => self.cores,
            Resource::Ram => self.ram,
            Resource::ServerGroups => self.server_groups,
            Resource::KeyPairs | Resource::ServerGroupMembers => 0,
        }
    }
}

/// The limit of a project, -1 for none.
///
/// # Errors
/// Of the database.
pub(crate) async fn limit(conn: &mut Conn, project: &str, resource: Resource) -> Result<i64, ApiError> {
    Ok(limits_of(conn, project, [resource]).await?[0])
}

/// The limits of a project, -1 for none, in this order.
///
/// # Errors
/// Of the database.
pub(crate) async fn limits_of<const N: usize>(
    conn: &mut Conn,
    project: &str,
    resources: [Resource; N],
) -> Result<[i64; N], ApiError> {
    // Its own come first.
    let said: Vec<(i64, String, i64)> = sqlx::query_as(
        "SELECT 0 AS place, resource, hard_limit FROM quotas WHERE project_id = $1
         UNION ALL SELECT 1, resource, hard_limit FROM quota_classes WHERE class = $2 ORDER BY place",
    )
    .bind(project)
    .bind(DEFAULT_CLASS)
    .fetch_all(conn)
    .await?;
    Ok(resources.map(|resource| {
        let found = said.iter().find(|(_, name, _)| name == resource.name());
        found.map_or(resource.default_limit(), |(.., limit)| *limit)
    }))
}

/// What a project uses.
///
/// # Errors
/// Of the database.
pub(crate) async fn used(conn: &mut Conn, project: &str) -> Result<Used, ApiError> {
    // Counted by triggers (migration 0096). What is held for a resize that can be taken back counts, as in Nova.
    let sql = "SELECT COALESCE(u.instances, 0) AS instances, COALESCE(u.cores, 0) AS cores,
             COALESCE(u.ram_mib, 0) AS ram, g.server_groups
         FROM (SELECT COUNT(*) AS server_groups FROM server_groups WHERE project_id = $1) AS g
             LEFT JOIN project_usage AS u ON u.project_id = $1";
    Ok(sqlx::query_as(sql).bind(project).fetch_one(conn).await?)
}

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/os-quota-sets/{project}", get(show).put(update).delete(reset))
        .route("/os-quota-sets/{project}/defaults", get(defaults))
        .route("/os-quota-sets/{project}/detail", get(detail))
        .route("/os-quota-class-sets/{class}", get(show_class).put(update_class))
}

/// Own quotas for everybody, all for an admin.
pub(super) fn may_see(ctx: &Ctx, project: &str) -> Result<(), ApiError> {
    match ctx.is_admin || ctx.require_project()? == project {
        true => Ok(()),
        false => Err(ApiError::Forbidden("Only an admin can see the quotas of other projects.".into())),
    }
}

/// What is shown and can't be changed: the items of a server's metadata, and as long as Nova has them what the network
/// service limits, and files that nothing takes.
fn fixed(version: Version) -> impl Iterator<Item = (&'static str, i64)> {
    let others = [
        ("metadata_items", i64::try_from(input::MAX_METADATA).unwrap_or(MAX_LIMIT), u16::MAX),
        ("floating_ips", -1, 36),
        ("fixed_ips", -1, 36),
        ("security_groups", -1, 36),
        ("security_group_rules", -1, 36),
        ("injected_files", 0, 57),
        ("injected_file_content_bytes", 0, 57),
        ("injected_file_path_bytes", 0, 57),
    ];
    others.into_iter().filter(move |(_, _, until)| !version.has(*until)).map(|(name, limit, _)| (name, limit))
}

/// The limits of a project and what can't be changed, each in the form that `show` gives it.
async fn set(
    conn: &mut Conn,
    project: &str,
    version: Version,
    show: impl Fn(i64, Option<Resource>) -> Value,
) -> Result<Map<String, Value>, ApiError> {
    let limits = limits_of(conn, project, Resource::ALL).await?;
    let changeable = Resource::ALL.into_iter().zip(limits);
    let changeable = changeable.map(|(resource, limit)| (resource.name(), show(limit, Some(resource))));
    let fixed = fixed(version).map(|(name, limit)| (name, show(limit, None)));
    Ok(changeable.chain(fixed).map(|(name, shown)| (name.to_owned(), shown)).collect())
}

/// The bare limit.
fn bare(limit: i64, _: Option<Resource>) -> Value {
    limit.into()
}

fn named(mut quota: Map<String, Value>, id: String) -> Json<Value> {
    quota.insert("id".into(), id.into());
    Json(json!({ "quota_set": quota }))
}

async fn show(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(project): Path<String>,
) -> Result<Json<Value>, ApiError> {
    may_see(&ctx, &project)?;
    Ok(named(set(&mut *app.db.acquire().await?, &project, version, bare).await?, project))
}

async fn defaults(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(project): Path<String>,
) -> Result<Json<Value>, ApiError> {
    may_see(&ctx, &project)?;
    Ok(named(set(&mut *app.db.acquire().await?, NOBODY, version, bare).await?, project))
}

async fn detail(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(project): Path<String>,
) -> Result<Json<Value>, ApiError> {
    may_see(&ctx, &project)?;
    let mut db = app.db.acquire().await?;
    let used = used(&mut db, &project).await?;
    let full = |limit, resource: Option<Resource>| json!({"limit": limit, "in_use": resource.map_or(0, |resource| used.of(resource)), "reserved": 0});
    Ok(named(set(&mut db, &project, version, full).await?, project))
}

fn check_class(class: &str) -> Result<(), ApiError> {
    match class == DEFAULT_CLASS {
        true => Ok(()),
        false => Err(ApiError::NotFound("There is no such class of quotas: the only one is default.".into())),
    }
}

async fn show_class(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(class): Path<String>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    check_class(&class)?;
    let mut quota = set(&mut *app.db.acquire().await?, NOBODY, version, bare).await?;
    quota.insert("id".into(), class.into());
    Ok(Json(json!({ "quota_class_set": quota })))
}

async fn update_class(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(class): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    check_class(&class)?;
    let (limits, _) = wanted(body, "quota_class_set", version)?;
    let mut tx = app.begin().await?;
    for (resource, limit) in limits {
        sqlx::query(
            "INSERT INTO quota_classes (class, resource, hard_limit) VALUES ($1, $2, $3)
             ON CONFLICT (class, resource) DO UPDATE SET hard_limit = excluded.hard_limit",
        )
        .bind(DEFAULT_CLASS)
        .bind(resource.name())
        .bind(limit)
        .execute(&mut *tx)
        .await?;
    }
    let quota = set(&mut tx, NOBODY, version, bare).await?;
    tx.commit().await?;
    Ok(Json(json!({ "quota_class_set": quota })))
}

/// 400 unless there is such a project.
pub(super) async fn require_known_project(conn: &mut Conn, project: &str) -> Result<(), ApiError> {
    let known: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM projects WHERE id = $1")
        .bind(project)
        .fetch_one(conn)
        .await?;
    match known > 0 {
        true => Ok(()),
        false => {
            let project: String = project.chars().take(64).collect();
            Err(ApiError::BadRequest(format!("Project ID {project} is not a valid project.")))
        }
    }
}

/// What an update sets.
fn wanted(body: Value, name: &str, version: Version) -> Result<(Vec<(Resource, i64)>, bool), ApiError> {
    let Value::Object(mut body) = body else {
        return Err(ApiError::BadRequest(format!("The body must be an object with {name}.")));
    };
    let Some(Value::Object(mut quota)) = body.remove(name) else {
        return Err(ApiError::BadRequest(format!("{name}: an object is required.")));
    };
    let force = match quota.remove("force") {
        None => false,
        Some(Value::Bool(force)) => force,
        Some(_) => return Err(ApiError::BadRequest("force: must be true or false.".into())),
    };
    quota.remove("tenant_id");
    let mut limits = Vec::new();
    for resource in Resource::ALL {
        let Some(value) = quota.remove(resource.name()) else { continue };
        let limit = value.as_i64().or_else(|| value.as_str()?.parse().ok());
        let limit = limit.filter(|limit| (-1..=MAX_LIMIT).contains(limit)).ok_or_else(|| {
            let name = resource.name();
            ApiError::BadRequest(format!("{name}: must be a whole number from -1 (no limit) to {MAX_LIMIT}."))
        })?;
        limits.push((resource, limit));
    }
    for (name, limit) in fixed(version) {
        if let Some(value) = quota.remove(name)
            && value != limit
            && value.as_str() != Some(limit.to_string().as_str())
        {
            return Err(ApiError::BadRequest(format!("{name}: is {limit} and can't be changed.")));
        }
    }
    if let Some(name) = quota.keys().chain(body.keys()).next() {
        return Err(ApiError::BadRequest(format!("{name}: Mote has no such quota.")));
    }
    Ok((limits, force))
}

async fn update(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(project): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let (limits_wanted, force) = wanted(body, "quota_set", version)?;
    let mut tx = app.begin().await?;
    require_known_project(&mut tx, &project).await?;
    let used = used(&mut tx, &project).await?;
    for (resource, limit) in limits_wanted {
        let in_use = used.of(resource);
        if !force && limit >= 0 && limit < in_use {
            let name = resource.name();
            return Err(ApiError::BadRequest(format!(
                "Quota limit {limit} for {name} must be greater than or equal to already used {in_use}."
            )));
        }
        sqlx::query(
            "INSERT INTO quotas (project_id, resource, hard_limit) VALUES ($1, $2, $3)
             ON CONFLICT (project_id, resource) DO UPDATE SET hard_limit = excluded.hard_limit",
        )
        .bind(&project)
        .bind(resource.name())
        .bind(limit)
        .execute(&mut *tx)
        .await?;
    }
    let quota = set(&mut tx, &project, version, bare).await?;
    tx.commit().await?;
    Ok(Json(json!({"quota_set": quota})))
}

/// Back to the defaults.
async fn reset(
    State(app): State<App>,
    ctx: Ctx,
    Path(project): Path<String>,
) -> Result<StatusCode, ApiError> {
    ctx.require_admin()?;
    let mut tx = app.begin().await?;
    for resource in Resource::ALL {
        sqlx::query("DELETE FROM quotas WHERE project_id = $1 AND resource = $2")
            .bind(&project)
            .bind(resource.name())
            .execute(&mut *tx)
            .await?;
    }
    tx.commit().await?;
    Ok(StatusCode::ACCEPTED)
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;
    use crate::testing::TestApp;

    #[tokio::test]
    async fn limits_have_defaults_are_changed_by_admins_and_reset() {
        let test = TestApp::new().await;
        let (project, token) = test.tenant("ada", "member").await;
        let path = format!("/compute/v2.1/os-quota-sets/{project}");
        let quota = test.get(&path, &token).await.expect(200);
        let expected = json!({
            "id": project, "instances": 10, "cores": 20, "ram": 51200, "key_pairs": 100, "server_groups": 10,
            "server_group_members": 10, "metadata_items": 128, "floating_ips": -1, "fixed_ips": -1,
            "security_groups": -1, "security_group_rules": -1, "injected_files": 0,
            "injected_file_content_bytes": 0, "injected_file_path_bytes": 0,
        });
        assert_eq!(quota["quota_set"], expected);
        let change = json!({"quota_set": {"instances": 3, "cores": "-1", "force": false}});
        test.call(Method::PUT, &path, &token, change.clone()).await.expect(403);
        let admin = &test.admin_token;
        let quota = test.call(Method::PUT, &path, admin, change).await.expect(200);
        assert_eq!((&quota["quota_set"]["instances"], &quota["quota_set"]["cores"]), (&json!(3), &json!(-1)));
        let mut db = test.app.db.acquire().await.unwrap();
        assert_eq!(limit(&mut db, &project, Resource::Instances).await.unwrap(), 3);
        let detail = test.get(&format!("{path}/detail"), &token).await.expect(200);
        assert_eq!(detail["quota_set"]["instances"], json!({"limit": 3, "in_use": 0, "reserved": 0}));
        test.delete(&path, admin).await.expect(202);
        let defaults = test.get(&format!("{path}/defaults"), &token).await.expect(200);
        assert_eq!(test.get(&path, &token).await.expect(200), defaults);
    }

    #[tokio::test]
    async fn quotas_of_others_and_unknown_ones_are_refused() {
        let test = TestApp::new().await;
        let (_, token) = test.tenant("ada", "member").await;
        let path = format!("/compute/v2.1/os-quota-sets/{}", test.admin.project_id);
        test.get(&path, &token).await.expect(403);
        for quota in
            [json!({"floating_ips": 3}), json!({"ram": -2}), json!({"ram": 1.5}), json!({"cores": null})]
        {
            let body = json!({"quota_set": quota});
            test.call(Method::PUT, &path, &test.admin_token, body).await.expect(400);
        }
        let body = json!({"quota_set": {"ram": 5}});
        test.call(Method::PUT, "/compute/v2.1/os-quota-sets/none", &test.admin_token, body).await.expect(400);
    }

    #[tokio::test]
    async fn the_class_of_all_projects_counts_for_those_without_a_limit_of_their_own() {
        let test = TestApp::new().await;
        let (project, token) = test.tenant("ada", "member").await;
        let (class, admin) = ("/compute/v2.1/os-quota-class-sets/default", test.admin_token.as_str());
        let shown = test.get(class, admin).await.expect(200)["quota_class_set"].take();
        assert_eq!((&shown["id"], &shown["instances"]), (&json!("default"), &json!(10)));
        test.get(class, &token).await.expect(403);
        test.get("/compute/v2.1/os-quota-class-sets/gold", admin).await.expect(404);
        let body = json!({"quota_class_set": {"instances": 3, "key_pairs": 0}});
        test.call(Method::PUT, class, &token, body.clone()).await.expect(403);
        let set = test.call(Method::PUT, class, admin, body).await.expect(200);
        assert_eq!(
            (&set["quota_class_set"]["instances"], &set["quota_class_set"]["cores"]),
            (&json!(3), &json!(20))
        );
        let path = format!("/compute/v2.1/os-quota-sets/{project}");
        for path in [path.clone(), format!("{path}/defaults")] {
            let quota = test.get(&path, &token).await.expect(200);
            assert_eq!(quota["quota_set"]["instances"], 3, "{path}");
        }
        let key = json!({"keypair": {"name": "k"}});
        test.post("/compute/v2.1/os-keypairs", &token, key.clone()).await.expect(403);
        // Its own limit counts for a project that has one, whatever the class says.
        let own = json!({"quota_set": {"key_pairs": 1}});
        test.call(Method::PUT, &path, admin, own).await.expect(200);
        test.post("/compute/v2.1/os-keypairs", &token, key).await.expect(200);
        let wrong = json!({"quota_class_set": {"instances": -2}});
        test.call(Method::PUT, class, admin, wrong).await.expect(400);
        let wrong = json!({"quota_class_set": {"metadata_items": 5}});
        test.call(Method::PUT, class, admin, wrong).await.expect(400);
    }
}
