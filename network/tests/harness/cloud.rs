//! Several hosts on one machine: each a namespace on an underlay (192.0.2.0/24), each connected to the physical network
//! `public`, behind which is the world: 203.0.113.1, the router of 203.0.113.0/24, with 198.51.100.1 behind it.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{collections::HashMap, net::IpAddr, sync::atomic::Ordering};

use mote_host_api::{NetworkSpec, PortSpec, RemotePort, SegmentSpec, TunnelSpec};
use mote_network::{Config, Desired, namespace, plan};

use super::{COUNTER, Client, Lab, run};

pub struct Cloud {
    /// Holds the names of everything, and removes it.
    ground: Lab,
    pub world: String,
    pub hosts: Vec<Host>,
}

pub struct Host {
    pub lab: Lab,
    pub namespace: String,
    pub tunnel_ip: IpAddr,
    pub desired: Desired,
}

/// A bridge in a namespace, and links to it.
fn switch(namespace: &str, bridge: &str) {
    run("ip", ["-n", namespace, "link", "add", bridge, "type", "bridge"]);
    run("ip", ["-n", namespace, "link", "set", bridge, "up"]);
}

fn connect(switch: &str, bridge: &str, port: &str, namespace: &str, link: &str) {
    run("ip", ["-n", namespace, "link", "add", link, "type", "veth", "peer", "name", port, "netns", switch]);
    run("ip", ["-n", switch, "link", "set", port, "master", bridge, "up"]);
    run("ip", ["-n", namespace, "link", "set", link, "up"]);
}

impl Cloud {
    pub fn new(count: u8) -> Self {
        let ground = Lab::new();
        let name = |what: &str| format!("{}{what}", ground.prefix);
        let make = |what: &str| {
            namespace::create_blocking(&name(what)).unwrap();
            run("ip", ["-n", &name(what), "link", "set", "lo", "up"]);
            name(what)
        };
        let (underlay, world) = (make("underlay"), make("world"));
        switch(&underlay, "br0");
        switch(&world, "br0");
        run("ip", ["-n", &world, "address", "add", "203.0.113.1/24", "dev", "br0"]);
        run("ip", ["-n", &world, "address", "add", "2001:db8:ffff::1/64", "dev", "br0", "nodad"]);
        run("ip", ["-n", &world, "address", "add", "198.51.100.1/32", "dev", "lo"]);
        let hosts = (0..count).map(|number| {
            let namespace = make(&format!("host{number}"));
            let tunnel_ip = IpAddr::from([192, 0, 2, 10 + number]);
            connect(&underlay, "br0", &format!("p{number}"), &namespace, "eth0");
            run("ip", ["-n", &namespace, "address", "add", &format!("{tunnel_ip}/24"), "dev", "eth0"]);
            switch(&namespace, "br-public");
            connect(&world, "br0", &format!("p{number}"), &namespace, "eth1");
            run("ip", ["-n", &namespace, "link", "set", "eth1", "master", "br-public"]);
            let config = Config {
                prefix: format!("mt{}x{}-", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)),
                host_namespace: Some(namespace.clone()),
                physical_networks: ["public", "second"]
                    .map(|name| (name.to_owned(), format!("br-{name}")))
                    .into(),
                ..Config::default()
            };
            let tunnel = Some(TunnelSpec { local_ip: tunnel_ip, udp_port: 4789 });
            let desired = Desired { tunnel, ..Desired::default() };
            Host { lab: Lab::with(config), namespace, tunnel_ip, desired }
        });
        let hosts = hosts.collect();
        Self { ground, world, hosts }
    }

    /// Connects the hosts to a physical network `second` with a world of its own behind it: 198.18.0.1, the router of
    /// 198.18.0.0/24 and 2001:db8:eeee::/64, with another 198.51.100.1.
    pub fn second_world(&self) -> String {
        let world = format!("{}second", self.ground.prefix);
        namespace::create_blocking(&world).unwrap();
        run("ip", ["-n", &world, "link", "set", "lo", "up"]);
        switch(&world, "br0");
        run("ip", ["-n", &world, "address", "add", "198.18.0.1/24", "dev", "br0"]);
        run("ip", ["-n", &world, "address", "add", "2001:db8:eeee::1/64", "dev", "br0", "nodad"]);
        run("ip", ["-n", &world, "address", "add", "198.51.100.1/32", "dev", "lo"]);
        for (number, host) in self.hosts.iter().enumerate() {
            switch(&host.namespace, "br-second");
            connect(&world, "br0", &format!("p{number}"), &host.namespace, "eth2");
            run("ip", ["-n", &host.namespace, "link", "set", "eth2", "master", "br-second"]);
        }
        world
    }

    /// Gives each host its part of the networks: those ports that are placed there, and the others as remote ones.
    pub fn place(&mut self, networks: &[(NetworkSpec, Vec<usize>)]) {
        for (number, host) in self.hosts.iter_mut().enumerate() {
            host.desired.networks =
                networks.iter().map(|(network, places)| part(network, places, number)).collect();
        }
    }

    /// One pass on every host, and one that must have nothing to do.
    pub async fn converge(&mut self) {
        for host in &mut self.hosts {
            host.lab.converge_all(&host.desired, &HashMap::new()).await;
            let executor = &host.lab.executor;
            let left = plan(&host.desired, executor.conntrack().await, &executor.observe().await.unwrap());
            assert_eq!(left.steps, [], "a second pass has nothing to do");
            let again = host.lab.converge_all(&host.desired, &HashMap::new()).await;
            assert_eq!(again.executed, 0, "a second pass has nothing to do");
        }
    }

    /// A client on the host that the port is placed on.
    pub fn plug_in(&mut self, host: usize, network: &NetworkSpec, port: &PortSpec) -> Client {
        let client = self.hosts[host].lab.plug_in(network.id, port);
        let mtu = network.mtu.to_string();
        let name = client.namespace.clone();
        run("ip", ["-n", &name, "link", "set", "eth0", "mtu", &mtu]);
        for fixed in &port.fixed_ips {
            run("ip", ["-n", &name, "address", "add", &format!("{}/24", fixed.ip_address), "dev", "eth0"]);
        }
        for fixed in &port.fixed_ips_v6 {
            let address = format!("{}/64", fixed.ip_address);
            run("ip", ["-n", &name, "address", "add", &address, "dev", "eth0", "nodad"]);
        }
        client
    }
}

fn part(network: &NetworkSpec, places: &[usize], host: usize) -> NetworkSpec {
    let mut part = network.clone();
    part.ports.clear();
    let overlay = matches!(network.segment, Some(SegmentSpec::Vxlan { .. }));
    for (port, place) in network.ports.iter().zip(places) {
        if *place == host {
            part.ports.push(port.clone());
        } else if overlay {
            let v4 = port.fixed_ips.iter().map(|fixed| IpAddr::V4(fixed.ip_address));
            let v6 = port.fixed_ips_v6.iter().map(|fixed| IpAddr::V6(fixed.ip_address));
            part.remote_ports.push(RemotePort {
                mac_address: port.mac_address.clone(),
                ip_addresses: v4.chain(v6).collect(),
                tunnel_ip: IpAddr::from([192, 0, 2, 10 + *place as u8]),
            });
        }
    }
    part
}
