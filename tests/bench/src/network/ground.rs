//! Hosts and clients in namespaces that go with the value that stands for them.

use std::{
    net::{IpAddr, Ipv4Addr},
    os::fd::OwnedFd,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use mote_host_api::{
    AddressSetId, AddressSetSpec, Direction, EtherType, FixedIp, NetworkId, NetworkSpec, PortId, PortSpec,
    Protocol, Remote, RemotePort, SecurityGroupId, SecurityGroupRule, SecurityGroupSpec, SegmentSpec,
    ServerId, SubnetId, SubnetSpec, TunnelSpec,
};
use mote_network::{Config, Desired, Executor, names::tap_name, namespace};

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Which of two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    One,
    Two,
}

impl Place {
    fn tunnel_ip(self) -> IpAddr {
        IpAddr::from([192, 0, 2, if self == Self::One { 1 } else { 2 }])
    }
}

/// Hosts, and two clients that can reach each other.
pub(super) struct Ground {
    prefix: String,
    clients: Vec<String>,
    hosts: Vec<Executor>,
}

impl Drop for Ground {
    fn drop(&mut self) {
        for name in namespace::list().unwrap_or_default() {
            if name.starts_with(&self.prefix) {
                // Best effort: what stays has a name that says where it is from.
                let _ = namespace::delete_blocking(&name);
            }
        }
    }
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().context("ip")?;
    if !output.status.success() {
        bail!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

impl Ground {
    fn empty() -> Self {
        let prefix = format!("mb{}x{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        Self { prefix, clients: Vec::new(), hosts: Vec::new() }
    }

    fn make(&self, what: &str) -> Result<String> {
        let name = format!("{}{what}", self.prefix);
        namespace::create_blocking(&name)?;
        ip(&format!("-n {name} link set lo up"))?;
        Ok(name)
    }

    pub(super) fn clients(&self) -> [&str; 2] {
        [0, 1].map(|at| self.clients.get(at).map_or("", String::as_str))
    }

    /// The address of the second client.
    pub(super) fn receiver(&self) -> Ipv4Addr {
        address(1)
    }

    /// A client whose card is `link` at the other end.
    fn plug_in(&mut self, there: &str, link: &str, mtu: u16) -> Result<()> {
        let number = self.clients.len() as u16;
        let name = self.make(&format!("c{number}"))?;
        let mac = mac(number);
        ip(&format!("-n {there} link add {link} type veth peer name eth0 address {mac} netns {name}"))?;
        ip(&format!("-n {name} address add {}/16 dev eth0", address(number)))?;
        ip(&format!("-n {name} link set eth0 mtu {mtu} up"))?;
        self.clients.push(name);
        Ok(())
    }

    fn plain_port(&mut self, switch: &str, mtu: u16) -> Result<()> {
        let link = format!("p{}", self.clients.len());
        self.plug_in(switch, &link, mtu)?;
        ip(&format!("-n {switch} link set {link} mtu {mtu} master br0 up"))
    }

    /// Two clients on a bridge.
    pub(super) fn plain_bridge() -> Result<Self> {
        let mut ground = Self::empty();
        let switch = ground.make("s")?;
        ip(&format!("-n {switch} link add br0 type bridge"))?;
        ip(&format!("-n {switch} link set br0 up"))?;
        for _ in 0..2 {
            ground.plain_port(&switch, MTU)?;
        }
        Ok(ground)
    }

    /// Two hosts with a link between them.
    fn underlay(&self) -> Result<[String; 2]> {
        let hosts = [self.make("h1")?, self.make("h2")?];
        ip(&format!("-n {} link add eth0 type veth peer name eth0 netns {}", hosts[0], hosts[1]))?;
        for (host, place) in hosts.iter().zip([Place::One, Place::Two]) {
            ip(&format!("-n {host} address add {}/24 dev eth0", place.tunnel_ip()))?;
            ip(&format!("-n {host} link set eth0 up"))?;
        }
        Ok(hosts)
    }

    /// Two clients on bridges of two hosts, a VXLAN between these.
    pub(super) fn plain_vxlan() -> Result<Self> {
        let mut ground = Self::empty();
        let hosts = ground.underlay()?;
        for (host, (own, other)) in hosts.iter().zip([(Place::One, Place::Two), (Place::Two, Place::One)]) {
            let (own, other) = (own.tunnel_ip(), other.tunnel_ip());
            ip(&format!("-n {host} link add br0 type bridge"))?;
            ip(&format!("-n {host} link add vx0 type vxlan id 9 dstport 4789 local {own} remote {other}"))?;
            ip(&format!("-n {host} link set vx0 master br0 up"))?;
            ip(&format!("-n {host} link set br0 up"))?;
            ground.plain_port(host, MTU)?;
        }
        Ok(ground)
    }

    /// One host without clients.
    pub(super) fn host() -> Result<Self> {
        let mut ground = Self::empty();
        let host = ground.make("h")?;
        ground.hosts.push(ground.executor(&host, 'x'));
        Ok(ground)
    }

    fn executor(&self, host: &str, letter: char) -> Executor {
        let prefix = format!("{}{letter}-", self.prefix);
        Executor::new(Config { prefix, host_namespace: Some(host.to_owned()), ..Config::default() })
    }

    /// Two clients at ports of a network, filtered by a group with this number of rules.
    pub(super) async fn mote(places: &[Place; 2], rules: Option<u16>) -> Result<Self> {
        let mut ground = Self::empty();
        let hosts = ground.underlay()?;
        let (group, members) = group(rules.unwrap_or_default());
        let network = network_with_ports(2, rules.map(|_| group.id));
        for ((host, letter), place) in hosts.iter().zip(['x', 'y']).zip([Place::One, Place::Two]) {
            let mut part = network.clone();
            part.segment = Some(SegmentSpec::Vxlan { vni: 9 });
            part.ports.clear();
            for (port, at) in network.ports.iter().zip(places) {
                if *at == place {
                    part.ports.push(port.clone());
                } else {
                    part.remote_ports.push(RemotePort {
                        mac_address: port.mac_address.clone(),
                        ip_addresses: port.fixed_ips.iter().map(|fixed| fixed.ip_address.into()).collect(),
                        tunnel_ip: at.tunnel_ip(),
                    });
                }
            }
            let desired = Desired {
                networks: vec![part],
                security_groups: vec![group.clone()],
                address_sets: vec![members.clone()],
                tunnel: Some(TunnelSpec { local_ip: place.tunnel_ip(), udp_port: 4789 }),
                ..Desired::default()
            };
            let executor = ground.executor(host, letter);
            converge(&executor, &desired).await?;
            for port in &desired.networks[0].ports {
                ground.plug_in(&executor.namespace(network.id), &tap_name(port.id), MTU)?;
            }
            converge(&executor, &desired).await?;
            ground.hosts.push(executor);
        }
        Ok(ground)
    }

    /// One pass on the first host.
    pub(super) async fn converge(&self, desired: &Desired) -> Result<()> {
        converge(self.hosts.first().context("no host")?, desired).await
    }

    pub(super) async fn open_tap(&self, network: &NetworkSpec, port: &PortSpec) -> Result<OwnedFd> {
        let host = self.hosts.first().context("no host")?;
        Ok(host.open_tap(network.id, port, network.mtu).await?)
    }
}

async fn converge(executor: &Executor, desired: &Desired) -> Result<()> {
    let plan = executor.plan(desired, &executor.observe().await?).await;
    if let Some(refused) = plan.refused.first() {
        bail!("{refused}");
    }
    let mut session = executor.session();
    for step in &plan.steps {
        session.execute(step).await.with_context(|| step.to_string())?;
    }
    Ok(())
}

const MTU: u16 = 1450;

fn address(number: u16) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_000a + u32::from(number))
}

fn mac(number: u16) -> String {
    let [high, low] = number.to_be_bytes();
    format!("fa:16:3e:00:{high:02x}:{low:02x}")
}

/// A rule for what comes in.
pub(super) fn a_rule(protocol: Protocol, remote: Option<Remote>) -> SecurityGroupRule {
    SecurityGroupRule { direction: Direction::Ingress, ethertype: EtherType::Ipv4, protocol, remote }
}

/// A group that lets out everything and in what its members send, and rules that match nothing here.
pub(super) fn group(rules: u16) -> (SecurityGroupSpec, AddressSetSpec) {
    let id = AddressSetId::new();
    let addresses = (0..1000).map(|number| mote_host_api::host_net(address(number).into())).collect();
    let others = (1..rules).map(|number| {
        let range = IpNet::new([172, 16, 0, number as u8].into(), 32).unwrap_or_default();
        a_rule(Protocol::Tcp { ports: Some((10 * number, 10 * number + 1)) }, Some(Remote::Cidr(range)))
    });
    let out = SecurityGroupRule { direction: Direction::Egress, ..a_rule(Protocol::Any, None) };
    let rules = others.chain([a_rule(Protocol::Any, Some(Remote::Set(id))), out]).collect();
    let group = SecurityGroupSpec { id: SecurityGroupId::new(), stateful: true, rules };
    (group, AddressSetSpec { id, addresses })
}

/// A port of a network, filtered if it has a group.
pub(super) fn port(network: &NetworkSpec, number: u16, group: Option<SecurityGroupId>) -> PortSpec {
    let subnet_id = network.subnets.first().map_or_else(SubnetId::new, |subnet| subnet.id);
    PortSpec {
        id: PortId::new(),
        server_id: ServerId::new(),
        mac_address: mac(number),
        fixed_ips: vec![FixedIp { subnet_id, ip_address: address(number) }],
        port_security: group.is_some(),
        security_groups: group.into_iter().collect(),
        ..PortSpec::default()
    }
}

/// 10.0.0.0/16 with ports.
pub(super) fn network_with_ports(count: u16, group: Option<SecurityGroupId>) -> NetworkSpec {
    let subnet = SubnetSpec {
        id: SubnetId::new(),
        cidr: ipnet::Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 16),
        gateway_ip: None,
        service_ip: Ipv4Addr::new(10, 0, 0, 2),
        enable_dhcp: true,
        dns_nameservers: Vec::new(),
        host_routes: Vec::new(),
    };
    let mut network =
        NetworkSpec { id: NetworkId::new(), mtu: MTU, subnets: vec![subnet], ..NetworkSpec::default() };
    network.ports = (0..count).map(|number| port(&network, number, group)).collect();
    network
}
