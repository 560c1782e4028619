use std::net::IpAddr;

use mote_host_api::{
    FixedIp, GatewayPlace, HostRoute, RemotePort, RouterGateway, RouterId, RouterInterface, RouterSpec,
    ServerId,
};
use uuid::Uuid;

use super::*;

fn network() -> NetworkSpec {
    let subnet = |third: u8| SubnetSpec {
        id: SubnetId(Uuid::from_u128(third.into())),
        cidr: format!("10.0.{third}.0/24").parse().unwrap(),
        gateway_ip: None,
        service_ip: Ipv4Addr::new(10, 0, third, 2),
        enable_dhcp: true,
        dns_nameservers: vec![],
        host_routes: vec![],
    };
    let port = |last: u8| PortSpec {
        id: PortId(Uuid::from_u128(u128::from(last) << 100)),
        server_id: ServerId::new(),
        mac_address: format!("fa:16:3e:00:00:{last:02x}"),
        fixed_ips: vec![FixedIp {
            subnet_id: SubnetId(Uuid::from_u128(0)),
            ip_address: Ipv4Addr::new(10, 0, 0, last),
        }],
        ..PortSpec::default()
    };
    NetworkSpec {
        id: NetworkId::new(),
        mtu: 1450,
        subnets: vec![subnet(0), subnet(1)],
        ports: vec![port(10), port(11)],
        ..NetworkSpec::default()
    }
}

#[test]
fn a_good_network_is_taken() {
    let spec = network();
    let config = validate(&spec).unwrap();
    let addresses: Vec<String> = config.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.0.0.2/24", "10.0.1.2/24", "169.254.169.254/32", "fe80::a9fe:a9fe/64"]);
    assert_eq!(config.ports.len(), 2);
    assert_eq!(config.neighbours()[&IpAddr::from([10, 0, 0, 11])].to_string(), "fa:16:3e:00:00:0b");
}

#[test]
fn an_overlay_needs_a_tunnel_address_only_when_it_is_on_other_hosts() {
    let mut spec = network();
    spec.segment = Some(SegmentSpec::Vxlan { vni: 5 });
    let configured = |spec: &NetworkSpec| {
        configure(&Desired::from(&[spec.clone()][..]), Conntrack::Bridge, &mut Memory::default())
    };
    let (configs, errors) = configured(&spec);
    assert_eq!((configs[0].segment.clone(), errors), (None, vec![]));
    spec.remote_ports.push(RemotePort {
        mac_address: "fa:16:3e:00:09:09".to_owned(),
        ip_addresses: vec![],
        tunnel_ip: [192, 0, 2, 1].into(),
    });
    assert_eq!(configured(&spec).1[0].problem, SpecProblem::NoTunnel);
}

#[test]
fn a_network_has_a_vxlan_link_when_something_of_it_is_on_other_hosts() {
    let mut desired = Desired {
        networks: vec![network()],
        tunnel: Some(TunnelSpec { local_ip: [192, 0, 2, 1].into(), udp_port: 4789 }),
        ..Desired::default()
    };
    desired.networks[0].segment = Some(SegmentSpec::Vxlan { vni: 5 });
    let has_link = |desired: &Desired| {
        let (configs, errors) = configure(desired, Conntrack::Bridge, &mut Memory::default());
        assert_eq!(errors, []);
        configs.into_iter().find(|config| config.id == desired.networks[0].id).unwrap().segment.is_some()
    };
    assert!(!has_link(&desired), "all of it is here");
    let remote = |last| RemotePort {
        mac_address: "fa:16:3e:00:09:09".to_owned(),
        ip_addresses: vec![],
        tunnel_ip: [192, 0, 2, last].into(),
    };
    desired.networks[0].remote_ports = vec![remote(1)];
    assert!(!has_link(&desired), "the other host agent is on this machine");
    desired.networks[0].remote_ports = vec![remote(2)];
    assert!(has_link(&desired), "a port is on another host");

    // Ports of another network of its router are elsewhere: they send over this one.
    desired.networks[0].remote_ports.clear();
    let mut other = NetworkSpec { segment: Some(SegmentSpec::Vxlan { vni: 6 }), ..network() };
    other.remote_ports = vec![remote(2)];
    desired.networks.push(other);
    let interface = |network: usize| RouterInterface {
        port_id: PortId(Uuid::from_u128(network as u128 + 1)),
        network_id: desired.networks[network].id,
        mac_address: format!("fa:16:3e:aa:00:0{network}"),
        addresses: vec![],
    };
    let gateway = |place| RouterGateway {
        place,
        port_id: PortId(Uuid::from_u128(9)),
        network_id: NetworkId::new(),
        mac_address: "fa:16:3e:aa:00:09".to_owned(),
        addresses: vec![],
        next_hop: None,
        next_hop_v6: None,
        enable_snat: false,
        floating_ips: vec![],
    };
    let router = RouterSpec {
        id: RouterId::new(),
        admin_state_up: true,
        interfaces: vec![interface(0), interface(1)],
        gateway: Some(gateway(GatewayPlace::Here)),
        routes: vec![],
        routes_v6: vec![],
        extra_gateways: Vec::new(),
        default_route_ecmp: false,
    };
    desired.routers = vec![router];
    assert!(has_link(&desired), "ports on another host reach it by their router");
    desired.networks[1].remote_ports.clear();
    assert!(!has_link(&desired), "nobody else is there");
    desired.routers[0].gateway = Some(gateway(GatewayPlace::Remote([192, 0, 2, 2].into())));
    assert!(has_link(&desired), "the gateway is on another host");
}

#[test]
fn filtered_ports_are_refused_where_the_kernel_cannot_filter_them() {
    let mut spec = network();
    let configured = |spec: &NetworkSpec| {
        configure(&Desired::from(&[spec.clone()][..]), Conntrack::Missing, &mut Memory::default())
    };
    assert_eq!(configured(&spec).1, vec![]);
    spec.ports[0].port_security = true;
    assert_eq!(configured(&spec).1[0].problem, SpecProblem::NoConntrack);
}

#[test]
fn bad_networks_are_refused_by_name() {
    type Change = fn(&mut NetworkSpec);
    type Expected = fn(&SpecProblem) -> bool;
    let changes: &[(Change, Expected)] = &[
        (|n| n.mtu = 67, |p| matches!(p, SpecProblem::Mtu(67))),
        (|n| n.mtu = 65522, |p| matches!(p, SpecProblem::Mtu(_))),
        (|n| n.subnets[0].cidr = "10.0.0.0/31".parse().unwrap(), |p| matches!(p, SpecProblem::Cidr(..))),
        (|n| n.subnets[0].cidr = "10.0.0.1/24".parse().unwrap(), |p| matches!(p, SpecProblem::Cidr(..))),
        (|n| n.subnets[0].cidr = "127.0.0.0/8".parse().unwrap(), |p| matches!(p, SpecProblem::Cidr(..))),
        (|n| n.subnets[0].cidr = "224.0.0.0/24".parse().unwrap(), |p| matches!(p, SpecProblem::Cidr(..))),
        (|n| n.subnets[0].cidr = "0.0.0.0/1".parse().unwrap(), |p| matches!(p, SpecProblem::Cidr(..))),
        (|n| n.subnets[1].id = n.subnets[0].id, |p| matches!(p, SpecProblem::DuplicateSubnet(_))),
        (
            |n| {
                n.subnets[1].cidr = "10.0.0.0/16".parse().unwrap();
            },
            |p| matches!(p, SpecProblem::Overlap(..)),
        ),
        (
            |n| n.subnets[0].service_ip = Ipv4Addr::new(10, 0, 1, 2),
            |p| matches!(p, SpecProblem::ServiceIp(..)),
        ),
        (
            |n| n.subnets[0].service_ip = Ipv4Addr::new(10, 0, 0, 0),
            |p| matches!(p, SpecProblem::ServiceIp(..)),
        ),
        (
            |n| n.subnets[0].service_ip = Ipv4Addr::new(10, 0, 0, 255),
            |p| matches!(p, SpecProblem::ServiceIp(..)),
        ),
        (
            |n| {
                n.subnets[1].cidr = "169.254.0.0/16".parse().unwrap();
                n.subnets[1].service_ip = METADATA_IP;
            },
            |p| matches!(p, SpecProblem::ServiceIp(..)),
        ),
        (
            |n| n.subnets[0].dns_nameservers = vec![METADATA_IP; DNS_NAMESERVERS_MAX + 1],
            |p| matches!(p, SpecProblem::TooMany { .. }),
        ),
        (
            |n| {
                let route = HostRoute { destination: Ipv4Net::default(), nexthop: METADATA_IP };
                n.subnets[0].host_routes = vec![route; HOST_ROUTES_MAX + 1];
            },
            |p| matches!(p, SpecProblem::TooMany { .. }),
        ),
        (|n| n.ports = vec![n.ports[0].clone(); PORTS_MAX + 1], |p| matches!(p, SpecProblem::TooMany { .. })),
        (|n| n.ports[0].mac_address = "fa:16:3e".into(), |p| matches!(p, SpecProblem::Mac(..))),
        (|n| n.ports[0].mac_address = "ff:ff:ff:ff:ff:ff".into(), |p| matches!(p, SpecProblem::Mac(..))),
        (
            |n| n.ports[0].mac_address = n.ports[1].mac_address.clone(),
            |p| matches!(p, SpecProblem::DuplicateMac(..)),
        ),
        (
            |n| n.ports[0].mac_address = bridge_mac(n.id).to_string(),
            |p| matches!(p, SpecProblem::DuplicateMac(..)),
        ),
        (
            |n| n.ports[0].fixed_ips[0].subnet_id = SubnetId::new(),
            |p| matches!(p, SpecProblem::UnknownSubnet(..)),
        ),
        (
            |n| n.ports[0].fixed_ips[0].ip_address = Ipv4Addr::new(10, 0, 1, 10),
            |p| matches!(p, SpecProblem::FixedIp(..)),
        ),
        (
            |n| n.ports[0].fixed_ips[0].ip_address = Ipv4Addr::new(10, 0, 0, 11),
            |p| matches!(p, SpecProblem::DuplicateIp(..)),
        ),
        (
            |n| n.ports[0].fixed_ips[0].ip_address = Ipv4Addr::new(10, 0, 0, 2),
            |p| matches!(p, SpecProblem::DuplicateIp(..)),
        ),
        (|n| n.ports[0].id = n.ports[1].id, |p| matches!(p, SpecProblem::DuplicatePort(_))),
    ];
    for (i, (change, expected)) in changes.iter().enumerate() {
        let mut spec = network();
        change(&mut spec);
        let error = validate(&spec).expect_err(&format!("change {i} was taken"));
        assert_eq!(error.network, spec.id);
        assert!(expected(&error.problem), "change {i}: {error}");
        assert!(error.to_string().contains(&spec.id.to_string()));
    }
}

#[test]
fn networks_that_would_share_a_namespace_exclude_each_other() {
    let (mut a, mut b, c) = (network(), network(), network());
    a.id = NetworkId(Uuid::from_u128(0x1234_5678_9abc_0000_0000_0000_0000_0001));
    b.id = NetworkId(Uuid::from_u128(0x1234_5678_9abf_0000_0000_0000_0000_0002));
    let (configs, errors) = validate_all(&[a.clone(), b, c.clone(), c.clone()]);
    assert!(configs.is_empty());
    assert_eq!(errors.len(), 2);
    assert_eq!(errors[0].problem, SpecProblem::KeyCollision(a.id));
    assert_eq!(errors[1].problem, SpecProblem::Duplicate);
    let (configs, errors) = validate_all(&[a, c]);
    assert_eq!((configs.len(), errors.len()), (2, 0));
}
