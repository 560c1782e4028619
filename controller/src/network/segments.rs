//! Segments: what carries a network between hosts. A tenant gets a VXLAN number; an admin may choose by the provider
//! attributes. A unique index makes it impossible that two networks share a segment.

use serde_json::{Value, json};

use super::attributes::{Attributes, invalid, invalid_input};
use crate::{db::Conn, http::error::ApiError};

/// VXLAN network identifiers have 24 bits (RFC 7348 §5); 0 is left out.
const MAX_VNI: i64 = (1 << 24) - 1;
/// VLAN ids of IEEE 802.1Q without the reserved ones.
const MAX_VLAN: i64 = 4094;
/// Random numbers that are tried for a network: several in a row fail only if nearly all 2^24 are taken.
const VNI_TRIES: usize = 32;
/// Leaves room for the headers of VXLAN over an underlay of 1500.
const VXLAN_MTU: u16 = 1450;
/// Ethernet's.
const ETHERNET_MTU: u16 = 1500;
/// Longest name of a physical network.
const MAX_PHYSICAL: usize = 64;

/// What carries a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Segment {
    /// The untagged frames of a physical network.
    Flat(String),
    /// Tagged frames of a physical network.
    Vlan(String, i64),
    /// A tunnel between hosts.
    Vxlan(i64),
}

impl Segment {
    /// From its columns.
    pub(super) fn stored(kind: &str, physical: &str, number: i64) -> Self {
        match kind {
            "flat" => Self::Flat(physical.into()),
            "vlan" => Self::Vlan(physical.into(), number),
            _ => Self::Vxlan(number),
        }
    }

    /// `provider:network_type`.
    pub(super) fn network_type(&self) -> &'static str {
        match self {
            Self::Flat(_) => "flat",
            Self::Vlan(..) => "vlan",
            Self::Vxlan(_) => "vxlan",
        }
    }

    /// `provider:physical_network`.
    pub(super) fn physical_network(&self) -> Option<&str> {
        match self {
            Self::Flat(name) | Self::Vlan(name, _) => Some(name),
            Self::Vxlan(_) => None,
        }
    }

    /// `provider:segmentation_id`.
    pub(super) fn segmentation_id(&self) -> Option<i64> {
        match self {
            Self::Flat(_) => None,
            Self::Vlan(_, number) | Self::Vxlan(number) => Some(*number),
        }
    }

    /// The MTU of a network that isn't given one.
    pub(super) fn default_mtu(&self) -> u16 {
        match self {
            Self::Vxlan(_) => VXLAN_MTU,
            Self::Flat(_) | Self::Vlan(..) => ETHERNET_MTU,
        }
    }
}

/// What an admin asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Wish {
    network_type: Option<&'static str>,
    physical_network: Option<String>,
    segmentation_id: Option<i64>,
}

impl Wish {
    /// Takes the provider attributes.
    pub(super) fn parse(body: &mut Attributes) -> Result<Self, ApiError> {
        let network_type = match body.value("provider:network_type") {
            None | Some(Value::Null) => None,
            Some(value) => {
                let known = ["flat", "vlan", "vxlan"].into_iter().find(|kind| value == json!(kind));
                let unknown =
                    || invalid_input(format!("provider:network_type '{value}' is none of flat, vlan, vxlan"));
                Some(known.ok_or_else(unknown)?)
            }
        };
        let physical_network = body.nullable("provider:physical_network")?.flatten();
        let fits =
            |name: &String| (1..=MAX_PHYSICAL).contains(&name.len()) && !name.chars().any(char::is_control);
        if physical_network.as_ref().is_some_and(|name| !fits(name)) {
            return Err(invalid("provider:physical_network", format!("1 to {MAX_PHYSICAL} characters")));
        }
        let segmentation_id = match body.value("provider:segmentation_id") {
            None | Some(Value::Null) => None,
            Some(value) => {
                Some(value.as_i64().or_else(|| value.as_str()?.parse().ok()).ok_or_else(|| {
                    invalid("provider:segmentation_id", format!("'{value}' is not an integer"))
                })?)
            }
        };
        Ok(Self { network_type, physical_network, segmentation_id })
    }

    /// Whether something was asked for.
    pub(super) fn is_given(&self) -> bool {
        *self != Self::default()
    }

    /// Refuses a change: guests would lose each other.
    pub(super) fn unchanged(&self, segment: &Segment) -> Result<(), ApiError> {
        let same = self.network_type.is_none_or(|kind| kind == segment.network_type())
            && self.physical_network.as_deref().is_none_or(|name| Some(name) == segment.physical_network())
            && self.segmentation_id.is_none_or(|number| Some(number) == segment.segmentation_id());
        match same {
            true => Ok(()),
            false => Err(invalid_input("the provider attributes of a network can't be changed")),
        }
    }
}

/// Finds the segment of a new network.
///
/// # Errors
/// 400 for what makes no sense, 409 for a segment that is taken, 503 if none is left.
pub(super) async fn allocate(tx: &mut Conn, wish: &Wish) -> Result<Segment, ApiError> {
    let kind = wish.network_type.unwrap_or("vxlan");
    let required = || invalid_input(format!("physical_network required for {kind} provider network"));
    match kind {
        "flat" => {
            let physical = wish.physical_network.clone().ok_or_else(required)?;
            if wish.segmentation_id.is_some() {
                return Err(invalid_input("segmentation_id specified for flat provider network"));
            }
            let text = format!("Unable to create the flat network. Physical network {physical} is in use.");
            free(tx, Segment::Flat(physical), || ApiError::Conflict(text).named("FlatNetworkInUse")).await
        }
        "vlan" => {
            let physical = wish.physical_network.clone().ok_or_else(required)?;
            vlan(tx, physical, wish.segmentation_id).await
        }
        _ if wish.physical_network.is_some() => {
            Err(invalid_input("provider:physical_network specified for VXLAN network"))
        }
        _ => vxlan(tx, wish.segmentation_id).await,
    }
}

async fn vlan(tx: &mut Conn, physical: String, number: Option<i64>) -> Result<Segment, ApiError> {
    if let Some(number) = number {
        if !(1..=MAX_VLAN).contains(&number) {
            return Err(invalid_input(format!("segmentation_id out of range (1 through {MAX_VLAN})")));
        }
        let text = format!(
            "Unable to create the network. The VLAN {number} on physical network {physical} is in use."
        );
        return free(tx, Segment::Vlan(physical, number), || ApiError::Conflict(text).named("VlanIdInUse"))
            .await;
    }
    let taken: Vec<i64> = sqlx::query_scalar(
        "SELECT segmentation_id FROM networks WHERE network_type = 'vlan' AND physical_network = $1",
    )
    .bind(&physical)
    .fetch_all(tx)
    .await?;
    let number = (1..=MAX_VLAN).find(|number| !taken.contains(number)).ok_or_else(none_left)?;
    Ok(Segment::Vlan(physical, number))
}

async fn vxlan(tx: &mut Conn, number: Option<i64>) -> Result<Segment, ApiError> {
    if let Some(number) = number {
        if !(1..=MAX_VNI).contains(&number) {
            return Err(invalid_input(format!("segmentation_id out of range (1 through {MAX_VNI})")));
        }
        let text = format!("Unable to create the network. The tunnel ID {number} is in use.");
        return free(tx, Segment::Vxlan(number), || ApiError::Conflict(text).named("TunnelIdInUse")).await;
    }
    for _ in 0..VNI_TRIES {
        let mut bytes = [0; 4];
        getrandom::fill(&mut bytes[1..]).map_err(|error| ApiError::internal(error.to_string()))?;
        let segment = Segment::Vxlan(i64::from(u32::from_be_bytes(bytes)).max(1));
        if !is_taken(tx, &segment).await? {
            return Ok(segment);
        }
    }
    Err(none_left())
}

fn none_left() -> ApiError {
    ApiError::Unavailable(
        "Unable to create the network. No tenant network is available for allocation.".into(),
    )
    .named("NoNetworkAvailable")
}

async fn free(
    tx: &mut Conn,
    segment: Segment,
    taken: impl FnOnce() -> ApiError,
) -> Result<Segment, ApiError> {
    match is_taken(tx, &segment).await? {
        true => Err(taken()),
        false => Ok(segment),
    }
}

async fn is_taken(tx: &mut Conn, segment: &Segment) -> Result<bool, ApiError> {
    Ok(sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM networks
             WHERE network_type = $1 AND physical_network = $2 AND segmentation_id = $3)",
    )
    .bind(segment.network_type())
    .bind(segment.physical_network().unwrap_or_default())
    .bind(segment.segmentation_id().unwrap_or_default())
    .fetch_one(tx)
    .await?)
}
