//! Servers as Nova 2.1 shows them.

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha224};

use super::{
    super::state::{VmState, power_state},
    row::ServerRow,
};
use crate::{
    app::App,
    db::rfc3339_s,
    http::{context::Ctx, error::ApiError},
    network::ports::server::ServerAddress,
};

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
fn host_id(row: &ServerRow) -> String {
    match &row.host_id {
        Some(host) => hex::encode(Sha224::digest(format!("{}{host}", row.project_id))),
        None => String::new(),
    }
}

/// The full form.
///
/// # Errors
/// 500 if the row's metadata is broken.
pub(super) fn document<'a>(
    app: &App,
    ctx: &Ctx,
    row: &ServerRow,
    its_addresses: impl IntoIterator<Item = &'a ServerAddress>,
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
        "OS-EXT-STS:power_state": power_state(row.vm_state()),
        "OS-SRV-USG:launched_at": row.launched_us.map(launched_at),
        "OS-SRV-USG:terminated_at": null,
        "os-extended-volumes:volumes_attached": [],
    });
    match row.vm_state() {
        VmState::Error => server["fault"] = fault(ctx, row),
        // Nova shows a progress in the states that have one.
        VmState::Building | VmState::Active => server["progress"] = json!(0),
        VmState::Stopped => {}
    }
    if ctx.is_admin {
        server["OS-EXT-SRV-ATTR:host"] = json!(row.host_name);
        server["OS-EXT-SRV-ATTR:hypervisor_hostname"] = json!(row.host_name);
        server["OS-EXT-SRV-ATTR:instance_name"] = json!(row.id);
    }
    Ok(server)
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
