//! The plan's steps on a real kernel: what is desired is reached, from every point at which a host may have crashed.

#![allow(clippy::unwrap_used, reason = "a test's helpers, too, fail by panicking")]

mod harness;

use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use harness::{Lab, add_port, metadata_of, network, run};
use mote_host_api::{NetworkSpec, SubnetId};
use mote_network::{
    Config, Executor, ExecutorError, Plan, Step,
    names::{BRIDGE, MacAddress, NetworkKey, tap_name},
    namespace,
    observed::{BridgePort, LinkKind, NamespaceContent, ObservedNamespace, PortFlags},
    plan,
};

async fn planned(executor: &Executor, desired: &[NetworkSpec]) -> Plan {
    plan(&desired.into(), executor.conntrack().await, &executor.observe().await.unwrap())
}

async fn execute(executor: &Executor, steps: &[Step]) {
    for step in steps {
        executor.execute(step).await.unwrap_or_else(|error| panic!("{step}: {error:?}"));
    }
}

async fn reach(executor: &Executor, desired: &[NetworkSpec]) {
    execute(executor, &planned(executor, desired).await.steps).await;
    assert_eq!(planned(executor, desired).await.steps, vec![]);
}

async fn content(lab: &Lab, network: &NetworkSpec) -> NamespaceContent {
    let key = NetworkKey::from(network.id);
    let observed = lab.executor.observe().await.unwrap();
    match observed.into_iter().find(|other| other.key == key).map(|network| network.namespace) {
        Some(ObservedNamespace::Live(content)) => content,
        other => panic!("{other:?}"),
    }
}

fn path_of(lab: &Lab, network: &NetworkSpec) -> PathBuf {
    Path::new(namespace::DIR).join(lab.executor.namespace(network.id))
}

/// Two networks, the second with two subnets.
fn two_networks() -> Vec<NetworkSpec> {
    let (mut a, mut b) = (network(), network());
    add_port(&mut a, 10);
    add_port(&mut b, 10);
    let mut subnet = b.subnets[0].clone();
    subnet.id = SubnetId::new();
    subnet.cidr = "10.0.1.0/24".parse().unwrap();
    subnet.service_ip = [10, 0, 1, 2].into();
    b.subnets.push(subnet);
    vec![a, b]
}

/// The same networks with everything that can change changed.
fn changed(networks: &[NetworkSpec]) -> Vec<NetworkSpec> {
    let mut changed = networks.to_vec();
    changed[0].mtu = 9000;
    changed[0].subnets[0].service_ip = [10, 0, 0, 200].into();
    changed[0].ports[0].mac_address = "fa:16:3e:ff:ff:01".to_owned();
    changed[1].subnets.remove(0);
    changed[1].ports.clear();
    let mut third = network();
    add_port(&mut third, 20);
    changed.push(third);
    changed
}

#[tokio::test]
async fn a_network_is_made_as_iproute2_sees_it_and_deleted_without_a_trace() {
    skip_if!(harness::skip_reason());
    let mut lab = Lab::new();
    let networks = two_networks();
    let metadata = metadata_of(&networks);
    let first = lab.converge(&networks, &metadata).await;
    assert!(first.executed > 0);
    assert_eq!(first.services.serving.len(), 2);
    assert_eq!(lab.converge(&networks, &metadata).await.executed, 0, "a second pass has nothing to do");

    let namespace = lab.executor.namespace(networks[1].id);
    assert!(run("ip", ["netns", "list"]).contains(&namespace));
    let addresses = run("ip", ["-n", &namespace, "-4", "-o", "address", "show", "dev", BRIDGE]);
    for address in ["10.0.0.2/24", "10.0.1.2/24", "169.254.169.254/32"] {
        assert!(addresses.contains(address), "{addresses}");
    }
    let links = run("ip", ["-n", &namespace, "-o", "link"]);
    assert!(links.contains("mtu 1442") && links.contains("<LOOPBACK,UP"), "{links}");
    let sysctl =
        |name: &str| run("ip", ["netns", "exec", &namespace, "cat", &format!("/proc/sys/net/{name}")]);
    assert_eq!(sysctl("ipv4/ip_forward"), "0\n");
    if Path::new("/proc/sys/net/ipv6").exists() {
        let own = run("ip", ["-n", &namespace, "-6", "-o", "address", "show", "dev", BRIDGE]);
        assert!(own.contains("fe80::a9fe:a9fe/64") && own.lines().count() == 1, "{own}");
        assert_eq!(sysctl("ipv6/conf/br0/accept_ra"), "0\n");
    }

    lab.converge(&[], &HashMap::new()).await;
    assert_eq!(lab.names(), Vec::<String>::new());
}

#[tokio::test]
async fn a_crash_after_any_step_of_making_changing_or_deleting_is_repaired() {
    skip_if!(harness::skip_reason());
    let lab = Lab::new();
    let old = two_networks();
    let new = changed(&old);
    for (from, to) in [(&vec![], &old), (&old, &new), (&new, &vec![])] {
        for crash in 0.. {
            reach(&lab.executor, from).await;
            let steps = planned(&lab.executor, to).await.steps;
            execute(&lab.executor, &steps[..crash]).await;
            reach(&lab.executor, to).await;
            if crash == steps.len() {
                break;
            }
        }
    }
    assert_eq!(lab.names(), Vec::<String>::new());
}

#[tokio::test]
async fn a_crash_within_making_or_deleting_a_namespace_is_repaired() {
    skip_if!(harness::skip_reason());
    let lab = Lab::new();
    let networks = vec![network()];
    let path = path_of(&lab, &networks[0]);
    let unmounted = || fs::write(&path, "").unwrap();
    // Only the file was made, or only the unmount was done.
    for desired in [&networks[..], &[]] {
        fs::create_dir_all(namespace::DIR).unwrap();
        reach(&lab.executor, &[]).await;
        unmounted();
        reach(&lab.executor, desired).await;
        assert_eq!(path.exists(), !desired.is_empty());
        reach(&lab.executor, &networks).await;
        run("umount", [&path]);
        reach(&lab.executor, desired).await;
        reach(&lab.executor, &[]).await;
        assert!(!path.exists());
        // Mounted twice.
        reach(&lab.executor, &networks).await;
        run("mount", [Path::new("--bind"), &path, &path]);
        reach(&lab.executor, desired).await;
        reach(&lab.executor, &[]).await;
        assert!(!path.exists());
        // A link to nowhere.
        std::os::unix::fs::symlink("/nonexistent", &path).unwrap();
        reach(&lab.executor, desired).await;
        reach(&lab.executor, &[]).await;
        assert!(!path.exists() && !path.is_symlink());
    }
}

#[tokio::test]
async fn what_others_changed_is_put_right() {
    skip_if!(harness::skip_reason());
    let lab = Lab::new();
    let mut networks = two_networks();
    let port = networks[0].ports[0].clone();
    reach(&lab.executor, &networks).await;
    let tap = lab.executor.open_tap(networks[0].id, &port, networks[0].mtu).await.unwrap();
    let good = content(&lab, &networks[0]).await;
    let (name, namespace) = (tap_name(port.id), lab.executor.namespace(networks[0].id));
    let damages: &[&[&str]] = &[
        &["link", "set", BRIDGE, "down"],
        &["link", "set", "lo", "down"],
        &["link", "set", BRIDGE, "address", "02:ff:ff:ff:ff:ff"],
        &["link", "set", BRIDGE, "mtu", "1000"],
        &["link", "del", BRIDGE],
        &["link", "set", &name, "nomaster"],
        &["link", "set", &name, "down"],
        &["link", "set", &name, "mtu", "900"],
        &["link", "set", &name, "type", "bridge_slave", "learning", "on", "hairpin", "on", "flood", "on"],
        &["link", "add", "br1", "type", "bridge"],
        &["tuntap", "add", "stray", "mode", "tap"],
        &["address", "flush", "dev", BRIDGE],
        &["address", "add", "10.0.0.77/24", "dev", BRIDGE],
        &["neigh", "flush", "nud", "permanent", "dev", BRIDGE],
        &["neigh", "replace", "10.0.0.10", "lladdr", "02:00:00:00:00:01", "nud", "permanent", "dev", BRIDGE],
        &["neigh", "add", "10.0.0.66", "lladdr", "02:00:00:00:00:01", "nud", "permanent", "dev", BRIDGE],
    ];
    for damage in damages {
        run("ip", ["-n", &namespace].iter().chain(*damage));
        assert_ne!(planned(&lab.executor, &networks).await.steps, vec![], "{damage:?} is not seen");
        reach(&lab.executor, &networks).await;
        assert_eq!(content(&lab, &networks[0]).await, good, "after {damage:?}");
    }
    let in_namespace = ["netns", "exec", &namespace];
    let fdb = ["bridge", "fdb", "add", "02:00:00:00:00:09", "dev", &name, "master", "static"];
    run("ip", in_namespace.iter().chain(&fdb));
    run("ip", in_namespace.iter().chain(&["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]));
    reach(&lab.executor, &networks).await;
    assert_eq!(content(&lab, &networks[0]).await, good);

    // The port goes, its tap with it, though somebody still holds the descriptor.
    networks[0].ports.clear();
    reach(&lab.executor, &networks).await;
    assert!(content(&lab, &networks[0]).await.link(&name).is_none());
    drop(tap);
}

#[tokio::test]
async fn a_tap_is_wired_and_exclusive_and_goes_with_its_descriptor() {
    skip_if!(harness::skip_reason());
    let lab = Lab::new();
    let mut network = network();
    let port = add_port(&mut network, 10);
    let other = add_port(&mut network, 11);
    let missing = lab.executor.open_tap(network.id, &port, network.mtu).await.unwrap_err();
    assert!(missing.to_string().contains("does not exist"), "{missing}");

    let desired = [network.clone()];
    reach(&lab.executor, &desired).await;
    let tap = lab.executor.open_tap(network.id, &port, network.mtu).await.unwrap();
    assert_eq!(planned(&lab.executor, &desired).await.steps, vec![], "open_tap leaves nothing to the plan");
    let link = content(&lab, &network).await.link(&tap_name(port.id)).unwrap().clone();
    let mac: MacAddress = port.mac_address.parse().unwrap();
    assert_eq!((link.kind, link.up, link.mtu), (LinkKind::Tun, true, 1442));
    assert_eq!(link.bridge_port, Some(BridgePort { flags: PortFlags::GUEST, stations: [mac].into() }));

    let in_use = lab.executor.open_tap(network.id, &port, network.mtu).await.unwrap_err();
    assert!(matches!(in_use, ExecutorError::TapInUse { .. }), "{in_use:?}");
    let namespace = lab.executor.namespace(network.id);
    run("ip", ["-n", &namespace, "link", "add", &tap_name(other.id), "type", "bridge"]);
    let taken = lab.executor.open_tap(network.id, &other, network.mtu).await.unwrap_err();
    assert!(matches!(taken, ExecutorError::Tap { .. } | ExecutorError::TapInUse { .. }), "{taken:?}");
    run("ip", ["-n", &namespace, "link", "del", &tap_name(other.id)]);

    drop(tap);
    assert!(content(&lab, &network).await.link(&tap_name(port.id)).is_none());
    drop(lab.executor.open_tap(network.id, &port, network.mtu).await.unwrap());
}

#[tokio::test]
async fn deleting_a_network_takes_the_taps_of_running_guests_away() {
    skip_if!(harness::skip_reason());
    let lab = Lab::new();
    let mut network = network();
    let port = add_port(&mut network, 10);
    reach(&lab.executor, std::slice::from_ref(&network)).await;
    let tap = lab.executor.open_tap(network.id, &port, network.mtu).await.unwrap();
    reach(&lab.executor, &[]).await;
    assert_eq!(lab.names(), Vec::<String>::new());
    let error = nix::unistd::read(&tap, &mut [0; 64]).unwrap_err();
    assert_eq!(error, nix::errno::Errno::EBADFD, "the descriptor has no device any more");
}

#[tokio::test]
async fn a_refused_network_is_left_as_it_is_and_the_others_go_on() {
    skip_if!(harness::skip_reason());
    let mut lab = Lab::new();
    let mut networks = two_networks();
    let metadata = metadata_of(&networks);
    lab.converge(&networks, &metadata).await;
    let before = content(&lab, &networks[0]).await;
    networks[0].mtu = 1;
    networks[1].mtu = 1300;
    let steps = planned(&lab.executor, &networks).await;
    assert_eq!(steps.refused.len(), 1);
    assert_eq!(steps.refused[0].network, networks[0].id);
    execute(&lab.executor, &steps.steps).await;
    assert_eq!(content(&lab, &networks[0]).await, before);
    assert_eq!(content(&lab, &networks[1]).await.link(BRIDGE).unwrap().mtu, 1300);
}

#[tokio::test]
async fn names_of_others_are_left_alone() {
    skip_if!(harness::skip_reason());
    let (mine, other) = (Lab::new(), Lab::new());
    let networks = two_networks();
    reach(&mine.executor, &networks).await;
    reach(&other.executor, &networks).await;
    let foreign = format!("{}something", mine.prefix);
    namespace::create(&foreign).await.unwrap();
    reach(&mine.executor, &[]).await;
    assert_eq!(mine.names(), [foreign]);
    assert_eq!(other.names().len(), 2);
    assert_eq!(planned(&other.executor, &networks).await.steps, vec![]);
}

/// Set in the process that has a network namespace of its own.
const CHILD: &str = "MOTE_TEST_IN_OWN_NAMESPACE";

/// In a process with a scratch namespace of its own, so that a failure harms nothing.
#[tokio::test]
async fn the_own_namespace_under_a_networks_name_is_never_touched() {
    skip_if!(harness::skip_reason());
    skip_if!(harness::skip_without("unshare"));
    if std::env::var_os(CHILD).is_none() {
        let name = "the_own_namespace_under_a_networks_name_is_never_touched";
        let mut child = Command::new("unshare");
        child.arg("--net").arg(std::env::current_exe().unwrap()).args(["--exact", name, "--nocapture"]);
        assert!(child.env(CHILD, "1").status().unwrap().success());
        return;
    }
    run("ip", ["link", "add", "precious", "type", "bridge"]);
    let lab = Lab::new();
    let networks = vec![network()];
    for desired in [&[][..], &networks] {
        reach(&lab.executor, &networks).await;
        reach(&lab.executor, &[]).await;
        let path = path_of(&lab, &networks[0]);
        fs::write(&path, "").unwrap();
        run("mount", [Path::new("--bind"), Path::new("/proc/self/ns/net"), &path]);
        // `mount` has this process's namespace, too.
        assert_eq!(lab.executor.observe().await.unwrap()[0].namespace, ObservedNamespace::Broken);
        reach(&lab.executor, desired).await;
        assert!(run("ip", ["link"]).contains("precious"));
        assert!(!run("ip", ["link"]).contains(BRIDGE));
    }
}

/// Set in the process that shall be killed: the prefix that it works with.
const VICTIM: &str = "MOTE_TEST_VICTIM_PREFIX";

/// Executes plan after plan in a second process and kills it after ever longer times, wherever it is.
#[tokio::test]
async fn a_process_that_is_killed_anywhere_leaves_nothing_that_is_not_repaired() {
    skip_if!(harness::skip_reason());
    let old = two_networks_with_fixed_ids();
    let new = changed(&old);
    if let Ok(prefix) = std::env::var(VICTIM) {
        let executor = Executor::new(Config { prefix, ..Config::default() });
        for desired in [&old, &new, &vec![]].into_iter().cycle() {
            execute(&executor, &planned(&executor, desired).await.steps).await;
            println!("pass");
        }
    }
    let lab = Lab::new();
    for round in 0..12 {
        let mut victim = Command::new(std::env::current_exe().unwrap());
        let name = "a_process_that_is_killed_anywhere_leaves_nothing_that_is_not_repaired";
        victim.args(["--exact", name, "--nocapture"]).env(VICTIM, &lab.prefix).stdout(Stdio::piped());
        let mut victim = victim.spawn().unwrap();
        // From its first pass on, so that it is killed at work.
        let mut output = BufReader::new(victim.stdout.take().unwrap()).lines();
        assert!(output.any(|line| line.unwrap().contains("pass")));
        std::thread::sleep(Duration::from_micros(1700 * round));
        victim.kill().unwrap();
        victim.wait().unwrap();
        for desired in [&new, &old, &vec![]] {
            reach(&lab.executor, desired).await;
        }
        assert_eq!(lab.names(), Vec::<String>::new());
    }
}

fn two_networks_with_fixed_ids() -> Vec<NetworkSpec> {
    let mut networks = two_networks();
    for (network, id) in networks
        .iter_mut()
        .zip(["11111111-2222-4333-8444-555555555555", "66666666-7777-4888-8999-aaaaaaaaaaaa"])
    {
        network.id = id.parse().unwrap();
    }
    networks
}
