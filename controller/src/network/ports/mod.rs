//! Ports as resources. What a request says is in [`input`], what happens to rows in [`store`], addresses in [`addresses`],
//! what servers do with ports in [`server`].

use std::collections::BTreeSet;

use serde_json::Value;

use super::{
    Scope,
    attributes::Attributes,
    floating_ips,
    listing::{Collection, Query},
    networks, quotas, reach,
    resource::{Change, Resource},
};
use crate::{db::Conn, http::error::ApiError};
use server::PlugState;

mod addresses;
mod input;
pub(crate) mod server;
mod store;

pub(super) use addresses::{
    FixedIpWish, FixedIps, add_automatic_addresses, add_service_address, give_address,
    remove_automatic_addresses, remove_service_address, replace as replace_addresses, take_address,
};
pub(super) use input::wishes;
pub(super) use store::{
    Groups, NewPort, Port, find, in_use, insert, leads_outside, of_others, of_project, remove, subnet_in_use,
};

/// The device owner of a network's own service port.
pub(crate) const SERVICE_OWNER: &str = "network:distributed";
/// That of a router's interface.
pub(crate) const INTERFACE_OWNER: &str = "network:router_interface";
/// That of a router's port on an external network.
pub(crate) const GATEWAY_OWNER: &str = "network:router_gateway";
/// That of a floating IP's port on an external network.
pub(crate) const FLOATING_OWNER: &str = "network:floatingip";
/// What all of the cloud's own ports begin with.
const OWN: &str = "network:";

/// Ports as resources.
pub(super) struct Ports;

/// Neutron's policy: only the owner of a network chooses addresses and MACs in it, and goes without its filters.
fn may_choose(scope: &Scope, owner: &str, wanted: &input::Wanted) -> Result<(), ApiError> {
    if scope.owns(owner) {
        return Ok(());
    }
    let address =
        matches!(&wanted.fixed_ips, Some(FixedIps::These(wishes)) if wishes.iter().any(|w| w.ip.is_some()));
    if address || wanted.mac_address.is_some() {
        return Err(ApiError::Forbidden("Only the owner of a network can choose addresses in it.".into()));
    }
    let unsafe_pairs = wanted.allowed_address_pairs.as_ref().is_some_and(|pairs| !pairs.is_empty());
    match unsafe_pairs || wanted.port_security_enabled.is_some() {
        true => Err(ApiError::Forbidden(
            "Only the owner of a network can change port security and allowed address pairs in it.".into(),
        )),
        false => Ok(()),
    }
}

/// The port, if the asker may see it: its own, or on a network of its own.
pub(super) async fn visible(db: &mut Conn, id: &str, scope: &Scope) -> Result<Port, ApiError> {
    let port = store::find(db, id).await?;
    port.filter(|port| scope.owns(&port.row.project_id) || scope.owns(&port.row.network_project_id))
        .ok_or_else(|| Ports::missing(id))
}

/// Neutron's 404.
pub(super) fn missing(id: &str) -> ApiError {
    Ports::missing(id)
}

/// Neutron's 409 for a port that something uses.
pub(super) fn in_use_by(port: &Port) -> ApiError {
    let text = format!(
        "Unable to complete operation on port {} for network {}. Port already has an attached device {}.",
        port.row.id, port.row.network_id, port.row.device_id
    );
    ApiError::Conflict(text).named("PortInUse")
}

/// The cloud's own ports are changed through what they belong to.
fn refuse_own(port: &Port, verb: &str) -> Result<(), ApiError> {
    match port.row.device_owner.starts_with(OWN) {
        true => {
            let text = format!(
                "Port {} cannot be {verb} directly via the port API: has device owner {}.",
                port.row.id, port.row.device_owner
            );
            Err(ApiError::Conflict(text).named("ServicePortInUse"))
        }
        false => Ok(()),
    }
}

async fn check_policy(db: &mut Conn, scope: &Scope, policy: Option<&Option<String>>) -> Result<(), ApiError> {
    match policy {
        Some(Some(id)) => super::qos::visible(db, id, scope).await.map(drop),
        _ => Ok(()),
    }
}

impl Resource for Ports {
    const NAME: &'static str = "port";
    const PATH: &'static str = "ports";
    const COLLECTION: Collection = Collection {
        name: "ports",
        attributes: &[
            "admin_state_up",
            "allowed_address_pairs",
            "binding:host_id",
            "binding:profile",
            "binding:vif_details",
            "binding:vif_type",
            "binding:vnic_type",
            "created_at",
            "description",
            "device_id",
            "device_owner",
            "extra_dhcp_opts",
            "fixed_ips",
            "id",
            "mac_address",
            "name",
            "network_id",
            "port_security_enabled",
            "project_id",
            "qos_network_policy_id",
            "qos_policy_id",
            "revision_number",
            "security_groups",
            "status",
            "tags",
            "tenant_id",
            "updated_at",
        ],
    };

    fn missing(id: &str) -> ApiError {
        ApiError::NotFound(format!("Port {id} could not be found.")).named("PortNotFound")
    }

    async fn read(db: &mut Conn, scope: &Scope, query: &Query) -> Result<Vec<Value>, ApiError> {
        let ports = store::list(db, scope, query).await?;
        Ok(ports.iter().map(|port| port.document(scope.admin)).collect())
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        let project_id = change.scope.owner(&mut body)?;
        let network_id = body.required("network_id")?;
        let wanted = input::Wanted::parse(&mut body)?;
        body.finish()?;
        let network = networks::visible(&mut change.tx, &network_id, &change.scope).await?;
        may_choose(&change.scope, &network.project_id, &wanted)?;
        check_policy(&mut change.tx, &change.scope, wanted.qos_policy_id.as_ref()).await?;
        quotas::check(&mut change.tx, &project_id, quotas::Resource::Port).await?;
        if let Some(groups) = &wanted.security_groups {
            store::check_groups(&mut change.tx, &change.scope, groups).await?;
        }
        let new = NewPort {
            project_id,
            name: wanted.name.unwrap_or_default(),
            description: wanted.description.unwrap_or_default(),
            mac_address: wanted.mac_address,
            device_id: wanted.device_id.unwrap_or_default(),
            device_owner: wanted.device_owner.unwrap_or_default(),
            fixed_ips: wanted.fixed_ips.unwrap_or(FixedIps::Any),
            admin_state_up: wanted.admin_state_up.unwrap_or(true),
            port_security: wanted.port_security_enabled,
            groups: wanted.security_groups.map_or(Groups::Default, Groups::These),
            pairs: wanted.allowed_address_pairs.unwrap_or_default(),
            qos_policy_id: wanted.qos_policy_id.flatten(),
            router_id: None,
            plugged: None,
        };
        // A port that is not on a host yet matters to none but by its groups.
        let id = store::insert(&mut change.tx, &network.id, &new).await?;
        let hosts = reach::of_port_groups(&mut change.tx, &id).await?;
        change.concern(hosts);
        Ok(id)
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        let port = visible(&mut change.tx, id, &change.scope).await?;
        if !change.scope.owns(&port.row.project_id) {
            return Err(ApiError::Forbidden("Only the owner of a port and admins can change it.".into()));
        }
        let mut wanted = input::Wanted::parse(&mut body)?;
        body.finish()?;
        if wanted.mac_address.as_ref() == Some(&port.row.mac_address) {
            wanted.mac_address = None;
        }
        if wanted.port_security_enabled == Some(port.row.port_security_enabled) {
            wanted.port_security_enabled = None;
        }
        if !wanted.is_cosmetic() {
            refuse_own(&port, "changed")?;
        }
        may_choose(&change.scope, &port.row.network_project_id, &wanted)?;
        check_policy(&mut change.tx, &change.scope, wanted.qos_policy_id.as_ref()).await?;
        let moves = wanted.device_id.as_ref().is_some_and(|device| *device != port.row.device_id)
            || wanted.device_owner.as_ref().is_some_and(|owner| *owner != port.row.device_owner)
            || wanted.mac_address.is_some();
        if port.row.server_id.is_some() && moves {
            return Err(in_use_by(&port));
        }
        let hosts = apply(&mut change.tx, &change.scope, &port, wanted).await?;
        change.concern(hosts);
        Ok(())
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        let port = visible(&mut change.tx, id, &change.scope).await?;
        refuse_own(&port, "deleted")?;
        if port.row.server_id.is_some() {
            // As in Nova, its server loses it.
            let hosts = reach::of_port(&mut change.tx, &port.row.network_id, id).await?;
            change.concern(hosts);
            change.concern(port.row.host_id.clone());
        }
        if let Some(host) = port.row.host_id.as_deref().filter(|_| port.may_be_wired()) {
            // Until the host has no tap of it, its addresses are nobody else's.
            return server::leave(&mut change.tx, id, host, PlugState::Deleting).await;
        }
        let hosts = reach::of_port_groups(&mut change.tx, id).await?;
        change.concern(hosts);
        let hosts = floating_ips::let_go(&mut change.tx, id).await?;
        change.concern(hosts);
        store::remove(&mut change.tx, id).await
    }
}

/// Changes a port as it was checked that it may be, and says which hosts it concerns.
async fn apply(
    tx: &mut Conn,
    scope: &Scope,
    port: &Port,
    wanted: input::Wanted,
) -> Result<BTreeSet<String>, ApiError> {
    let id = &port.row.id;
    let mut concerned = BTreeSet::new();
    concerned.extend(reach::of_port(tx, &port.row.network_id, id).await?);
    store::update(tx, scope, port, &wanted).await?;
    if let Some(fixed) = wanted.fixed_ips {
        floating_ips::refuse_moving(tx, port, &fixed).await?;
        addresses::replace(tx, port, fixed).await?;
    }
    if let Some(mac) = &wanted.mac_address {
        addresses::follow_mac(tx, port, mac).await?;
    }
    concerned.extend(reach::of_port_groups(tx, id).await?);
    concerned.extend(port.row.host_id.clone());
    Ok(concerned)
}
