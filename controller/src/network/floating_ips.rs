//! Floating IPs: addresses of an external network that a router translates to those of tenants' ports.

use std::net::IpAddr;

use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    Scope,
    attributes::{Attributes, address, invalid_input},
    ipam,
    listing::{Collection, Query},
    networks, port_forwardings, ports,
    ports::{FLOATING_OWNER, FixedIpWish, FixedIps, INTERFACE_OWNER, NewPort, Port},
    qos, quotas, reach,
    resource::{Change, Resource},
    routers::bad_request,
    subnets,
};
use crate::{
    db::{Conn, now_us, rfc3339_s},
    http::error::ApiError,
};

/// Floating IPs as resources.
pub(super) struct FloatingIps;

/// A floating IP as stored, with what it shows of its port.
#[derive(Debug, Clone, FromRow)]
pub(super) struct FloatingIpRow {
    pub(super) id: String,
    pub(super) project_id: String,
    description: String,
    pub(super) floating_network_id: String,
    pub(super) floating_ip_address: String,
    own_port_id: String,
    pub(super) fixed_port_id: Option<String>,
    fixed_ip_address: Option<String>,
    pub(super) router_id: Option<String>,
    qos_policy_id: Option<String>,
    revision: i64,
    created_us: i64,
    updated_us: i64,
    #[sqlx(default)]
    port_name: Option<String>,
    #[sqlx(default)]
    port_network_id: Option<String>,
    #[sqlx(default)]
    port_mac: Option<String>,
    #[sqlx(default)]
    port_up: Option<bool>,
    #[sqlx(default)]
    port_device_id: Option<String>,
    #[sqlx(default)]
    port_device_owner: Option<String>,
    #[sqlx(default)]
    vm_state: Option<String>,
}

impl FloatingIpRow {
    fn document(&self, port_forwardings: Vec<Value>) -> Value {
        let details = self.fixed_port_id.as_ref().map(|_| {
            let active = self.vm_state.as_deref() == Some("active");
            json!({
                "name": self.port_name, "network_id": self.port_network_id, "mac_address": self.port_mac,
                "admin_state_up": self.port_up, "device_id": self.port_device_id,
                "device_owner": self.port_device_owner, "status": if active { "ACTIVE" } else { "DOWN" },
            })
        });
        json!({
            "id": self.id, "project_id": self.project_id, "tenant_id": self.project_id,
            "description": self.description, "floating_network_id": self.floating_network_id,
            "floating_ip_address": self.floating_ip_address, "port_id": self.fixed_port_id,
            "fixed_ip_address": self.fixed_ip_address, "router_id": self.router_id,
            "status": if self.router_id.is_some() { "ACTIVE" } else { "DOWN" },
            "qos_policy_id": self.qos_policy_id, "port_details": details, "port_forwardings": port_forwardings,
            "revision_number": self.revision,
            "created_at": rfc3339_s(self.created_us), "updated_at": rfc3339_s(self.updated_us),
        })
    }
}

/// The floating IP, if it is the asker's.
pub(super) async fn owned(db: &mut Conn, id: &str, scope: &Scope) -> Result<FloatingIpRow, ApiError> {
    let row: Option<FloatingIpRow> =
        sqlx::query_as("SELECT * FROM floating_ips WHERE id = $1").bind(id).fetch_optional(db).await?;
    row.filter(|row| scope.owns(&row.project_id)).ok_or_else(|| FloatingIps::missing(id))
}

/// Where a floating IP leads.
struct Association {
    port_id: String,
    ip: IpAddr,
    router_id: String,
}

/// The fixed address that is meant, with its subnet.
pub(super) fn fixed_address(port: &Port, asked: Option<IpAddr>) -> Result<(String, IpAddr), ApiError> {
    let id = &port.row.id;
    if let Some(ip) = asked {
        let found = port.fixed_ips.iter().find(|(_, own)| *own == ip && own.is_ipv4());
        return found
            .cloned()
            .ok_or_else(|| bad_request("floatingip", format!("Port {id} does not have fixed ip {ip}")));
    }
    let ipv4: Vec<_> = port.fixed_ips.iter().filter(|(_, ip)| ip.is_ipv4()).collect();
    match ipv4.as_slice() {
        [one] => Ok((*one).clone()),
        [] => Err(bad_request(
            "floatingip",
            format!("Cannot add floating IP to port {id} that has no fixed IPv4 addresses"),
        )),
        _ => Err(bad_request(
            "floatingip",
            format!(
                "Port {id} has multiple fixed IPv4 addresses.  Must provide a specific IPv4 address when assigning a \
                 floating IP"
            ),
        )),
    }
}

/// The router that leads from a subnet to an external network; that with the subnet's gateway address comes first.
pub(super) async fn router_between(
    tx: &mut Conn,
    subnet_id: &str,
    external_network_id: &str,
) -> Result<Option<String>, ApiError> {
    Ok(sqlx::query_scalar(
        "SELECT routers.id FROM routers JOIN ports ON ports.router_id = routers.id AND ports.device_owner = $3
             JOIN fixed_ips ON fixed_ips.port_id = ports.id JOIN subnets ON subnets.id = fixed_ips.subnet_id
         WHERE fixed_ips.subnet_id = $1 AND EXISTS (
             SELECT 1 FROM router_gateways JOIN ports AS outside ON outside.id = router_gateways.port_id
             WHERE router_gateways.router_id = routers.id AND outside.network_id = $2)
         ORDER BY CASE WHEN fixed_ips.address = subnets.gateway_ip THEN 0 ELSE 1 END, routers.created_us LIMIT 1",
    )
    .bind(subnet_id)
    .bind(external_network_id)
    .bind(INTERFACE_OWNER)
    .fetch_optional(tx)
    .await?)
}

/// Neutron's answer when no router leads from a port to the external network.
pub(super) fn not_reachable(network_id: &str, subnet_id: &str, port_id: &str) -> ApiError {
    let text = format!(
        "External network {network_id} is not reachable from subnet {subnet_id}.  Therefore, cannot associate Port \
         {port_id} with a Floating IP."
    );
    ApiError::NotFound(text).named("ExternalGatewayForFloatingIPNotFound")
}

async fn association(
    change: &mut Change,
    row: &FloatingIpRow,
    port_id: &str,
    asked: Option<IpAddr>,
) -> Result<Association, ApiError> {
    let port = ports::find(&mut change.tx, port_id).await?;
    let port = port
        .filter(|port| change.scope.owns(&port.row.project_id))
        .ok_or_else(|| ports::Ports::missing(port_id))?;
    if !port_forwardings::of(&mut change.tx, &row.id).await?.is_empty() {
        let text = format!("Floating IP {} in use by Port Forwarding resources.", row.id);
        return Err(ApiError::Conflict(text).named("FipInUseByPortForwarding"));
    }
    let (subnet_id, ip) = fixed_address(&port, asked)?;
    let router = router_between(&mut change.tx, &subnet_id, &row.floating_network_id).await?;
    let router_id = router.ok_or_else(|| not_reachable(&row.floating_network_id, &subnet_id, port_id))?;
    let other: Option<String> = sqlx::query_scalar(
        "SELECT id FROM floating_ips
         WHERE fixed_port_id = $1 AND fixed_ip_address = $2 AND floating_network_id = $3 AND id != $4",
    )
    .bind(port_id)
    .bind(ip.to_string())
    .bind(&row.floating_network_id)
    .bind(&row.id)
    .fetch_optional(&mut *change.tx)
    .await?;
    match other {
        None => Ok(Association { port_id: port_id.to_owned(), ip, router_id }),
        Some(_) => {
            let text = format!(
                "Cannot associate floating IP {} ({}) with port {port_id} using fixed IP {ip}, as that fixed IP already \
                 has a floating IP on external network {}.",
                row.floating_ip_address, row.id, row.floating_network_id
            );
            Err(ApiError::Conflict(text).named("FloatingIPPortAlreadyAssociated"))
        }
    }
}

async fn write(change: &mut Change, id: &str, association: Option<&Association>) -> Result<(), ApiError> {
    let before: Option<Option<String>> =
        sqlx::query_scalar("SELECT router_id FROM floating_ips WHERE id = $1")
            .bind(id)
            .fetch_optional(&mut *change.tx)
            .await?;
    let after = association.map(|association| association.router_id.clone());
    for router in before.flatten().into_iter().chain(after) {
        let hosts = reach::of_router(&mut change.tx, &router).await?;
        change.concern(hosts);
    }
    sqlx::query(
        "UPDATE floating_ips SET fixed_port_id = $2, fixed_ip_address = $3, router_id = $4, revision = revision + 1,
             updated_us = $5 WHERE id = $1",
    )
    .bind(id)
    .bind(association.map(|association| &association.port_id))
    .bind(association.map(|association| association.ip.to_string()))
    .bind(association.map(|association| &association.router_id))
    .bind(now_us())
    .execute(&mut *change.tx)
    .await?;
    Ok(())
}

/// Frees the floating IPs of a port that goes; gives the hosts that hear of it.
pub(super) async fn let_go(tx: &mut Conn, port_id: &str) -> Result<Vec<String>, ApiError> {
    let routers: Vec<String> = sqlx::query_scalar(
        "SELECT router_id FROM floating_ips WHERE router_id IS NOT NULL AND (fixed_port_id = $1 OR id IN
             (SELECT floatingip_id FROM port_forwardings WHERE internal_port_id = $1))",
    )
    .bind(port_id)
    .fetch_all(&mut *tx)
    .await?;
    let mut hosts = Vec::new();
    for router in routers {
        hosts.extend(reach::of_router(tx, &router).await?);
    }
    for sql in [
        "UPDATE floating_ips SET fixed_port_id = NULL, fixed_ip_address = NULL, router_id = NULL,
             revision = revision + 1 WHERE fixed_port_id = $1",
        "UPDATE floating_ips SET router_id = NULL WHERE id IN
             (SELECT floatingip_id FROM port_forwardings WHERE internal_port_id = $1) AND id NOT IN
             (SELECT floatingip_id FROM port_forwardings WHERE internal_port_id != $1)",
        "DELETE FROM port_forwardings WHERE internal_port_id = $1",
    ] {
        sqlx::query(sql).bind(port_id).execute(&mut *tx).await?;
    }
    Ok(hosts)
}

/// 409 if a port would lose an address that a floating IP or a port forwarding leads to.
pub(super) async fn refuse_moving(tx: &mut Conn, port: &Port, wanted: &FixedIps) -> Result<(), ApiError> {
    let (FixedIps::These(wishes) | FixedIps::Exactly(wishes)) = wanted else { return Ok(()) };
    let used: Vec<String> = sqlx::query_scalar(
        "SELECT fixed_ip_address FROM floating_ips WHERE fixed_port_id = $1
         UNION SELECT internal_ip_address FROM port_forwardings WHERE internal_port_id = $1",
    )
    .bind(&port.row.id)
    .fetch_all(tx)
    .await?;
    for ip in used {
        let stays = wishes.iter().any(|wish| wish.ip.is_some_and(|wanted| wanted.to_string() == ip));
        let kept = port.fixed_ips.iter().any(|(subnet, own)| {
            own.to_string() == ip
                && wishes.iter().any(|wish| wish.ip.is_none() && wish.subnet_id.as_ref() == Some(subnet))
        });
        if !stays && !kept {
            let text = format!(
                "Unable to complete the operation on port \"{}\" because the port still has an associated floating IP.",
                port.row.id
            );
            return Err(ApiError::Conflict(text).named("FipAssociated"));
        }
    }
    Ok(())
}

/// The port that has the floating address.
async fn own_port(
    change: &mut Change,
    id: &str,
    network_id: &str,
    subnet_id: Option<String>,
    ip: Option<IpAddr>,
) -> Result<Port, ApiError> {
    let wish = FixedIps::Exactly(match (&subnet_id, ip) {
        (None, None) => Vec::new(),
        (_, ip) => vec![FixedIpWish { subnet_id: subnet_id.clone(), ip }],
    });
    let new = NewPort::own("", FLOATING_OWNER, id, wish);
    let port_id = ports::insert(&mut change.tx, network_id, &new).await?;
    if subnet_id.is_none() && ip.is_none() {
        let ranges = subnets::ranges(&mut change.tx, network_id).await?;
        let mut taken = None;
        for range in ranges.iter().filter(|range| matches!(range.cidr, ipnet::IpNet::V4(_))) {
            taken = ipam::take_next(&mut change.tx, range, &port_id, 0).await?;
            if taken.is_some() {
                break;
            }
        }
        if taken.is_none() {
            return Err(ipam::exhausted(network_id));
        }
    }
    let port = ports::find(&mut change.tx, &port_id).await?;
    port.ok_or_else(|| ApiError::internal("the port that was just made is not there"))
}

fn fixed_ip(body: &mut Attributes) -> Result<Option<IpAddr>, ApiError> {
    let value = body.value("fixed_ip_address").filter(|value| !value.is_null());
    value.map(|value| address("fixed_ip_address", &value)).transpose()
}

const SELECT: &str = "SELECT floating_ips.*, ports.name AS port_name, ports.network_id AS port_network_id,
        ports.mac_address AS port_mac, ports.admin_state_up AS port_up, ports.device_id AS port_device_id,
        ports.device_owner AS port_device_owner, servers.vm_state
    FROM floating_ips LEFT JOIN ports ON ports.id = floating_ips.fixed_port_id
        LEFT JOIN servers ON servers.id = ports.server_id WHERE (";

impl Resource for FloatingIps {
    const NAME: &'static str = "floatingip";
    const PATH: &'static str = "floatingips";
    const COLLECTION: Collection = Collection {
        name: "floatingips",
        attributes: &[
            "created_at",
            "description",
            "fixed_ip_address",
            "floating_ip_address",
            "floating_network_id",
            "id",
            "port_details",
            "port_forwardings",
            "port_id",
            "project_id",
            "qos_policy_id",
            "revision_number",
            "router_id",
            "status",
            "tags",
            "tenant_id",
            "updated_at",
        ],
    };

    fn missing(id: &str) -> ApiError {
        ApiError::NotFound(format!("Floating IP {id} could not be found")).named("FloatingIPNotFound")
    }

    async fn read(db: &mut Conn, scope: &Scope, query: &Query) -> Result<Vec<Value>, ApiError> {
        let mut statement = QueryBuilder::new(SELECT);
        statement.push_bind(scope.admin).push(" OR floating_ips.project_id = ");
        statement.push_bind(scope.project.clone()).push(")");
        let columns = [("id", "floating_ips.id"), ("port_id", "floating_ips.fixed_port_id")];
        query.narrow(&mut statement, &columns);
        statement.push(" ORDER BY floating_ips.created_us, floating_ips.id");
        let rows: Vec<FloatingIpRow> = statement.build_query_as().fetch_all(&mut *db).await?;
        let mut documents = Vec::with_capacity(rows.len());
        for row in rows {
            let forwardings = match row.fixed_port_id {
                Some(_) => Vec::new(),
                None => port_forwardings::of(db, &row.id).await?,
            };
            documents.push(row.document(forwardings));
        }
        Ok(documents)
    }

    async fn create(change: &mut Change, mut body: Attributes) -> Result<String, ApiError> {
        let project_id = change.scope.owner(&mut body)?;
        let network_id = body.required("floating_network_id")?;
        let description = body.string("description")?.unwrap_or_default();
        let port_id = body.nullable_id("port_id")?.flatten();
        let fixed = fixed_ip(&mut body)?;
        let subnet_id = body.nullable_id("subnet_id")?.flatten();
        let wanted = body.value("floating_ip_address").filter(|value| !value.is_null());
        let wanted = wanted.map(|value| address("floating_ip_address", &value)).transpose()?;
        let policy = body.nullable_id("qos_policy_id")?.flatten();
        body.finish()?;
        if wanted.is_some() && !change.scope.admin {
            return Err(ApiError::Forbidden("Only an admin can choose a floating IP's address.".into()));
        }
        if wanted.is_some_and(|ip| ip.is_ipv6()) {
            return Err(invalid_input("a floating IP is an IPv4 address"));
        }
        if port_id.is_none() && fixed.is_some() {
            return Err(bad_request("floatingip", "fixed_ip_address cannot be specified without a port_id"));
        }
        let network = networks::visible(&mut change.tx, &network_id, &change.scope).await?;
        if !network.external {
            let text = format!("Network {network_id} is not a valid external network");
            return Err(bad_request("floatingip", text));
        }
        if let Some(policy) = &policy {
            qos::visible(&mut change.tx, policy, &change.scope).await?;
        }
        if let Some(subnet) = &subnet_id {
            let row = subnets::find(&mut change.tx, subnet).await?;
            if row.network_id != network.id || !matches!(row.net()?, ipnet::IpNet::V4(_)) {
                return Err(bad_request(
                    "floatingip",
                    format!("Subnet {subnet} is no IPv4 subnet of network {network_id}"),
                ));
            }
        }
        quotas::check(&mut change.tx, &project_id, quotas::Resource::FloatingIp).await?;
        let id = Uuid::new_v4().to_string();
        let port = own_port(change, &id, &network.id, subnet_id, wanted).await?;
        let address = port.fixed_ips.first().map(|(_, ip)| ip.to_string());
        let address = address.ok_or_else(|| ipam::exhausted(&network.id))?;
        let row: FloatingIpRow = sqlx::query_as(
            "INSERT INTO floating_ips (id, project_id, description, floating_network_id, floating_ip_address,
                 own_port_id, qos_policy_id, created_us, updated_us)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8) RETURNING *",
        )
        .bind(&id)
        .bind(&project_id)
        .bind(description)
        .bind(&network.id)
        .bind(address)
        .bind(&port.row.id)
        .bind(policy)
        .bind(now_us())
        .fetch_one(&mut *change.tx)
        .await?;
        if let Some(port_id) = port_id {
            let association = association(change, &row, &port_id, fixed).await?;
            write(change, &id, Some(&association)).await?;
        }
        Ok(id)
    }

    async fn update(change: &mut Change, id: &str, mut body: Attributes) -> Result<(), ApiError> {
        let description = body.string("description")?;
        let port_id = body.nullable_id("port_id")?;
        let fixed = fixed_ip(&mut body)?;
        let policy = body.nullable_id("qos_policy_id")?;
        body.finish()?;
        let row = owned(&mut change.tx, id, &change.scope).await?;
        if let Some(Some(policy)) = &policy {
            qos::visible(&mut change.tx, policy, &change.scope).await?;
        }
        let port_id = match (port_id, &row.fixed_port_id) {
            // Only the address changes.
            (None, Some(port)) if fixed.is_some() => Some(Some(port.clone())),
            (port, _) => port,
        };
        if fixed.is_some() && !matches!(port_id, Some(Some(_))) {
            return Err(bad_request("floatingip", "fixed_ip_address cannot be specified without a port_id"));
        }
        sqlx::query(
            "UPDATE floating_ips SET description = COALESCE($2, description), qos_policy_id = $3,
                 revision = revision + 1, updated_us = $4 WHERE id = $1",
        )
        .bind(id)
        .bind(description)
        .bind(policy.unwrap_or_else(|| row.qos_policy_id.clone()))
        .bind(now_us())
        .execute(&mut *change.tx)
        .await?;
        if let Some(router) = &row.router_id {
            let hosts = reach::of_router(&mut change.tx, router).await?;
            change.concern(hosts);
        }
        match port_id {
            None => Ok(()),
            Some(None) if row.fixed_port_id.is_none() => Ok(()),
            Some(None) => write(change, id, None).await,
            Some(Some(port_id)) => {
                let association = association(change, &row, &port_id, fixed).await?;
                write(change, id, Some(&association)).await
            }
        }
    }

    async fn delete(change: &mut Change, id: &str) -> Result<(), ApiError> {
        let row = owned(&mut change.tx, id, &change.scope).await?;
        if let Some(router) = &row.router_id {
            let hosts = reach::of_router(&mut change.tx, router).await?;
            change.concern(hosts);
        }
        sqlx::query("DELETE FROM floating_ips WHERE id = $1").bind(id).execute(&mut *change.tx).await?;
        ports::remove(&mut change.tx, &row.own_port_id).await
    }
}
