//! Address groups: named sets of address ranges that rules of security groups refer to.

use axum::{
    Json,
    extract::{Path, State},
};
use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    Id, Scope,
    attributes::{Attributes, range},
    listing::{Collection, Query},
    quotas, rbac, reach,
    resource::{self, Change, Resource},
};
use crate::{
    app::App,
    db::{Conn, now_us, rfc3339_s},
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// Most ranges of a group: hosts hold each as an element of a set.
const MAX_ADDRESSES: usize = 1000;

/// Address groups as resources.
pub(super) struct AddressGroups;

/// An address group as stored.
#[derive(Debug, FromRow)]
pub(super) struct GroupRow {
    id: String,
    /// Owner.
    pub(super) project_id: String,
    name: String,
    description: String,
    revision: i64,
    created_us: i64,
    updated_us: i64,
}

fn select(scope: &Scope) -> QueryBuilder<crate::db::Db> {
    let mut query = QueryBuilder::new("SELECT address_groups.* FROM address_groups WHERE ");
    rbac::push_visible(&mut query, ["address_groups.id", "address_groups.project_id"], scope);
    query
}

/// The group of that id, if the asker may see it.
pub(super) async fn visible(db: &mut Conn, id: &str, scope: &Scope) -> Result<GroupRow, ApiError> {
    let mut query = select(scope);
    query.push(" AND address_groups.id = ").push_bind(id.to_owned());
    let row: Option<GroupRow> = query.build_query_as().fetch_optional(db).await?;
    row.ok_or_else(|| AddressGroups::missing(id))
}

async fn owned(db: &mut Conn, id: &str, scope: &Scope) -> Result<GroupRow, ApiError> {
    let row = visible(db, id, scope).await?;
    match scope.owns(&row.project_id) {
        true => Ok(row),
        false => {
            Err(ApiError::Forbidden("Only the owner of an address group and admins can change it.".into()))
        }
    }
}

fn addresses(body: &mut Attributes) -> Result<Vec<String>, ApiError> {
    let mut addresses = Vec::new();
    for value in body.list("addresses")?.unwrap_or_default() {
        let text = range(value.as_str().unwrap_or_default())?.trunc().to_string();
        if !addresses.contains(&text) {
            addresses.push(text);
        }
    }
    Ok(addresses)
}

async fn stored(db: &mut Conn, id: &str) -> Result<Vec<String>, ApiError> {
    let sql = "SELECT address FROM address_group_addresses WHERE address_group_id = $1 ORDER BY address";
    Ok(sqlx::query_scalar(sql).bind(id).fetch_all(db).await?)
}

async fn add(tx: &mut Conn, id: &str, addresses: &[String]) -> Result<(), ApiError> {
    let there = stored(tx, id).await?;
    let twice: Vec<&str> =
        addresses.iter().filter(|address| there.contains(address)).map(String::as_str).collect();
    if !twice.is_empty() {
        let text = format!("Addresses {} already exist in the address group {id}.", twice.join(", "));
        return Err(ApiError::BadRequest(text).named("AddressesAlreadyExist"));
    }
    if there.len() + addresses.len() > MAX_ADDRESSES {
        return Err(ApiError::BadRequest(format!("An address group has {MAX_ADDRESSES} addresses at most.")));
    }
    for address in addresses {
        sqlx::query("INSERT INTO address_group_addresses (address_group_id, address) VALUES ($1, $2)")
            .bind(id)
            .bind(address)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

async fn remove(tx: &mut Conn, id: &str, addresses: &[String]) -> Result<(), ApiError> {
    let there = stored(tx, id).await?;
    let absent: Vec<&str> =
        addresses.iter().filter(|address| !there.contains(address)).map(String::as_str).collect();
    if !absent.is_empty() {
        let text = format!("Addresses {} not found in the address group {id}.", absent.join(", "));
        return Err(ApiError::NotFound(text).named("AddressesNotFound"));
    }
    for address in addresses {
        sqlx::query("DELETE FROM address_group_addresses WHERE address_group_id = $1 AND address = $2")
            .bind(id)
            .bind(address)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

/// `PUT /v2.0/address-groups/{id}/add_addresses`, `…/remove_addresses`.
async fn edit(app: App, ctx: Ctx, id: String, body: Value, adds: bool) -> Result<Json<Value>, ApiError> {
    // openstacksdk sends the list without the envelope that the reference has.
    let mut body = match body.get("addresses").is_some() {
        true => Attributes::of("body", body)?,
        false => Attributes::open(body, AddressGroups::NAME)?,
    };
    let addresses = addresses(&mut body)?;
    body.finish()?;
    let mut change = Change::begin(&app, Scope::writing(&ctx)?).await?;
    owned(&mut change.tx, &id, &change.scope).await?;
    match adds {
        true => add(&mut change.tx, &id, &addresses).await?,
        false => remove(&mut change.tx, &id, &addresses).await?,
    }
    sqlx::query("UPDATE address_groups SET revision = revision + 1, updated_us = $2 WHERE id = $1")
        .bind(&id)
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
    let hosts = reach::naming_addresses(&mut change.tx, &id).await?;
    change.concern(hosts);
    let document =
        resource::document::<AddressGroups>(&mut change.tx, &change.scope, &id, &Query::default()).await?;
    change.commit(&app).await?;
    Ok(Json(json!({"address_group": document})))
}

/// `PUT /v2.0/address-groups/{id}/add_addresses`.
pub(super) async fn add_addresses(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    edit(app, ctx, id, body, true).await
}

/// `PUT /v2.0/address-groups/{id}/remove_addresses`.
pub(super) async fn remove_addresses(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    edit(app, ctx, id, body, false).await
}

impl Resource for AddressGroups {
    const NAME: &'static str = "address_group";
    const PATH: &'static str = "address-groups";
    const COLLECTION: Collection = Collection {
        name: "address_groups",
        attributes: &[
            "addresses",
            "created_at",
            "description",
            "id",
            "name",
            "project_id",
            "revision_number",
            "shared",
            "tags",
            "tenant_id",
            "updated_at",
        ],
    };

    fn missing(id: &str) -> ApiError {
        ApiError::NotFound(format!("Address group {id} could not be found.")).named("AddressGroupNotFound")
    }

    async fn read(db: &mut Conn, scope: &Scope, query: &Query) -> Result<Vec<Value>, ApiError> {
        let mut statement = select(scope);
        query.narrow(&mut statement, &[("id", "address_groups.id")]);
        statement.push(" ORDER BY created_us, id");
        let rows: Vec<GroupRow> = statement.build_query_as().fetch_all(&mut *db).await?;
        let mut documents = Vec::with_capacity(rows.len());
        for row in rows {
            documents.push(json!({
                "id": row.id, "name": row.name, "description": row.description, "project_id": row.project_id,
                "tenant_id": row.project_id, "shared": !scope.owns(&row.project_id),
                "addresses": stored(db, &row.id).await?, "revision_number": row.revision,
                "created_at": rfc3339_s(row.created_us), "updated_at": rfc3339_s(row.updated_us),
            }));
        }
        Ok(documents)
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        let project_id = change.scope.owner(&mut body)?;
        let name = body.string("name")?.unwrap_or_default();
        let description = body.long_description()?.unwrap_or_default();
        let addresses = addresses(&mut body)?;
        body.finish()?;
        quotas::check(&mut change.tx, &project_id, quotas::Resource::AddressGroup).await?;
        let id = Uuid::new_v4().to_string();
        sqlx::query(
            "INSERT INTO address_groups (id, project_id, name, description, created_us, updated_us)
             VALUES ($1, $2, $3, $4, $5, $5)",
        )
        .bind(&id)
        .bind(&project_id)
        .bind(name)
        .bind(description)
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
        add(&mut change.tx, &id, &addresses).await?;
        Ok(id)
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        let (name, description) = (body.string("name")?, body.long_description()?);
        body.finish()?;
        owned(&mut change.tx, id, &change.scope).await?;
        sqlx::query(
            "UPDATE address_groups SET name = COALESCE($2, name), description = COALESCE($3, description),
                 revision = revision + 1, updated_us = $4 WHERE id = $1",
        )
        .bind(id)
        .bind(name)
        .bind(description)
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
        Ok(())
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        owned(&mut change.tx, id, &change.scope).await?;
        let used: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM security_group_rules WHERE remote_address_group_id = $1)",
        )
        .bind(id)
        .fetch_one(&mut *change.tx)
        .await?;
        if used {
            let text = format!("Address group {id} is in use on one or more security group rules.");
            return Err(ApiError::Conflict(text).named("AddressGroupInUse"));
        }
        for sql in
            ["DELETE FROM rbac_policies WHERE object_id = $1", "DELETE FROM address_groups WHERE id = $1"]
        {
            sqlx::query(sql).bind(id).execute(&mut *change.tx).await?;
        }
        Ok(())
    }
}
