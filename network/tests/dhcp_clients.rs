//! DHCP, DHCPv6, router advertisements and metadata over IPv6 as clients see them that distributions have: isc-dhclient,
//! dhcpcd, systemd-networkd, wide-dhcpv6, and the kernel itself. (busybox's udhcpc is in services.rs.)

#![allow(clippy::unwrap_used, reason = "a test's helpers, too, fail by panicking")]

mod harness;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use harness::{Client, Lab, add_port, metadata_of, network, run};
use mote_host_api::{FixedIpV6, Ipv6Mode, NetworkSpec, SubnetId, SubnetV6Spec};

/// Longest wait for something that must happen.
const PATIENCE: Duration = Duration::from_secs(30);

const NETWORKD: &str = "/usr/lib/systemd/systemd-networkd";

/// The harness's network with fd00::/64 of a mode, and one port with 10.0.0.10 and fd00::10.
fn dual(mode: Option<Ipv6Mode>) -> NetworkSpec {
    let mut network = network();
    network.subnets[0].dns_nameservers.clear();
    let id = SubnetId::new();
    network.subnets_v6.push(SubnetV6Spec {
        id,
        cidr: "fd00::/64".parse().unwrap(),
        gateway_ip: None,
        ra_mode: mode,
        address_mode: mode,
        dns_nameservers: Vec::new(),
    });
    add_port(&mut network, 10);
    let ip_address = "fd00::10".parse().unwrap();
    network.ports[0].fixed_ips_v6.push(FixedIpV6 { subnet_id: id, ip_address });
    network
}

/// Converges with a client at the first port, and runs `f` with it.
async fn with_client<T: Send + 'static>(
    network: NetworkSpec,
    f: impl FnOnce(&Client) -> T + Send + 'static,
) -> T {
    let mut lab = Lab::new();
    let port = network.ports[0].clone();
    let networks = vec![network];
    let metadata = metadata_of(&networks);
    lab.converge(&networks, &metadata).await;
    let client = lab.plug_in(networks[0].id, &port);
    lab.converge(&networks, &metadata).await;
    tokio::task::spawn_blocking(move || f(&client)).await.unwrap()
}

/// A program that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn file(client: &Client, name: &str, text: &str) -> PathBuf {
    let path = client.directory.join(name);
    fs::write(&path, text).unwrap();
    run("chmod", ["755".as_ref(), path.as_os_str()]);
    path
}

/// A script that notes its environment in a file.
fn noting(client: &Client, name: &str) -> (PathBuf, PathBuf) {
    let notes = client.directory.join(format!("{name}.env"));
    let text = format!("#!/bin/sh\nenv >>{0}.new\ncp {0}.new {0}\n", notes.display());
    (file(client, name, &text), notes)
}

/// In the client's namespace, with directories of its own in place of the machine's.
fn isolated(client: &Client, places: &[&str], arguments: &[&str]) -> Child {
    let mut script = String::new();
    for (number, place) in places.iter().enumerate() {
        let own = client.directory.join(format!("{}-{number}", client.namespace));
        fs::create_dir_all(&own).unwrap();
        script.push_str(&format!("mkdir -p {place} && mount --bind {} {place} && ", own.display()));
    }
    script.push_str("exec \"$@\"");
    let mut command = client.command("unshare");
    command.args(["-m", "sh", "-c", &script, "sh"]).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until a file contains all of it.
fn expect_in(path: &Path, wanted: &[&str]) {
    let mut text = String::new();
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        text = fs::read_to_string(path).unwrap_or_default();
        if wanted.iter().all(|wanted| text.lines().any(|line| line == *wanted)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{wanted:?} are not all in {}: {text}", path.display());
}

fn ip(client: &Client, arguments: &[&str]) -> String {
    run("ip", [&["-n", &client.namespace], arguments].concat())
}

fn has_routes_and_address(client: &Client) {
    let wanted = ["default via 10.0.0.1", "169.254.169.254 via 10.0.0.2", "172.20.0.0/16 via 10.0.0.3"];
    eventually("routes and address", || {
        let (routes, addresses) = (ip(client, &["route"]), ip(client, &["address"]));
        wanted.iter().all(|route| routes.contains(route)) && addresses.contains("inet 10.0.0.10/24")
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn isc_dhclient_gets_takes_up_again_and_gives_back_its_leases() {
    skip_if!(harness::skip_reason().or(harness::skip_without("dhclient")));
    with_client(dual(Some(Ipv6Mode::Dhcpv6Stateful)), |client| {
        let configuration = file(
            client,
            "dhclient.conf",
            "option rfc3442-classless-static-routes code 121 = array of unsigned integer 8;\n\
             request subnet-mask, broadcast-address, routers, domain-name, domain-name-servers, host-name,\n\
             interface-mtu, rfc3442-classless-static-routes, dhcp6.name-servers, dhcp6.domain-search;\n",
        );
        // It leaves its lease however it ends.
        let dhclient = |version: &str, script: &Path, more: &[&str]| {
            let place = |what: &str| client.directory.join(format!("dhclient{version}.{what}"));
            let (leases, pid) = (place("leases"), place("pid"));
            let fixed: [&std::ffi::OsStr; 10] = [
                version.as_ref(),
                "-1".as_ref(),
                "-cf".as_ref(),
                configuration.as_os_str(),
                "-sf".as_ref(),
                script.as_os_str(),
                "-lf".as_ref(),
                leases.as_os_str(),
                "-pf".as_ref(),
                pid.as_os_str(),
            ];
            // A process id of a former run would be taken for one to be ended.
            let _ = fs::remove_file(&pid);
            let mut command = client.command("dhclient");
            command.args(fixed).args(more).arg("eth0");
            Running(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
        };
        let common = ["new_ip_address=10.0.0.10", "new_interface_mtu=1442", "new_host_name=vm-10"];
        let v4 = [
            "new_domain_name=openstacklocal",
            "new_domain_name_servers=10.0.0.2",
            "new_rfc3442_classless_static_routes=32 169 254 169 254 10 0 0 2 16 172 20 10 0 0 3 0 10 0 0 1",
        ];
        for reason in ["reason=BOUND", "reason=REBOOT"] {
            let (script, notes) = noting(client, reason);
            let _running = dhclient("-4", &script, &["-d"]);
            expect_in(&notes, &[&[reason], &common[..], &v4].concat());
        }
        let v6 = [
            "new_ip6_address=fd00::10",
            "new_dhcp6_name_servers=fe80::a9fe:a9fe",
            "new_dhcp6_domain_search=openstacklocal.",
        ];
        // The second time it has a lease and asks for confirmation of it.
        for (name, reason) in [("first", "reason=BOUND6"), ("second", "reason=BOUND6")] {
            let (script, notes) = noting(client, name);
            let _running = dhclient("-6", &script, &["-d"]);
            expect_in(&notes, &[&[reason], &v6[..]].concat());
        }
        let (script, notes) = noting(client, "released");
        let mut released = dhclient("-6", &script, &["-r"]);
        expect_in(&notes, &["reason=RELEASE6"]);
        released.0.wait().unwrap();
        let (script, notes) = noting(client, "information");
        let _running = dhclient("-6", &script, &["-S", "-d"]);
        expect_in(&notes, &["new_dhcp6_name_servers=fe80::a9fe:a9fe"]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dhcpcd_configures_both_versions() {
    skip_if!(harness::skip_reason().or(harness::skip_without("dhcpcd")));
    with_client(dual(Some(Ipv6Mode::Dhcpv6Stateful)), |client| {
        let (script, notes) = noting(client, "dhcpcd");
        let configuration = file(
            client,
            "dhcpcd.conf",
            "slaac hwaddr\nduid\npersistent\nnoarp\noption domain_name_servers, domain_name, interface_mtu, host_name\n\
             option classless_static_routes\noption dhcp6_name_servers, dhcp6_domain_search\n",
        );
        let arguments =
            ["dhcpcd", "-f", &configuration.to_string_lossy(), "-c", &script.to_string_lossy(), "-B", "eth0"];
        let _running = Running(isolated(client, &["/run/dhcpcd", "/var/lib/dhcpcd"], &arguments));
        has_routes_and_address(client);
        eventually("an IPv6 address", || ip(client, &["-6", "address"]).contains("fd00::10/128"));
        let wanted = ["new_domain_name_servers=10.0.0.2", "new_domain_name=openstacklocal", "new_host_name=vm-10"];
        expect_in(&notes, &wanted);
        let wanted = ["new_dhcp6_name_servers=fe80::a9fe:a9fe%eth0", "new_dhcp6_domain_search=openstacklocal"];
        expect_in(&notes, &wanted);
        // It limits what it sends by its routes.
        let routes = ip(client, &["route"]);
        assert!(routes.lines().any(|route| route.starts_with("default") && route.contains("mtu 1442")), "{routes}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn systemd_networkd_configures_both_versions() {
    let missing = || (!Path::new(NETWORKD).exists()).then(|| format!("needs {NETWORKD}"));
    skip_if!(harness::skip_reason().or_else(missing));
    with_client(dual(Some(Ipv6Mode::Dhcpv6Stateful)), |client| {
        // Without the machine's udev it doesn't wait for it.
        let own = client.directory.join(format!("{}-0", client.namespace));
        fs::create_dir_all(own.join("network")).unwrap();
        let text = "[Match]\nName=eth0\n[Network]\nDHCP=yes\nIPv6AcceptRA=yes\n[DHCPv4]\nUseMTU=yes\n";
        fs::write(own.join("network/10.network"), text).unwrap();
        for place in ["netif/links", "netif/leases"] {
            fs::create_dir_all(own.join(place)).unwrap();
        }
        run("chmod", ["-R".as_ref(), "a+rwX".as_ref(), own.as_os_str()]);
        run("chmod", ["a+rwx".as_ref(), client.directory.as_os_str()]);
        let script = format!("mount -o remount,bind,ro /sys; exec {NETWORKD}");
        let _running = Running(isolated(client, &["/run/systemd"], &["sh", "-c", &script]));
        has_routes_and_address(client);
        eventually("an IPv6 address", || ip(client, &["-6", "address"]).contains("fd00::10/128"));
        assert!(ip(client, &["link", "show", "eth0"]).contains("mtu 1442"));
        let index = ip(client, &["-o", "link", "show", "eth0"]);
        let index = index.split(':').next().unwrap();
        let lease = own.join(format!("netif/leases/{index}"));
        expect_in(
            &lease,
            &["ADDRESS=10.0.0.10", "DNS=10.0.0.2", "DOMAINNAME=openstacklocal", "HOSTNAME=vm-10"],
        );
        let link = own.join(format!("netif/links/{index}"));
        eventually("the resolver over IPv6", || {
            fs::read_to_string(&link).unwrap_or_default().contains("fe80::a9fe:a9fe")
        });
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wide_dhcpv6_gets_an_address_or_information_by_mode() {
    skip_if!(harness::skip_reason().or(harness::skip_without("dhcp6c")));
    for mode in [Ipv6Mode::Dhcpv6Stateful, Ipv6Mode::Dhcpv6Stateless] {
        let stateful = mode == Ipv6Mode::Dhcpv6Stateful;
        with_client(dual(Some(mode)), move |client| {
            let (script, notes) = noting(client, "dhcp6c");
            let send = if stateful { "send ia-na 0;" } else { "information-only;" };
            let text = format!(
                "interface eth0 {{ {send} request domain-name-servers; request domain-name; script \"{}\"; }};\n\
                 id-assoc na 0 {{ }};\n",
                script.display()
            );
            let configuration = file(client, "dhcp6c.conf", &text);
            let pid = client.directory.join("dhcp6c.pid");
            let arguments = ["dhcp6c", "-f", "-c", &configuration.to_string_lossy(), "-p", &pid.to_string_lossy(), "eth0"];
            let _running = Running(isolated(client, &["/var/lib/dhcpv6"], &arguments));
            expect_in(&notes, &["new_domain_name_servers=fe80::a9fe:a9fe ", "new_domain_name=openstacklocal. "]);
            if stateful {
                eventually("an address", || ip(client, &["-6", "address"]).contains("fd00::10/"));
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_kernel_makes_itself_an_address_exactly_where_it_shall() {
    skip_if!(harness::skip_reason());
    for (mode, makes) in [
        (Some(Ipv6Mode::Slaac), true),
        (Some(Ipv6Mode::Dhcpv6Stateless), true),
        (Some(Ipv6Mode::Dhcpv6Stateful), false),
        (None, false),
    ] {
        with_client(dual(mode), move |client| {
            let own = || ip(client, &["-6", "address"]).contains("fd00::f816:3eff:fe00:a/64");
            if makes {
                eventually("an address of its own", own);
            } else if mode.is_some() {
                let on_link = || ip(client, &["-6", "route"]).contains("fd00::/64");
                eventually("the prefix is on the link", on_link);
                assert!(!own(), "{mode:?}");
            } else {
                std::thread::sleep(Duration::from_millis(500));
                assert!(!ip(client, &["-6", "route"]).contains("fd00::/64"), "nothing is announced");
            }
        })
        .await;
    }
}

/// By curl over fe80::a9fe:a9fe, as cloud-init asks.
fn metadata_v6(client: &Client, path: &str) -> Option<(u16, String)> {
    client.fetch(&format!("http://[fe80::a9fe:a9fe%25eth0]{path}"), &["-g", "--max-time", "2"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_over_ipv6_is_that_of_the_port_that_asks() {
    skip_if!(harness::skip_reason().or(harness::skip_without("curl")));
    let mut network = dual(Some(Ipv6Mode::Slaac));
    let (first, second) = (network.ports[0].clone(), add_port(&mut network, 11));
    let mut lab = Lab::new();
    let networks = vec![network];
    let metadata = metadata_of(&networks);
    lab.converge(&networks, &metadata).await;
    let clients = [&first, &second].map(|port| lab.plug_in(networks[0].id, port));
    lab.converge(&networks, &metadata).await;
    let test = move || {
        let hostname = "/latest/meta-data/hostname";
        for (client, name) in clients.iter().zip(["vm-10", "vm-11"]) {
            eventually("a link-local address", || ip(client, &["-6", "address"]).contains("scope link"));
            assert_eq!(metadata_v6(client, hostname), Some((200, name.to_owned())));
            let (_, body) = metadata_v6(client, "/openstack/latest/meta_data.json").unwrap();
            assert!(body.contains(name), "{body}");
        }
        // The second takes the first one's address, then its Ethernet address, too.
        let attacker = &clients[1];
        ip(attacker, &["-6", "address", "flush", "dev", "eth0"]);
        ip(attacker, &["address", "add", "fe80::f816:3eff:fe00:a/64", "dev", "eth0", "nodad"]);
        assert_eq!(metadata_v6(attacker, hostname), None, "the neighbour's address");
        ip(attacker, &["link", "set", "eth0", "address", "fa:16:3e:00:00:0a"]);
        assert_eq!(metadata_v6(attacker, hostname), None, "the neighbour's Ethernet address, too");
        assert_eq!(metadata_v6(&clients[0], hostname), Some((200, "vm-10".to_owned())));
    };
    tokio::task::spawn_blocking(test).await.unwrap();
}
