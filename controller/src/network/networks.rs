//! Networks.

use crate::db::Conn;
use axum::{
    Json,
    extract::{Path, Query as Params, State},
};
use http::StatusCode;
use serde_json::{Value, json};
use sqlx::FromRow;
use uuid::Uuid;

use super::{
    Id, Scope,
    attributes::{Attributes, invalid},
    base,
    listing::{Collection, Query},
    not_found, ports, quotas, zones,
};
use crate::{
    app::App,
    db::{now_us, rfc3339_s},
    hosts::{self, Touched},
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// Leaves room for the headers of VXLAN over an underlay of 1500, so that a network can reach several hosts later
/// without a change that its guests would have to follow.
pub(crate) const DEFAULT_MTU: u16 = 1450;
/// Every IPv4 host takes datagrams of this size (RFC 791).
const MIN_MTU: i64 = 576;
/// Jumbo frames.
const MAX_MTU: i64 = 9000;

const NETWORKS: Collection = Collection {
    name: "networks",
    attributes: &[
        "admin_state_up",
        "availability_zone_hints",
        "availability_zones",
        "created_at",
        "description",
        "id",
        "mtu",
        "name",
        "project_id",
        "revision_number",
        "router:external",
        "shared",
        "status",
        "subnets",
        "tags",
        "tenant_id",
        "updated_at",
    ],
};

/// A network as stored.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct NetworkRow {
    /// Id.
    pub(crate) id: String,
    /// Owner.
    pub(crate) project_id: String,
    /// Name.
    pub(crate) name: String,
    description: String,
    /// Every project may use it.
    pub(crate) shared: bool,
    /// MTU.
    pub(crate) mtu: i64,
    revision: i64,
    created_us: i64,
    updated_us: i64,
}

/// A network that shall be made.
#[derive(Debug, Clone)]
pub(crate) struct NewNetwork {
    /// Owner.
    pub(crate) project_id: String,
    /// Name.
    pub(crate) name: String,
    /// Description.
    pub(crate) description: String,
    /// Every project may use it.
    pub(crate) shared: bool,
    /// MTU.
    pub(crate) mtu: u16,
}

impl NetworkRow {
    fn document(&self, subnets: &[String], zones: &[String]) -> Value {
        json!({
            "id": self.id, "name": self.name, "description": self.description,
            "project_id": self.project_id, "tenant_id": self.project_id,
            "admin_state_up": true, "status": "ACTIVE", "shared": self.shared, "router:external": false,
            "mtu": self.mtu, "subnets": subnets, "tags": [],
            "availability_zone_hints": [], "availability_zones": zones,
            "revision_number": self.revision,
            "created_at": rfc3339_s(self.created_us), "updated_at": rfc3339_s(self.updated_us),
        })
    }
}

/// The network of that id, if the asker may see it.
pub(super) async fn visible(db: &mut Conn, id: &str, scope: &Scope) -> Result<NetworkRow, ApiError> {
    let sql = "SELECT * FROM networks WHERE id = $1";
    let row: Option<NetworkRow> = sqlx::query_as(sql).bind(id).fetch_optional(db).await?;
    row.filter(|row| row.shared || scope.owns(&row.project_id)).ok_or_else(|| not_found("Network", id))
}

/// The network of that id, if the asker may change it; 403 if it may only see it.
async fn owned(db: &mut Conn, id: &str, scope: &Scope) -> Result<NetworkRow, ApiError> {
    let row = visible(db, id, scope).await?;
    match scope.owns(&row.project_id) {
        true => Ok(row),
        false => Err(ApiError::Forbidden("Only the owner of a network and admins can change it.".into())),
    }
}

/// Networks that a server of the project can be on without naming one: its own and the shared ones.
pub(crate) async fn usable(tx: &mut Conn, project_id: &str) -> Result<Vec<NetworkRow>, ApiError> {
    let sql = "SELECT * FROM networks WHERE project_id = $1 OR shared ORDER BY created_us, id";
    Ok(sqlx::query_as(sql).bind(project_id).fetch_all(tx).await?)
}

/// Adds a network, within its owner's quota.
pub(crate) async fn insert(tx: &mut Conn, new: &NewNetwork) -> Result<NetworkRow, ApiError> {
    quotas::check(tx, &new.project_id, quotas::Resource::Network).await?;
    let now = now_us();
    let row = sqlx::query_as(
        "INSERT INTO networks (id, project_id, name, description, shared, mtu, created_us, updated_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $7) RETURNING *",
    )
    .bind(Uuid::new_v4().to_string())
    .bind(&new.project_id)
    .bind(&new.name)
    .bind(&new.description)
    .bind(new.shared)
    .bind(i64::from(new.mtu))
    .bind(now)
    .fetch_one(tx)
    .await?;
    Ok(row)
}

/// Every host with a server on the network gets its new state.
pub(super) async fn touch(tx: &mut Conn, network_id: &str) -> Result<Vec<Touched>, ApiError> {
    let hosts: Vec<String> = sqlx::query_scalar(
        "SELECT DISTINCT servers.host_id FROM ports JOIN servers ON servers.id = ports.server_id
         WHERE ports.network_id = $1 AND servers.host_id IS NOT NULL AND NOT servers.deleting",
    )
    .bind(network_id)
    .fetch_all(&mut *tx)
    .await?;
    let mut touched = Vec::with_capacity(hosts.len());
    for host in hosts {
        touched.push(hosts::touch(tx, &host).await?.0);
    }
    Ok(touched)
}

async fn subnet_ids(db: &mut Conn, network_id: &str) -> Result<Vec<String>, ApiError> {
    let sql = "SELECT id FROM subnets WHERE network_id = $1 ORDER BY created_us, id";
    Ok(sqlx::query_scalar(sql).bind(network_id).fetch_all(db).await?)
}

/// Attributes of networks that have one value here.
fn constants() -> [(&'static str, Value); 7] {
    [
        ("admin_state_up", json!(true)),
        ("router:external", json!(false)),
        ("availability_zone_hints", json!([])),
        ("tags", json!([])),
        ("port_security_enabled", json!(false)),
        ("vlan_transparent", json!(false)),
        ("is_default", json!(false)),
    ]
}

fn mtu(body: &mut Attributes) -> Result<Option<u16>, ApiError> {
    let Some(mtu) = body.integer("mtu")? else { return Ok(None) };
    let known =
        Some(mtu).filter(|mtu| (MIN_MTU..=MAX_MTU).contains(mtu)).and_then(|mtu| u16::try_from(mtu).ok());
    match known {
        Some(mtu) => Ok(Some(mtu)),
        None if mtu == 0 => Ok(Some(DEFAULT_MTU)),
        None => Err(invalid("mtu", format!("'{mtu}' is not in range {MIN_MTU} through {MAX_MTU}"))),
    }
}

fn admin_for_shared(scope: &Scope, shared: Option<bool>) -> Result<(), ApiError> {
    match shared == Some(true) && !scope.admin {
        true => Err(ApiError::Forbidden("Only an admin can share a network with all projects.".into())),
        false => Ok(()),
    }
}

/// `GET /v2.0/networks`.
pub(super) async fn list(
    State(app): State<App>,
    ctx: Ctx,
    Params(pairs): Params<Vec<(String, String)>>,
) -> Result<Json<Value>, ApiError> {
    let scope = Scope::reading(&ctx)?;
    let query = Query::parse(pairs, NETWORKS)?;
    let zones = zones(&app).await?;
    let mut db = app.db.acquire().await?;
    let networks: Vec<NetworkRow> = sqlx::query_as(
        "SELECT * FROM networks WHERE $1 OR shared OR project_id = $2 ORDER BY created_us, id",
    )
    .bind(scope.admin)
    .bind(&scope.project)
    .fetch_all(&mut *db)
    .await?;
    let subnets: Vec<(String, String)> =
        sqlx::query_as("SELECT network_id, id FROM subnets ORDER BY created_us, id")
            .fetch_all(&mut *db)
            .await?;
    let mut of_network = std::collections::HashMap::<String, Vec<String>>::new();
    for (network, subnet) in subnets {
        of_network.entry(network).or_default().push(subnet);
    }
    let documents = networks
        .iter()
        .map(|network| network.document(of_network.get(&network.id).map_or(&[], Vec::as_slice), &zones))
        .collect();
    query.answer(documents, NETWORKS, &format!("{}/networks", base(&app))).map(Json)
}

/// `POST /v2.0/networks`.
pub(super) async fn create(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let scope = Scope::writing(&ctx)?;
    let mut body = Attributes::open(body, "network")?;
    body.only(&constants())?;
    let shared = body.boolean("shared")?;
    admin_for_shared(&scope, shared)?;
    let new = NewNetwork {
        project_id: scope.owner(&mut body)?,
        name: body.string("name")?.unwrap_or_default(),
        description: body.string("description")?.unwrap_or_default(),
        shared: shared.unwrap_or(false),
        mtu: mtu(&mut body)?.unwrap_or(DEFAULT_MTU),
    };
    body.finish()?;
    let zones = zones(&app).await?;
    let mut tx = app.begin().await?;
    let row = insert(&mut tx, &new).await?;
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({"network": row.document(&[], &zones)}))))
}

/// `GET /v2.0/networks/{id}`.
pub(super) async fn show(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    Params(pairs): Params<Vec<(String, String)>>,
) -> Result<Json<Value>, ApiError> {
    let scope = Scope::reading(&ctx)?;
    let query = Query::parse(pairs, NETWORKS)?;
    let zones = zones(&app).await?;
    let mut db = app.db.acquire().await?;
    let row = visible(&mut db, &id, &scope).await?;
    let mut document = row.document(&subnet_ids(&mut db, &id).await?, &zones);
    query.pick(&mut document);
    Ok(Json(json!({"network": document})))
}

/// `PUT /v2.0/networks/{id}`.
pub(super) async fn update(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let scope = Scope::writing(&ctx)?;
    let mut body = Attributes::open(body, "network")?;
    body.only(&constants())?;
    let (name, description) = (body.string("name")?, body.string("description")?);
    let (shared, mtu) = (body.boolean("shared")?, mtu(&mut body)?);
    body.finish()?;
    let zones = zones(&app).await?;
    let mut tx = app.begin().await?;
    let row = owned(&mut tx, &id, &scope).await?;
    if shared.is_some_and(|shared| shared != row.shared) {
        admin_for_shared(&scope, shared)?;
        if row.shared && ports::of_others(&mut tx, &row).await? {
            let text = format!(
                "Unable to reconfigure sharing settings for network {id}. Multiple tenants are using it."
            );
            return Err(ApiError::Conflict(text).named("InvalidSharedSetting"));
        }
    }
    let touched = match mtu.is_some_and(|mtu| i64::from(mtu) != row.mtu) {
        true => touch(&mut tx, &id).await?,
        false => Vec::new(),
    };
    let row: NetworkRow = sqlx::query_as(
        "UPDATE networks SET name = COALESCE($2, name), description = COALESCE($3, description),
             shared = COALESCE($4, shared), mtu = COALESCE($5, mtu), revision = revision + 1, updated_us = $6
         WHERE id = $1 RETURNING *",
    )
    .bind(&id)
    .bind(name)
    .bind(description)
    .bind(shared)
    .bind(mtu.map(i64::from))
    .bind(now_us())
    .fetch_one(&mut *tx)
    .await?;
    let document = row.document(&subnet_ids(&mut tx, &id).await?, &zones);
    tx.commit().await?;
    app.hub.wake_all(touched);
    Ok(Json(json!({"network": document})))
}

/// `DELETE /v2.0/networks/{id}`.
pub(super) async fn delete(State(app): State<App>, ctx: Ctx, Path(id): Id) -> Result<StatusCode, ApiError> {
    let scope = Scope::writing(&ctx)?;
    let mut tx = app.begin().await?;
    owned(&mut tx, &id, &scope).await?;
    if ports::in_use(&mut tx, &id).await? {
        let text = format!(
            "Unable to complete operation on network {id}. There are one or more ports still in use on the network."
        );
        return Err(ApiError::Conflict(text).named("NetworkInUse"));
    }
    for sql in [
        "DELETE FROM ports WHERE network_id = $1",
        "DELETE FROM subnets WHERE network_id = $1",
        "DELETE FROM networks WHERE id = $1",
    ] {
        sqlx::query(sql).bind(&id).execute(&mut *tx).await?;
    }
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
