//! RBAC policies: a project lets another (or all, if an admin says so) use what it owns.
//!
//! Sharing a network with all by `shared` and by a policy is the same: each makes the other.

use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    Scope, address_groups,
    attributes::{Attributes, invalid_input},
    listing::{Collection, Query},
    networks, ports, qos, quotas,
    resource::{Change, Resource},
    security_groups, subnet_pools,
};
use crate::{
    db::{Conn, Db, now_us},
    http::error::ApiError,
};

/// Every project.
const ALL: &str = "*";
/// Longest id of a project.
const MAX_PROJECT: usize = 255;

/// RBAC policies as resources.
pub(super) struct RbacPolicies;

#[derive(Debug, FromRow)]
struct PolicyRow {
    id: String,
    project_id: String,
    object_type: String,
    object_id: String,
    action: String,
    target_project: String,
}

/// Adds whether something is shared with the asker's project.
pub(super) fn push_shared(query: &mut QueryBuilder<Db>, column: &'static str, scope: &Scope) {
    query.push("EXISTS (SELECT 1 FROM rbac_policies WHERE rbac_policies.action = 'access_as_shared' AND ");
    query.push("rbac_policies.object_id = ").push(column).push(" AND rbac_policies.target_project IN ('*', ");
    query.push_bind(scope.project.clone()).push("))");
}

/// Adds whether the asker's project may see something by any policy.
pub(super) fn push_any(query: &mut QueryBuilder<Db>, column: &'static str, scope: &Scope) {
    query.push("EXISTS (SELECT 1 FROM rbac_policies WHERE rbac_policies.object_id = ").push(column);
    query.push(" AND rbac_policies.target_project IN ('*', ").push_bind(scope.project.clone()).push("))");
}

/// Adds the condition that the asker may see a row of a table with owners: its own, or shared with it.
pub(super) fn push_visible(query: &mut QueryBuilder<Db>, [id, project_id]: [&'static str; 2], scope: &Scope) {
    query.push("(").push_bind(scope.admin).push(" OR ").push(project_id).push(" = ");
    query.push_bind(scope.project.clone()).push(" OR ");
    push_shared(query, id, scope);
    query.push(")");
}

/// Lets the policy for all projects follow a network's attribute.
pub(super) async fn follow(
    tx: &mut Conn,
    owner: &str,
    network_id: &str,
    action: &str,
    wanted: bool,
) -> Result<(), ApiError> {
    if !wanted {
        sqlx::query(
            "DELETE FROM rbac_policies WHERE object_id = $1 AND action = $2 AND target_project = '*'",
        )
        .bind(network_id)
        .bind(action)
        .execute(tx)
        .await?;
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO rbac_policies (id, project_id, object_type, object_id, action, target_project, created_us)
         VALUES ($1, $2, 'network', $3, $4, '*', $5) ON CONFLICT DO NOTHING",
    )
    .bind(Uuid::new_v4().to_string())
    .bind(owner)
    .bind(network_id)
    .bind(action)
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(())
}

/// The other direction: the network's attribute follows a policy for all projects.
async fn reflect(tx: &mut Conn, row: &PolicyRow, there: bool) -> Result<(), ApiError> {
    if row.object_type != "network" || row.target_project != ALL {
        return Ok(());
    }
    let sql = match row.action.as_str() {
        "access_as_external" => "UPDATE networks SET external = $2 WHERE id = $1",
        _ => "UPDATE networks SET shared = $2 WHERE id = $1",
    };
    sqlx::query(sql).bind(&row.object_id).bind(there).execute(tx).await?;
    Ok(())
}

/// The owner of the object, if the asker may see it.
async fn owner_of(db: &mut Conn, scope: &Scope, kind: &str, id: &str) -> Result<String, ApiError> {
    match kind {
        "network" => networks::visible(db, id, scope).await.map(|row| row.project_id),
        "security_group" => security_groups::visible(db, id, scope).await.map(|row| row.project_id),
        "address_group" => address_groups::visible(db, id, scope).await.map(|row| row.project_id),
        "subnetpool" => subnet_pools::visible(db, id, scope).await.map(|row| row.project_id),
        _ => qos::visible(db, id, scope).await.map(|row| row.project_id),
    }
}

fn target(body: &mut Attributes, scope: &Scope) -> Result<Option<String>, ApiError> {
    let named = [body.string("target_tenant")?, body.string("target_project")?];
    let Some(target) = named.into_iter().flatten().next() else { return Ok(None) };
    if target.is_empty() || target.chars().count() > MAX_PROJECT {
        return Err(invalid_input("target_tenant is no project"));
    }
    match target == ALL && !scope.admin {
        true => Err(ApiError::Forbidden("Only an admin can share with all projects.".into())),
        false => Ok(Some(target)),
    }
}

async fn find(db: &mut Conn, id: &str, scope: &Scope) -> Result<PolicyRow, ApiError> {
    let row: Option<PolicyRow> =
        sqlx::query_as("SELECT * FROM rbac_policies WHERE id = $1").bind(id).fetch_optional(db).await?;
    row.filter(|row| scope.owns(&row.project_id)).ok_or_else(|| RbacPolicies::missing(id))
}

/// 409 as long as the target uses what it would lose.
async fn refuse_in_use(tx: &mut Conn, row: &PolicyRow) -> Result<(), ApiError> {
    let used = match (row.object_type.as_str(), row.action.as_str()) {
        ("network", "access_as_external") => ports::leads_outside(tx, &row.object_id).await?,
        ("network", _) => ports::of_project(tx, &row.object_id, &row.target_project).await?,
        _ => false,
    };
    match used {
        true => Err(ApiError::Conflict(format!(
            "RBAC policy on object {} cannot be removed because other objects depend on it.",
            row.object_id
        ))
        .named("RbacPolicyInUse")),
        false => Ok(()),
    }
}

fn duplicate() -> ApiError {
    ApiError::Conflict("An RBAC policy already exists with those values.".into()).named("DuplicateRbacPolicy")
}

async fn exists(tx: &mut Conn, object_id: &str, action: &str, target: &str) -> Result<bool, ApiError> {
    Ok(sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM rbac_policies WHERE object_id = $1 AND action = $2 AND target_project = $3)",
    )
    .bind(object_id)
    .bind(action)
    .bind(target)
    .fetch_one(tx)
    .await?)
}

impl Resource for RbacPolicies {
    const NAME: &'static str = "rbac_policy";
    const PATH: &'static str = "rbac-policies";
    const COLLECTION: Collection = Collection {
        name: "rbac_policies",
        attributes: &[
            "action",
            "id",
            "object_id",
            "object_type",
            "project_id",
            "target_project",
            "target_tenant",
            "tenant_id",
        ],
    };

    fn missing(id: &str) -> ApiError {
        ApiError::NotFound(format!("RBAC policy with ID {id} not found")).named("RbacPolicyNotFound")
    }

    async fn read(db: &mut Conn, scope: &Scope, query: &Query) -> Result<Vec<Value>, ApiError> {
        let mut statement = QueryBuilder::new("SELECT * FROM rbac_policies WHERE (");
        statement.push_bind(scope.admin).push(" OR project_id = ").push_bind(scope.project.clone()).push(")");
        query.narrow(&mut statement, &[("id", "id"), ("object_id", "object_id")]);
        statement.push(" ORDER BY created_us, id");
        let rows: Vec<PolicyRow> = statement.build_query_as().fetch_all(db).await?;
        let document = |row: PolicyRow| {
            json!({
                "id": row.id, "project_id": row.project_id, "tenant_id": row.project_id,
                "object_type": row.object_type, "object_id": row.object_id, "action": row.action,
                "target_tenant": row.target_project, "target_project": row.target_project,
            })
        };
        Ok(rows.into_iter().map(document).collect())
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        let project_id = change.scope.owner(&mut body)?;
        let required = |name: &str| {
            ApiError::BadRequest(format!(
                "Failed to parse request. Required attribute '{name}' not specified"
            ))
        };
        let types = ["network", "security_group", "qos_policy", "address_group", "subnetpool"];
        let object_type = body.word("object_type", &types)?.ok_or_else(|| required("object_type"))?;
        let actions: &[&str] = match object_type {
            "network" => &["access_as_shared", "access_as_external"],
            _ => &["access_as_shared"],
        };
        let action = body.word("action", actions)?.ok_or_else(|| required("action"))?;
        let object_id = body.required("object_id")?;
        let target = target(&mut body, &change.scope)?.ok_or_else(|| required("target_tenant"))?;
        body.finish()?;
        if action == "access_as_external" && !change.scope.admin {
            return Err(ApiError::Forbidden("Only an admin can make a network external.".into()));
        }
        let owner = owner_of(&mut change.tx, &change.scope, object_type, &object_id).await?;
        if !change.scope.owns(&owner) {
            return Err(ApiError::Forbidden("Only the owner of a resource can share it.".into()));
        }
        if exists(&mut change.tx, &object_id, action, &target).await? {
            return Err(duplicate());
        }
        quotas::check(&mut change.tx, &project_id, quotas::Resource::RbacPolicy).await?;
        let row: PolicyRow = sqlx::query_as(
            "INSERT INTO rbac_policies (id, project_id, object_type, object_id, action, target_project, created_us)
             VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING *",
        )
        .bind(Uuid::new_v4().to_string())
        .bind(&project_id)
        .bind(object_type)
        .bind(&object_id)
        .bind(action)
        .bind(&target)
        .bind(now_us())
        .fetch_one(&mut *change.tx)
        .await?;
        reflect(&mut change.tx, &row, true).await?;
        Ok(row.id)
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        let target = target(&mut body, &change.scope)?;
        body.finish()?;
        let row = find(&mut change.tx, id, &change.scope).await?;
        let Some(target) = target.filter(|target| *target != row.target_project) else { return Ok(()) };
        refuse_in_use(&mut change.tx, &row).await?;
        if exists(&mut change.tx, &row.object_id, &row.action, &target).await? {
            return Err(duplicate());
        }
        reflect(&mut change.tx, &row, false).await?;
        let row: PolicyRow =
            sqlx::query_as("UPDATE rbac_policies SET target_project = $2 WHERE id = $1 RETURNING *")
                .bind(id)
                .bind(&target)
                .fetch_one(&mut *change.tx)
                .await?;
        reflect(&mut change.tx, &row, true).await
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        let row = find(&mut change.tx, id, &change.scope).await?;
        refuse_in_use(&mut change.tx, &row).await?;
        reflect(&mut change.tx, &row, false).await?;
        sqlx::query("DELETE FROM rbac_policies WHERE id = $1").bind(id).execute(&mut *change.tx).await?;
        Ok(())
    }
}
