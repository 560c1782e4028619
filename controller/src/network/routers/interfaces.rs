//! Interfaces of routers: `add_router_interface` and `remove_router_interface`.

use axum::{
    Json,
    extract::{Path, State},
};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::{
    super::{
        Id, Scope,
        attributes::Attributes,
        ports::{self, FixedIpWish, FixedIps, INTERFACE_OWNER, NewPort},
        reach,
        resource::Change,
        subnets,
    },
    RouterAddress, RouterRow, addresses, bad_request, owned, refuse_overlap,
};
use crate::{
    app::App,
    db::{Conn, now_us},
    http::{context::Ctx, error::ApiError, json::JsonBody},
};

/// What the body names.
struct Named {
    subnet_id: Option<String>,
    port_id: Option<String>,
}

impl Named {
    fn parse(body: Value) -> Result<Self, ApiError> {
        let mut body = Attributes::of("body", body)?;
        let named = Self {
            subnet_id: body.nullable_id("subnet_id")?.flatten(),
            port_id: body.nullable_id("port_id")?.flatten(),
        };
        body.finish()?;
        match named.subnet_id.is_none() && named.port_id.is_none() {
            true => Err(bad_request("router", "Either subnet_id or port_id must be specified")),
            false => Ok(named),
        }
    }
}

/// The interface as the answer shows it.
struct Interface {
    port_id: String,
    network_id: String,
    subnet_ids: Vec<String>,
}

impl Interface {
    fn document(&self, router: &RouterRow) -> Value {
        json!({
            "id": router.id, "tenant_id": router.project_id, "project_id": router.project_id,
            "port_id": self.port_id, "network_id": self.network_id, "subnet_id": self.subnet_ids.first(),
            "subnet_ids": self.subnet_ids,
        })
    }
}

/// `PUT /v2.0/routers/{id}/add_router_interface`.
pub(in super::super) async fn add(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let named = Named::parse(body)?;
    let mut change = Change::begin(&app, Scope::writing(&ctx)?).await?;
    let router = owned(&mut change.tx, &id, &change.scope).await?;
    // Those that knew the router before, and those that know it now: two parts of the cloud may have become one.
    let hosts = reach::of_router(&mut change.tx, &id).await?;
    change.concern(hosts);
    let there = addresses(&mut change.tx, &id).await?;
    let interface = match (&named.subnet_id, &named.port_id) {
        (Some(_), Some(_)) => {
            return Err(bad_request("router", "Cannot specify both subnet-id and port-id"));
        }
        (Some(subnet), _) => by_subnet(&mut change, &router, &there, subnet).await?,
        (None, port) => by_port(&mut change, &router, &there, port.as_deref().unwrap_or_default()).await?,
    };
    changed(&mut change, &id).await?;
    change.commit(&app).await?;
    Ok(Json(interface.document(&router)))
}

async fn changed(change: &mut Change, router_id: &str) -> Result<(), ApiError> {
    sqlx::query("UPDATE routers SET revision = revision + 1, updated_us = $2 WHERE id = $1")
        .bind(router_id)
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
    let hosts = reach::of_router(&mut change.tx, router_id).await?;
    change.concern(hosts);
    Ok(())
}

async fn by_subnet(
    change: &mut Change,
    router: &RouterRow,
    there: &[RouterAddress],
    subnet_id: &str,
) -> Result<Interface, ApiError> {
    let (subnet, network) = subnets::visible(&mut change.tx, subnet_id, &change.scope).await?;
    if !change.scope.owns(&subnet.project_id) && !change.scope.owns(&network.project_id) {
        let text = format!(
            "Cannot add interface to router because subnet {subnet_id} is not owned by project making the request"
        );
        return Err(bad_request("router", text));
    }
    let Some(gateway) = &subnet.gateway_ip else {
        return Err(bad_request("router", "Subnet for router interface must have a gateway IP"));
    };
    let gateway: std::net::IpAddr = gateway.parse().map_err(ApiError::internal)?;
    let cidr = subnet.net()?;
    if !cidr.contains(&gateway) {
        return Err(bad_request(
            "router",
            format!("The gateway {gateway} of subnet {subnet_id} is not in it; name a port instead"),
        ));
    }
    refuse_overlap(there, subnet_id, cidr)?;
    // All IPv6 subnets of a network share one interface, as in Neutron.
    let shared = there.iter().find(|address| {
        address.network_id == network.id
            && address.device_owner == INTERFACE_OWNER
            && matches!(cidr, IpNet::V6(_))
            && address.cidr.contains(':')
    });
    if let Some(shared) = shared {
        let port = ports::find(&mut change.tx, &shared.port_id).await?;
        let port = port.ok_or_else(|| ports::missing(&shared.port_id))?;
        ports::give_address(&mut change.tx, &port, subnet_id, Some(gateway)).await?;
        return Ok(Interface {
            port_id: port.row.id,
            network_id: network.id,
            subnet_ids: vec![subnet_id.to_owned()],
        });
    }
    let wish = FixedIpWish { subnet_id: Some(subnet_id.to_owned()), ip: Some(gateway) };
    let new = NewPort {
        router_id: Some(router.id.clone()),
        ..NewPort::own(&router.project_id, INTERFACE_OWNER, &router.id, FixedIps::Exactly(vec![wish]))
    };
    let port_id = ports::insert(&mut change.tx, &network.id, &new).await?;
    Ok(Interface { port_id, network_id: network.id, subnet_ids: vec![subnet_id.to_owned()] })
}

async fn by_port(
    change: &mut Change,
    router: &RouterRow,
    there: &[RouterAddress],
    port_id: &str,
) -> Result<Interface, ApiError> {
    let port = ports::visible(&mut change.tx, port_id, &change.scope).await?;
    if !change.scope.owns(&port.row.project_id) {
        return Err(ports::missing(port_id));
    }
    if !port.row.device_id.is_empty() || !port.row.device_owner.is_empty() {
        return Err(ports::in_use_by(&port));
    }
    if port.fixed_ips.is_empty() {
        return Err(bad_request("router", "Router port must have at least one fixed IP"));
    }
    if port.fixed_ips.iter().filter(|(_, ip)| ip.is_ipv4()).count() > 1 {
        return Err(bad_request("router", "Cannot have multiple IPv4 subnets on router port"));
    }
    for (subnet, _) in &port.fixed_ips {
        let row = subnets::find(&mut change.tx, subnet).await?;
        refuse_overlap(there, subnet, row.net()?)?;
    }
    let hosts = reach::of_port(&mut change.tx, &port.row.network_id, port_id).await?;
    change.concern(hosts);
    sqlx::query("DELETE FROM port_security_groups WHERE port_id = $1")
        .bind(port_id)
        .execute(&mut *change.tx)
        .await?;
    sqlx::query(
        "UPDATE ports SET device_owner = $2, device_id = $3, router_id = $3, port_security_enabled = FALSE,
             allowed_address_pairs = '[]', revision = revision + 1, updated_us = $4 WHERE id = $1",
    )
    .bind(port_id)
    .bind(INTERFACE_OWNER)
    .bind(&router.id)
    .bind(now_us())
    .execute(&mut *change.tx)
    .await?;
    Ok(Interface {
        port_id: port_id.to_owned(),
        network_id: port.row.network_id,
        subnet_ids: port.fixed_ips.into_iter().map(|(subnet, _)| subnet).collect(),
    })
}

/// `PUT /v2.0/routers/{id}/remove_router_interface`.
pub(in super::super) async fn remove(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Id,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<Value>, ApiError> {
    let named = Named::parse(body)?;
    let mut change = Change::begin(&app, Scope::writing(&ctx)?).await?;
    let router = owned(&mut change.tx, &id, &change.scope).await?;
    let hosts = reach::of_router(&mut change.tx, &id).await?;
    change.concern(hosts);
    let there = addresses(&mut change.tx, &id).await?;
    let interfaces: Vec<&RouterAddress> =
        there.iter().filter(|address| address.device_owner == INTERFACE_OWNER).collect();
    let going = chosen(&id, &interfaces, &named)?;
    let subnet_ids: Vec<String> = going.iter().map(|address| address.subnet_id.clone()).collect();
    for address in &going {
        refuse_in_use(&mut change.tx, &router, address).await?;
    }
    let port_id = going[0].port_id.clone();
    let network_id = going[0].network_id.clone();
    let stays = interfaces
        .iter()
        .any(|address| address.port_id == port_id && !subnet_ids.contains(&address.subnet_id));
    match stays {
        true => {
            for subnet in &subnet_ids {
                ports::take_address(&mut change.tx, &port_id, subnet).await?;
            }
        }
        false => ports::remove(&mut change.tx, &port_id).await?,
    }
    // The part of the cloud that the router doesn't reach any more hears of it, too.
    let hosts = reach::of_network(&mut change.tx, &network_id).await?;
    change.concern(hosts);
    changed(&mut change, &id).await?;
    change.commit(&app).await?;
    Ok(Json(Interface { port_id, network_id, subnet_ids }.document(&router)))
}

/// The addresses that the body names; at least one.
fn chosen<'a>(
    router_id: &str,
    interfaces: &[&'a RouterAddress],
    named: &Named,
) -> Result<Vec<&'a RouterAddress>, ApiError> {
    let Some(port) = &named.port_id else {
        let subnet = named.subnet_id.as_deref().unwrap_or_default();
        let found: Vec<_> =
            interfaces.iter().copied().filter(|address| address.subnet_id == subnet).collect();
        return match found.is_empty() {
            true => {
                Err(ApiError::NotFound(format!("Router {router_id} has no interface on subnet {subnet}"))
                    .named("RouterInterfaceNotFoundForSubnet"))
            }
            false => Ok(found),
        };
    };
    let of_port: Vec<_> = interfaces.iter().copied().filter(|address| address.port_id == *port).collect();
    if of_port.is_empty() {
        let text = format!("Router {router_id} does not have an interface with id {port}");
        return Err(ApiError::NotFound(text).named("RouterInterfaceNotFound"));
    }
    match &named.subnet_id {
        Some(subnet) if of_port.iter().all(|address| address.subnet_id != *subnet) => {
            let text = format!("Subnet on port {port} does not match the requested subnet {subnet}.");
            Err(ApiError::BadRequest(text).named("SubnetMismatchForPort"))
        }
        _ => Ok(of_port),
    }
}

async fn refuse_in_use(tx: &mut Conn, router: &RouterRow, address: &RouterAddress) -> Result<(), ApiError> {
    let subnet = &address.subnet_id;
    let floating: bool = sqlx::query_scalar(
        "SELECT EXISTS (
             SELECT 1 FROM floating_ips JOIN fixed_ips ON fixed_ips.port_id = floating_ips.fixed_port_id
                 AND fixed_ips.address = floating_ips.fixed_ip_address
             WHERE floating_ips.router_id = $1 AND fixed_ips.subnet_id = $2
             UNION ALL
             SELECT 1 FROM floating_ips JOIN port_forwardings ON port_forwardings.floatingip_id = floating_ips.id
                 JOIN fixed_ips ON fixed_ips.port_id = port_forwardings.internal_port_id
                 AND fixed_ips.address = port_forwardings.internal_ip_address
             WHERE floating_ips.router_id = $1 AND fixed_ips.subnet_id = $2)",
    )
    .bind(&router.id)
    .bind(subnet)
    .fetch_one(tx)
    .await?;
    if floating {
        let text = format!(
            "Router interface for subnet {subnet} on router {} cannot be deleted, as it is required by one or more \
             floating IPs.",
            router.id
        );
        return Err(ApiError::Conflict(text).named("RouterInterfaceInUseByFloatingIP"));
    }
    let net: IpNet = address.cidr.parse().map_err(ApiError::internal)?;
    if router.routes()?.iter().any(|route| net.contains(&route.nexthop)) {
        let text = format!(
            "Router interface for subnet {subnet} on router {} cannot be deleted, as it is required by one or more \
             routes.",
            router.id
        );
        return Err(ApiError::Conflict(text).named("RouterInterfaceInUseByRoute"));
    }
    Ok(())
}
