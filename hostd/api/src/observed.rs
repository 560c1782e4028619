//! What a host reports: itself, and what it observes of its servers.

use std::{collections::BTreeSet, net::IpAddr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{CloudId, HostId, ImageId, PortId, ServerId};

/// `POST /mote/v1/hosts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The token that an admin handed out (`POST /mote/v1/join-tokens`).
    pub token: String,
    /// Unique name, by default the machine's host name. Joining again with the same name and a valid token gives the
    /// same host id and a new secret.
    pub name: String,
    /// Availability zone, default `nova`.
    pub availability_zone: String,
    /// What it has.
    pub inventory: Inventory,
}

/// Answer to [`JoinRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinResponse {
    /// The installation that was joined.
    pub cloud_id: CloudId,
    /// The host's id.
    pub host_id: HostId,
    /// Bearer token for all further calls; the controller keeps only its hash.
    pub secret: String,
}

/// What a host has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Logical CPUs.
    pub vcpus: u32,
    /// MiB.
    pub memory_mib: u64,
    /// GiB of the file system that holds servers' disks.
    pub disk_gib: u64,
    /// Name and release of the kernel, for people.
    pub kernel: String,
    /// Version of mote-hostd.
    pub version: String,
    /// What it can do, by OpenStack's names of traits: `HW_CPU_X86_VMX` or `HW_CPU_X86_SVM` where KVM has hardware
    /// virtualization, `CUSTOM_KVM` where /dev/kvm works at all. An image asks by property `trait:NAME=required`.
    pub traits: Vec<String>,
    /// Address at which other hosts' VXLAN reaches this one; none: it takes no part in overlays, and a port in a VXLAN
    /// network that is on more than one host can't be placed here.
    #[serde(default)]
    pub tunnel_ip: Option<IpAddr>,
    /// Physical networks that it is connected to (for flat and vlan segments, and gateways in them), by name.
    #[serde(default)]
    pub physical_networks: Vec<String>,
}

/// `PUT …/observed`: the whole of what the host sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedState {
    /// Host.
    pub host_id: HostId,
    /// Inventory.
    pub inventory: Inventory,
    /// The newest generation of the desired state that this host has seen and worked on completely once: a server that
    /// it does not name any more *and* that is not among `servers` is gone from this host, with everything it had.
    pub applied_generation: u64,
    /// Every server that left any trace on this host.
    pub servers: Vec<ObservedServer>,
    /// What ports have carried, of those of which the controller may not know it yet.
    #[serde(default)]
    pub traffic: Vec<PortTraffic>,
}

/// What one port has carried while one VMM ran. Numbers of a series only grow, so that hearing them twice, late or not at
/// all changes nothing that is counted: a port has carried the sum of its series, each at its largest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortTraffic {
    /// The port.
    pub port_id: PortId,
    /// Names the VMM, and no other one ever.
    pub series: String,
    /// What was counted.
    #[serde(flatten)]
    pub traffic: Traffic,
}

/// What a NIC has carried, as its guest sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Bytes that the guest was sent.
    pub rx_bytes: u64,
    /// Frames that the guest was sent.
    pub rx_packets: u64,
    /// Frames for the guest that found no place in its queue.
    pub rx_dropped: u64,
    /// Bytes that the guest has sent.
    pub tx_bytes: u64,
    /// Frames that the guest has sent.
    pub tx_packets: u64,
    /// Frames of the guest that were given up.
    pub tx_dropped: u64,
}

/// One server as observed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedServer {
    /// Id.
    pub id: ServerId,
    /// State.
    pub state: ServerState,
    /// The run generation that its VMM was started for (0: never).
    pub run_generation: u64,
    /// Numbers of its disks that are complete.
    #[serde(default)]
    pub disks: BTreeSet<u32>,
    /// The ports that its VMM has NICs of, where these can be changed while it runs. None: it has no VMM, what that has is not
    /// known at the moment, or its NICs stay as they are until its next start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<BTreeSet<PortId>>,
    /// When this state was entered.
    pub since: Timestamp,
    /// For `Failed`: why, one line for a person. For `Preparing`: what is going on.
    pub message: Option<String>,
    /// What was wanted of it, failed several times, and is not tried again as long as it is wanted in the same way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub given_up: Vec<GivenUp>,
}

/// Something that a host could not do for a server, which goes on as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GivenUp {
    /// What it was.
    pub wish: Wish,
    /// Why, one line for a person.
    pub message: String,
}

/// What can be wanted of a server without which it can go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wish {
    /// That it is suspended.
    Suspend,
    /// A copy of its root disk for that image.
    Capture(ImageId),
}

/// The life of a server on a host.
///
/// ```text
/// Preparing ──► Running ──► Stopped ──► (Running | Removing)
///     │          ▲ ▼ │ └───► Failed ──► (Running | Removing)
///     │         Paused  └──► Suspended ──► (Running | Removing)
///     └─► Failed   └──► Removing ──► gone
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerState {
    /// Image, disk, ports are being made.
    Preparing,
    /// The VMM runs the guest.
    Running,
    /// The VMM holds the guest, which stands still.
    Paused,
    /// No VMM: what it held is on the disk, and its guest can go on from there.
    Suspended,
    /// No VMM: the guest powered off, or it shall be stopped.
    Stopped,
    /// It could not be started, or its VMM died and its policy says so.
    Failed,
    /// Being removed.
    Removing,
}
