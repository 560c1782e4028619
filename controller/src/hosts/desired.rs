//! What shall exist on a host, computed from the rows of one snapshot of the database.
//!
//! A row that can't be understood fails the whole: a host removes what its desired state does not name, so leaving one
//! server out would destroy it.

use crate::db::Conn;
use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use mote_host_api::{
    CaptureSpec, DesiredPower, DesiredState, DiskSpec, InstanceMetadata, LocalDiskSpec, MAX_WAIT_S, PortId,
    RescueSpec, RestartPolicy, ServerSpec,
};
use serde::de::DeserializeOwned;
use sqlx::FromRow;
use tokio::time::{Instant, timeout_at};

use super::{join, secrets::Speaker};
use crate::{
    app::App,
    compute::{
        extra_specs,
        servers::{
            guest::{DiskConfig, vendor_data},
            local,
        },
    },
    http::{error::ApiError, query::Params},
    network::desired as networks,
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
    let servers: Vec<ServerRow> = sqlx::query_as(
        "SELECT * FROM servers WHERE host_id = $1 AND NOT (deleting OR offloading) ORDER BY created_us, id",
    )
    .bind(host)
    .fetch_all(&mut *conn)
    .await?;
    let ids: Vec<String> = servers.iter().map(|server| server.id.clone()).collect();
    let networks = networks::read(conn, host, &ids).await?;
    let mut of_servers: HashMap<String, Vec<PortId>> = HashMap::new();
    let order = nic_order(conn, host).await?;
    for port in networks.networks.iter().flat_map(|network| &network.ports) {
        // One that is being unplugged has no place any more.
        if order.contains_key(&port.id.to_string()) {
            of_servers.entry(port.server_id.to_string()).or_default().push(port.id);
        }
    }
    let mut captures = captures(conn, host).await?;
    let servers = servers.into_iter().map(|row| {
        let mut ports = of_servers.remove(&row.id).unwrap_or_default();
        ports.sort_by_key(|port| order.get(&port.to_string()).copied());
        let captures = captures.remove(&row.id).unwrap_or_default();
        row.spec(ports, captures)
    });
    Ok(DesiredState {
        cloud_id: join::cloud_id(conn).await?,
        host_id: speaker.id,
        generation,
        servers: servers.collect::<Result<_, ApiError>>()?,
        networks: networks.networks,
        tunnel: networks.tunnel,
        security_groups: networks.security_groups,
        address_sets: networks.address_sets,
        routers: networks.routers,
    })
}

/// The ports' places among the NICs of their servers.
async fn nic_order(conn: &mut Conn, host: &str) -> Result<HashMap<String, i64>, ApiError> {
    let rows: Vec<(String, i64)> = sqlx::query_as(
        "SELECT ports.id, ports.device_index FROM ports JOIN servers ON servers.id = ports.server_id
         WHERE servers.host_id = $1 AND COALESCE(ports.plug_state, 'plugging') = 'plugging'",
    )
    .bind(host)
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().collect())
}

/// The copies of root disks that are wanted, by server.
async fn captures(conn: &mut Conn, host: &str) -> Result<HashMap<String, Vec<CaptureSpec>>, ApiError> {
    let rows: Vec<(String, String)> = sqlx::query_as(
        "SELECT c.server_id, c.image_id FROM server_captures c JOIN servers s ON s.id = c.server_id
         WHERE s.host_id = $1 ORDER BY c.created_us, c.image_id",
    )
    .bind(host)
    .fetch_all(conn)
    .await?;
    let mut captures: HashMap<String, Vec<CaptureSpec>> = HashMap::new();
    for (server, image) in rows {
        captures.entry(server).or_default().push(CaptureSpec { image_id: parse(&image)? });
    }
    Ok(captures)
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
    disk_number: i64,
    disk_copy_of: Option<i64>,
    disk_kept: Option<i64>,
    local_disks: String,
    local_disks_kept: String,
    rescue: Option<String>,
    config_drive: Option<i64>,
    flavor_extra_specs: String,
    disk_config: String,
    admin_password_hash: Option<String>,
}

impl ServerRow {
    fn spec(
        self,
        ports: Vec<mote_host_api::PortId>,
        captures: Vec<CaptureSpec>,
    ) -> Result<ServerSpec, ApiError> {
        let local_disks: Vec<LocalDiskSpec> = json(&self.local_disks)?;
        let block_devices = local::names(&local_disks, self.rescue.is_some()).collect();
        Ok(ServerSpec {
            id: parse(&self.id)?,
            power: power(&self.desired_power)?,
            run_generation: number(self.run_generation)?,
            vcpus: number(self.vcpus)?,
            memory_mib: number(self.memory_mib)?,
            root_disk_gib: number(self.disk_gib)?,
            boot: json(&self.boot)?,
            disk: DiskSpec {
                number: number(self.disk_number)?,
                copy_of: self.disk_copy_of.map(number).transpose()?,
            },
            kept_disk: self.disk_kept.map(number).transpose()?,
            local_disks,
            kept_local_disks: json(&self.local_disks_kept)?,
            rescue: self.rescue.as_deref().map(json::<RescueSpec>).transpose()?,
            config_drive: self.config_drive.map(number).transpose()?,
            captures,
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
                vendor_data: vendor_data(
                    DiskConfig::from_word(&self.disk_config),
                    self.admin_password_hash.as_deref(),
                ),
                block_devices,
            },
            devices: extra_specs::devices(&json(&self.flavor_extra_specs)?),
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
