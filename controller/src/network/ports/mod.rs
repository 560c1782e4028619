//! Ports: handlers and documents. What happens to rows is in [`store`], what servers do with ports in [`server`].

use crate::db::Conn;
use axum::{
    Json,
    extract::{Path, Query as Params, State},
};
use http::StatusCode;
use serde_json::{Value, json};

use super::{
    Id, Scope,
    attributes::{Attributes, address, invalid},
    base,
    listing::{Collection, Query},
    networks, not_found, quotas,
};
use crate::{
    app::App,
    hosts,
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

pub(crate) mod server;
mod store;

use store::{FixedIpWish, FixedIps, NewPort, Port};
pub(super) use store::{add_service_address, in_use, of_others, remove_service_address, subnet_in_use};

/// The device owner of a network's own service port.
pub(crate) const SERVICE_OWNER: &str = "network:distributed";
/// Neutron's `max_fixed_ips_per_port`.
const MAX_FIXED_IPS: usize = 5;

const PORTS: Collection = Collection {
    name: "ports",
    attributes: &[
        "admin_state_up",
        "binding:host_id",
        "binding:profile",
        "binding:vif_details",
        "binding:vif_type",
        "binding:vnic_type",
        "created_at",
        "description",
        "device_id",
        "device_owner",
        "fixed_ips",
        "id",
        "mac_address",
        "name",
        "network_id",
        "project_id",
        "revision_number",
        "security_groups",
        "status",
        "tags",
        "tenant_id",
        "updated_at",
    ],
};

/// Attributes of ports that have one value here.
fn constants() -> [(&'static str, Value); 9] {
    [
        ("admin_state_up", json!(true)),
        ("port_security_enabled", json!(false)),
        ("security_groups", json!([])),
        ("allowed_address_pairs", json!([])),
        ("extra_dhcp_opts", json!([])),
        ("binding:vnic_type", json!("normal")),
        ("binding:profile", json!({})),
        ("binding:host_id", json!("")),
        ("tags", json!([])),
    ]
}

fn fixed_ips(body: &mut Attributes) -> Result<Option<FixedIps>, ApiError> {
    let Some(list) = body.list("fixed_ips")? else { return Ok(None) };
    if list.len() > MAX_FIXED_IPS {
        return Err(invalid(
            "fixed_ips",
            format!("Exceeded maximum amount of fixed ips per port: {MAX_FIXED_IPS}"),
        ));
    }
    let parse = |entry: Value| {
        let Value::Object(mut entry) = entry else {
            return Err(invalid("fixed_ips", format!("'{entry}' is not a dictionary")));
        };
        let subnet_id = entry.remove("subnet_id").filter(|id| !id.is_null());
        let ip = entry.remove("ip_address").filter(|ip| !ip.is_null());
        if let Some(unknown) = entry.keys().next() {
            return Err(invalid("fixed_ips", format!("unexpected key '{unknown}'")));
        }
        let subnet_id = match subnet_id {
            None => None,
            Some(Value::String(id)) => Some(id),
            Some(other) => return Err(invalid("fixed_ips", format!("'{other}' is not a valid subnet id"))),
        };
        let ip = ip.map(|ip| address("fixed_ips", &ip)).transpose()?;
        match subnet_id.is_none() && ip.is_none() {
            true => Err(invalid("fixed_ips", "an entry needs subnet_id or ip_address")),
            false => Ok(FixedIpWish { subnet_id, ip }),
        }
    };
    list.into_iter().map(parse).collect::<Result<_, _>>().map(|wishes| Some(FixedIps::These(wishes)))
}

/// `device_owner` that users may write: not those by which Mote knows its own ports.
fn device_owner(body: &mut Attributes) -> Result<Option<String>, ApiError> {
    let owner = body.string("device_owner")?;
    match owner.as_deref().is_some_and(|owner| owner.starts_with("network:")) {
        true => {
            Err(ApiError::Forbidden("Device owners that begin with 'network:' are the cloud's own.".into()))
        }
        false => Ok(owner),
    }
}

/// Neutron's policy: only the owner of a network chooses addresses and MACs in it.
fn may_choose(scope: &Scope, owner: &str, fixed: Option<&FixedIps>, mac: bool) -> Result<(), ApiError> {
    let address =
        matches!(fixed, Some(FixedIps::These(wishes)) if wishes.iter().any(|wish| wish.ip.is_some()));
    match (address || mac) && !scope.owns(owner) {
        true => Err(ApiError::Forbidden("Only the owner of a network can choose addresses in it.".into())),
        false => Ok(()),
    }
}

/// The port, if the asker may see it: its own, or on a network of its own.
async fn visible(db: &mut Conn, id: &str, scope: &Scope) -> Result<Port, ApiError> {
    let port = store::find(db, id).await?;
    port.filter(|port| scope.owns(&port.row.project_id) || scope.owns(&port.row.network_project_id))
        .ok_or_else(|| not_found("Port", id))
}

fn parse_mac(body: &mut Attributes) -> Result<Option<String>, ApiError> {
    let Some(text) = body.string("mac_address")? else { return Ok(None) };
    store::canonical_mac(&text)
        .map(Some)
        .ok_or_else(|| invalid("mac_address", format!("'{text}' is not a valid MAC address of one device")))
}

/// `GET /v2.0/ports`.
pub(super) async fn list(
    State(app): State<App>,
    ctx: Ctx,
    Params(pairs): Params<Vec<(String, String)>>,
) -> Result<Json<Value>, ApiError> {
    let scope = Scope::reading(&ctx)?;
    let query = Query::parse(pairs, PORTS)?;
    let mut db = app.db.acquire().await?;
    let ports = store::list(&mut db, &scope, &query).await?;
    let documents = ports.iter().map(|port| port.document(scope.admin)).collect();
    query.answer(documents, PORTS, &format!("{}/ports", base(&app))).map(Json)
}

/// `POST /v2.0/ports`.
pub(super) async fn create(
    State(app): State<App>,
    ctx: Ctx,
    JsonBody(body): JsonBody<Value>,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let scope = Scope::writing(&ctx)?;
    let mut body = Attributes::open(body, "port")?;
    body.only(&constants())?;
    let network_id = body.string("network_id")?.ok_or_else(|| {
        ApiError::BadRequest("Failed to parse request. Required attribute 'network_id' not specified".into())
    })?;
    let new = NewPort {
        project_id: scope.owner(&mut body)?,
        name: body.string("name")?.unwrap_or_default(),
        description: body.string("description")?.unwrap_or_default(),
        mac_address: parse_mac(&mut body)?,
        device_id: body.string("device_id")?.unwrap_or_default(),
        device_owner: device_owner(&mut body)?.unwrap_or_default(),
        fixed_ips: fixed_ips(&mut body)?.unwrap_or(FixedIps::Any),
        plugged: None,
    };
    body.finish()?;
    let mut tx = app.begin().await?;
    let network = networks::visible(&mut tx, &network_id, &scope).await?;
    may_choose(&scope, &network.project_id, Some(&new.fixed_ips), new.mac_address.is_some())?;
    quotas::check(&mut tx, &new.project_id, quotas::Resource::Port).await?;
    let id = store::insert(&mut tx, &network.id, &new).await?;
    let document = visible(&mut tx, &id, &scope).await?.document(scope.admin);
    tx.commit().await?;
    Ok((StatusCode::CREATED, Json(json!({"port": document}))))
}

/// `GET /v2.0/ports/{id}`.
pub(super) async fn show(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    Params(pairs): Params<Vec<(String, String)>>,
) -> Result<Json<Value>, ApiError> {
    let scope = Scope::reading(&ctx)?;
    let query = Query::parse(pairs, PORTS)?;
    let mut db = app.db.acquire().await?;
    let mut document = visible(&mut db, &id, &scope).await?.document(scope.admin);
    query.pick(&mut document);
    Ok(Json(json!({"port": document})))
}

/// `PUT /v2.0/ports/{id}`.
pub(super) async fn update(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let scope = Scope::writing(&ctx)?;
    let mut body = Attributes::open(body, "port")?;
    body.only(&constants())?;
    let (name, description) = (body.string("name")?, body.string("description")?);
    let (device_id, owner) = (body.string("device_id")?, device_owner(&mut body)?);
    let fixed = fixed_ips(&mut body)?;
    let mut tx = app.begin().await?;
    let port = visible(&mut tx, &id, &scope).await?;
    body.only(&[("mac_address", json!(port.row.mac_address))])?;
    body.finish()?;
    if port.row.device_owner == SERVICE_OWNER {
        return Err(service_port(&id));
    }
    may_choose(&scope, &port.row.network_project_id, fixed.as_ref(), false)?;
    let plugged = port.row.server_id.is_some();
    let moves = device_id.as_ref().is_some_and(|device| *device != port.row.device_id)
        || owner.as_ref().is_some_and(|owner| *owner != port.row.device_owner);
    if plugged && moves {
        return Err(in_use_by(&port));
    }
    store::rename(&mut tx, &id, [name, description, device_id, owner]).await?;
    let mut touched = None;
    if let Some(fixed) = fixed {
        store::replace_addresses(&mut tx, &port, fixed).await?;
        if let Some(host) = &port.row.host_id {
            touched = Some(hosts::touch(&mut tx, host).await?.0);
        }
    }
    let document = visible(&mut tx, &id, &scope).await?.document(scope.admin);
    tx.commit().await?;
    app.hub.wake_all(touched);
    Ok(Json(json!({"port": document})))
}

/// `DELETE /v2.0/ports/{id}`.
pub(super) async fn delete(State(app): State<App>, ctx: Ctx, Path(id): Id) -> Result<StatusCode, ApiError> {
    let scope = Scope::writing(&ctx)?;
    let mut tx = app.begin().await?;
    let port = visible(&mut tx, &id, &scope).await?;
    if port.row.device_owner == SERVICE_OWNER {
        return Err(service_port(&id));
    }
    if port.row.server_id.is_some() {
        return Err(in_use_by(&port));
    }
    sqlx::query("DELETE FROM ports WHERE id = $1").bind(&id).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

fn in_use_by(port: &Port) -> ApiError {
    let text = format!(
        "Unable to complete operation on port {} for network {}. Port already has an attached device {}.",
        port.row.id, port.row.network_id, port.row.device_id
    );
    ApiError::Conflict(text).named("PortInUse")
}

fn service_port(id: &str) -> ApiError {
    let text =
        format!("Port {id} cannot be changed directly via the port API: has device owner {SERVICE_OWNER}.");
    ApiError::Conflict(text).named("ServicePortInUse")
}
