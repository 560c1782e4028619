//! Servers as Nova shows them, by microversion.
//!
//! The documents are serialized as they are, without a tree of JSON in between: a page has a thousand of them.

use std::{
    collections::BTreeMap,
    fmt::{self, Display, Formatter},
};

use serde::{Serialize, Serializer};
use sha2::{Digest, Sha224};

use super::{
    super::{
        state::{VmState, power_state},
        versions::Version,
    },
    details::{Address, Details},
    row::ServerRow,
};
use crate::{
    app::App,
    db::rfc3339_s,
    http::{context::Ctx, error::ApiError},
};

/// Where a guest finds its first disk.
const ROOT_DEVICE: &str = "/dev/vda";

/// A URL below the controller's own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Href<'a> {
    base: &'a str,
    path: &'static str,
    id: &'a str,
}

impl Display for Href<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.base, self.path, self.id)
    }
}

impl Serialize for Href<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Where something is found.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Link<'a> {
    rel: &'static str,
    href: Href<'a>,
}

/// Where a server is found: by this API's version, and for ever.
pub(super) fn links<'a>(app: &'a App, id: &'a str) -> [Link<'a>; 2] {
    let base = app.config.public_url.as_str();
    [
        Link { rel: "self", href: Href { base, path: "compute/v2.1/servers", id } },
        Link { rel: "bookmark", href: Href { base, path: "compute/servers", id } },
    ]
}

/// A server's own URL.
pub(super) fn url(app: &App, id: &str) -> String {
    links(app, id)[0].href.to_string()
}

/// `{id, links}` of something in compute or image.
#[derive(Debug, Serialize)]
struct Reference<'a> {
    id: &'a str,
    links: [Link<'a>; 1],
}

fn reference<'a>(app: &'a App, path: &'static str, id: &'a str) -> Reference<'a> {
    let href = Href { base: &app.config.public_url, path, id };
    Reference { id, links: [Link { rel: "bookmark", href }] }
}

/// The short form of lists.
#[derive(Debug, Serialize)]
pub(super) struct Brief<'a> {
    id: &'a str,
    name: &'a str,
    links: [Link<'a>; 2],
}

/// The short form of lists.
pub(super) fn brief<'a>(app: &'a App, row: &'a ServerRow) -> Brief<'a> {
    Brief { id: &row.id, name: &row.name, links: links(app, &row.id) }
}

/// One address, with what extensions add in the full form.
#[derive(Debug, Serialize)]
pub(super) struct AddressView<'a> {
    version: u8,
    addr: std::net::IpAddr,
    #[serde(rename = "OS-EXT-IPS:type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(rename = "OS-EXT-IPS-MAC:mac_addr", skip_serializing_if = "Option::is_none")]
    mac_address: Option<&'a str>,
}

/// Addresses by network's name; `full` with what extensions add.
pub(super) fn addresses(addresses: &[Address], full: bool) -> BTreeMap<&str, Vec<AddressView<'_>>> {
    let mut networks = BTreeMap::<&str, Vec<AddressView<'_>>>::new();
    for address in addresses {
        networks.entry(&address.network).or_default().push(AddressView {
            version: if address.ip.is_ipv4() { 4 } else { 6 },
            addr: address.ip,
            kind: full.then_some(if address.floating { "floating" } else { "fixed" }),
            mac_address: full.then_some(&address.mac_address),
        });
    }
    networks
}

/// The same for all servers of a project on a host, and says nothing else: as in Nova.
pub(super) fn host_id(row: &ServerRow) -> String {
    match &row.host_id {
        Some(host) => hex::encode(Sha224::digest(format!("{}{host}", row.project_id))),
        None => String::new(),
    }
}

/// A flavor: by reference, and since 2.47 as it was.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum FlavorView<'a> {
    Reference(Reference<'a>),
    Copy {
        vcpus: i64,
        ram: i64,
        disk: i64,
        ephemeral: i64,
        swap: i64,
        original_name: &'a str,
        extra_specs: BTreeMap<String, String>,
    },
}

#[derive(Debug, Serialize)]
struct Fault<'a> {
    code: i64,
    message: &'a str,
    created: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<&'a str>,
}

/// The name of something.
#[derive(Debug, Serialize)]
struct Name<'a> {
    name: &'a str,
}

/// What only administrators see.
#[derive(Debug, Serialize)]
struct ForAdmins<'a> {
    #[serde(rename = "OS-EXT-SRV-ATTR:host")]
    host: Option<&'a str>,
    #[serde(rename = "OS-EXT-SRV-ATTR:hypervisor_hostname")]
    hypervisor_hostname: Option<&'a str>,
    #[serde(rename = "OS-EXT-SRV-ATTR:instance_name")]
    instance_name: &'a str,
}

/// What only administrators see, since 2.3.
#[derive(Debug, Serialize)]
struct ForAdminsSince3<'a> {
    #[serde(rename = "OS-EXT-SRV-ATTR:launch_index")]
    launch_index: i64,
    #[serde(rename = "OS-EXT-SRV-ATTR:reservation_id")]
    reservation_id: Option<&'a str>,
    #[serde(rename = "OS-EXT-SRV-ATTR:kernel_id")]
    kernel_id: &'a str,
    #[serde(rename = "OS-EXT-SRV-ATTR:ramdisk_id")]
    ramdisk_id: &'a str,
    #[serde(rename = "OS-EXT-SRV-ATTR:root_device_name")]
    root_device_name: &'a str,
    /// Not in the answer of a rebuild, which has it under its own name.
    #[serde(rename = "OS-EXT-SRV-ATTR:user_data", skip_serializing_if = "Option::is_none")]
    user_data: Option<Option<&'a str>>,
}

/// The full form. A field that a microversion doesn't have is `None`, one that it has and that is null is `Some(None)`.
#[derive(Debug, Serialize)]
pub(super) struct Document<'a> {
    id: &'a str,
    name: &'a str,
    status: &'static str,
    tenant_id: &'a str,
    user_id: &'a str,
    #[serde(rename = "hostId")]
    host_id: String,
    links: [Link<'a>; 2],
    addresses: BTreeMap<&'a str, Vec<AddressView<'a>>>,
    #[serde(rename = "accessIPv4")]
    access_ipv4: &'a str,
    #[serde(rename = "accessIPv6")]
    access_ipv6: &'a str,
    image: Reference<'a>,
    flavor: FlavorView<'a>,
    created: String,
    updated: String,
    metadata: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_name: Option<Option<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    config_drive: Option<&'static str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    security_groups: Vec<Name<'a>>,
    #[serde(rename = "OS-DCF:diskConfig")]
    disk_config: &'static str,
    #[serde(rename = "OS-EXT-AZ:availability_zone", skip_serializing_if = "Option::is_none")]
    availability_zone: Option<&'a str>,
    #[serde(rename = "OS-EXT-STS:vm_state", skip_serializing_if = "Option::is_none")]
    vm_state: Option<&'static str>,
    #[serde(rename = "OS-EXT-STS:task_state", skip_serializing_if = "Option::is_none")]
    task_state: Option<Option<&'static str>>,
    #[serde(rename = "OS-EXT-STS:power_state", skip_serializing_if = "Option::is_none")]
    power_state: Option<u8>,
    #[serde(rename = "OS-SRV-USG:launched_at", skip_serializing_if = "Option::is_none")]
    launched_at: Option<Option<String>>,
    #[serde(rename = "OS-SRV-USG:terminated_at", skip_serializing_if = "Option::is_none")]
    terminated_at: Option<Option<String>>,
    #[serde(rename = "os-extended-volumes:volumes_attached", skip_serializing_if = "Option::is_none")]
    volumes_attached: Option<[&'static str; 0]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fault: Option<Fault<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<u8>,
    #[serde(flatten)]
    for_admins: Option<ForAdmins<'a>>,
    #[serde(flatten)]
    for_admins_since_3: Option<ForAdminsSince3<'a>>,
    #[serde(rename = "OS-EXT-SRV-ATTR:hostname", skip_serializing_if = "Option::is_none")]
    hostname: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    locked: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_status: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<Option<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tags: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trusted_image_certificates: Option<Option<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    server_groups: Option<&'a [String]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    locked_reason: Option<Option<&'a str>>,
    /// Of a rebuild, since 2.57.
    #[serde(skip_serializing_if = "Option::is_none")]
    user_data: Option<Option<&'a str>>,
}

/// Whether a document is of one server or of a page of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// With its server groups (2.71).
    Single,
    /// In a list.
    Listed,
    /// Of one that was just changed: before 2.75 without what extensions add to the others.
    Updated,
    /// Of one that is being rebuilt: as [`Form::Updated`], and with its key (2.54) and user data (2.57).
    Rebuilt,
}

/// The full form.
///
/// # Errors
/// 500 if the row's metadata is broken.
pub(super) fn document<'a>(
    app: &'a App,
    ctx: &Ctx,
    (version, form): (Version, Form),
    row: &'a ServerRow,
    details: &'a Details,
) -> Result<Document<'a>, ApiError> {
    let rebuilt = form == Form::Rebuilt;
    let full = version.has(75) || !(rebuilt || form == Form::Updated);
    let admin = ctx.is_admin && full;
    let (vm_state, task_state) = (row.vm_state(), row.task_state());
    Ok(Document {
        id: &row.id,
        name: &row.name,
        status: row.status(),
        tenant_id: &row.project_id,
        user_id: &row.user_id,
        host_id: host_id(row),
        links: links(app, &row.id),
        addresses: addresses(&details.addresses, full),
        access_ipv4: &row.access_ipv4,
        access_ipv6: &row.access_ipv6,
        image: reference(app, "compute/images", &row.image_id),
        flavor: flavor(app, version, row)?,
        created: rfc3339_s(row.created_us),
        updated: rfc3339_s(row.updated_us),
        metadata: row.metadata()?,
        key_name: (full || (rebuilt && version.has(54))).then_some(row.key_name.as_deref()),
        config_drive: full.then_some(if row.has_config_drive() { "True" } else { "" }),
        security_groups: details.security_groups.iter().filter(|_| full).map(|name| Name { name }).collect(),
        disk_config: row.disk_config().word(),
        availability_zone: full.then_some(&row.availability_zone),
        vm_state: full.then_some(vm_state.word()),
        task_state: full.then_some(task_state.map(|task| task.word())),
        power_state: full.then(|| power_state(vm_state, row.desired_power())),
        launched_at: full.then(|| row.launched_us.map(time)),
        terminated_at: full.then(|| row.deleted_us.map(time)),
        volumes_attached: full.then_some([]),
        fault: (vm_state == VmState::Error).then(|| fault(ctx, row)),
        // Nova shows a progress in the states that have one.
        progress: matches!(vm_state, VmState::Building | VmState::Active | VmState::Resized).then_some(0),
        for_admins: admin.then(|| ForAdmins {
            host: row.host_name.as_deref(),
            hypervisor_hostname: row.host_name.as_deref(),
            instance_name: &row.id,
        }),
        for_admins_since_3: (admin && version.has(3)).then_some(ForAdminsSince3 {
            launch_index: row.launch_index,
            reservation_id: row.reservation_id.as_deref(),
            kernel_id: "",
            ramdisk_id: "",
            root_device_name: ROOT_DEVICE,
            user_data: (!rebuilt).then_some(row.user_data.as_deref()),
        }),
        hostname: ((admin && version.has(3)) || version.has(90)).then_some(&row.hostname),
        locked: version.has(9).then_some(row.locked_by.is_some()),
        host_status: (admin && version.has(16)).then(|| row.host_status()),
        description: version.has(19).then_some(row.description.as_deref()),
        tags: version.has(26).then_some(&details.tags),
        trusted_image_certificates: version.has(63).then_some(None),
        server_groups: (version.has(71) && form != Form::Listed).then_some(&details.groups),
        locked_reason: version.has(73).then_some(row.locked_reason.as_deref()),
        user_data: (rebuilt && version.has(57)).then_some(row.user_data.as_deref()),
    })
}

fn flavor<'a>(app: &'a App, version: Version, row: &'a ServerRow) -> Result<FlavorView<'a>, ApiError> {
    if !version.has(47) {
        return Ok(FlavorView::Reference(reference(app, "compute/flavors", &row.flavor_id)));
    }
    Ok(FlavorView::Copy {
        vcpus: row.vcpus,
        ram: row.memory_mib,
        disk: row.disk_gib,
        ephemeral: row.ephemeral_gib,
        swap: row.swap_mib,
        original_name: &row.flavor_name,
        extra_specs: row.extra_specs()?,
    })
}

/// Nova prints these times with microseconds and without a zone.
fn time(us: i64) -> String {
    crate::db::rfc3339_us(us).trim_end_matches('Z').to_owned()
}

fn fault<'a>(ctx: &Ctx, row: &'a ServerRow) -> Fault<'a> {
    Fault {
        code: row.fault_code.unwrap_or(500),
        // A state that an administrator set has no message.
        message: row.fault_message.as_deref().unwrap_or_default(),
        created: rfc3339_s(row.fault_us.unwrap_or(row.updated_us)),
        details: row.fault_message.as_deref().filter(|_| ctx.is_admin),
    }
}
