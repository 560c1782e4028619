//! The plan at scale: 10,000 ports on 100 hosts.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    time::Instant,
};

use mote_host_api::Remote;
use uuid::Uuid;

use super::{plan::plan, rows::*};
use crate::network::{ports::SERVICE_OWNER, security_group_rules::RuleRow};

const HOSTS: usize = 100;
const NETWORKS: usize = 100;
const PORTS_PER_NETWORK: usize = 100;

fn id(kind: u32, number: usize) -> String {
    Uuid::from_u64_pair(u64::from(kind) << 32, number as u64).to_string()
}

fn port(network: usize, number: usize) -> PortRow {
    let ip = Ipv4Addr::from(0x0a00_0000 + u32::try_from(network * 256 + number + 3).unwrap());
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

fn cloud() -> Rows {
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
            segmentation_id: i64::try_from(network + 1).unwrap(),
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
            addresses: vec![(id(5, network), format!("10.0.{network}.2").parse().unwrap())],
            ..port(network, 0)
        };
        rows.ports.push(service);
        rows.ports.extend((0..PORTS_PER_NETWORK).map(|number| port(network, number)));
    }
    let groups: BTreeSet<String> = rows.ports.iter().flat_map(|port| port.groups.clone()).collect();
    for group in groups {
        let there = rows.rules.len();
        rows.rules.extend((0..10).map(|n| RuleRow::for_tests(&id(8, there + n), &group, Some(&group))));
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
fn concerned(rows: &Rows, group: &str) -> BTreeSet<String> {
    let naming = |port: &&PortRow| port.groups.iter().any(|own| own == group);
    rows.ports.iter().filter(naming).filter_map(|port| port.host_id.clone()).collect()
}

#[test]
fn a_change_of_a_group_of_1000_is_told_to_its_hosts_only() {
    let mut rows = cloud();
    let group = id(6, 0);
    assert_eq!(rows.members.iter().filter(|member| member.security_group_id == group).count(), 1000);
    let before: Vec<_> = {
        let index = Index::new(&rows);
        rows.hosts.iter().map(|host| plan(&index, &host.id).unwrap()).collect()
    };
    let member = rows.members.iter_mut().find(|member| member.security_group_id == group).unwrap();
    member.address = Some("10.99.0.1".into());
    let hosts = concerned(&rows, &group);
    let started = Instant::now();
    let index = Index::new(&rows);
    let indexed = started.elapsed();
    let told: Vec<_> = hosts.iter().map(|host| plan(&index, host).unwrap()).collect();
    let planned = started.elapsed();
    println!(
        "one group of 1000 in 10,000 ports on {HOSTS} hosts: {} hosts concerned, index {} us, index and plans {} us",
        hosts.len(),
        indexed.as_micros(),
        planned.as_micros()
    );
    assert!(hosts.len() < HOSTS, "{}", hosts.len());
    for (state, host) in told.iter().zip(&hosts) {
        let set = state.address_sets.iter().find(|set| set.id.to_string() == group).unwrap();
        assert_eq!(set.addresses.len(), 1000, "{host}");
        let rules = state.security_groups.iter().flat_map(|group| &group.rules);
        assert!(
            rules.clone().count() > 0
                && rules.into_iter().all(|rule| matches!(rule.remote, Some(Remote::Set(_))))
        );
    }
    // Who is not concerned is told the same as before; who is, is not.
    for (host, before) in rows.hosts.iter().zip(&before) {
        let same = plan(&index, &host.id).unwrap() == *before;
        assert_eq!(same, !hosts.contains(&host.id), "{}", host.id);
    }
}

#[test]
fn a_host_without_ports_is_told_nothing_but_its_tunnel() {
    let mut rows = cloud();
    rows.hosts.push(HostRow { id: id(4, 500), tunnel_ip: None });
    let state = plan(&Index::new(&rows), &id(4, 500)).unwrap();
    assert_eq!(state, super::HostNetworks::default());
}
