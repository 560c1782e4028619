//! Networks over several hosts: two tenants with the same addresses, three hosts, a physical network.

#![allow(clippy::unwrap_used, reason = "a test's helpers, too, fail by panicking")]

mod harness;

use std::net::{IpAddr, SocketAddr};

use harness::{
    add_port,
    cloud::Cloud,
    network,
    probe::{self, Wire},
    run,
};
use mote_host_api::{FixedIpV6, NetworkSpec, SegmentSpec, SubnetId};

/// A VXLAN network with a port of 10.0.0.(10 + i) and fd00::(10 + i) for each i.
fn overlay(vni: u32, ports: u8) -> NetworkSpec {
    let mut network = network();
    network.mtu = 1450;
    network.segment = Some(SegmentSpec::Vxlan { vni });
    for host in 10..10 + ports {
        add_port(&mut network, host);
        let port = network.ports.last_mut().unwrap();
        // Tenants differ in Ethernet addresses only.
        port.mac_address = format!("fa:16:3e:{vni:02x}:00:{host:02x}");
        let ip_address = format!("fd00::{host}").parse().unwrap();
        port.fixed_ips_v6 = vec![FixedIpV6 { subnet_id: SubnetId::new(), ip_address }];
    }
    network
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_ports_reach_each_other_over_hosts_and_nobody_elses() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")).or(harness::skip_without("ping")));
    let mut cloud = Cloud::new(3);
    let (red, blue) = (overlay(7, 4), overlay(8, 2));
    // Red: two on host 0, one on each other; blue: hosts 0 and 2. Both have .10 and .11.
    let places = [(red.clone(), vec![0, 0, 1, 2]), (blue.clone(), vec![0, 2])];
    cloud.place(&places);
    cloud.converge().await;
    let mut clients = Vec::new();
    for (network, places) in &places {
        let plugged =
            network.ports.iter().zip(places).map(|(port, host)| cloud.plug_in(*host, network, port));
        clients.push(plugged.collect::<Vec<_>>());
    }
    cloud.converge().await;
    for (tenant, clients) in clients.iter().enumerate() {
        for (from, client) in clients.iter().enumerate() {
            for to in (0..4).filter(|to| *to != from) {
                let expected = to < clients.len();
                for ip in
                    [IpAddr::from([10, 0, 0, 10 + to as u8]), format!("fd00::{}", 10 + to).parse().unwrap()]
                {
                    assert_eq!(
                        probe::ping(&client.namespace, ip, expected),
                        expected,
                        "tenant {tenant}: {from} to {ip}"
                    );
                }
            }
        }
    }
    // A full-size packet passes, and a connection.
    let full = ["-n", "-q", "-c", "1", "-W", "5", "-M", "do", "-s", "1422", "10.0.0.13"];
    assert!(clients[0][0].run("ping", full).status.success());
    let (a, d) = (&clients[0][0].namespace, &clients[0][3].namespace);
    assert!(probe::tcp(a, d, SocketAddr::from(([10, 0, 0, 13], 80)), true));
    // No question for an address leaves a host: what host 1 sees of the underlay is only what is for it.
    run("ip", ["-n", a, "neighbour", "flush", "dev", "eth0"]);
    let other = Wire::open(&cloud.hosts[1].namespace, "eth0");
    assert!(probe::ping(a, "10.0.0.13".parse().unwrap(), true));
    assert!(!probe::ping(a, "10.0.0.99".parse().unwrap(), false));
    assert!(!other.sees(&[8, 0, 6, 4, 0, 1, 0xfa, 0x16, 0x3e], false), "no ARP of a guest on the underlay");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_moves_to_another_host_is_found_there() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")).or(harness::skip_without("ping")));
    let mut cloud = Cloud::new(3);
    let red = overlay(7, 2);
    for place in [1, 2] {
        cloud.place(&[(red.clone(), vec![0, place])]);
        cloud.converge().await;
        let here = cloud.plug_in(0, &red, &red.ports[0]);
        let there = cloud.plug_in(place, &red, &red.ports[1]);
        cloud.converge().await;
        assert!(probe::ping(&here.namespace, "10.0.0.11".parse().unwrap(), true), "on host {place}");
        for client in [here, there] {
            run("ip", ["-n", &client.namespace, "link", "delete", "eth0"]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flat_network_is_the_physical_one() {
    skip_if!(harness::skip_reason().or(harness::skip_without("nft")).or(harness::skip_without("ping")));
    let mut cloud = Cloud::new(2);
    let mut public = overlay(9, 0);
    public.subnets[0].cidr = "203.0.113.0/24".parse().unwrap();
    public.subnets[0].service_ip = [203, 0, 113, 2].into();
    public.mtu = 1500;
    public.segment = Some(SegmentSpec::Flat { physical_network: "public".to_owned() });
    add_port(&mut public, 20);
    public.ports[0].fixed_ips[0].ip_address = [203, 0, 113, 20].into();
    let mut here = public.clone();
    here.segment = Some(SegmentSpec::Flat { physical_network: "public".to_owned() });
    cloud.hosts[0].desired.networks = vec![here];
    cloud.converge().await;
    let client = cloud.plug_in(0, &public, &public.ports[0]);
    cloud.converge().await;
    assert!(probe::ping(&client.namespace, "203.0.113.1".parse().unwrap(), true));
    // Who sends with its Ethernet address from outside doesn't get what is for it.
    let wire = Wire::open(&cloud.world, "br0");
    let mac: mote_network::names::MacAddress = public.ports[0].mac_address.parse().unwrap();
    (0..3).for_each(|_| wire.send(&probe::ethernet([0xff; 6], mac.0, 0x0800, b"spoofed")));
    let entries = run("bridge", ["-n", &cloud.hosts[0].lab.executor.namespace(public.id), "fdb", "show"]);
    let entry = |line: &&str| line.starts_with(&mac.to_string()) && line.contains("master");
    let entries: Vec<&str> = entries.lines().filter(entry).collect();
    assert!(entries.len() == 1 && entries[0].contains("dev tap"), "{entries:?}");
    // The host's end goes with the network.
    let links = |cloud: &Cloud| run("ip", ["-n", &cloud.hosts[0].namespace, "-o", "link"]);
    assert!(links(&cloud).contains("up"));
    cloud.hosts[0].desired.networks.clear();
    cloud.converge().await;
    let name = format!("up{}", mote_network::NetworkKey::from(public.id));
    // The kernel takes a namespace down in its own time.
    let gone = || !links(&cloud).contains(&name);
    let end = std::time::Instant::now() + probe::PATIENCE;
    while !gone() && std::time::Instant::now() < end {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(gone());
}
