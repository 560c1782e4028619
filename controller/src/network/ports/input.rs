//! What a request says of a port.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{
    super::attributes::{Attributes, address, invalid, range},
    FixedIpWish, FixedIps, OWN,
    store::canonical_mac,
};
use crate::http::error::ApiError;

/// Neutron's `max_fixed_ips_per_port`.
const MAX_FIXED_IPS: usize = 5;
/// Neutron's `max_allowed_address_pair`.
const MAX_PAIRS: usize = 10;

/// What may be given at creation and changed later.
#[derive(Debug, Clone, Default)]
pub(super) struct Wanted {
    pub(super) name: Option<String>,
    pub(super) description: Option<String>,
    pub(super) mac_address: Option<String>,
    pub(super) device_id: Option<String>,
    pub(super) device_owner: Option<String>,
    pub(super) fixed_ips: Option<FixedIps>,
    pub(super) admin_state_up: Option<bool>,
    pub(super) port_security_enabled: Option<bool>,
    pub(super) security_groups: Option<Vec<String>>,
    pub(super) allowed_address_pairs: Option<Vec<Pair>>,
    pub(super) qos_policy_id: Option<Option<String>>,
}

/// An allowed address pair.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super) struct Pair {
    pub(super) ip_address: String,
    /// None: the port's own.
    pub(super) mac_address: Option<String>,
}

/// Attributes of ports that have one value here.
fn constants() -> [(&'static str, Value); 5] {
    [
        ("extra_dhcp_opts", json!([])),
        ("binding:vnic_type", json!("normal")),
        ("binding:profile", json!({})),
        ("binding:host_id", json!("")),
        ("propagate_uplink_status", json!(false)),
    ]
}

impl Wanted {
    pub(super) fn parse(body: &mut Attributes) -> Result<Self, ApiError> {
        body.only(&constants())?;
        Ok(Self {
            name: body.string("name")?,
            description: body.string("description")?,
            mac_address: mac(body)?,
            device_id: body.string("device_id")?,
            device_owner: device_owner(body)?,
            fixed_ips: fixed_ips(body)?,
            admin_state_up: body.boolean("admin_state_up")?,
            port_security_enabled: body.boolean("port_security_enabled")?,
            security_groups: body.ids("security_groups")?,
            allowed_address_pairs: pairs(body)?,
            qos_policy_id: body.nullable_id("qos_policy_id")?,
        })
    }

    /// Whether only the name and the description are changed.
    pub(super) fn is_cosmetic(&self) -> bool {
        self.mac_address.is_none()
            && self.device_id.is_none()
            && self.device_owner.is_none()
            && self.fixed_ips.is_none()
            && self.admin_state_up.is_none()
            && self.port_security_enabled.is_none()
            && self.security_groups.is_none()
            && self.allowed_address_pairs.is_none()
            && self.qos_policy_id.is_none()
    }
}

fn mac(body: &mut Attributes) -> Result<Option<String>, ApiError> {
    let Some(text) = body.string("mac_address")? else { return Ok(None) };
    parse_mac("mac_address", &text).map(Some)
}

fn parse_mac(name: &str, text: &str) -> Result<String, ApiError> {
    canonical_mac(text)
        .ok_or_else(|| invalid(name, format!("'{text}' is not a valid MAC address of one device")))
}

/// `device_owner` that users may write: not those by which Mote knows its own ports.
fn device_owner(body: &mut Attributes) -> Result<Option<String>, ApiError> {
    let owner = body.string("device_owner")?;
    match owner.as_deref().is_some_and(|owner| owner.starts_with(OWN)) {
        true => {
            Err(ApiError::Forbidden("Device owners that begin with 'network:' are the cloud's own.".into()))
        }
        false => Ok(owner),
    }
}

fn fixed_ips(body: &mut Attributes) -> Result<Option<FixedIps>, ApiError> {
    let Some(list) = body.list("fixed_ips")? else { return Ok(None) };
    wishes(list).map(|wishes| Some(FixedIps::These(wishes)))
}

/// A list of `{subnet_id, ip_address}`.
pub(in super::super) fn wishes(list: Vec<Value>) -> Result<Vec<FixedIpWish>, ApiError> {
    if list.len() > MAX_FIXED_IPS {
        return Err(invalid(
            "fixed_ips",
            format!("Exceeded maximum amount of fixed ips per port: {MAX_FIXED_IPS}"),
        ));
    }
    let parse = |entry: Value| {
        let mut entry = Attributes::of("fixed_ips", entry)?;
        let subnet_id = entry.nullable_id("subnet_id")?.flatten();
        let ip = entry.value("ip_address").filter(|ip| !ip.is_null());
        entry.finish()?;
        let ip = ip.map(|ip| address("fixed_ips", &ip)).transpose()?;
        match subnet_id.is_none() && ip.is_none() {
            true => Err(invalid("fixed_ips", "an entry needs subnet_id or ip_address")),
            false => Ok(FixedIpWish { subnet_id, ip }),
        }
    };
    list.into_iter().map(parse).collect()
}

fn pairs(body: &mut Attributes) -> Result<Option<Vec<Pair>>, ApiError> {
    let list = match body.value("allowed_address_pairs") {
        None => return Ok(None),
        Some(Value::Null) => Vec::new(),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(invalid("allowed_address_pairs", format!("'{other}' is not a list"))),
    };
    if list.len() > MAX_PAIRS {
        let text = format!("The number of allowed address pair exceeds the maximum {MAX_PAIRS}.");
        return Err(ApiError::BadRequest(text).named("AllowedAddressPairExhausted"));
    }
    let mut pairs = BTreeSet::new();
    for entry in list {
        let mut entry = Attributes::of("allowed_address_pairs", entry)?;
        let Some(ip) = entry.string("ip_address")? else {
            return Err(ApiError::BadRequest("AllowedAddressPair must contain ip_address".into())
                .named("AllowedAddressPairsMissingIP"));
        };
        let written_as_range = ip.contains('/');
        let net = range(&ip)?.trunc();
        let ip_address = if written_as_range { net.to_string() } else { net.addr().to_string() };
        let mac_address = match entry.nullable("mac_address")?.flatten() {
            Some(text) => Some(parse_mac("allowed_address_pairs", &text)?),
            None => None,
        };
        entry.finish()?;
        let shown = mac_address.clone().unwrap_or_else(|| "None".into());
        if !pairs.insert(Pair { ip_address: ip_address.clone(), mac_address }) {
            let text = format!(
                "Request contains duplicate address pair: mac_address {shown} ip_address {ip_address}."
            );
            return Err(ApiError::BadRequest(text).named("DuplicateAddressPairInRequest"));
        }
    }
    Ok(Some(pairs.into_iter().collect()))
}
