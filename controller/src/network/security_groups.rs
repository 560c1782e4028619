//! Security groups. Each project has a group named `default`, made when something first asks for it: its members may send
//! anything, and hear only from each other.

use std::collections::HashMap;

use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    Scope,
    attributes::Attributes,
    listing::{Collection, Query},
    quotas, rbac, reach,
    resource::{Change, Resource},
    security_group_rules::{self, RuleRow},
};
use crate::{
    app::App,
    db::{Conn, now_us, rfc3339_s},
    http::error::ApiError,
};

/// The name of each project's own first group.
const DEFAULT: &str = "default";

/// Security groups as resources.
pub(super) struct SecurityGroups;

/// A group as stored.
#[derive(Debug, Clone, FromRow)]
pub(super) struct GroupRow {
    /// Id.
    pub(super) id: String,
    /// Owner.
    pub(super) project_id: String,
    /// Name.
    pub(super) name: String,
    description: String,
    stateful: bool,
    is_default: bool,
    revision: i64,
    created_us: i64,
    updated_us: i64,
    #[sqlx(default)]
    shared_here: bool,
}

fn select(scope: &Scope) -> QueryBuilder<crate::db::Db> {
    let mut query = QueryBuilder::new("SELECT security_groups.*, ");
    rbac::push_shared(&mut query, "security_groups.id", scope);
    query.push(" AS shared_here FROM security_groups WHERE ");
    rbac::push_visible(&mut query, ["security_groups.id", "security_groups.project_id"], scope);
    query
}

/// The group of that id, if the asker may see it.
pub(super) async fn visible(db: &mut Conn, id: &str, scope: &Scope) -> Result<GroupRow, ApiError> {
    let mut query = select(scope);
    query.push(" AND security_groups.id = ").push_bind(id.to_owned());
    let row: Option<GroupRow> = query.build_query_as().fetch_optional(db).await?;
    row.ok_or_else(|| SecurityGroups::missing(id))
}

/// The group, if the asker may change it.
pub(super) async fn owned(db: &mut Conn, id: &str, scope: &Scope) -> Result<GroupRow, ApiError> {
    let row = visible(db, id, scope).await?;
    match scope.owns(&row.project_id) {
        true => Ok(row),
        false => {
            Err(ApiError::Forbidden("Only the owner of a security group and admins can change it.".into()))
        }
    }
}

/// The groups that the asker names, by id or name; the first that isn't there, or a name that several have, is an error.
pub(super) async fn named(db: &mut Conn, scope: &Scope, names: &[String]) -> Result<Vec<String>, ApiError> {
    let mut query = select(scope);
    query.push(" ORDER BY created_us, id");
    let rows: Vec<GroupRow> = query.build_query_as().fetch_all(db).await?;
    let mut ids = Vec::with_capacity(names.len());
    for name in names {
        let by_id = rows.iter().find(|row| row.id == *name);
        let own = |row: &&GroupRow| row.name == *name && row.project_id == scope.project;
        let by_name: Vec<&GroupRow> = rows.iter().filter(own).collect();
        let found = match (by_id, by_name.as_slice()) {
            (Some(row), _) => row,
            (None, [row]) => row,
            (None, []) => return Err(SecurityGroups::missing(name)),
            (None, _) => {
                let text = format!(
                    "Multiple security groups found matching '{name}'. Use an ID to be more specific."
                );
                return Err(ApiError::Conflict(text).named("NoUniqueMatch"));
            }
        };
        if !ids.contains(&found.id) {
            ids.push(found.id.clone());
        }
    }
    Ok(ids)
}

async fn default_id(db: &mut Conn, project_id: &str) -> Result<Option<String>, ApiError> {
    let sql = "SELECT id FROM security_groups WHERE project_id = $1 AND is_default";
    Ok(sqlx::query_scalar(sql).bind(project_id).fetch_optional(db).await?)
}

/// The project's default group, made if it isn't there.
pub(super) async fn default_group(tx: &mut Conn, project_id: &str) -> Result<String, ApiError> {
    if let Some(id) = default_id(tx, project_id).await? {
        return Ok(id);
    }
    let new = NewGroup {
        project_id,
        name: DEFAULT,
        description: "Default security group",
        stateful: true,
        is_default: true,
    };
    let made = insert(tx, &new).await?;
    match made {
        Some(id) => {
            for ethertype in ["IPv4", "IPv6"] {
                security_group_rules::insert_remote(tx, project_id, &id, ethertype).await?;
            }
            Ok(id)
        }
        None => default_id(tx, project_id)
            .await?
            .ok_or_else(|| ApiError::internal("the default security group vanished while it was made")),
    }
}

struct NewGroup<'a> {
    project_id: &'a str,
    name: &'a str,
    description: &'a str,
    stateful: bool,
    is_default: bool,
}

/// Adds a group that lets everything out; `None` if it would be a second default.
async fn insert(tx: &mut Conn, new: &NewGroup<'_>) -> Result<Option<String>, ApiError> {
    let id: Option<String> = sqlx::query_scalar(
        "INSERT INTO security_groups (id, project_id, name, description, stateful, is_default, created_us, updated_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $7) ON CONFLICT DO NOTHING RETURNING id",
    )
    .bind(Uuid::new_v4().to_string())
    .bind(new.project_id)
    .bind(new.name)
    .bind(new.description)
    .bind(new.stateful)
    .bind(new.is_default)
    .bind(now_us())
    .fetch_optional(&mut *tx)
    .await?;
    let Some(id) = id else { return Ok(None) };
    for ethertype in ["IPv4", "IPv6"] {
        security_group_rules::insert_open(tx, new.project_id, &id, ethertype).await?;
    }
    Ok(Some(id))
}

async fn in_use(tx: &mut Conn, id: &str) -> Result<(), ApiError> {
    let used: bool =
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM port_security_groups WHERE security_group_id = $1)")
            .bind(id)
            .fetch_one(tx)
            .await?;
    match used {
        true => Err(ApiError::Conflict(format!("Security Group {id} in use.")).named("SecurityGroupInUse")),
        false => Ok(()),
    }
}

fn reserved() -> ApiError {
    ApiError::Conflict("Default security group already exists.".into())
        .named("SecurityGroupDefaultAlreadyExists")
}

/// The groups of some ports by port, in the order of their ids.
pub(super) async fn of_ports(
    db: &mut Conn,
    port_id: Option<&str>,
) -> Result<HashMap<String, Vec<String>>, ApiError> {
    let rows: Vec<(String, String)> = match port_id {
        Some(id) => {
            sqlx::query_as(
                "SELECT port_id, security_group_id FROM port_security_groups WHERE port_id = $1
                 ORDER BY security_group_id",
            )
            .bind(id)
            .fetch_all(db)
            .await?
        }
        None => {
            sqlx::query_as(
                "SELECT port_id, security_group_id FROM port_security_groups ORDER BY security_group_id",
            )
            .fetch_all(db)
            .await?
        }
    };
    let mut groups: HashMap<String, Vec<String>> = HashMap::new();
    for (port, group) in rows {
        groups.entry(port).or_default().push(group);
    }
    Ok(groups)
}

impl Resource for SecurityGroups {
    const NAME: &'static str = "security_group";
    const PATH: &'static str = "security-groups";
    const COLLECTION: Collection = Collection {
        name: "security_groups",
        attributes: &[
            "created_at",
            "description",
            "id",
            "name",
            "project_id",
            "revision_number",
            "security_group_rules",
            "shared",
            "stateful",
            "tags",
            "tenant_id",
            "updated_at",
        ],
    };

    fn missing(id: &str) -> ApiError {
        ApiError::NotFound(format!("Security group {id} does not exist")).named("SecurityGroupNotFound")
    }

    async fn prepare(app: &App, scope: &Scope) -> Result<(), ApiError> {
        if default_id(&mut *app.db.acquire().await?, &scope.project).await?.is_none() {
            let mut tx = app.begin().await?;
            default_group(&mut tx, &scope.project).await?;
            tx.commit().await?;
        }
        Ok(())
    }

    async fn read(db: &mut Conn, scope: &Scope, query: &Query) -> Result<Vec<Value>, ApiError> {
        let mut statement = select(scope);
        query.narrow(&mut statement, &[("id", "security_groups.id"), ("name", "security_groups.name")]);
        statement.push(" ORDER BY created_us, id");
        let rows: Vec<GroupRow> = statement.build_query_as().fetch_all(&mut *db).await?;
        let only = match rows.as_slice() {
            [one] => Some(one.id.as_str()),
            _ => None,
        };
        let mut rules = security_group_rules::by_group(db, only).await?;
        let document = |row: &GroupRow| {
            let rules: Vec<Value> =
                rules.remove(&row.id).unwrap_or_default().iter().map(RuleRow::document).collect();
            json!({
                "id": row.id, "name": row.name, "description": row.description, "stateful": row.stateful,
                "project_id": row.project_id, "tenant_id": row.project_id, "shared": row.shared_here,
                "security_group_rules": rules, "revision_number": row.revision,
                "created_at": rfc3339_s(row.created_us), "updated_at": rfc3339_s(row.updated_us),
            })
        };
        Ok(rows.iter().map(document).collect())
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        let project_id = change.scope.owner(&mut body)?;
        let name = body.string("name")?.unwrap_or_default();
        let description = body.string("description")?.unwrap_or_default();
        let stateful = body.boolean("stateful")?.unwrap_or(true);
        body.finish()?;
        if name.eq_ignore_ascii_case(DEFAULT) {
            return Err(reserved());
        }
        default_group(&mut change.tx, &project_id).await?;
        quotas::check(&mut change.tx, &project_id, quotas::Resource::SecurityGroup).await?;
        let new = NewGroup {
            project_id: &project_id,
            name: &name,
            description: &description,
            stateful,
            is_default: false,
        };
        let id = insert(&mut change.tx, &new).await?;
        id.ok_or_else(|| ApiError::internal("a new security group conflicts with another"))
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        let (name, description) = (body.string("name")?, body.string("description")?);
        let stateful = body.boolean("stateful")?;
        body.finish()?;
        let row = owned(&mut change.tx, id, &change.scope).await?;
        if let Some(name) = name.as_ref().filter(|name| **name != row.name) {
            if row.is_default {
                return Err(ApiError::Conflict("Updating default security group not allowed.".into())
                    .named("SecurityGroupCannotUpdateDefault"));
            }
            if name.eq_ignore_ascii_case(DEFAULT) {
                return Err(reserved());
            }
        }
        if stateful.is_some_and(|stateful| stateful != row.stateful) {
            in_use(&mut change.tx, id).await?;
        }
        sqlx::query(
            "UPDATE security_groups SET name = COALESCE($2, name), description = COALESCE($3, description),
                 stateful = COALESCE($4, stateful), revision = revision + 1, updated_us = $5 WHERE id = $1",
        )
        .bind(id)
        .bind(name)
        .bind(description)
        .bind(stateful)
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
        Ok(())
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        let row = owned(&mut change.tx, id, &change.scope).await?;
        in_use(&mut change.tx, id).await?;
        if row.is_default && !change.scope.admin {
            return Err(ApiError::Conflict(
                "Insufficient rights for removing default security group.".into(),
            )
            .named("SecurityGroupCannotRemoveDefault"));
        }
        // Rules of others that name it go with it.
        let hosts = reach::naming_group(&mut change.tx, id).await?;
        change.concern(hosts);
        for sql in
            ["DELETE FROM rbac_policies WHERE object_id = $1", "DELETE FROM security_groups WHERE id = $1"]
        {
            sqlx::query(sql).bind(id).execute(&mut *change.tx).await?;
        }
        Ok(())
    }
}
