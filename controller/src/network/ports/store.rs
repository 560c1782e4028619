//! Rows of ports.

use std::{collections::BTreeSet, net::IpAddr};

use serde_json::{Value, json};
use sqlx::{FromRow, QueryBuilder};
use uuid::Uuid;

use super::{
    super::{Scope, listing::Query, networks::NetworkRow, resource::forget_tags, security_groups},
    FLOATING_OWNER, GATEWAY_OWNER, OWN, SERVICE_OWNER, addresses,
    addresses::FixedIps,
    input::{Pair, Wanted},
};
use crate::{
    db::{Conn, Db, now_us, rfc3339_s},
    http::error::ApiError,
};

/// Tries to find a MAC address that the network doesn't have yet. With 2^24 to choose from, several in a row fail only on
/// a network that is nearly full of them.
const MAC_TRIES: usize = 16;

/// A port with what comes from its network and server.
#[derive(Debug, Clone, FromRow)]
pub(in super::super) struct PortRow {
    pub(in super::super) id: String,
    pub(in super::super) network_id: String,
    pub(in super::super) project_id: String,
    pub(in super::super) name: String,
    description: String,
    pub(in super::super) mac_address: String,
    pub(in super::super) device_id: String,
    pub(in super::super) device_owner: String,
    pub(in super::super) server_id: Option<String>,
    pub(in super::super) admin_state_up: bool,
    pub(in super::super) port_security_enabled: bool,
    allowed_address_pairs: String,
    qos_policy_id: Option<String>,
    network_policy_id: Option<String>,
    revision: i64,
    created_us: i64,
    updated_us: i64,
    pub(in super::super) network_project_id: String,
    pub(in super::super) host_id: Option<String>,
    host_name: Option<String>,
    vm_state: Option<String>,
    task_state: Option<String>,
    plug_state: Option<String>,
    subnet_id: Option<String>,
    address: Option<String>,
}

/// A port, its addresses in order, and its groups.
#[derive(Debug, Clone)]
pub(in super::super) struct Port {
    pub(in super::super) row: PortRow,
    pub(in super::super) fixed_ips: Vec<(String, IpAddr)>,
    pub(super) groups: Vec<String>,
}

/// The security groups that a port shall get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) enum Groups {
    /// The default group of its project, if it has port security and an address.
    Default,
    /// These.
    These(Vec<String>),
    /// These, if it has port security: as in Nova, a network without it has no use for groups.
    IfSecure(Vec<String>),
}

/// The server that a port is made for.
#[derive(Debug, Clone)]
pub(in super::super) struct Plugged {
    pub(super) server_id: String,
    pub(super) index: i64,
}

/// A port that shall be made.
#[derive(Debug, Clone)]
pub(in super::super) struct NewPort {
    pub(in super::super) project_id: String,
    pub(in super::super) name: String,
    pub(in super::super) description: String,
    pub(in super::super) mac_address: Option<String>,
    pub(in super::super) device_id: String,
    pub(in super::super) device_owner: String,
    pub(in super::super) fixed_ips: FixedIps,
    pub(in super::super) admin_state_up: bool,
    /// None: as the network says.
    pub(in super::super) port_security: Option<bool>,
    pub(in super::super) groups: Groups,
    pub(in super::super) pairs: Vec<Pair>,
    pub(in super::super) qos_policy_id: Option<String>,
    pub(in super::super) router_id: Option<String>,
    pub(in super::super) plugged: Option<Plugged>,
}

impl NewPort {
    /// One of the cloud's own, which has no filter of its own.
    pub(in super::super) fn own(project: &str, owner: &str, device: &str, fixed_ips: FixedIps) -> Self {
        Self {
            project_id: project.into(),
            name: String::new(),
            description: String::new(),
            mac_address: None,
            device_id: device.into(),
            device_owner: owner.into(),
            fixed_ips,
            admin_state_up: true,
            port_security: Some(false),
            groups: Groups::These(Vec::new()),
            pairs: Vec::new(),
            qos_policy_id: None,
            router_id: None,
            plugged: None,
        }
    }
}

impl Port {
    fn status(&self) -> &'static str {
        let row = &self.row;
        match row.device_owner.as_str() {
            FLOATING_OWNER => "N/A",
            owner if owner.starts_with(OWN) => "ACTIVE",
            _ if row.admin_state_up => {
                super::server::nic_state(row.vm_state.as_deref() == Some("active"), row.plug_state.as_deref())
            }
            _ => "DOWN",
        }
    }

    /// Whether a host may have a tap of it: it is a server's, and that isn't off.
    pub(super) fn may_be_wired(&self) -> bool {
        let row = &self.row;
        let is_off = row.vm_state.as_deref() == Some("stopped") && row.task_state.is_none();
        row.host_id.is_some() && !is_off
    }

    fn binding(&self) -> &'static str {
        match (self.row.host_id.is_some(), self.row.device_owner.starts_with(OWN)) {
            (true, _) => "tap",
            (false, true) => "distributed",
            (false, false) => "unbound",
        }
    }

    /// The document; `binding:*` is for admins, as in Neutron.
    pub(super) fn document(&self, admin: bool) -> Value {
        let row = &self.row;
        let fixed_ips: Vec<Value> = self
            .fixed_ips
            .iter()
            .map(|(subnet, ip)| json!({"subnet_id": subnet, "ip_address": ip}))
            .collect();
        let pairs: Value = serde_json::from_str(&row.allowed_address_pairs).unwrap_or_else(|_| json!([]));
        let mut document = json!({
            "id": row.id, "network_id": row.network_id, "name": row.name, "description": row.description,
            "project_id": row.project_id, "tenant_id": row.project_id, "admin_state_up": row.admin_state_up,
            "status": self.status(), "mac_address": row.mac_address, "fixed_ips": fixed_ips,
            "device_id": row.device_id, "device_owner": row.device_owner, "binding:vnic_type": "normal",
            "port_security_enabled": row.port_security_enabled, "security_groups": self.groups,
            "allowed_address_pairs": pairs, "extra_dhcp_opts": [], "qos_policy_id": row.qos_policy_id,
            "qos_network_policy_id": row.network_policy_id, "revision_number": row.revision,
            "created_at": rfc3339_s(row.created_us), "updated_at": rfc3339_s(row.updated_us),
        });
        if admin {
            document["binding:host_id"] = json!(row.host_name.as_deref().unwrap_or_default());
            document["binding:vif_type"] = json!(self.binding());
            document["binding:vif_details"] = json!({"port_filter": row.port_security_enabled});
            document["binding:profile"] = json!({});
        }
        document
    }
}

const SELECT: &str = "SELECT ports.*, networks.project_id AS network_project_id,
        networks.qos_policy_id AS network_policy_id, servers.host_id, servers.vm_state, servers.task_state,
        hosts.name AS host_name, fixed_ips.subnet_id, fixed_ips.address
    FROM ports JOIN networks ON networks.id = ports.network_id
        LEFT JOIN servers ON servers.id = ports.server_id LEFT JOIN hosts ON hosts.id = servers.host_id
        LEFT JOIN fixed_ips ON fixed_ips.port_id = ports.id WHERE ";
const ORDER: &str = " ORDER BY ports.created_us, ports.id, fixed_ips.position";

async fn fetch(db: &mut Conn, mut query: QueryBuilder<Db>) -> Result<Vec<Port>, ApiError> {
    query.push(ORDER);
    let rows: Vec<PortRow> = query.build_query_as().fetch_all(&mut *db).await?;
    let mut ports: Vec<Port> = Vec::new();
    for row in rows {
        let address = match (&row.subnet_id, &row.address) {
            (Some(subnet), Some(ip)) => Some((subnet.clone(), ip.parse().map_err(ApiError::internal)?)),
            _ => None,
        };
        match ports.last_mut().filter(|port| port.row.id == row.id) {
            Some(port) => port.fixed_ips.extend(address),
            None => {
                ports.push(Port { row, fixed_ips: address.into_iter().collect(), groups: Vec::new() });
            }
        }
    }
    let only = match ports.as_slice() {
        [one] => Some(one.row.id.clone()),
        _ => None,
    };
    let mut groups = security_groups::of_ports(db, only.as_deref()).await?;
    for port in &mut ports {
        port.groups = groups.remove(&port.row.id).unwrap_or_default();
    }
    Ok(ports)
}

/// One port.
pub(in super::super) async fn find(db: &mut Conn, id: &str) -> Result<Option<Port>, ApiError> {
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
    let columns = [
        ("id", "ports.id"),
        ("device_id", "ports.device_id"),
        ("device_owner", "ports.device_owner"),
        ("network_id", "ports.network_id"),
        ("mac_address", "ports.mac_address"),
    ];
    asked.narrow(&mut query, &columns);
    fetch(db, query).await
}

/// Checks that the asker may see the groups, and that they go together.
pub(super) async fn check_groups(tx: &mut Conn, scope: &Scope, groups: &[String]) -> Result<(), ApiError> {
    for group in groups {
        security_groups::visible(tx, group, scope).await?;
    }
    Ok(())
}

async fn write_groups(tx: &mut Conn, port_id: &str, groups: &[String]) -> Result<(), ApiError> {
    let mut kinds = BTreeSet::new();
    for group in groups {
        if groups.len() > 1 {
            let stateful: bool = sqlx::query_scalar("SELECT stateful FROM security_groups WHERE id = $1")
                .bind(group)
                .fetch_one(&mut *tx)
                .await?;
            kinds.insert(stateful);
        }
        sqlx::query("INSERT INTO port_security_groups (port_id, security_group_id) VALUES ($1, $2)")
            .bind(port_id)
            .bind(group)
            .execute(&mut *tx)
            .await?;
    }
    match kinds.len() > 1 {
        true => Err(ApiError::Conflict(
            "Error Cannot apply both stateful and stateless security groups on the same port while attempting the \
             operation."
                .into(),
        )
        .named("SecurityGroupConflict")),
        false => Ok(()),
    }
}

fn security_required() -> ApiError {
    ApiError::BadRequest(
        "Port security must be enabled and port must have an IP address in order to use security groups."
            .into(),
    )
    .named("PortSecurityAndIPRequiredForSecurityGroups")
}

fn security_required_for_pairs() -> ApiError {
    ApiError::Conflict(
        "Port Security must be enabled in order to have allowed address pairs on a port.".into(),
    )
    .named("AddressPairAndPortSecurityRequired")
}

fn stored_pairs(pairs: &[Pair], mac: &str) -> String {
    let pairs: Vec<Value> = pairs
        .iter()
        .map(|pair| {
            json!({"ip_address": pair.ip_address, "mac_address": pair.mac_address.as_deref().unwrap_or(mac)})
        })
        .collect();
    json!(pairs).to_string()
}

fn mac_in_use(network_id: &str, mac: &str) -> ApiError {
    let text =
        format!("Unable to complete operation for network {network_id}. The mac address {mac} is in use.");
    ApiError::Conflict(text).named("MacAddressInUse")
}

/// Adds a port with its addresses and groups; the quota is the caller's business.
pub(in super::super) async fn insert(
    tx: &mut Conn,
    network_id: &str,
    new: &NewPort,
) -> Result<String, ApiError> {
    let id = Uuid::new_v4().to_string();
    let mac = match &new.mac_address {
        Some(mac) if mac_is_taken(tx, network_id, mac).await? => return Err(mac_in_use(network_id, mac)),
        Some(mac) => mac.clone(),
        None => free_mac(tx, network_id).await?,
    };
    let secure = match new.port_security {
        Some(own) => own,
        None => {
            sqlx::query_scalar("SELECT port_security_enabled FROM networks WHERE id = $1")
                .bind(network_id)
                .fetch_one(&mut *tx)
                .await?
        }
    };
    if !secure && !new.pairs.is_empty() {
        return Err(security_required_for_pairs());
    }
    let plugged = new.plugged.as_ref();
    sqlx::query(
        "INSERT INTO ports (id, network_id, project_id, name, description, mac_address, device_id, device_owner,
             server_id, device_index, made_by_server, admin_state_up, port_security_enabled, allowed_address_pairs,
             qos_policy_id, router_id, created_us, updated_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $17)",
    )
    .bind(&id)
    .bind(network_id)
    .bind(&new.project_id)
    .bind(&new.name)
    .bind(&new.description)
    .bind(&mac)
    .bind(&new.device_id)
    .bind(&new.device_owner)
    .bind(plugged.map(|plugged| &plugged.server_id))
    .bind(plugged.map_or(0, |plugged| plugged.index))
    .bind(plugged.is_some())
    .bind(new.admin_state_up)
    .bind(secure)
    .bind(stored_pairs(&new.pairs, &mac))
    .bind(&new.qos_policy_id)
    .bind(&new.router_id)
    .bind(now_us())
    .execute(&mut *tx)
    .await?;
    let addressed = addresses::take(tx, network_id, [&id, &mac], &new.fixed_ips).await? > 0;
    match &new.groups {
        Groups::These(groups) if groups.is_empty() => {}
        Groups::IfSecure(_) if !secure => {}
        Groups::These(_) | Groups::IfSecure(_) if !secure || !addressed => return Err(security_required()),
        Groups::These(groups) | Groups::IfSecure(groups) => write_groups(tx, &id, groups).await?,
        Groups::Default if secure && addressed => {
            let group = security_groups::default_group(tx, &new.project_id).await?;
            write_groups(tx, &id, &[group]).await?;
        }
        Groups::Default => {}
    }
    Ok(id)
}

/// Changes what of a port is not its addresses.
pub(super) async fn update(
    tx: &mut Conn,
    scope: &Scope,
    port: &Port,
    wanted: &Wanted,
) -> Result<(), ApiError> {
    let (id, row) = (&port.row.id, &port.row);
    let secure = wanted.port_security_enabled.unwrap_or(row.port_security_enabled);
    let groups = wanted.security_groups.as_ref().unwrap_or(&port.groups);
    if !secure && !groups.is_empty() {
        return Err(match wanted.security_groups.is_some() {
            true => security_required(),
            false => ApiError::Conflict(
                "Port has security group associated. Cannot disable port security or IP address until security group \
                 is removed."
                    .into(),
            )
            .named("PortSecurityPortHasSecurityGroup"),
        });
    }
    let mac = wanted.mac_address.as_deref().unwrap_or(&row.mac_address);
    if wanted.mac_address.is_some() && mac_is_taken(tx, &row.network_id, mac).await? {
        return Err(mac_in_use(&row.network_id, mac));
    }
    let pairs = match &wanted.allowed_address_pairs {
        Some(pairs) => stored_pairs(pairs, mac),
        None => row.allowed_address_pairs.clone(),
    };
    if !secure && pairs != "[]" {
        return Err(security_required_for_pairs());
    }
    if let Some(groups) = &wanted.security_groups {
        let new: Vec<String> = groups.iter().filter(|group| !port.groups.contains(group)).cloned().collect();
        check_groups(tx, scope, &new).await?;
        sqlx::query("DELETE FROM port_security_groups WHERE port_id = $1").bind(id).execute(&mut *tx).await?;
        write_groups(tx, id, groups).await?;
    }
    sqlx::query(
        "UPDATE ports SET name = COALESCE($2, name), description = COALESCE($3, description),
             device_id = COALESCE($4, device_id), device_owner = COALESCE($5, device_owner),
             admin_state_up = COALESCE($6, admin_state_up), port_security_enabled = $7, allowed_address_pairs = $8,
             qos_policy_id = $9, mac_address = $10, revision = revision + 1, updated_us = $11 WHERE id = $1",
    )
    .bind(id)
    .bind(&wanted.name)
    .bind(&wanted.description)
    .bind(&wanted.device_id)
    .bind(&wanted.device_owner)
    .bind(wanted.admin_state_up)
    .bind(secure)
    .bind(pairs)
    .bind(wanted.qos_policy_id.clone().unwrap_or_else(|| row.qos_policy_id.clone()))
    .bind(mac)
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(())
}

/// Removes a port. Floating IPs must have let it go.
pub(in super::super) async fn remove(tx: &mut Conn, id: &str) -> Result<(), ApiError> {
    forget_tags(tx, id).await?;
    sqlx::query("DELETE FROM ports WHERE id = $1").bind(id).execute(tx).await?;
    Ok(())
}

async fn any(tx: &mut Conn, sql: &'static str, binds: &[&str]) -> Result<bool, ApiError> {
    let mut query = sqlx::query_scalar::<_, bool>(sql);
    for bind in binds {
        query = query.bind((*bind).to_owned());
    }
    Ok(query.fetch_one(tx).await?)
}

/// Whether anything but the network's own service uses it.
pub(in super::super) async fn in_use(tx: &mut Conn, network_id: &str) -> Result<bool, ApiError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM ports WHERE network_id = $1 AND device_owner != $2)";
    any(tx, sql, &[network_id, SERVICE_OWNER]).await
}

/// Whether a port of another project is on the network.
pub(in super::super) async fn of_others(tx: &mut Conn, network: &NetworkRow) -> Result<bool, ApiError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM ports WHERE network_id = $1 AND project_id != $2
                   AND device_owner NOT LIKE 'network:%')";
    any(tx, sql, &[&network.id, &network.project_id]).await
}

/// Whether a port of the project, or of any but the owner for `*`, is on the network.
pub(in super::super) async fn of_project(
    tx: &mut Conn,
    network_id: &str,
    project: &str,
) -> Result<bool, ApiError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM ports JOIN networks ON networks.id = ports.network_id
                   WHERE ports.network_id = $1 AND ports.project_id != networks.project_id
                   AND (ports.project_id = $2 OR $2 = '*') AND device_owner NOT LIKE 'network:%')";
    any(tx, sql, &[network_id, project]).await
}

/// Whether a router has its gateway, or a floating IP its address, on the network.
pub(in super::super) async fn leads_outside(tx: &mut Conn, network_id: &str) -> Result<bool, ApiError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM ports WHERE network_id = $1 AND device_owner IN ($2, $3))";
    any(tx, sql, &[network_id, GATEWAY_OWNER, FLOATING_OWNER]).await
}

/// Whether anything but the network's own service has an address of the subnet.
pub(in super::super) async fn subnet_in_use(tx: &mut Conn, subnet_id: &str) -> Result<bool, ApiError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM fixed_ips JOIN ports ON ports.id = fixed_ips.port_id
                   WHERE fixed_ips.subnet_id = $1 AND ports.device_owner != $2)";
    any(tx, sql, &[subnet_id, SERVICE_OWNER]).await
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
