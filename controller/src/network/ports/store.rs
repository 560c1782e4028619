//! Rows of ports and their addresses.

use crate::db::{Conn, Db};
use std::net::Ipv4Addr;

use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    super::{
        Scope,
        ipam::{self, Range},
        listing::Query,
        networks::NetworkRow,
        subnets,
    },
    SERVICE_OWNER,
};
use crate::{
    db::{now_us, rfc3339_s},
    http::error::ApiError,
};

/// Tries to find a MAC address that the network doesn't have yet. With 2^24 to choose from, several in a row fail only on
/// a network that is nearly full of them.
const MAC_TRIES: usize = 16;

/// A port with what comes from its network and server.
#[derive(Debug, Clone, FromRow)]
pub(super) struct PortRow {
    pub(super) id: String,
    pub(super) network_id: String,
    pub(super) project_id: String,
    name: String,
    description: String,
    pub(super) mac_address: String,
    pub(super) device_id: String,
    pub(super) device_owner: String,
    pub(super) server_id: Option<String>,
    revision: i64,
    created_us: i64,
    updated_us: i64,
    pub(super) network_project_id: String,
    pub(super) host_id: Option<String>,
    host_name: Option<String>,
    vm_state: Option<String>,
    subnet_id: Option<String>,
    ip: Option<i64>,
}

/// A port and its addresses in order.
#[derive(Debug, Clone)]
pub(super) struct Port {
    pub(super) row: PortRow,
    pub(super) fixed_ips: Vec<(String, Ipv4Addr)>,
}

/// The addresses that a port shall get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FixedIps {
    /// One, of the first subnet that has any.
    Any,
    /// These, possibly none.
    These(Vec<FixedIpWish>),
}

/// A wish for one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FixedIpWish {
    /// In this subnet.
    pub(super) subnet_id: Option<String>,
    /// This one.
    pub(super) ip: Option<Ipv4Addr>,
}

/// The server that a port is made for.
#[derive(Debug, Clone)]
pub(super) struct Plugged {
    pub(super) server_id: String,
    pub(super) index: i64,
}

/// A port that shall be made.
#[derive(Debug, Clone)]
pub(super) struct NewPort {
    pub(super) project_id: String,
    pub(super) name: String,
    pub(super) description: String,
    pub(super) mac_address: Option<String>,
    pub(super) device_id: String,
    pub(super) device_owner: String,
    pub(super) fixed_ips: FixedIps,
    pub(super) plugged: Option<Plugged>,
}

impl Port {
    /// The document; `binding:*` is for admins, as in Neutron.
    pub(super) fn document(&self, admin: bool) -> Value {
        let row = &self.row;
        let fixed_ips: Vec<Value> = self
            .fixed_ips
            .iter()
            .map(|(subnet, ip)| json!({"subnet_id": subnet, "ip_address": ip}))
            .collect();
        let status = if row.vm_state.as_deref() == Some("active") { "ACTIVE" } else { "DOWN" };
        let mut document = json!({
            "id": row.id, "network_id": row.network_id, "name": row.name, "description": row.description,
            "project_id": row.project_id, "tenant_id": row.project_id, "admin_state_up": true, "status": status,
            "mac_address": row.mac_address, "fixed_ips": fixed_ips,
            "device_id": row.device_id, "device_owner": row.device_owner, "binding:vnic_type": "normal",
            "security_groups": [], "tags": [], "revision_number": row.revision,
            "created_at": rfc3339_s(row.created_us), "updated_at": rfc3339_s(row.updated_us),
        });
        if admin {
            document["binding:host_id"] = json!(row.host_name.as_deref().unwrap_or_default());
            document["binding:vif_type"] = json!(if row.host_id.is_some() { "tap" } else { "unbound" });
            document["binding:vif_details"] = json!({});
            document["binding:profile"] = json!({});
        }
        document
    }
}

const SELECT: &str =
    "SELECT ports.*, networks.project_id AS network_project_id, servers.host_id, servers.vm_state,
        hosts.name AS host_name, fixed_ips.subnet_id, fixed_ips.ip
    FROM ports JOIN networks ON networks.id = ports.network_id
        LEFT JOIN servers ON servers.id = ports.server_id LEFT JOIN hosts ON hosts.id = servers.host_id
        LEFT JOIN fixed_ips ON fixed_ips.port_id = ports.id WHERE ";
const ORDER: &str = " ORDER BY ports.created_us, ports.id, fixed_ips.position";

async fn fetch(db: &mut Conn, mut query: QueryBuilder<Db>) -> Result<Vec<Port>, ApiError> {
    query.push(ORDER);
    let rows: Vec<PortRow> = query.build_query_as().fetch_all(db).await?;
    let mut ports: Vec<Port> = Vec::new();
    for row in rows {
        let address = match (&row.subnet_id, row.ip) {
            (Some(subnet), Some(ip)) => Some((subnet.clone(), to_address(ip)?)),
            _ => None,
        };
        match ports.last_mut().filter(|port| port.row.id == row.id) {
            Some(port) => port.fixed_ips.extend(address),
            None => ports.push(Port { row, fixed_ips: address.into_iter().collect() }),
        }
    }
    Ok(ports)
}

/// The stored form of an address back.
pub(in super::super) fn to_address(ip: i64) -> Result<Ipv4Addr, ApiError> {
    u32::try_from(ip).map(Ipv4Addr::from).map_err(ApiError::internal)
}

/// One port.
pub(super) async fn find(db: &mut Conn, id: &str) -> Result<Option<Port>, ApiError> {
    let mut query = QueryBuilder::new(SELECT);
    query.push("ports.id = ").push_bind(id.to_owned());
    Ok(fetch(db, query).await?.pop())
}

/// The ports that the asker may see, narrowed by the filters that have an index.
pub(super) async fn list(db: &mut Conn, scope: &Scope, asked: &Query) -> Result<Vec<Port>, ApiError> {
    let mut query = QueryBuilder::new(SELECT);
    query.push("(").push_bind(scope.admin);
    query.push(" OR ports.project_id = ").push_bind(scope.project.clone());
    query.push(" OR networks.project_id = ").push_bind(scope.project.clone()).push(")");
    for (filter, column) in
        [("id", "ports.id"), ("device_id", "ports.device_id"), ("network_id", "ports.network_id")]
    {
        let Some(values) = asked.values(filter) else { continue };
        query.push(" AND ").push(column).push(" IN (");
        let mut list = query.separated(", ");
        for value in values {
            list.push_bind(value.clone());
        }
        query.push(")");
    }
    fetch(db, query).await
}

/// Adds a port with its addresses; the quota is the caller's business.
pub(super) async fn insert(tx: &mut Conn, network_id: &str, new: &NewPort) -> Result<String, ApiError> {
    let id = Uuid::new_v4().to_string();
    let mac = match &new.mac_address {
        Some(mac) if mac_is_taken(tx, network_id, mac).await? => {
            let text = format!(
                "Unable to complete operation for network {network_id}. The mac address {mac} is in use."
            );
            return Err(ApiError::Conflict(text).named("MacAddressInUse"));
        }
        Some(mac) => mac.clone(),
        None => free_mac(tx, network_id).await?,
    };
    let plugged = new.plugged.as_ref();
    sqlx::query(
        "INSERT INTO ports (id, network_id, project_id, name, description, mac_address, device_id, device_owner,
             server_id, device_index, made_by_server, created_us, updated_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $12)",
    )
    .bind(&id)
    .bind(network_id)
    .bind(&new.project_id)
    .bind(&new.name)
    .bind(&new.description)
    .bind(mac)
    .bind(&new.device_id)
    .bind(&new.device_owner)
    .bind(plugged.map(|plugged| &plugged.server_id))
    .bind(plugged.map_or(0, |plugged| plugged.index))
    .bind(plugged.is_some())
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    let ranges = subnets::ranges(tx, network_id).await?;
    match &new.fixed_ips {
        FixedIps::Any => take_any(tx, network_id, &ranges, &id).await?,
        FixedIps::These(wishes) => take_these(tx, network_id, &ranges, &id, wishes).await?,
    }
    Ok(id)
}

async fn take_any(tx: &mut Conn, network_id: &str, ranges: &[Range], port_id: &str) -> Result<(), ApiError> {
    for range in ranges {
        if ipam::take_next(tx, range, port_id, 0).await?.is_some() {
            return Ok(());
        }
    }
    match ranges.is_empty() {
        true => Ok(()),
        false => Err(ipam::exhausted(network_id)),
    }
}

async fn take_these(
    tx: &mut Conn,
    network_id: &str,
    ranges: &[Range],
    port_id: &str,
    wishes: &[FixedIpWish],
) -> Result<(), ApiError> {
    // Certain addresses first, so that a wish for any address doesn't take one of them; the order stays.
    let ordered = wishes.iter().enumerate();
    let (certain, any): (Vec<_>, Vec<_>) = ordered.partition(|(_, wish)| wish.ip.is_some());
    for (index, wish) in certain.into_iter().chain(any) {
        let position = i64::try_from(index).map_err(ApiError::internal)?;
        let range = range_of(network_id, ranges, wish)?;
        match wish.ip {
            Some(ip) => ipam::take(tx, range, ip, port_id, position).await?,
            None => {
                let taken = ipam::take_next(tx, range, port_id, position).await?;
                taken.ok_or_else(|| ipam::exhausted(network_id))?;
            }
        }
    }
    Ok(())
}

fn range_of<'a>(network_id: &str, ranges: &'a [Range], wish: &FixedIpWish) -> Result<&'a Range, ApiError> {
    match (&wish.subnet_id, wish.ip) {
        (Some(subnet), _) => ranges.iter().find(|range| range.subnet_id == *subnet).ok_or_else(|| {
            let text = format!(
                "Invalid input for operation: Failed to create port on network {network_id}, because fixed_ips \
                 included invalid subnet {subnet}."
            );
            ApiError::BadRequest(text).named("InvalidInput")
        }),
        (None, Some(ip)) => ranges.iter().find(|range| range.cidr.contains(&ip)).ok_or_else(|| {
            let text =
                format!("IP address {ip} is not a valid IP for any of the subnets on the specified network.");
            ApiError::BadRequest(text).named("InvalidIpForNetwork")
        }),
        (None, None) => ranges.first().ok_or_else(|| ipam::exhausted(network_id)),
    }
}

/// Gives a port other addresses. Where it shall have some address of a subnet that it has one of, it keeps that.
pub(super) async fn replace_addresses(tx: &mut Conn, port: &Port, wanted: FixedIps) -> Result<(), ApiError> {
    let FixedIps::These(mut wishes) = wanted else { return Ok(()) };
    let mut kept: Vec<_> =
        port.fixed_ips.iter().filter(|(_, ip)| !wishes.iter().any(|wish| wish.ip == Some(*ip))).collect();
    for wish in wishes.iter_mut().filter(|wish| wish.ip.is_none()) {
        let same = kept.iter().position(|(subnet, _)| Some(subnet) == wish.subnet_id.as_ref());
        wish.ip = same.map(|at| kept.remove(at).1);
    }
    sqlx::query("DELETE FROM fixed_ips WHERE port_id = $1").bind(&port.row.id).execute(&mut *tx).await?;
    let ranges = subnets::ranges(tx, &port.row.network_id).await?;
    take_these(tx, &port.row.network_id, &ranges, &port.row.id, &wishes).await
}

/// Changes name, description, device id, device owner; `None` leaves one as it is.
pub(super) async fn rename(
    tx: &mut Conn,
    id: &str,
    [name, description, device_id, device_owner]: [Option<String>; 4],
) -> Result<(), ApiError> {
    sqlx::query(
        "UPDATE ports SET name = COALESCE($2, name), description = COALESCE($3, description),
             device_id = COALESCE($4, device_id), device_owner = COALESCE($5, device_owner),
             revision = revision + 1, updated_us = $6 WHERE id = $1",
    )
    .bind(id)
    .bind(name)
    .bind(description)
    .bind(device_id)
    .bind(device_owner)
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(())
}

/// Whether anything but the network's own service uses it.
pub(in super::super) async fn in_use(tx: &mut Conn, network_id: &str) -> Result<bool, ApiError> {
    let one: Option<i64> =
        sqlx::query_scalar("SELECT 1 FROM ports WHERE network_id = $1 AND device_owner != $2 LIMIT 1")
            .bind(network_id)
            .bind(SERVICE_OWNER)
            .fetch_optional(tx)
            .await?;
    Ok(one.is_some())
}

/// Whether a port of another project is on the network.
pub(in super::super) async fn of_others(tx: &mut Conn, network: &NetworkRow) -> Result<bool, ApiError> {
    let one: Option<i64> =
        sqlx::query_scalar("SELECT 1 FROM ports WHERE network_id = $1 AND project_id != $2 LIMIT 1")
            .bind(&network.id)
            .bind(&network.project_id)
            .fetch_optional(tx)
            .await?;
    Ok(one.is_some())
}

/// Whether anything but the network's own service has an address of the subnet.
pub(in super::super) async fn subnet_in_use(tx: &mut Conn, subnet_id: &str) -> Result<bool, ApiError> {
    let one: Option<i64> = sqlx::query_scalar(
        "SELECT 1 FROM fixed_ips JOIN ports ON ports.id = fixed_ips.port_id
         WHERE fixed_ips.subnet_id = $1 AND ports.device_owner != $2 LIMIT 1",
    )
    .bind(subnet_id)
    .bind(SERVICE_OWNER)
    .fetch_optional(tx)
    .await?;
    Ok(one.is_some())
}

/// Gives the network's service port (made with the first subnet) an address in a new subnet.
pub(in super::super) async fn add_service_address(
    tx: &mut Conn,
    network: &NetworkRow,
    subnet_id: &str,
) -> Result<(), ApiError> {
    let port_id = match service_port(tx, &network.id).await? {
        Some(id) => id,
        None => {
            let new = NewPort {
                project_id: network.project_id.clone(),
                name: String::new(),
                description: String::new(),
                mac_address: None,
                device_id: format!("mote-{}", network.id),
                device_owner: SERVICE_OWNER.into(),
                fixed_ips: FixedIps::These(Vec::new()),
                plugged: None,
            };
            insert(tx, &network.id, &new).await?
        }
    };
    let ranges = subnets::ranges(tx, &network.id).await?;
    let range = ranges.iter().find(|range| range.subnet_id == subnet_id);
    let range = range.ok_or_else(|| ApiError::internal("the subnet that was just made is not there"))?;
    let taken = ipam::take_next(tx, range, &port_id, 0).await?;
    taken.map(|_| ()).ok_or_else(|| ipam::exhausted(&network.id))
}

/// Takes the service port's address in a subnet back, and the port with its last address.
pub(in super::super) async fn remove_service_address(
    tx: &mut Conn,
    network_id: &str,
    subnet_id: &str,
) -> Result<(), ApiError> {
    let Some(port_id) = service_port(tx, network_id).await? else { return Ok(()) };
    sqlx::query("DELETE FROM fixed_ips WHERE port_id = $1 AND subnet_id = $2")
        .bind(&port_id)
        .bind(subnet_id)
        .execute(&mut *tx)
        .await?;
    sqlx::query(
        "DELETE FROM ports WHERE id = $1 AND NOT EXISTS (SELECT 1 FROM fixed_ips WHERE port_id = $1)",
    )
    .bind(&port_id)
    .execute(&mut *tx)
    .await?;
    Ok(())
}

async fn service_port(tx: &mut Conn, network_id: &str) -> Result<Option<String>, ApiError> {
    let sql = "SELECT id FROM ports WHERE network_id = $1 AND device_owner = $2";
    Ok(sqlx::query_scalar(sql).bind(network_id).bind(SERVICE_OWNER).fetch_optional(tx).await?)
}

async fn mac_is_taken(tx: &mut Conn, network_id: &str, mac: &str) -> Result<bool, ApiError> {
    let sql = "SELECT 1 FROM ports WHERE network_id = $1 AND mac_address = $2";
    let one: Option<i64> = sqlx::query_scalar(sql).bind(network_id).bind(mac).fetch_optional(tx).await?;
    Ok(one.is_some())
}

/// A random address below OpenStack's prefix (`base_mac`) that the network doesn't have yet.
async fn free_mac(tx: &mut Conn, network_id: &str) -> Result<String, ApiError> {
    for _ in 0..MAC_TRIES {
        let mut tail = [0; 3];
        getrandom::fill(&mut tail).map_err(|error| ApiError::internal(error.to_string()))?;
        let mac = format!("fa:16:3e:{:02x}:{:02x}:{:02x}", tail[0], tail[1], tail[2]);
        if !mac_is_taken(tx, network_id, &mac).await? {
            return Ok(mac);
        }
    }
    let text = format!("Unable to generate unique mac on network {network_id}.");
    Err(ApiError::Unavailable(text).named("MacAddressGenerationFailure"))
}

/// `aa:bb:cc:dd:ee:ff` in lower case, if the text is the address of one device.
pub(super) fn canonical_mac(text: &str) -> Option<String> {
    let parts: Vec<&str> = text.split([':', '-']).collect();
    let bytes: Vec<u8> = parts
        .iter()
        .filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
        .filter_map(|part| u8::from_str_radix(part, 16).ok())
        .collect();
    if parts.len() != 6 || bytes.len() != 6 || bytes[0] & 1 == 1 || bytes.iter().all(|byte| *byte == 0) {
        return None;
    }
    Some(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_one_device_are_macs() {
        assert_eq!(canonical_mac("FA-16-3E-00-0a-01").as_deref(), Some("fa:16:3e:00:0a:01"));
        for text in [
            "",
            "fa:16:3e:00:0a",
            "fa:16:3e:00:0a:01:02",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "fa:16:3e:00:0a:+1",
            "01:00:5e:00:00:01",
        ] {
            assert_eq!(canonical_mac(text), None, "{text}");
        }
    }
}
