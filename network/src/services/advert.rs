//! Router advertisements of one network (RFC 4861 §4.2, RFC 8106): what guests configure IPv6 by, or learn from that they
//! have to ask by DHCPv6.
//!
//! The frame is made from the desired state and says that it comes from the network's router, where there is one: its
//! link-local address is the guests' next hop. It is sent at intervals and when a guest asks.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, UdpSocket as StdUdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use mote_host_api::{Ipv6Mode, NetworkSpec};
use nix::sys::socket::{MsgFlags, send};
use tokio::{net::UdpSocket, sync::watch};
use tracing::debug;

use super::directory::Directory;
use crate::names::{METADATA_IP_V6, MacAddress, NetworkKey, bridge_mac};

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
const NEXT_HEADER_ICMPV6: u8 = 58;
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
/// Time between advertisements that nobody asked for.
const INTERVAL: Duration = Duration::from_secs(10);
/// Shortest time between two advertisements, whoever asks.
const SPACING: Duration = Duration::from_millis(200);
/// How long guests believe in the router, in seconds.
const ROUTER_LIFETIME_S: u16 = 1800;
const VALID_LIFETIME_S: u32 = 86_400;
const PREFERRED_LIFETIME_S: u32 = 14_400;
const HOP_LIMIT: u8 = 64;
/// Header: addresses are got by DHCPv6.
const MANAGED: u8 = 0x80;
/// Header: other configuration is got by DHCPv6.
const OTHER: u8 = 0x40;
/// Prefix option: addresses of it are on the link.
const ON_LINK: u8 = 0x80;
/// Prefix option: guests make addresses of it themselves.
const AUTONOMOUS: u8 = 0x40;
/// Length of a prefix that guests make addresses of.
const AUTONOMOUS_LEN: u8 = 64;
/// Name servers in one option.
const DNS_MAX: usize = 16;
/// A solicitation is at least its header; what is longer is cut.
const REQUEST_MAX: usize = 512;

/// A router's interface in a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterPort {
    /// Ethernet address.
    pub mac: MacAddress,
    /// Addresses with prefix lengths.
    pub addresses: Vec<IpNet>,
}

/// The frame for a network; none if no subnet of it is announced. `domain`: where guests look for names.
pub(super) fn frame(network: &NetworkSpec, router: Option<&RouterPort>, domain: &str) -> Option<Vec<u8>> {
    let subnets: Vec<_> = network.subnets_v6.iter().filter(|subnet| subnet.ra_mode.is_some()).collect();
    if subnets.is_empty() {
        return None;
    }
    let leads = |router: &&RouterPort| {
        let addresses = router.addresses.iter().map(IpNet::addr);
        let v6 = addresses.filter_map(|ip| if let IpAddr::V6(ip) = ip { Some(ip) } else { None });
        v6.into_iter().any(|ip| subnets.iter().any(|subnet| subnet.cidr.contains(&ip)))
    };
    let router = router.filter(leads);
    let (mac, source) = router
        .map_or((bridge_mac(network.id), METADATA_IP_V6), |router| (router.mac, router.mac.link_local()));
    let lifetime = if router.is_some() { ROUTER_LIFETIME_S } else { 0 };

    let flags = subnets.iter().fold(0, |flags, subnet| match subnet.ra_mode {
        Some(Ipv6Mode::Dhcpv6Stateful) => flags | MANAGED | OTHER,
        Some(Ipv6Mode::Dhcpv6Stateless) => flags | OTHER,
        _ => flags,
    });
    let mut icmp = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, HOP_LIMIT, flags];
    icmp.extend(lifetime.to_be_bytes());
    icmp.extend([0; 8]);
    icmp.extend([1, 1]);
    icmp.extend(mac.0);
    icmp.extend([5, 1, 0, 0]);
    icmp.extend(u32::from(network.mtu).to_be_bytes());
    for subnet in &subnets {
        let length = subnet.cidr.prefix_len();
        let own = subnet.ra_mode != Some(Ipv6Mode::Dhcpv6Stateful) && length == AUTONOMOUS_LEN;
        icmp.extend([3, 4, length, if own { ON_LINK | AUTONOMOUS } else { ON_LINK }]);
        icmp.extend(VALID_LIFETIME_S.to_be_bytes());
        icmp.extend(PREFERRED_LIFETIME_S.to_be_bytes());
        icmp.extend([0; 4]);
        icmp.extend(subnet.cidr.network().octets());
    }
    let mut servers: Vec<Ipv6Addr> =
        subnets.iter().flat_map(|subnet| &subnet.dns_nameservers).copied().take(DNS_MAX).collect();
    if servers.is_empty() {
        servers.push(METADATA_IP_V6);
    }
    icmp.extend([25, 1 + 2 * servers.len() as u8, 0, 0]);
    icmp.extend(u32::from(ROUTER_LIFETIME_S).to_be_bytes());
    servers.iter().for_each(|server| icmp.extend(server.octets()));
    icmp.extend(search_list(domain));
    let length = u16::try_from(icmp.len()).ok()?;
    let pseudo =
        [&source.octets()[..], &ALL_NODES.octets(), &u32::from(length).to_be_bytes(), &[0, 0, 0]].concat();
    let sum = checksum(&[&pseudo[..], &[NEXT_HEADER_ICMPV6], &icmp].concat());
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut frame = [&ALL_NODES_MAC[..], &mac.0, &ETHERTYPE_IPV6, &[0x60, 0, 0, 0]].concat();
    frame.extend(length.to_be_bytes());
    // Only what wasn't routed is believed (RFC 4861 §6.1.2).
    frame.extend([NEXT_HEADER_ICMPV6, 255]);
    frame.extend(source.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(icmp);
    Some(frame)
}

/// RFC 8106 §5.2.
fn search_list(domain: &str) -> Vec<u8> {
    let mut name = Vec::new();
    for label in domain.split('.') {
        // A zone's labels are at most 63 bytes long.
        name.push(label.len() as u8);
        name.extend_from_slice(label.as_bytes());
    }
    name.push(0);
    name.resize(name.len().next_multiple_of(8), 0);
    let mut option = vec![31, 1 + (name.len() / 8) as u8, 0, 0];
    option.extend(u32::from(ROUTER_LIFETIME_S).to_be_bytes());
    option.extend(name);
    option
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

/// The sockets, made inside the namespace.
pub(super) struct Sockets {
    /// ICMPv6 on the bridge; none where the network has no IPv6.
    pub(super) solicitations: Option<StdUdpSocket>,
    /// Packet socket on the bridge.
    pub(super) adverts: OwnedFd,
}

/// Serves until the sender of `directory` is dropped.
pub(super) async fn serve(
    network: NetworkKey,
    sockets: Sockets,
    mut directory: watch::Receiver<Arc<Directory>>,
) -> io::Result<()> {
    let solicitations = sockets.solicitations.map(UdpSocket::from_std).transpose()?;
    let mut ticks = tokio::time::interval(INTERVAL);
    let mut last: Option<Instant> = None;
    let mut buffer = [0; REQUEST_MAX];
    loop {
        let asked = async {
            match &solicitations {
                Some(socket) => {
                    socket.recv(&mut buffer).await.map(|length| buffer[..length].first().copied())
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            changed = directory.changed() => if changed.is_err() { return Ok(()) },
            _ = ticks.tick() => {}
            kind = asked => if !matches!(kind, Ok(Some(ROUTER_SOLICITATION))) {
                tokio::time::sleep(Duration::from_millis(1)).await;
                continue;
            },
        }
        let frame = directory.borrow().advertisement.clone();
        let Some(frame) = frame else { continue };
        if let Some(wait) = last.and_then(|last| SPACING.checked_sub(last.elapsed())) {
            tokio::time::sleep(wait).await;
        }
        last = Some(Instant::now());
        if let Err(error) = send(sockets.adverts.as_raw_fd(), &frame, MsgFlags::empty()) {
            debug!(%network, "router advertisement: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use mote_host_api::{SubnetId, SubnetV6Spec};

    use super::*;

    fn subnet(cidr: &str, mode: Option<Ipv6Mode>, dns: &[&str]) -> SubnetV6Spec {
        SubnetV6Spec {
            id: SubnetId::new(),
            cidr: cidr.parse().unwrap(),
            gateway_ip: None,
            ra_mode: mode,
            address_mode: mode,
            dns_nameservers: dns.iter().map(|ip| ip.parse().unwrap()).collect(),
        }
    }

    fn holds(frame: &[u8], address: &str) -> bool {
        let octets = address.parse::<Ipv6Addr>().unwrap().octets();
        frame.windows(16).any(|window| window == octets)
    }

    #[test]
    fn the_frame_names_prefix_router_and_servers_and_its_checksum_verifies() {
        let mut network = NetworkSpec { mtu: 1450, ..NetworkSpec::default() };
        assert_eq!(frame(&network, None, "a"), None);
        network.subnets_v6.push(subnet("fd00:1::/64", Some(Ipv6Mode::Slaac), &["fd00::53"]));
        let mac = MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1]);
        let router = RouterPort { mac, addresses: vec!["fd00:1::1/64".parse().unwrap()] };
        let elsewhere = RouterPort { mac, addresses: vec!["fd00:2::1/64".parse().unwrap()] };
        for (router, lifetime) in [(Some(&router), 1800u16), (Some(&elsewhere), 0), (None, 0)] {
            let frame = frame(&network, router, "lab.example").unwrap();
            let (head, icmp) = frame.split_at(54);
            assert_eq!(&icmp[6..8], lifetime.to_be_bytes());
            assert_eq!(usize::from(u16::from_be_bytes([head[18], head[19]])), icmp.len());
            let pseudo = [&head[22..54], &(icmp.len() as u32).to_be_bytes(), &[0, 0, 0, 58], icmp].concat();
            assert_eq!(checksum(&pseudo), 0);
            assert!(holds(&frame, "fd00:1::") && holds(&frame, "fd00::53"));
            assert!(!holds(&frame, "fe80::a9fe:a9fe") || lifetime == 0, "only as the sender");
            assert!(frame.windows(13).any(|window| window == b"\x03lab\x07example\x00"));
        }
    }

    #[test]
    fn flags_say_how_addresses_are_got_by_mode() {
        use Ipv6Mode::{Dhcpv6Stateful, Dhcpv6Stateless, Slaac};
        for (mode, header, prefix) in
            [(Slaac, 0, 0xc0), (Dhcpv6Stateless, 0x40, 0xc0), (Dhcpv6Stateful, 0xc0, 0x80)]
        {
            let subnets_v6 = vec![subnet("fd00:1::/64", Some(mode), &[]), subnet("fd00:2::/64", None, &[])];
            let network = NetworkSpec { mtu: 1450, subnets_v6, ..NetworkSpec::default() };
            let frame = frame(&network, None, "a").unwrap();
            let icmp = &frame[54..];
            assert_eq!(icmp[5], header, "{mode:?}");
            let at = icmp.windows(3).position(|window| window == [3, 4, 64]).unwrap();
            assert_eq!(icmp[at + 3], prefix, "{mode:?}");
            assert!(!holds(icmp, "fd00:2::"), "a subnet without a mode isn't announced");
            assert!(holds(icmp, "fe80::a9fe:a9fe"), "the network's own resolver");
        }
        let long =
            NetworkSpec { subnets_v6: vec![subnet("fd00::/96", Some(Slaac), &[])], ..NetworkSpec::default() };
        let frame = frame(&long, None, "a").unwrap();
        assert!(frame.windows(4).any(|window| window == [3, 4, 96, 0x80]), "nobody makes addresses of a /96");
    }
}
