//! Neutron's quotas: checked in the transaction that adds a resource.

use crate::db::Conn;
use axum::{
    Json,
    extract::{Path, State},
};
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::{
    Id,
    attributes::{Attributes, invalid},
};
use crate::{
    app::App,
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resource {
    /// Networks.
    Network,
    /// Subnets.
    Subnet,
    /// Ports (those of servers and routers' interfaces, too; not the cloud's own on external networks, nor services').
    Port,
    /// Subnet pools.
    SubnetPool,
    /// Routers.
    Router,
    /// Floating IPs.
    FloatingIp,
    /// Security groups.
    SecurityGroup,
    /// Their rules.
    SecurityGroupRule,
    /// Address groups.
    AddressGroup,
    /// RBAC policies.
    RbacPolicy,
}

impl Resource {
    const ALL: [Resource; 10] = [
        Resource::Network,
        Resource::Subnet,
        Resource::Port,
        Resource::SubnetPool,
        Resource::Router,
        Resource::FloatingIp,
        Resource::SecurityGroup,
        Resource::SecurityGroupRule,
        Resource::AddressGroup,
        Resource::RbacPolicy,
    ];

    fn name(self) -> &'static str {
        match self {
            Resource::Network => "network",
            Resource::Subnet => "subnet",
            Resource::Port => "port",
            Resource::SubnetPool => "subnetpool",
            Resource::Router => "router",
            Resource::FloatingIp => "floatingip",
            Resource::SecurityGroup => "security_group",
            Resource::SecurityGroupRule => "security_group_rule",
            Resource::AddressGroup => "address_group",
            Resource::RbacPolicy => "rbac_policy",
        }
    }

    /// Neutron's defaults (`quota_network`, …); that of address groups, which Neutron doesn't limit, is ours.
    fn default_limit(self) -> i64 {
        match self {
            Resource::Network | Resource::Subnet | Resource::SecurityGroupRule => 100,
            Resource::Port => 500,
            Resource::SubnetPool => -1,
            Resource::FloatingIp | Resource::AddressGroup => 50,
            Resource::Router | Resource::SecurityGroup | Resource::RbacPolicy => 10,
        }
    }

    fn count_sql(self) -> &'static str {
        match self {
            Resource::Network => "SELECT COUNT(*) FROM networks WHERE project_id = $1",
            Resource::Subnet => "SELECT COUNT(*) FROM subnets WHERE project_id = $1",
            Resource::Port => {
                // Counted by triggers (migration 0096).
                "SELECT COALESCE((SELECT ports FROM project_usage WHERE project_id = $1), 0)"
            }
            Resource::SubnetPool => "SELECT COUNT(*) FROM subnet_pools WHERE project_id = $1",
            Resource::Router => "SELECT COUNT(*) FROM routers WHERE project_id = $1",
            Resource::FloatingIp => "SELECT COUNT(*) FROM floating_ips WHERE project_id = $1",
            Resource::SecurityGroup => "SELECT COUNT(*) FROM security_groups WHERE project_id = $1",
            Resource::SecurityGroupRule => "SELECT COUNT(*) FROM security_group_rules WHERE project_id = $1",
            Resource::AddressGroup => "SELECT COUNT(*) FROM address_groups WHERE project_id = $1",
            // Those that follow from a network's `shared` and `router:external` are the cloud's.
            Resource::RbacPolicy => {
                "SELECT COUNT(*) FROM rbac_policies WHERE project_id = $1 AND target_project != '*'"
            }
        }
    }
}

/// Whether the project may have one more.
///
/// # Errors
/// 409 `OverQuota`.
pub(crate) async fn check(tx: &mut Conn, project: &str, resource: Resource) -> Result<(), ApiError> {
    let limit = limit(tx, project, resource).await?;
    let used: i64 = sqlx::query_scalar(resource.count_sql()).bind(project).fetch_one(tx).await?;
    match limit >= 0 && used >= limit {
        true => Err(ApiError::OverQuota(format!("Quota exceeded for resources: ['{}'].", resource.name()))),
        false => Ok(()),
    }
}

async fn limit(tx: &mut Conn, project: &str, resource: Resource) -> Result<i64, ApiError> {
    let own: Option<i64> =
        sqlx::query_scalar("SELECT hard_limit FROM quotas WHERE project_id = $1 AND resource = $2")
            .bind(project)
            .bind(resource.name())
            .fetch_optional(tx)
            .await?;
    Ok(own.unwrap_or(resource.default_limit()))
}

async fn document(tx: &mut Conn, project: &str) -> Result<Value, ApiError> {
    let mut quota = Map::new();
    for resource in Resource::ALL {
        quota.insert(resource.name().into(), limit(tx, project, resource).await?.into());
    }
    Ok(json!({"quota": quota}))
}

fn may_see(ctx: &Ctx, project: &str) -> Result<(), ApiError> {
    match ctx.is_admin || ctx.require_project()? == project {
        true => Ok(()),
        false => Err(ApiError::Forbidden("Only an admin can see the quotas of other projects.".into())),
    }
}

/// `GET /v2.0/quotas`: the projects whose limits differ from the defaults (admin).
pub(super) async fn list(State(app): State<App>, ctx: Ctx) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let mut db = app.db.acquire().await?;
    // The table is compute's, too.
    let stored: Vec<(String, String)> =
        sqlx::query_as("SELECT project_id, resource FROM quotas ORDER BY project_id")
            .fetch_all(&mut *db)
            .await?;
    let ours = |resource: &str| Resource::ALL.iter().any(|known| known.name() == resource);
    let mut projects: Vec<String> =
        stored.into_iter().filter(|(_, resource)| ours(resource)).map(|(project, _)| project).collect();
    projects.dedup();
    let mut quotas = Vec::new();
    for project in projects {
        let mut quota = document(&mut db, &project).await?["quota"].take();
        quota["project_id"] = json!(project);
        quota["tenant_id"] = json!(project);
        quotas.push(quota);
    }
    Ok(Json(json!({"quotas": quotas})))
}

/// `GET /v2.0/quotas/{project}`.
pub(super) async fn show(
    State(app): State<App>,
    ctx: Ctx,
    Path(project): Id,
) -> Result<Json<Value>, ApiError> {
    may_see(&ctx, &project)?;
    let mut db = app.db.acquire().await?;
    document(&mut db, &project).await.map(Json)
}

/// `GET /v2.0/quotas/{project}/details`.
pub(super) async fn details(
    State(app): State<App>,
    ctx: Ctx,
    Path(project): Id,
) -> Result<Json<Value>, ApiError> {
    may_see(&ctx, &project)?;
    let mut db = app.db.acquire().await?;
    let mut quota = Map::new();
    for resource in Resource::ALL {
        let used: i64 = sqlx::query_scalar(resource.count_sql()).bind(&project).fetch_one(&mut *db).await?;
        let limit = limit(&mut db, &project, resource).await?;
        quota.insert(resource.name().into(), json!({"limit": limit, "used": used, "reserved": 0}));
    }
    Ok(Json(json!({"quota": quota})))
}

/// `GET /v2.0/quotas/{project}/default`.
pub(super) async fn default(ctx: Ctx, Path(project): Id) -> Result<Json<Value>, ApiError> {
    may_see(&ctx, &project)?;
    let limits: Map<String, Value> = Resource::ALL
        .into_iter()
        .map(|resource| (resource.name().into(), resource.default_limit().into()))
        .collect();
    Ok(Json(json!({"quota": limits})))
}

/// `PUT /v2.0/quotas/{project}` (admin).
pub(super) async fn update(
    State(app): State<App>,
    ctx: Ctx,
    Path(project): Id,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    ctx.require_admin()?;
    let mut body = Attributes::open(body, "quota")?;
    let (check, force) = (body.boolean("check_limit")?, body.boolean("force")?);
    if check == Some(true) && force == Some(true) {
        return Err(invalid("check_limit", "it and force exclude each other"));
    }
    let mut limits = Vec::new();
    for resource in Resource::ALL {
        let Some(limit) = body.integer(resource.name())? else { continue };
        if limit < -1 {
            return Err(invalid(resource.name(), format!("'{limit}' must be -1 (no limit) or more")));
        }
        limits.push((resource, limit));
    }
    body.finish()?;
    let mut tx = app.begin().await?;
    for (resource, limit) in limits {
        if check == Some(true) && limit >= 0 {
            let used: i64 =
                sqlx::query_scalar(resource.count_sql()).bind(&project).fetch_one(&mut *tx).await?;
            if used > limit {
                let text = format!(
                    "Change would make usage less than 0 for the following resources: ['{}'].",
                    resource.name()
                );
                return Err(ApiError::Conflict(text).named("InvalidQuotaValue"));
            }
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
    let document = document(&mut tx, &project).await?;
    tx.commit().await?;
    Ok(Json(document))
}

/// `DELETE /v2.0/quotas/{project}` (admin): back to the defaults.
pub(super) async fn reset(
    State(app): State<App>,
    ctx: Ctx,
    Path(project): Id,
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
    Ok(StatusCode::NO_CONTENT)
}
