//! What shall exist on a host, computed from the rows of one snapshot of the database.
//!
//! A row that can't be understood fails the whole: a host removes what its desired state does not name, so leaving one
//! server out would destroy it.

use crate::db::Conn;
use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    time::Duration,
};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use mote_host_api::{
    DesiredPower, DesiredState, FixedIp, InstanceMetadata, MAX_WAIT_S, NetworkSpec, PortSpec, RestartPolicy,
    ServerSpec, SubnetSpec,
};
use serde::de::DeserializeOwned;
use sqlx::FromRow;
use tokio::time::{Instant, timeout_at};

use super::{join, secrets::Speaker};
use crate::{
    app::App,
    http::{error::ApiError, query::Params},
    network::ports::SERVICE_OWNER,
};

/// How long the host is willing to wait for an answer.
pub(super) fn wait(params: &Params) -> Result<Duration, ApiError> {
    Ok(Duration::from_secs(params.number("wait")?.unwrap_or(0).min(MAX_WAIT_S)))
}

/// `GET /hosts/{id}/desired?after=&wait=`.
pub(super) async fn poll(
    speaker: Speaker,
    State(app): State<App>,
    params: Params,
) -> Result<Response, ApiError> {
    let after = params.number("after")?.unwrap_or(0);
    let deadline = Instant::now() + wait(&params)?;
    // Before the first look, so that a change after it is not missed.
    let mut changes = app.hub.changes(speaker.id);
    loop {
        let mut snapshot = app.db.begin().await?;
        let generation = generation(&mut snapshot, &speaker).await?;
        // A host that knows a larger generation knows it from a database that was put back since.
        if generation != after {
            return Ok(Json(read(&mut snapshot, &speaker, generation).await?).into_response());
        }
        // No connection is held while waiting.
        drop(snapshot);
        let look_again = deadline.min(Instant::now() + app.hub.look_again());
        let woken = matches!(timeout_at(look_again, changes.changed()).await, Ok(Ok(())));
        if !woken && Instant::now() >= deadline {
            return Ok(StatusCode::NO_CONTENT.into_response());
        }
    }
}

async fn generation(conn: &mut Conn, speaker: &Speaker) -> Result<u64, ApiError> {
    let stored: Option<i64> = sqlx::query_scalar("SELECT generation FROM hosts WHERE id = $1")
        .bind(&speaker.key)
        .fetch_optional(conn)
        .await?;
    number(stored.ok_or(ApiError::Unauthorized)?)
}

/// The whole.
async fn read(conn: &mut Conn, speaker: &Speaker, generation: u64) -> Result<DesiredState, ApiError> {
    let host = speaker.key.as_str();
    let mut ports = ports(conn, host).await?;
    let mut of_servers: HashMap<String, Vec<PortSpec>> = HashMap::new();
    for (_, spec) in &ports {
        of_servers.entry(spec.server_id.to_string()).or_default().push(spec.clone());
    }
    let mut subnets = subnets(conn, host).await?;
    let networks: Vec<(String, i64)> = sqlx::query_as(
        "SELECT id, mtu FROM networks WHERE id IN (
             SELECT ports.network_id FROM ports JOIN servers ON servers.id = ports.server_id
             WHERE servers.host_id = $1 AND NOT servers.deleting) ORDER BY id",
    )
    .bind(host)
    .fetch_all(&mut *conn)
    .await?;
    let networks = networks.into_iter().map(|(id, mtu)| {
        Ok(NetworkSpec {
            id: parse(&id)?,
            mtu: number(mtu)?,
            subnets: subnets.remove(&id).unwrap_or_default(),
            ports: ports.extract_if(.., |(network, _)| *network == id).map(|(_, spec)| spec).collect(),
            ..NetworkSpec::default()
        })
    });
    let networks = networks.collect::<Result<_, ApiError>>()?;
    let servers: Vec<ServerRow> =
        sqlx::query_as("SELECT * FROM servers WHERE host_id = $1 AND NOT deleting ORDER BY created_us, id")
            .bind(host)
            .fetch_all(&mut *conn)
            .await?;
    let servers = servers.into_iter().map(|row| {
        let ports = of_servers.remove(&row.id).unwrap_or_default();
        row.spec(ports.into_iter().map(|port| port.id).collect())
    });
    Ok(DesiredState {
        cloud_id: join::cloud_id(conn).await?,
        host_id: speaker.id,
        generation,
        networks,
        servers: servers.collect::<Result<_, ApiError>>()?,
        ..DesiredState::default()
    })
}

#[derive(FromRow)]
struct PortRow {
    id: String,
    network_id: String,
    server_id: String,
    mac_address: String,
    subnet_id: Option<String>,
    ip: Option<i64>,
}

/// All ports of the host's servers, each with its network, in the order of the servers' NICs.
async fn ports(conn: &mut Conn, host: &str) -> Result<Vec<(String, PortSpec)>, ApiError> {
    let rows: Vec<PortRow> = sqlx::query_as(
        "SELECT ports.id, ports.network_id, ports.server_id, ports.mac_address, fixed_ips.subnet_id, fixed_ips.ip
         FROM ports JOIN servers ON servers.id = ports.server_id
             LEFT JOIN fixed_ips ON fixed_ips.port_id = ports.id
         WHERE servers.host_id = $1 AND NOT servers.deleting
         ORDER BY ports.server_id, ports.device_index, ports.id, fixed_ips.position",
    )
    .bind(host)
    .fetch_all(conn)
    .await?;
    let mut ports: Vec<(String, PortSpec)> = Vec::new();
    for row in rows {
        let id = parse(&row.id)?;
        let address = match (&row.subnet_id, row.ip) {
            (Some(subnet), Some(ip)) => Some(FixedIp { subnet_id: parse(subnet)?, ip_address: address(ip)? }),
            _ => None,
        };
        if let Some((_, last)) = ports.last_mut().filter(|(_, last)| last.id == id) {
            last.fixed_ips.extend(address);
            continue;
        }
        let server_id = parse(&row.server_id)?;
        let spec = PortSpec {
            id,
            server_id,
            mac_address: row.mac_address,
            fixed_ips: address.into_iter().collect(),
            ..PortSpec::default()
        };
        ports.push((row.network_id, spec));
    }
    Ok(ports)
}

#[derive(FromRow)]
struct SubnetRow {
    id: String,
    network_id: String,
    cidr: String,
    gateway_ip: Option<String>,
    enable_dhcp: bool,
    dns_nameservers: String,
    host_routes: String,
    service_ip: i64,
}

/// The subnets of those networks by network's id.
async fn subnets(conn: &mut Conn, host: &str) -> Result<HashMap<String, Vec<SubnetSpec>>, ApiError> {
    let rows: Vec<SubnetRow> = sqlx::query_as(
        "SELECT subnets.id, subnets.network_id, cidr, gateway_ip, enable_dhcp, dns_nameservers, host_routes,
             fixed_ips.ip AS service_ip
         FROM subnets JOIN ports ON ports.network_id = subnets.network_id AND ports.device_owner = $2
             JOIN fixed_ips ON fixed_ips.port_id = ports.id AND fixed_ips.subnet_id = subnets.id
         WHERE subnets.network_id IN (
             SELECT ports.network_id FROM ports JOIN servers ON servers.id = ports.server_id
             WHERE servers.host_id = $1 AND NOT servers.deleting)
         ORDER BY subnets.created_us, subnets.id",
    )
    .bind(host)
    .bind(SERVICE_OWNER)
    .fetch_all(conn)
    .await?;
    let mut subnets: HashMap<String, Vec<SubnetSpec>> = HashMap::new();
    for row in rows {
        let spec = SubnetSpec {
            id: parse(&row.id)?,
            cidr: row.cidr.parse().map_err(ApiError::internal)?,
            gateway_ip: row.gateway_ip.map(|ip| ip.parse()).transpose().map_err(ApiError::internal)?,
            service_ip: address(row.service_ip)?,
            enable_dhcp: row.enable_dhcp,
            dns_nameservers: json(&row.dns_nameservers)?,
            host_routes: json(&row.host_routes)?,
        };
        subnets.entry(row.network_id).or_default().push(spec);
    }
    Ok(subnets)
}

#[derive(FromRow)]
struct ServerRow {
    id: String,
    project_id: String,
    name: String,
    hostname: String,
    vcpus: i64,
    memory_mib: i64,
    disk_gib: i64,
    boot: String,
    key_name: Option<String>,
    public_key: Option<String>,
    user_data: Option<String>,
    metadata: String,
    restart_policy: String,
    launch_index: i64,
    availability_zone: String,
    desired_power: String,
    run_generation: i64,
}

impl ServerRow {
    fn spec(self, ports: Vec<mote_host_api::PortId>) -> Result<ServerSpec, ApiError> {
        Ok(ServerSpec {
            id: parse(&self.id)?,
            power: power(&self.desired_power)?,
            run_generation: number(self.run_generation)?,
            vcpus: number(self.vcpus)?,
            memory_mib: number(self.memory_mib)?,
            root_disk_gib: number(self.disk_gib)?,
            boot: json(&self.boot)?,
            ports,
            restart_policy: word::<RestartPolicy>(&self.restart_policy)?,
            metadata: InstanceMetadata {
                uuid: parse(&self.id)?,
                name: self.name,
                hostname: self.hostname,
                project_id: self.project_id,
                availability_zone: self.availability_zone,
                public_keys: self.key_name.zip(self.public_key).into_iter().collect(),
                meta: json::<BTreeMap<String, String>>(&self.metadata)?,
                user_data: self.user_data,
                launch_index: number(self.launch_index)?,
            },
        })
    }
}

/// The word of a wanted power in the database.
pub(super) fn power(stored: &str) -> Result<DesiredPower, ApiError> {
    word(stored)
}

/// A value that is stored by its name in the protocol.
fn word<T: DeserializeOwned>(stored: &str) -> Result<T, ApiError> {
    serde_json::from_value(serde_json::Value::String(stored.to_owned())).map_err(ApiError::internal)
}

fn json<T: DeserializeOwned>(stored: &str) -> Result<T, ApiError> {
    serde_json::from_str(stored).map_err(ApiError::internal)
}

fn parse<T: std::str::FromStr<Err = uuid::Error>>(stored: &str) -> Result<T, ApiError> {
    stored.parse().map_err(ApiError::internal)
}

fn number<T: TryFrom<i64, Error = std::num::TryFromIntError>>(stored: i64) -> Result<T, ApiError> {
    T::try_from(stored).map_err(ApiError::internal)
}

fn address(stored: i64) -> Result<Ipv4Addr, ApiError> {
    Ok(Ipv4Addr::from(number::<u32>(stored)?))
}
