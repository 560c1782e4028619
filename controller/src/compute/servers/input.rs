//! The body of `POST /servers`: what it may say, checked before anything is read or written. Pure.

use std::{collections::BTreeMap, net::IpAddr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{
    super::versions::Version,
    guest::{DiskConfig, password_hash},
    local,
};
use crate::{http::error::ApiError, network::ports::server::NicWish};

/// Most servers of one request, whatever the quota.
const MAX_SERVERS: u64 = 100;
/// Most NICs of one server.
pub(super) const MAX_NICS: usize = 8;
/// Most security groups of one request.
const MAX_GROUPS: usize = 50;
/// Most servers in one scheduler hint.
const MAX_HINTS: usize = 100;
/// Nova's limit for names and for keys and values of metadata, in characters.
const MAX_NAME: usize = 255;
/// Nova's limit for `user_data`, in characters of base64.
const MAX_USER_DATA: usize = 65_535;
/// Nova's default quota of metadata items.
pub(in super::super) const MAX_METADATA: usize = 128;
/// Nova's limit of tags of one server.
pub(super) const MAX_TAGS: usize = 50;
/// Nova's limit for a tag, in characters.
const MAX_TAG: usize = 60;
/// How much of a wrong value a message shows, in characters.
const MAX_SHOWN: usize = 128;

/// The metadata key that says what happens when a VMM dies.
pub(super) const RESTART_POLICY: &str = "mote:restart_policy";

/// Which NICs are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Nics {
    /// One on the only network of the project.
    Auto,
    /// As `Auto`, but none where the project has no network.
    Any,
    /// None.
    None,
    /// These.
    These(Vec<NicWish>),
}

/// Where servers shall run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Place {
    /// Zone.
    pub(super) zone: Option<String>,
    /// Host in it (admins only).
    pub(super) host: Option<String>,
}

/// A valid request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Wanted {
    pub(super) name: String,
    pub(super) image_id: String,
    pub(super) local_disks: Vec<local::Wish>,
    pub(super) flavor_id: String,
    pub(super) nics: Nics,
    pub(super) key_name: Option<String>,
    pub(super) user_data: Option<String>,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) place: Place,
    /// Names or ids of the groups of its new ports; empty: the default group.
    pub(super) security_groups: Vec<String>,
    /// Since 2.19.
    pub(super) description: Option<String>,
    /// Since 2.90; without, the name made fit.
    pub(super) hostname: Option<String>,
    /// Since 2.52.
    pub(super) tags: Vec<String>,
    /// A read-only disk with its metadata.
    pub(super) config_drive: bool,
    /// The id of a server group (scheduler hint `group`).
    pub(in super::super) group: Option<String>,
    /// Hosts of these servers only, or not of these (scheduler hints).
    pub(in super::super) same_host: Vec<String>,
    /// See above.
    pub(in super::super) different_host: Vec<String>,
    pub(in super::super) min_count: u64,
    pub(in super::super) max_count: u64,
    /// By which addresses its owner says that it is reached.
    pub(super) access: Access,
    /// Whether the guest grows its root file system.
    pub(super) disk_config: DiskConfig,
    /// What its first boot sets as password.
    pub(super) admin_password_hash: Option<String>,
    /// The answer shall name the request instead of the first server.
    pub(super) return_reservation_id: bool,
}

/// What happens when a server's VMM dies, as its metadata says; the word is that of
/// `mote_host_api::RestartPolicy` in JSON, which is what the database keeps.
pub(super) fn restart_policy(metadata: &BTreeMap<String, String>) -> Result<&'static str, ApiError> {
    match metadata.get(RESTART_POLICY).map(String::as_str) {
        None | Some("never") => Ok("never"),
        Some("on-failure") => Ok("on_failure"),
        Some(other) => Err(invalid(RESTART_POLICY, &other.into(), "is not one of never, on-failure")),
    }
}

/// Nova's message about a wrong field.
pub(in super::super) fn invalid(field: &str, value: &Value, why: &str) -> ApiError {
    let field: String = field.chars().take(MAX_SHOWN).collect();
    let value: String = value.to_string().chars().take(MAX_SHOWN).collect();
    ApiError::BadRequest(format!("Invalid input for field/attribute {field}. Value: {value}. {value} {why}."))
}

/// A JSON object whose fields are taken one by one; what is left at the end is unknown.
pub(in super::super) struct Fields(Map<String, Value>);

impl Fields {
    /// Opens `{"<name>": {…}}`; `others` are further members that must be empty.
    pub(in super::super) fn open(body: Value, name: &str, others: &[&str]) -> Result<Self, ApiError> {
        let Value::Object(mut body) = body else {
            return Err(ApiError::BadRequest(format!("The body must be an object with '{name}'.")));
        };
        let inner = body.remove(name);
        for other in others {
            if body.get(*other).is_some_and(|value| *value == Value::Object(Map::new())) {
                body.remove(*other);
            }
        }
        Self(body).finish()?;
        match inner {
            Some(Value::Object(fields)) => Ok(Self(fields)),
            Some(other) => Err(invalid(name, &other, "is not an object")),
            None => Err(ApiError::BadRequest(format!("Invalid input: '{name}' is a required property."))),
        }
    }

    /// A field; `null` counts as absent.
    pub(in super::super) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    /// All that is left.
    pub(super) fn into_inner(self) -> Map<String, Value> {
        self.0
    }

    /// Whether a field is named, also as `null`.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Whether a field is there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|value| !value.is_null())
    }

    /// A text.
    pub(in super::super) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(invalid(name, &other, "is not a string")),
        }
    }

    /// A UUID.
    pub(super) fn uuid(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        let Some(text) = self.string(name)? else { return Ok(None) };
        match Uuid::parse_str(&text) {
            Ok(id) => Ok(Some(id.hyphenated().to_string())),
            Err(_) => Err(invalid(name, &text.into(), "is not a 'uuid'")),
        }
    }

    /// A list, empty if absent.
    pub(super) fn list(&mut self, name: &str) -> Result<Vec<Value>, ApiError> {
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => Ok(list),
            Some(other) => Err(invalid(name, &other, "is not a list")),
        }
    }

    /// A number from 1, as such or as text (Nova takes both).
    fn count(&mut self, name: &str) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match number(&value).filter(|count| (1..=MAX_SERVERS).contains(count)) {
            Some(count) => Ok(Some(count)),
            None => Err(invalid(name, &value, &format!("is not a number from 1 to {MAX_SERVERS}"))),
        }
    }

    /// A field that may have one value only.
    pub(in super::super) fn only(&mut self, name: &str, allowed: &[Value]) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !allowed.contains(&value) => Err(invalid(name, &value, "is not supported here")),
            _ => Ok(()),
        }
    }

    /// Refuses what was not taken.
    pub(in super::super) fn finish(self) -> Result<(), ApiError> {
        let Some(name) = self.0.keys().next() else { return Ok(()) };
        let name: String = name.chars().take(MAX_SHOWN).collect();
        Err(ApiError::BadRequest(format!(
            "Invalid input: Additional properties are not allowed ('{name}' was unexpected)."
        )))
    }
}

/// A whole number, as such or as text.
pub(in super::super) fn number(value: &Value) -> Option<u64> {
    match value {
        Value::String(text) => text.parse().ok(),
        other => other.as_u64(),
    }
}

/// Reads the body.
///
/// # Errors
/// 400 that names the field.
pub(super) fn parse(mut body: Value, version: Version) -> Result<Wanted, ApiError> {
    let hints = Hints::take(&mut body)?;
    let mut fields = Fields::open(body, "server", &[])?;
    let name = server_name(&mut fields)?;
    let flavor_id = flavor_ref(&mut fields)?;
    let (image_id, local_disks) = disks(&mut fields)?;
    let image_id = image_id.ok_or_else(|| required("imageRef"))?;
    let nics = nics(&mut fields, version)?;
    let (min, max) = (fields.count("min_count")?, fields.count("max_count")?);
    let min_count = min.unwrap_or(1);
    let max_count = max.unwrap_or(min_count);
    if min_count > max_count {
        return Err(ApiError::BadRequest("min_count must be <= max_count".into()));
    }
    let metadata = metadata(fields.take("metadata"))?;
    restart_policy(&metadata)?;
    let mut place = place(fields.string("availability_zone")?)?;
    if version.has(74) {
        host(&mut fields, &mut place)?;
    }
    let wanted = Wanted {
        name,
        image_id,
        local_disks,
        flavor_id,
        nics,
        key_name: fields.string("key_name")?,
        user_data: user_data(&mut fields)?,
        metadata,
        place,
        description: if version.has(19) { description(&mut fields)? } else { None },
        hostname: if version.has(90) { hostname(&mut fields)? } else { None },
        tags: if version.has(52) { tags(fields.list("tags")?)? } else { Vec::new() },
        config_drive: config_drive(&mut fields)?,
        group: hints.group,
        same_host: hints.same_host,
        different_host: hints.different_host,
        return_reservation_id: match fields.take("return_reservation_id") {
            None => false,
            Some(Value::Bool(wanted)) => wanted,
            Some(other) => return Err(invalid("return_reservation_id", &other, "is neither true nor false")),
        },
        min_count,
        max_count,
        security_groups: security_groups(&mut fields)?,
        access: Access::take(&mut fields)?,
        disk_config: DiskConfig::take(&mut fields)?.unwrap_or(DiskConfig::Auto),
        admin_password_hash: password_hash(&mut fields)?,
    };
    if !version.has(57) {
        fields.only("personality", &[Value::Array(Vec::new())])?;
    }
    if version.has(63) {
        fields.only("trusted_image_certificates", &[Value::Array(Vec::new())])?;
    }
    fields.finish()?;
    Ok(wanted)
}

/// `accessIPv4` and `accessIPv6`: by which addresses its owner says that a server is reached. What is not named is `None`, an
/// empty text takes one away.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) ipv4: Option<String>,
    pub(super) ipv6: Option<String>,
}

impl Access {
    /// As a request has them.
    pub(super) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let mut address = |name: &str, fits: fn(&IpAddr) -> bool| {
            let Some(text) = fields.string(name)? else { return Ok(None) };
            match text.parse::<IpAddr>() {
                Ok(ip) if fits(&ip) => Ok(Some(ip.to_string())),
                _ if text.is_empty() => Ok(Some(text)),
                _ => Err(invalid(name, &text.into(), "is no such address")),
            }
        };
        Ok(Self {
            ipv4: address("accessIPv4", IpAddr::is_ipv4)?,
            ipv6: address("accessIPv6", IpAddr::is_ipv6)?,
        })
    }
}

/// `config_drive`, with the words for yes and no that Nova takes; nothing means no.
fn config_drive(fields: &mut Fields) -> Result<bool, ApiError> {
    let value = match fields.take("config_drive") {
        None => return Ok(false),
        Some(Value::Bool(wanted)) => return Ok(wanted),
        Some(other) => other,
    };
    match value.as_str().map(str::to_ascii_lowercase).as_deref() {
        Some("true" | "1" | "on" | "yes" | "y" | "t") => Ok(true),
        Some("false" | "0" | "off" | "no" | "n" | "f" | "") => Ok(false),
        _ => Err(invalid("config_drive", &value, "is neither true nor false")),
    }
}

/// Nova's words for a field that is missing.
pub(in super::super) fn required(name: &str) -> ApiError {
    ApiError::BadRequest(format!("Invalid input: '{name}' is a required property."))
}

/// `flavorRef`, required.
pub(super) fn flavor_ref(fields: &mut Fields) -> Result<String, ApiError> {
    match fields.take("flavorRef") {
        // Nova takes links, too: their last part is the id.
        Some(Value::String(text)) => Ok(text.rsplit('/').next().unwrap_or_default().to_owned()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        Some(other) => Err(invalid("flavorRef", &other, "is not a flavor's id")),
        None => Err(required("flavorRef")),
    }
}

/// `description` (2.19).
pub(super) fn description(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let Some(text) = fields.string("description")? else { return Ok(None) };
    match text.chars().count() <= MAX_NAME && !text.chars().any(|c| c.is_control() && c != '\n') {
        true => Ok(Some(text)),
        false => {
            Err(invalid("description", &text.into(), "is not a text of 255 printable characters at most"))
        }
    }
}

/// `hostname` (2.90): one label of DNS.
pub(super) fn hostname(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let Some(text) = fields.string("hostname")? else { return Ok(None) };
    let label = (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-');
    match label {
        true => Ok(Some(text)),
        false => Err(invalid("hostname", &text.into(), "is not a label of letters, digits and hyphens")),
    }
}

/// The tags of a server: each once, in their order (2.26).
pub(super) fn tags(list: Vec<Value>) -> Result<Vec<String>, ApiError> {
    if list.len() > MAX_TAGS {
        return Err(ApiError::BadRequest(format!("tags: a server can have {MAX_TAGS} tags at most.")));
    }
    let mut tags: Vec<String> = Vec::new();
    for value in list {
        let tag = tag(value.as_str().ok_or_else(|| invalid("tags", &value, "is not a string"))?)?;
        if !tags.contains(&tag) {
            tags.push(tag);
        }
    }
    Ok(tags)
}

/// One tag.
pub(super) fn tag(text: &str) -> Result<String, ApiError> {
    let fits = (1..=MAX_TAG).contains(&text.chars().count()) && !text.contains(['/', ',']);
    match fits && !text.chars().any(char::is_control) {
        true => Ok(text.to_owned()),
        false => {
            Err(invalid("tags", &text.into(), "is not a text of 1 to 60 characters without '/' and ','"))
        }
    }
}

/// The name, required.
pub(in super::super) fn server_name(fields: &mut Fields) -> Result<String, ApiError> {
    let value = fields.take("name").unwrap_or(Value::Null);
    let name = value.as_str().map(str::trim).unwrap_or_default();
    let fits = !name.is_empty() && name.chars().count() <= MAX_NAME && !name.chars().any(char::is_control);
    match fits {
        true => Ok(name.to_owned()),
        false => {
            Err(invalid("name", &value, &format!("is not a text of 1 to {MAX_NAME} printable characters")))
        }
    }
}

/// `imageRef` and the block device mapping: the disk that is made of the image (which the openstack client names there, too),
/// and disks beside it.
fn disks(fields: &mut Fields) -> Result<(Option<String>, Vec<local::Wish>), ApiError> {
    if fields.0.get("imageRef").is_some_and(|value| *value == "") {
        fields.take("imageRef");
    }
    let mut image = fields.uuid("imageRef")?;
    let devices = fields.list("block_device_mapping_v2")?;
    let refused = |why: &str| invalid("block_device_mapping_v2", &Value::Array(devices.clone()), why);
    let (mut booted, mut wishes) = (None, Vec::new());
    for device in &devices {
        let Value::Object(device) = device.clone() else { return Err(refused("is not a list of objects")) };
        let mut device = Fields(device);
        let (source, to) = (device.take("source_type"), device.take("destination_type"));
        let index = device.take("boot_index");
        if device.take("delete_on_termination").is_some_and(|delete| delete != true) {
            return Err(refused("has a disk that would stay when its server goes"));
        }
        if source == Some("blank".into())
            && to == Some("local".into())
            && index.as_ref().is_none_or(|index| *index == -1 || *index == "-1")
        {
            let size = match device.take("volume_size") {
                None => None,
                Some(size) => Some(
                    number(&size)
                        .filter(|size| *size > 0)
                        .ok_or_else(|| refused("has a disk without a size"))?,
                ),
            };
            wishes.push(match device.string("guest_format")?.as_deref() {
                None => local::Wish::Ephemeral(size),
                Some("swap") => local::Wish::Swap(size),
                Some(_) => {
                    return Err(refused(
                        "has a disk with a file system: guests make their own, only swap is made",
                    ));
                }
            });
            device.finish()?;
            continue;
        }
        let named = device.uuid("uuid")?;
        let root = source == Some("image".into())
            && to.is_none_or(|to| to == "local")
            && index.is_none_or(|index| number(&index) == Some(0))
            && named.is_some()
            && booted.is_none();
        if !root {
            return Err(refused(
                "is not one local disk made of an image, and blank local disks; volumes are not there",
            ));
        }
        device.finish()?;
        booted = named;
    }
    if booted.is_some() && image.is_some() && image != booted {
        return Err(refused("names another image than imageRef"));
    }
    image = image.or(booted);
    Ok((image, wishes))
}

fn nics(fields: &mut Fields, version: Version) -> Result<Nics, ApiError> {
    let wanted = fields.0.get("networks");
    if version.has(37) && wanted.is_none_or(Value::is_null) {
        return Err(required("networks"));
    }
    match wanted.and_then(Value::as_str).filter(|_| version.has(37)) {
        Some("auto") => {
            fields.take("networks");
            return Ok(Nics::Auto);
        }
        Some("none") => {
            fields.take("networks");
            return Ok(Nics::None);
        }
        _ => {}
    }
    let list = fields.list("networks")?;
    if list.is_empty() {
        // Before 2.37 a project without a network gets a server without a NIC.
        return Ok(Nics::Any);
    }
    if list.len() > MAX_NICS {
        return Err(ApiError::BadRequest(format!("networks: a server can have {MAX_NICS} NICs at most.")));
    }
    list.into_iter().map(nic).collect::<Result<_, _>>().map(Nics::These)
}

fn nic(value: Value) -> Result<NicWish, ApiError> {
    let Value::Object(fields) = value.clone() else {
        return Err(invalid("networks", &value, "is not an object"));
    };
    let mut fields = Fields(fields);
    let (network, port) = (fields.uuid("uuid")?, fields.uuid("port")?);
    let fixed_ip = match fields.string("fixed_ip")? {
        Some(text) => match text.parse::<IpAddr>() {
            Ok(ip) => Some(ip),
            Err(_) => return Err(invalid("fixed_ip", &text.into(), "is not an IP address")),
        },
        None => None,
    };
    fields.finish()?;
    match (network, port) {
        (_, Some(_)) if fixed_ip.is_some() => {
            Err(invalid("networks", &value, "has a port, whose address can't be chosen here"))
        }
        (_, Some(id)) => Ok(NicWish::Port { id }),
        (Some(id), None) => Ok(NicWish::Network { id, fixed_ip }),
        (None, None) => Err(invalid("networks", &value, "has neither uuid nor port")),
    }
}

/// `[{"name": …}]`, where a name may be an id.
fn security_groups(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let list = fields.list("security_groups")?;
    if list.len() > MAX_GROUPS {
        return Err(ApiError::BadRequest(format!("security_groups: more than {MAX_GROUPS} groups.")));
    }
    let name = |value: Value| match value.get("name").and_then(Value::as_str) {
        Some(name) if value.as_object().is_some_and(|fields| fields.len() == 1) => Ok(name.to_owned()),
        _ => Err(invalid("security_groups", &value, "is not {\"name\": …}")),
    };
    list.into_iter().map(name).collect()
}

pub(super) fn user_data(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let Some(text) = fields.string("user_data")? else { return Ok(None) };
    let text: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    let refused = |why: &str| invalid("user_data", &text.as_str().into(), why);
    if text.len() > MAX_USER_DATA {
        return Err(refused(&format!("is longer than {MAX_USER_DATA} characters")));
    }
    match STANDARD.decode(&text) {
        Ok(_) => Ok(Some(text).filter(|text| !text.is_empty())),
        Err(_) => Err(refused("is not base64")),
    }
}

/// Strings by key.
pub(super) fn metadata(value: Option<Value>) -> Result<BTreeMap<String, String>, ApiError> {
    let items = match value {
        None => return Ok(BTreeMap::new()),
        Some(Value::Object(items)) => items,
        Some(other) => return Err(invalid("metadata", &other, "is not an object")),
    };
    let items = items.into_iter().map(metadata_item).collect::<Result<_, _>>()?;
    check_count(&items)?;
    Ok(items)
}

/// Whether a server may have so many items.
pub(super) fn check_count(items: &BTreeMap<String, String>) -> Result<(), ApiError> {
    match items.len() > MAX_METADATA {
        true => Err(ApiError::OverQuota(format!("Maximum number of metadata items exceeds {MAX_METADATA}."))),
        false => Ok(()),
    }
}

fn metadata_item((key, value): (String, Value)) -> Result<(String, String), ApiError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_:. ".contains(c);
    if key.is_empty() || key.len() > MAX_NAME || !key.chars().all(allowed) {
        return Err(invalid(
            "metadata",
            &key.into(),
            "is not a key of 1 to 255 of a-z A-Z 0-9 - _ : . and space",
        ));
    }
    if key.starts_with("mote:") && key != RESTART_POLICY {
        return Err(invalid("metadata", &key.into(), "is not a key that Mote knows"));
    }
    match value {
        Value::String(text) if text.chars().count() <= MAX_NAME => Ok((key, text)),
        other => Err(invalid(&key, &other, &format!("is not a string of {MAX_NAME} characters at most"))),
    }
}

/// Since 2.74 an administrator names a host by a field of its own; a host here has one hypervisor of the same name.
fn host(fields: &mut Fields, place: &mut Place) -> Result<(), ApiError> {
    for name in ["host", "hypervisor_hostname"] {
        let Some(host) = fields.string(name)? else { continue };
        if place.host.as_ref().is_some_and(|other| *other != host) {
            return Err(invalid(name, &host.into(), "is another host than was named before"));
        }
        place.host = Some(host);
    }
    Ok(())
}

/// `os:scheduler_hints`, beside `server`. Those that are not known are refused, since they would not act.
#[derive(Debug, Default)]
struct Hints {
    group: Option<String>,
    same_host: Vec<String>,
    different_host: Vec<String>,
}

impl Hints {
    fn take(body: &mut Value) -> Result<Self, ApiError> {
        let mut hints = Self::default();
        for name in ["os:scheduler_hints", "OS-SCH-HNT:scheduler_hints"] {
            let Some(value) = body.as_object_mut().and_then(|body| body.remove(name)) else { continue };
            let Value::Object(map) = value.clone() else {
                return Err(invalid(name, &value, "is not an object"));
            };
            let mut fields = Fields(map);
            hints.group = fields.uuid("group")?;
            hints.same_host = Self::servers(&mut fields, "same_host")?;
            hints.different_host = Self::servers(&mut fields, "different_host")?;
            fields.finish()?;
        }
        Ok(hints)
    }

    /// Ids of servers, one or a list.
    fn servers(fields: &mut Fields, name: &str) -> Result<Vec<String>, ApiError> {
        let list = match fields.take(name) {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) if list.len() <= MAX_HINTS => list,
            Some(one @ Value::String(_)) => vec![one],
            Some(other) => return Err(invalid(name, &other, "is not a list of ids of servers")),
        };
        let id = |value: Value| match value.as_str().map(Uuid::parse_str) {
            Some(Ok(id)) => Ok(id.hyphenated().to_string()),
            _ => Err(invalid(name, &value, "is not a 'uuid'")),
        };
        list.into_iter().map(id).collect()
    }
}

fn place(zone: Option<String>) -> Result<Place, ApiError> {
    let Some(text) = zone else { return Ok(Place::default()) };
    let named = |part: &str| Some(part.to_owned()).filter(|part| !part.is_empty());
    let mut parts = text.split(':');
    let (zone, host) = (parts.next().and_then(named), parts.next().map(named));
    match (host, parts.next()) {
        (Some(None), _) | (_, Some(_)) => {
            Err(invalid("availability_zone", &text.as_str().into(), "is neither zone nor zone:host"))
        }
        (None, None) if zone.is_none() => {
            Err(invalid("availability_zone", &text.as_str().into(), "is no name of a zone"))
        }
        (host, None) => Ok(Place { zone, host: host.flatten() }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const ID: &str = "6dbd8f5b-0000-4000-8000-000000000001";

    fn server(more: Value) -> Value {
        let mut server = json!({"name": "s", "imageRef": ID, "flavorRef": "1", "networks": "auto"});
        for (key, value) in more.as_object().unwrap() {
            server[key] = value.clone();
        }
        json!({"server": server})
    }

    #[test]
    fn the_openstack_clients_request_is_understood() {
        let device = json!({"uuid": ID, "boot_index": "0", "source_type": "image", "destination_type": "local",
                            "delete_on_termination": true});
        let wanted = parse(
            server(json!({
                "imageRef": "", "flavorRef": 1, "min_count": 1, "max_count": "3", "networks": [{"uuid": ID}],
                "block_device_mapping_v2": [device], "security_groups": [{"name": "default"}],
                "availability_zone": "a:h", "user_data": "aGVs\nbG8=",
            })),
            Version(90),
        )
        .unwrap();
        assert_eq!((wanted.image_id.as_str(), wanted.flavor_id.as_str()), (ID, "1"));
        assert_eq!((wanted.min_count, wanted.max_count), (1, 3));
        assert_eq!(wanted.place, Place { zone: Some("a".into()), host: Some("h".into()) });
        assert_eq!(wanted.user_data.as_deref(), Some("aGVsbG8="));
        assert_eq!(wanted.nics, Nics::These(vec![NicWish::Network { id: ID.into(), fixed_ip: None }]));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (more, says) in [
            (json!({"name": ""}), "name"),
            (json!({"name": 7}), "name"),
            (json!({"imageRef": "no-uuid"}), "imageRef"),
            (json!({"networks": "some"}), "networks"),
            (json!({"networks": [{"uuid": "x"}]}), "uuid"),
            (json!({"networks": [{}]}), "networks"),
            (json!({"networks": [{"uuid": ID, "fixed_ip": "::x"}]}), "fixed_ip"),
            (json!({"user_data": "not base64!"}), "user_data"),
            (json!({"metadata": {"a": 1}}), "a"),
            (json!({"metadata": {RESTART_POLICY: "sometimes"}}), RESTART_POLICY),
            (json!({"metadata": {"mote:restart-policy": "never"}}), "mote:restart-policy"),
            (json!({"min_count": 0}), "min_count"),
            (json!({"min_count": 3, "max_count": 2}), "min_count"),
            (json!({"config_drive": "maybe"}), "config_drive"),
            (json!({"config_drive": 1}), "config_drive"),
            (json!({"config_drive": {}}), "config_drive"),
            (json!({"security_groups": ["web"]}), "security_groups"),
            (json!({"availability_zone": "a:b:c"}), "availability_zone"),
            (json!({"block_device_mapping_v2": [{"source_type": "volume"}]}), "block_device_mapping_v2"),
            (json!({"no_such_field": 1}), "no_such_field"),
        ] {
            let error = parse(server(more.clone()), Version(90)).unwrap_err();
            assert!(
                matches!(error, ApiError::BadRequest(_)) && error.to_string().contains(says),
                "{more}: {error}"
            );
        }
        assert!(parse(json!([]), Version(1)).is_err() && parse(json!({"server": 1}), Version(1)).is_err());
        let hints = json!({"server": {}, "os:scheduler_hints": {"group": "x"}});
        assert!(parse(hints, Version(1)).unwrap_err().to_string().contains("group"));
    }

    #[test]
    fn a_config_drive_is_wanted_in_novas_words() {
        for (value, wanted) in [
            (json!(true), true),
            (json!("True"), true),
            (json!("1"), true),
            (json!(false), false),
            (json!("False"), false),
            (json!(""), false),
            (json!(null), false),
        ] {
            let read = parse(server(json!({ "config_drive": value })), Version(90)).unwrap();
            assert_eq!(read.config_drive, wanted, "{value}");
        }
        assert!(!parse(server(json!({})), Version(90)).unwrap().config_drive);
    }

    #[test]
    fn fields_are_known_from_their_microversion_on() {
        for (field, value, since) in [
            ("description", json!("x"), 19),
            ("tags", json!(["x"]), 52),
            ("host", json!("h"), 74),
            ("hypervisor_hostname", json!("h"), 74),
            ("hostname", json!("h"), 90),
        ] {
            let body = || {
                let mut body = server(json!({ field: value }));
                body["server"].as_object_mut().unwrap().remove("networks");
                body
            };
            let before = parse(body(), Version(since.min(37) - 1)).unwrap_err();
            assert!(before.to_string().contains(field), "{field}: {before}");
            let mut body = body();
            body["server"]["networks"] = json!("auto");
            parse(body, Version(since.max(37))).unwrap();
        }
        let mut without = server(json!({}));
        without["server"].as_object_mut().unwrap().remove("networks");
        assert!(parse(without.clone(), Version(36)).is_ok());
        assert!(parse(without, Version(37)).unwrap_err().to_string().contains("networks"));
        assert!(parse(server(json!({})), Version(36)).is_err(), "\"auto\" is not known yet");
    }

    proptest! {
        #[test]
        fn no_text_in_a_field_panics(text in ".{0,300}", field in 0..8usize) {
            let names = ["name", "imageRef", "flavorRef", "networks", "user_data", "availability_zone", "min_count", "metadata"];
            let _ = parse(server(json!({names[field]: text})), Version(90));
        }
    }
}
