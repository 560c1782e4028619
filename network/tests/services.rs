//! DHCP and metadata as real clients see them, over a bridge of a real kernel.

#![allow(clippy::unwrap_used, reason = "a test's helpers, too, fail by panicking")]

mod harness;

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Stdio,
    time::{Duration, Instant},
};

use harness::{Client, Lab, add_port, metadata_of, network, run};
use mote_host_api::{Direction, EtherType, Protocol, SecurityGroupId, SecurityGroupRule, SecurityGroupSpec};
use mote_network::{Desired, namespace};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Longest wait for something that must happen.
const PATIENCE: Duration = Duration::from_secs(20);
const METADATA: ([u8; 4], u16) = ([169, 254, 169, 254], 80);

/// Waits for what another process does.
async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what}");
}

/// Runs blocking code of a test beside the services' tasks.
async fn beside<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(f).await.unwrap()
}

#[tokio::test]
async fn a_dhcp_client_gets_its_address_routes_and_metadata() {
    skip_if!(harness::skip_reason());
    skip_if!(harness::skip_without("busybox").or(harness::skip_without("curl")));
    let mut lab = Lab::new();
    let mut network = network();
    let port = add_port(&mut network, 10);
    let networks = vec![network];
    let metadata = metadata_of(&networks);
    lab.converge(&networks, &metadata).await;
    let client = lab.plug_in(networks[0].id, &port);
    lab.converge(&networks, &metadata).await;

    let client = beside(move || {
        client.configure_by_dhcp();
        client
    })
    .await;
    let lease = client.lease();
    let expected = [
        ("ip", "10.0.0.10"),
        ("mask", "24"),
        ("subnet", "255.255.255.0"),
        ("broadcast", "10.0.0.255"),
        ("router", "10.0.0.1"),
        ("dns", "9.9.9.9"),
        ("serverid", "10.0.0.2"),
        ("lease", "86400"),
        ("mtu", "1442"),
        ("hostname", "vm-10"),
        ("staticroutes", "169.254.169.254/32 10.0.0.2 172.20.0.0/16 10.0.0.3 0.0.0.0/0 10.0.0.1"),
    ];
    for (name, value) in expected {
        assert_eq!(lease.get(name).map(String::as_str), Some(value), "{name}");
    }
    let routes = run("ip", ["-n", &client.namespace, "route"]);
    assert!(routes.contains("169.254.169.254 via 10.0.0.2"), "{routes}");
    assert!(routes.contains("default via 10.0.0.1"), "{routes}");

    beside(move || {
        let (status, body) = client.metadata("/openstack/latest/meta_data.json").unwrap();
        let data: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &data["uuid"]), (200, &serde_json::json!(port.server_id)));
        assert_eq!(data["meta"]["colour"], "green");
        assert_eq!(client.metadata("/openstack/latest/user_data").unwrap(), (200, "#!/bin/sh\n".to_owned()));
        assert_eq!(client.metadata("/latest/meta-data/local-ipv4").unwrap(), (200, "10.0.0.10".to_owned()));
        let key = "/2009-04-04/meta-data/public-keys/0/openssh-key";
        assert_eq!(client.metadata(key).unwrap(), (200, "ssh-ed25519 AAAA test".to_owned()));
        assert_eq!(client.metadata("/latest/meta-data/nothing").unwrap().0, 404);
        let url = "http://169.254.169.254/openstack/latest/meta_data.json";
        assert_eq!(client.fetch(url, &["-d", "body"]).unwrap().0, 405);
        assert_eq!(client.fetch(url, &["-X", "PUT"]).unwrap().0, 405);
        assert_eq!(client.fetch(url, &["-I"]).unwrap().0, 200);
        assert_eq!(client.fetch(url, &["-H", "X-Forwarded-For: 10.0.0.99"]).unwrap().0, 200);
    })
    .await;
}

#[tokio::test]
async fn a_lease_is_renewed_by_unicast() {
    skip_if!(harness::skip_reason());
    skip_if!(harness::skip_without("busybox"));
    let mut lab = Lab::new();
    let mut network = network();
    let port = add_port(&mut network, 10);
    let networks = vec![network];
    let metadata = metadata_of(&networks);
    lab.converge(&networks, &metadata).await;
    let client = lab.plug_in(networks[0].id, &port);
    lab.converge(&networks, &metadata).await;

    let mut udhcpc = client.udhcpc(&[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let pid = Pid::from_raw(udhcpc.id().try_into().unwrap());
    let event = |wanted: &'static str| {
        let client = &client;
        move || client.lease().get("event").is_some_and(|event| event == wanted)
    };
    eventually("bound", event("bound")).await;
    // Ask for a renewal now; `ip netns exec` became the client. Asked again before the answer has come, it begins anew
    // instead.
    let mut asked: Option<Instant> = None;
    eventually("renewed", || {
        if asked.is_none_or(|asked| asked.elapsed() > Duration::from_secs(2)) {
            kill(pid, Signal::SIGUSR1).unwrap();
            asked = Some(Instant::now());
        }
        event("renew")()
    })
    .await;
    udhcpc.kill().unwrap();
    udhcpc.wait().unwrap();
}

/// A new process in the place of one that was killed: nothing is touched that is right, and on a host with 500 filtered
/// ports packets pass all the while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_changes_nothing_and_loses_no_packet() {
    skip_if!(harness::skip_reason().or(harness::skip_without("ping")).or(harness::skip_without("nft")));
    let mut lab = Lab::new();
    let group = SecurityGroupSpec {
        id: SecurityGroupId::new(),
        stateful: true,
        rules: [Direction::Ingress, Direction::Egress].map(any).into(),
    };
    let mut network = network();
    network.subnets[0].cidr = "10.0.0.0/16".parse().unwrap();
    for number in 0..500u16 {
        add_port(&mut network, 10);
        let [high, low] = (number + 10).to_be_bytes();
        let port = network.ports.last_mut().unwrap();
        port.mac_address = format!("fa:16:3e:00:{high:02x}:{low:02x}");
        port.fixed_ips[0].ip_address = [10, 0, high, low].into();
        port.port_security = true;
        port.security_groups = vec![group.id];
    }
    let desired = Desired { networks: vec![network], security_groups: vec![group], ..Desired::default() };
    let (network, metadata) = (&desired.networks[0], metadata_of(&desired.networks));
    /// At one in two milliseconds, for longer than three restarts take.
    const PACKETS: u32 = 4000;
    lab.converge_all(&desired, &metadata).await;
    let clients = [0, 1].map(|number| lab.plug_in(network.id, &network.ports[number]));
    let mut taps = Vec::new();
    for port in &network.ports[2..] {
        taps.push(lab.executor.open_tap(network.id, port, network.mtu).await.unwrap());
    }
    lab.converge_all(&desired, &metadata).await;
    for (client, host) in clients.iter().zip([10, 11]) {
        client.configure_statically(Ipv4Addr::new(10, 0, 0, host));
    }
    let mut ping = clients[0].command("ping");
    let count = PACKETS.to_string();
    ping.args(["-n", "-q", "-i", "0.002", "-c", &count, "-W", "2", "10.0.0.11"]).stdout(Stdio::piped());
    let mut ping = ping.spawn().unwrap();
    for _ in 0..3 {
        // Dropping the services closes their sockets, as a kill does.
        let config = mote_network::Config { prefix: lab.prefix.clone(), ..mote_network::Config::default() };
        lab.services.stop().await;
        lab.executor = mote_network::Executor::new(config.clone());
        lab.services = mote_network::Services::new(config);
        let again = lab.converge_all(&desired, &metadata).await;
        assert_eq!((again.executed, again.services.serving.len()), (0, 1));
    }
    assert_eq!(ping.try_wait().unwrap(), None, "the traffic runs all the while");
    let output = beside(move || ping.wait_with_output().unwrap()).await;
    let text = String::from_utf8_lossy(&output.stdout);
    let packets = format!("{PACKETS} packets transmitted, {PACKETS} received");
    assert!(text.contains(&packets), "{text}");
    drop(taps);
}

fn any(direction: Direction) -> SecurityGroupRule {
    SecurityGroupRule { direction, ethertype: EtherType::Ipv4, protocol: Protocol::Any, remote: None }
}

#[tokio::test]
async fn networks_with_the_same_addresses_know_nothing_of_each_other() {
    skip_if!(harness::skip_reason());
    skip_if!(harness::skip_without("busybox").or(harness::skip_without("curl")));
    let mut lab = Lab::new();
    let (mut a, mut b) = (network(), network());
    let (port_a, port_b) = (add_port(&mut a, 10), add_port(&mut b, 10));
    assert_eq!(port_a.fixed_ips[0].ip_address, port_b.fixed_ips[0].ip_address);
    assert_eq!(port_a.mac_address, port_b.mac_address);
    let only_b = add_port(&mut b, 11);
    let networks = vec![a, b];
    let metadata = metadata_of(&networks);
    lab.converge(&networks, &metadata).await;
    let client_a = lab.plug_in(networks[0].id, &port_a);
    let client_b = lab.plug_in(networks[1].id, &port_b);
    let second_b = lab.plug_in(networks[1].id, &only_b);
    lab.converge(&networks, &metadata).await;
    beside(move || {
        for client in [&client_a, &client_b, &second_b] {
            client.configure_by_dhcp();
        }
        for (client, port, in_b) in [(client_a, port_a, false), (client_b, port_b, true)] {
            let (_, body) = client.metadata("/openstack/latest/meta_data.json").unwrap();
            assert!(body.contains(&port.server_id.to_string()), "{body}");
            let reached = client.run("busybox", ["ping", "-c", "1", "-W", "1", "10.0.0.11"]).status.success();
            assert_eq!(reached, in_b, "10.0.0.11 is in network b only");
        }
    })
    .await;
}

#[tokio::test]
async fn unknown_clients_get_nothing() {
    skip_if!(harness::skip_reason());
    skip_if!(harness::skip_without("busybox").or(harness::skip_without("curl")));
    let mut lab = Lab::new();
    let mut network = network();
    let port = add_port(&mut network, 10);
    let networks = vec![network];
    lab.converge(&networks, &HashMap::new()).await;
    let client = lab.plug_in(networks[0].id, &port);
    run("ip", ["-n", &client.namespace, "link", "set", "eth0", "address", "fa:16:3e:00:00:99"]);
    lab.converge(&networks, &HashMap::new()).await;
    beside(move || {
        let output = client.udhcpc(&["-n", "-q", "-t", "1"]).output().unwrap();
        assert!(!output.status.success(), "an unknown Ethernet address got a lease");
        run("ip", ["-n", &client.namespace, "link", "set", "eth0", "address", "fa:16:3e:00:00:0a"]);
        client.configure_statically(Ipv4Addr::new(10, 0, 0, 10));
        assert_eq!(client.metadata("/"), None, "a server without metadata was served");
    })
    .await;
}

/// A guest that takes its neighbour's addresses does not get its neighbour's metadata.
#[tokio::test]
async fn an_impostor_does_not_get_its_neighbours_metadata() {
    skip_if!(harness::skip_reason());
    skip_if!(harness::skip_without("curl"));
    let mut lab = Lab::new();
    let mut network = network();
    let (victim, attacker) = (add_port(&mut network, 10), add_port(&mut network, 11));
    let networks = vec![network];
    let metadata = metadata_of(&networks);
    lab.converge(&networks, &metadata).await;
    let victim = lab.plug_in(networks[0].id, &victim);
    let attacker = lab.plug_in(networks[0].id, &attacker);
    lab.converge(&networks, &metadata).await;

    let (victim_ip, own_ip) = (Ipv4Addr::new(10, 0, 0, 10), Ipv4Addr::new(10, 0, 0, 11));
    beside(move || {
        attacker.configure_statically(own_ip);
        assert_eq!(attacker.metadata("/latest/meta-data/hostname").unwrap(), (200, "vm-11".to_owned()));
        let try_as_victim = |circumstance: &str| {
            let name = attacker.namespace.as_str();
            run("ip", ["-n", name, "address", "flush", "dev", "eth0"]);
            attacker.configure_statically(victim_ip);
            let answer =
                attacker.fetch("http://169.254.169.254/latest/meta-data/hostname", &["--max-time", "1"]);
            assert_eq!(answer, None, "{circumstance}");
        };
        try_as_victim("neighbour's IP address, neighbour is silent");
        let name = attacker.namespace.as_str();
        run("ip", ["-n", name, "link", "set", "eth0", "address", "fa:16:3e:00:00:0a"]);
        try_as_victim("neighbour's IP and Ethernet address, neighbour is silent");
        victim.configure_statically(victim_ip);
        try_as_victim("neighbour's IP and Ethernet address, neighbour is there");
        let answer = victim.metadata("/latest/meta-data/hostname").unwrap();
        assert_eq!(answer, (200, "vm-10".to_owned()), "the neighbour itself is served all the while");
    })
    .await;
}

#[tokio::test]
async fn the_hosts_own_services_are_out_of_reach() {
    skip_if!(harness::skip_reason());
    skip_if!(harness::skip_without("curl"));
    let mut lab = Lab::new();
    let mut network = network();
    let port = add_port(&mut network, 10);
    let networks = vec![network];
    let metadata = metadata_of(&networks);
    lab.converge(&networks, &metadata).await;
    let client = lab.plug_in(networks[0].id, &port);
    lab.converge(&networks, &metadata).await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let service = listener.local_addr().unwrap().port();
    beside(move || {
        client.configure_statically(Ipv4Addr::new(10, 0, 0, 10));
        run("ip", ["-n", &client.namespace, "route", "replace", "default", "via", "10.0.0.2"]);
        assert!(client.metadata("/").is_some());
        for address in ["10.0.0.2", "169.254.169.254", "127.0.0.1"] {
            let url = format!("http://{address}:{service}/");
            assert_eq!(client.fetch(&url, &["--max-time", "1"]), None, "{url}");
        }
        assert_eq!(client.fetch("http://10.0.0.2/", &["--max-time", "1"]), None, "metadata has one address");
    })
    .await;
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[tokio::test]
async fn services_follow_changes_and_come_back_after_their_namespace_was_lost() {
    skip_if!(harness::skip_reason());
    skip_if!(harness::skip_without("curl"));
    let mut lab = Lab::new();
    let mut network = network();
    let port = add_port(&mut network, 10);
    let networks = vec![network];
    let mut metadata = metadata_of(&networks);

    // Before the namespace is there, its services wait.
    let outcome = lab.services.update(&networks, &metadata).await;
    assert_eq!((outcome.waiting.len(), outcome.serving.len()), (1, 0));
    lab.converge(&networks, &metadata).await;
    let client = lab.plug_in(networks[0].id, &port);
    lab.converge(&networks, &metadata).await;
    let ip = Ipv4Addr::new(10, 0, 0, 10);
    let hostname = |client: Client| {
        beside(move || {
            client.configure_statically(ip);
            (client.metadata("/latest/meta-data/hostname"), client)
        })
    };
    let (answer, client) = hostname(client).await;
    assert_eq!(answer, Some((200, "vm-10".to_owned())));

    metadata.get_mut(&port.server_id).unwrap().hostname = "renamed".to_owned();
    lab.converge(&networks, &metadata).await;
    let (answer, client) = hostname(client).await;
    assert_eq!(answer, Some((200, "renamed".to_owned())));

    // The bridge is lost.
    let name = lab.executor.namespace(networks[0].id);
    run("ip", ["-n", &name, "link", "del", "br0"]);
    lab.converge(&networks, &metadata).await;
    let (answer, client) = hostname(client).await;
    assert_eq!(answer, Some((200, "renamed".to_owned())), "after the bridge was lost");

    // The whole namespace is lost (its card at our end, and so the client's, goes with it).
    run("ip", ["-n", &client.namespace, "link", "del", "eth0"]);
    run("ip", ["netns", "del", &name]);
    lab.converge(&networks, &metadata).await;
    let client = lab.plug_in(networks[0].id, &port);
    lab.converge(&networks, &metadata).await;
    let (answer, _) = hostname(client).await;
    assert_eq!(answer, Some((200, "renamed".to_owned())), "after the namespace was lost");

    // Another process that takes over binds the same addresses.
    let mut successor = mote_network::Services::new(mote_network::Config {
        prefix: lab.prefix.clone(),
        ..mote_network::Config::default()
    });
    let outcome = successor.update(&networks, &metadata).await;
    assert_eq!((outcome.serving.len(), outcome.failed.len()), (0, 1), "two at once is an error that is told");
    lab.services.stop().await;
    assert_eq!(successor.update(&networks, &metadata).await.serving.len(), 1);
}

#[tokio::test]
async fn floods_and_garbage_are_survived_and_connections_are_limited() {
    skip_if!(harness::skip_reason());
    skip_if!(harness::skip_without("busybox").or(harness::skip_without("curl")));
    let mut lab = Lab::new();
    let mut network = network();
    let port = add_port(&mut network, 10);
    let networks = vec![network];
    let metadata = metadata_of(&networks);
    lab.converge(&networks, &metadata).await;
    let client = lab.plug_in(networks[0].id, &port);
    lab.converge(&networks, &metadata).await;
    beside(move || {
        client.configure_statically(Ipv4Addr::new(10, 0, 0, 10));
        namespace::in_namespace(&client.namespace, flood_dhcp).unwrap();
        client.configure_by_dhcp();
        namespace::in_namespace(&client.namespace, abuse_http).unwrap();
        assert_eq!(client.metadata("/latest/meta-data/hostname").unwrap(), (200, "vm-10".to_owned()));
    })
    .await;
}

fn flood_dhcp() {
    let socket = UdpSocket::bind("10.0.0.10:68").unwrap();
    let mut packet = [0u8; 1200];
    for i in 0..2000u32 {
        for (j, byte) in packet.iter_mut().enumerate() {
            *byte = (i.wrapping_mul(2_654_435_761) >> (j % 25)) as u8;
        }
        // Every other one with a plausible head.
        if i % 2 == 0 {
            packet[..3].copy_from_slice(&[1, 1, (i % 32) as u8]);
            packet[236..240].copy_from_slice(&[99, 130, 83, 99]);
        }
        let length = usize::try_from(i).unwrap() % packet.len();
        let _ = socket.send_to(&packet[..length], "10.0.0.2:67");
    }
}

fn abuse_http() {
    let address = SocketAddr::from(METADATA);
    let connect = || {
        let stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    // A head without end is cut off with an error.
    let mut stream = connect();
    let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nA: ");
    let _ = stream.write_all(&[b'a'; 64 * 1024]);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"),
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
    // Bytes that are no HTTP.
    let mut stream = connect();
    stream.write_all(b"\x16\x03\x01\x00\xff\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"),
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
    // Sixteen connections are served at a time, the seventeenth is closed.
    let held: Vec<TcpStream> = (0..16)
        .map(|_| {
            let mut stream = connect();
            stream.write_all(b"GET /latest/ HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            assert!(stream.read(&mut [0; 16]).unwrap() > 0);
            stream
        })
        .collect();
    let mut one_more = connect();
    let _ = one_more.write_all(b"GET /latest/ HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(!matches!(one_more.read(&mut [0; 16]), Ok(1..)), "a seventeenth connection was served");
    drop(held);
}
