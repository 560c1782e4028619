//! Servers as Nova shows them, by microversion.

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha224};

use super::{
    super::{
        server_groups,
        state::{VmState, power_state},
        versions::Version,
    },
    row::ServerRow,
    tags,
};
use crate::{
    app::App,
    db::{Conn, rfc3339_s},
    http::{context::Ctx, error::ApiError},
    network::ports::server::ServerAddress,
};

/// Where a guest finds its first disk.
const ROOT_DEVICE: &str = "/dev/vda";

/// `{id, links}` of something in compute or image.
fn reference(app: &App, path: &str, id: &str) -> Value {
    let href = format!("{}/{path}/{id}", app.config.public_url);
    json!({"id": id, "links": [{"rel": "bookmark", "href": href}]})
}

/// Where a server is found.
pub(super) fn links(app: &App, id: &str) -> Value {
    let base = &app.config.public_url;
    json!([
        {"rel": "self", "href": format!("{base}/compute/v2.1/servers/{id}")},
        {"rel": "bookmark", "href": format!("{base}/compute/servers/{id}")},
    ])
}

/// The short form of lists.
pub(super) fn brief(app: &App, row: &ServerRow) -> Value {
    json!({"id": row.id, "name": row.name, "links": links(app, &row.id)})
}

/// Addresses by network's name.
pub(super) fn addresses<'a>(addresses: impl IntoIterator<Item = &'a ServerAddress>) -> Value {
    let mut networks = Map::new();
    for address in addresses {
        let Some(ip) = address.ip() else { continue };
        let entry = json!({
            "version": if ip.is_ipv4() { 4 } else { 6 }, "addr": ip.to_string(), "OS-EXT-IPS:type": "fixed",
            "OS-EXT-IPS-MAC:mac_addr": address.mac_address,
        });
        let list = networks.entry(address.network_name.clone()).or_insert_with(|| json!([]));
        if let Value::Array(list) = list {
            list.push(entry);
        }
    }
    Value::Object(networks)
}

/// The same for all servers of a project on a host, and says nothing else: as in Nova.
pub(super) fn host_id(row: &ServerRow) -> String {
    match &row.host_id {
        Some(host) => hex::encode(Sha224::digest(format!("{}{host}", row.project_id))),
        None => String::new(),
    }
}

/// What is shown of a server beside its row and its addresses.
#[derive(Debug, Default)]
pub(super) struct Details {
    /// Since 2.26.
    pub(super) tags: Vec<String>,
    /// Of a single server, since 2.71.
    pub(super) groups: Option<Vec<String>>,
}

impl Details {
    /// Those of one server.
    pub(super) async fn of(db: &mut Conn, version: Version, row: &ServerRow) -> Result<Self, ApiError> {
        let groups = match version.has(71) {
            true => Some(server_groups::of_server(db, &row.id).await?),
            false => None,
        };
        Ok(Self { tags: tags::of_server(db, &row.id).await?, groups })
    }
}

/// The full form.
///
/// # Errors
/// 500 if the row's metadata is broken.
pub(super) fn document<'a>(
    app: &App,
    ctx: &Ctx,
    version: Version,
    row: &ServerRow,
    its_addresses: impl IntoIterator<Item = &'a ServerAddress>,
    details: &Details,
) -> Result<Value, ApiError> {
    let mut server = json!({
        "id": row.id, "name": row.name, "status": row.status(), "tenant_id": row.project_id,
        "user_id": row.user_id, "hostId": host_id(row), "links": links(app, &row.id),
        "addresses": addresses(its_addresses), "accessIPv4": "", "accessIPv6": "",
        "image": reference(app, "compute/images", &row.image_id),
        "flavor": reference(app, "compute/flavors", &row.flavor_id),
        "created": rfc3339_s(row.created_us), "updated": rfc3339_s(row.updated_us),
        "metadata": row.metadata()?, "key_name": row.key_name, "config_drive": "", "security_groups": [],
        "OS-DCF:diskConfig": "MANUAL",
        "OS-EXT-AZ:availability_zone": row.availability_zone,
        "OS-EXT-STS:vm_state": row.vm_state().word(),
        "OS-EXT-STS:task_state": row.task_state().map(|task| task.word()),
        "OS-EXT-STS:power_state": power_state(row.vm_state(), row.desired_power()),
        "OS-SRV-USG:launched_at": row.launched_us.map(launched_at),
        "OS-SRV-USG:terminated_at": null,
        "os-extended-volumes:volumes_attached": [],
    });
    match row.vm_state() {
        VmState::Error => server["fault"] = fault(ctx, row),
        // Nova shows a progress in the states that have one.
        VmState::Building | VmState::Active | VmState::Resized => server["progress"] = json!(0),
        _ => {}
    }
    if ctx.is_admin {
        server["OS-EXT-SRV-ATTR:host"] = json!(row.host_name);
        server["OS-EXT-SRV-ATTR:hypervisor_hostname"] = json!(row.host_name);
        server["OS-EXT-SRV-ATTR:instance_name"] = json!(row.id);
    }
    by_version(&mut server, ctx, version, row, details)?;
    Ok(server)
}

/// What later microversions show besides.
fn by_version(
    server: &mut Value,
    ctx: &Ctx,
    version: Version,
    row: &ServerRow,
    details: &Details,
) -> Result<(), ApiError> {
    if version.has(3) && ctx.is_admin {
        server["OS-EXT-SRV-ATTR:launch_index"] = json!(row.launch_index);
        server["OS-EXT-SRV-ATTR:reservation_id"] = Value::Null;
        server["OS-EXT-SRV-ATTR:kernel_id"] = json!("");
        server["OS-EXT-SRV-ATTR:ramdisk_id"] = json!("");
        server["OS-EXT-SRV-ATTR:root_device_name"] = json!(ROOT_DEVICE);
        server["OS-EXT-SRV-ATTR:user_data"] = json!(row.user_data);
        server["OS-EXT-SRV-ATTR:hostname"] = json!(row.hostname);
    }
    if version.has(9) {
        server["locked"] = json!(row.locked_by.is_some());
    }
    if version.has(16) && ctx.is_admin {
        server["host_status"] = json!(row.host_status());
    }
    if version.has(19) {
        server["description"] = json!(row.description);
    }
    if version.has(26) {
        server["tags"] = json!(details.tags);
    }
    if version.has(47) {
        server["flavor"] = json!({
            "vcpus": row.vcpus, "ram": row.memory_mib, "disk": row.disk_gib, "ephemeral": 0, "swap": 0,
            "original_name": row.flavor_name, "extra_specs": row.extra_specs()?,
        });
    }
    if version.has(63) {
        server["trusted_image_certificates"] = Value::Null;
    }
    if let Some(groups) = &details.groups {
        server["server_groups"] = json!(groups);
    }
    if version.has(73) {
        server["locked_reason"] = json!(row.locked_reason);
    }
    if version.has(90) {
        server["OS-EXT-SRV-ATTR:hostname"] = json!(row.hostname);
    }
    Ok(())
}

/// Nova prints this one time with microseconds and without a zone.
fn launched_at(us: i64) -> String {
    crate::db::rfc3339_us(us).trim_end_matches('Z').to_owned()
}

fn fault(ctx: &Ctx, row: &ServerRow) -> Value {
    let mut fault = json!({
        "code": row.fault_code.unwrap_or(500), "message": row.fault_message,
        "created": rfc3339_s(row.fault_us.unwrap_or(row.updated_us)),
    });
    if ctx.is_admin {
        fault["details"] = json!(row.fault_message);
    }
    fault
}
