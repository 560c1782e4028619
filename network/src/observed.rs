//! What exists in the kernel, as [`crate::plan::plan`] needs it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::{
    filter::Digest,
    names::{MacAddress, NetworkKey},
};

/// A name under /run/netns that belongs to this host's networks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedNetwork {
    /// From its name.
    pub key: NetworkKey,
    /// What is behind the name.
    pub namespace: ObservedNamespace,
}

/// What is behind a name under /run/netns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObservedNamespace {
    /// A file that is no network namespace (left by a crash between two calls), or the host's own namespace, which
    /// must not be touched.
    Broken,
    /// A namespace.
    Live(NamespaceContent),
}

/// State of a network's namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamespaceContent {
    /// Those of [`crate::plan::SYSCTLS`] that exist in this kernel: path below /proc/sys → value.
    pub sysctls: BTreeMap<&'static str, String>,
    /// The packet filter that is loaded.
    pub filter: Option<Digest>,
    /// All links.
    pub links: Vec<ObservedLink>,
    /// Addresses of `br0` with their prefix lengths.
    pub addresses: BTreeSet<IpNet>,
    /// Permanent neighbour entries of `br0`.
    pub neighbours: BTreeMap<IpAddr, MacAddress>,
    /// Forwarding entries of the VXLAN link: the host behind which an Ethernet address is.
    pub tunnels: BTreeMap<MacAddress, IpAddr>,
}

impl NamespaceContent {
    /// The link of that name.
    pub fn link(&self, name: &str) -> Option<&ObservedLink> {
        self.links.iter().find(|link| link.name == name)
    }
}

/// A link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedLink {
    /// Name.
    pub name: String,
    /// Kind.
    pub kind: LinkKind,
    /// Alias, which says what an uplink was made for.
    pub alias: Option<String>,
    /// Administratively up.
    pub up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// Its own Ethernet address.
    pub mac: Option<MacAddress>,
    /// For a port of `br0`: its state as such.
    pub bridge_port: Option<BridgePort>,
}

/// Kinds of links as far as they matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkKind {
    /// `lo`.
    Loopback,
    /// A bridge.
    Bridge,
    /// A tap or tun.
    Tun,
    /// A VXLAN.
    Vxlan(VxlanLink),
    /// Any other.
    Other,
}

/// What a VXLAN link can't change without being made anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanLink {
    /// Network identifier.
    pub vni: u32,
    /// This host's address.
    pub local: IpAddr,
    /// UDP port.
    pub port: u16,
}

/// State of a link as a port of `br0`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BridgePort {
    /// How it forwards.
    pub flags: PortFlags,
    /// Ethernet addresses that are statically behind it.
    pub stations: BTreeSet<MacAddress>,
}

/// Flags of a bridge port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortFlags {
    /// Addresses are learnt from what the port sends.
    pub learning: bool,
    /// Frames to unknown addresses are sent to the port.
    pub flood: bool,
    /// Frames go back to the port that they came from.
    pub hairpin: bool,
    /// Frames to all and to groups are sent to the port.
    pub broadcast: bool,
    /// The bridge itself answers who asks for what is behind the port (ARP, neighbour discovery).
    pub suppress: bool,
}

impl PortFlags {
    /// For guests: nothing is learnt from them (a guest can't draw a neighbour's frames to itself by sending with its
    /// address), they get nothing that isn't for them, and nothing returns to its sender.
    pub const GUEST: Self =
        Self { learning: false, flood: false, hairpin: false, broadcast: true, suppress: false };
    /// For the overlay: only frames to addresses that are known to be there, and no question that the host can answer.
    pub const OVERLAY: Self =
        Self { learning: false, flood: false, hairpin: false, broadcast: false, suppress: true };
    /// For a physical network, of which the host doesn't know who is there.
    pub const UPLINK: Self =
        Self { learning: true, flood: true, hairpin: false, broadcast: true, suppress: false };
}

impl Default for PortFlags {
    /// As the kernel makes a new port.
    fn default() -> Self {
        Self::UPLINK
    }
}
