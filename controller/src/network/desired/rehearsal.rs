//! A cloud of 10,000 ports on 100 hosts as rows: what the tests of the plan and its benchmark look at.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::{plan::plan, rows::*};
use crate::{
    http::error::ApiError,
    network::{ports::SERVICE_OWNER, security_group_rules::RuleRow},
};

pub(super) const HOSTS: u32 = 100;
const NETWORKS: u32 = 100;
const PORTS_PER_NETWORK: u32 = 100;

pub(super) fn id(kind: u32, number: u32) -> String {
    Uuid::from_u64_pair(u64::from(kind) << 32, number.into()).to_string()
}

fn port(network: u32, number: u32) -> PortRow {
    let ip = Ipv4Addr::from(0x0a00_0000 + network * 256 + number + 3);
    PortRow {
        id: id(1, network * PORTS_PER_NETWORK + number),
        network_id: id(2, network),
        mac_address: format!("fa:16:3e:{network:02x}:00:{number:02x}"),
        device_owner: "compute:nova".into(),
        router_id: None,
        server_id: Some(id(3, network * PORTS_PER_NETWORK + number)),
        // A network's ports are on 20 hosts.
        host_id: Some(id(4, (network + number % 20) % HOSTS)),
        hostname: Some(format!("s{number}")),
        port_security_enabled: true,
        allowed_address_pairs: "[]".into(),
        admin_state_up: true,
        qos_policy_id: None,
        addresses: vec![(id(5, network), IpAddr::from(ip))],
        // The first ten networks are one group of 1,000 members.
        groups: vec![id(6, if network < 10 { 0 } else { network })],
    }
}

pub(super) fn cloud() -> Rows {
    let mut rows = Rows::default();
    for number in 0..HOSTS {
        rows.hosts.push(HostRow { id: id(4, number), tunnel_ip: Some(format!("192.0.2.{}", number + 1)) });
    }
    for network in 0..NETWORKS {
        rows.networks.push(NetworkRow {
            id: id(2, network),
            mtu: 1450,
            network_type: "vxlan".into(),
            physical_network: String::new(),
            segmentation_id: i64::from(network + 1),
            admin_state_up: true,
            qos_policy_id: None,
        });
        rows.subnets.push(SubnetRow {
            id: id(5, network),
            network_id: id(2, network),
            cidr: format!("10.0.{network}.0/24"),
            gateway_ip: Some(format!("10.0.{network}.1")),
            enable_dhcp: true,
            dns_nameservers: "[]".into(),
            host_routes: "[]".into(),
            ipv6_address_mode: None,
            ipv6_ra_mode: None,
        });
        let service = PortRow {
            id: id(7, network),
            device_owner: SERVICE_OWNER.into(),
            server_id: None,
            host_id: None,
            hostname: None,
            groups: Vec::new(),
            addresses: vec![(id(5, network), IpAddr::from([10, 0, network as u8, 2]))],
            ..port(network, 0)
        };
        rows.ports.push(service);
        rows.ports.extend((0..PORTS_PER_NETWORK).map(|number| port(network, number)));
    }
    let groups: BTreeSet<String> = rows.ports.iter().flat_map(|port| port.groups.clone()).collect();
    for group in groups {
        let there = rows.rules.len() as u32;
        rows.rules.extend((0..10).map(|n| RuleRow::tcp_between(&id(8, there + n), &group, Some(&group))));
        rows.groups.push((group, true));
    }
    for port in &rows.ports {
        for group in &port.groups {
            rows.members.push(MemberRow {
                security_group_id: group.clone(),
                address: Some(port.addresses[0].1.to_string()),
                allowed_address_pairs: "[]".into(),
            });
        }
    }
    rows
}

/// The hosts with a port whose rules name the group, as the database finds them.
pub(super) fn concerned(rows: &Rows, group: &str) -> BTreeSet<String> {
    let naming = |port: &&PortRow| port.groups.iter().any(|own| own == group);
    rows.ports.iter().filter(naming).filter_map(|port| port.host_id.clone()).collect()
}

/// What planning a change took.
#[derive(Debug)]
pub struct Rehearsal {
    /// Hosts of the cloud.
    pub hosts: u32,
    /// Those that the change concerns.
    pub concerned: usize,
    /// Planning what each of them is told.
    pub time: Duration,
}

/// Plans a change of one of 1,000 members of a group for all hosts that it concerns.
///
/// # Errors
/// When a row can't be understood.
pub fn member_changed() -> Result<Rehearsal, ApiError> {
    let mut rows = cloud();
    let group = id(6, 0);
    if let Some(member) = rows.members.iter_mut().find(|member| member.security_group_id == group) {
        member.address = Some("10.99.0.1".into());
    }
    let concerned = concerned(&rows, &group);
    let started = Instant::now();
    let index = Index::new(&rows)?;
    let told: Result<Vec<_>, ApiError> = concerned.iter().map(|host| plan(&index, host)).collect();
    let time = started.elapsed();
    Ok(Rehearsal { hosts: HOSTS, concerned: told?.len(), time })
}
