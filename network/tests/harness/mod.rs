//! Networks, and clients plugged into them, in network namespaces of the test's own; all removed at the end, however the
//! test ends. Names start with `mt<pid>x`, so that tests run side by side and what a killed run left is found.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering},
};

use mote_host_api::{
    FixedIp, HostRoute, InstanceMetadata, NetworkId, NetworkSpec, PortId, PortSpec, ServerId, SubnetId,
    SubnetSpec,
};
use mote_network::{Config, Converged, Desired, Executor, Services, converge, names, namespace};

pub mod cloud;
pub mod plans;
pub mod probe;

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Why tests of the kernel's networking can't run here.
pub fn skip_reason() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    if !Path::new("/dev/net/tun").exists() {
        return Some("needs /dev/net/tun".to_owned());
    }
    let ip = Command::new("ip").arg("-V").output();
    (!ip.is_ok_and(|output| output.status.success())).then(|| "needs iproute2's ip".to_owned())
}

/// Why tests with a program can't run here.
pub fn skip_without(program: &str) -> Option<String> {
    let found = std::env::split_paths(&std::env::var_os("PATH")?).any(|dir| dir.join(program).exists());
    (!found).then(|| format!("needs {program}"))
}

/// Returns from the test when it can't run here.
#[macro_export]
macro_rules! skip_if {
    ($reason:expr) => {
        if let Some(reason) = $reason {
            eprintln!("SKIPPED: {reason}");
            return;
        }
    };
}

pub struct Lab {
    pub prefix: String,
    pub executor: Executor,
    pub services: Services,
    pub directory: PathBuf,
    clients: Vec<String>,
}

impl Lab {
    pub fn new() -> Self {
        sweep();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("mt{}x{number}-", std::process::id());
        Self::with(Config { prefix, ..Config::default() })
    }

    pub fn with(config: Config) -> Self {
        let prefix = config.prefix.clone();
        let directory = std::env::temp_dir().join(&prefix);
        fs::create_dir_all(&directory).unwrap();
        let (executor, services) = (Executor::new(config.clone()), Services::new(config));
        Self { prefix, executor, services, directory, clients: Vec::new() }
    }

    /// One pass that must succeed.
    pub async fn converge(
        &mut self,
        desired: &[NetworkSpec],
        metadata: &HashMap<ServerId, InstanceMetadata>,
    ) -> Converged {
        self.converge_all(&desired.into(), metadata).await
    }

    /// One pass that must succeed.
    pub async fn converge_all(
        &mut self,
        desired: &Desired,
        metadata: &HashMap<ServerId, InstanceMetadata>,
    ) -> Converged {
        let converged = converge(&self.executor, &mut self.services, desired, metadata).await.unwrap();
        assert!(converged.failed.is_empty(), "{:?}", converged.failed);
        assert!(converged.failed_routers.is_empty(), "{:?}", converged.failed_routers);
        assert!(converged.services.failed.is_empty(), "{:?}", converged.services.failed);
        converged
    }

    /// Makes a namespace with a network card `eth0` in it, which is plugged in where the port's tap would be. The next
    /// pass attaches it to the bridge.
    pub fn plug_in(&mut self, network: NetworkId, port: &PortSpec) -> Client {
        let name = format!("{}client{}", self.prefix, self.clients.len());
        namespace::create_blocking(&name).unwrap();
        self.clients.push(name.clone());
        // Its link-local address is usable at once.
        let no_dad = || fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0");
        let _ = namespace::in_namespace(&name, no_dad).unwrap();
        let (there, tap) = (self.executor.namespace(network), names::tap_name(port.id));
        let add = ["-n", &there, "link", "add", &tap, "type", "veth", "peer", "name", "eth0"];
        run("ip", add.into_iter().chain(["address", &port.mac_address, "netns", &name]));
        run("ip", ["-n", &name, "link", "set", "lo", "up"]);
        run("ip", ["-n", &name, "link", "set", "eth0", "up"]);
        Client { namespace: name, directory: self.directory.clone() }
    }

    /// Names under /run/netns that belong to this lab's networks.
    pub fn names(&self) -> Vec<String> {
        let mut names = namespace::list().unwrap();
        names.retain(|name| name.starts_with(&self.prefix) && !self.clients.contains(name));
        names
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in namespace::list().unwrap_or_default() {
            if name.starts_with(&self.prefix) {
                kill_processes_of(&name);
                let _ = namespace::delete_blocking(&name);
            }
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Ends processes that a test left in one of its namespaces.
fn kill_processes_of(name: &str) {
    let Ok(output) = Command::new("ip").args(["netns", "pids", name]).output() else { return };
    for pid in String::from_utf8_lossy(&output.stdout).split_whitespace() {
        let pid = pid.parse().map(nix::unistd::Pid::from_raw);
        let _ = pid.map(|pid| nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL));
    }
}

/// Removes what killed runs of these tests left.
fn sweep() {
    for name in namespace::list().unwrap_or_default() {
        let pid = name.strip_prefix("mt").and_then(|rest| rest.split_once('x')).map(|(pid, _)| pid);
        let is_dead = |pid: &str| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists();
        if pid.is_some_and(is_dead) {
            kill_processes_of(&name);
            let _ = namespace::delete_blocking(&name);
        }
    }
}

/// Runs a program that must succeed; returns what it printed.
pub fn run<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A machine on a network.
pub struct Client {
    pub namespace: String,
    pub directory: PathBuf,
}

impl Client {
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, program]);
        command
    }

    pub fn run<'a>(&self, program: &str, arguments: impl IntoIterator<Item = &'a str>) -> Output {
        self.command(program).args(arguments).output().unwrap()
    }

    /// The command of busybox's DHCP client, which notes what it got in [`Client::lease`].
    pub fn udhcpc(&self, options: &[&str]) -> Command {
        let script = self.directory.join(format!("{}.sh", self.namespace));
        let notes = self.notes();
        let text = format!(
            "#!/bin/sh\n\
             case $1 in bound|renew)\n\
             [ $1 = bound ] && busybox ip -f inet address flush dev $interface\n\
             busybox ip address replace $ip/$mask broadcast $broadcast dev $interface\n\
             busybox ip link set $interface mtu $mtu\n\
             set -- $1 $staticroutes; event=$1; shift\n\
             while [ -n \"$2\" ]; do busybox ip route replace $1 via $2 dev $interface onlink; shift 2; done\n\
             env > {notes}.new; echo event=$event >> {notes}.new; busybox mv {notes}.new {notes};;\n\
             esac\n",
            notes = notes.display()
        );
        fs::write(&script, text).unwrap();
        run("chmod", [OsStr::new("+x"), script.as_os_str()]);
        let mut command = self.command("busybox");
        command.args(["udhcpc", "-i", "eth0", "-f", "-t", "10", "-T", "1", "-s"]).arg(script);
        command.args(["-O", "staticroutes", "-O", "mtu", "-O", "hostname"]).args(options);
        command
    }

    fn notes(&self) -> PathBuf {
        self.directory.join(format!("{}.lease", self.namespace))
    }

    /// What the DHCP client's script was told last.
    pub fn lease(&self) -> HashMap<String, String> {
        let text = fs::read_to_string(self.notes()).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.split_once('='))
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect()
    }

    /// Takes an address by DHCP.
    pub fn configure_by_dhcp(&self) {
        let output = self.udhcpc(&["-n", "-q"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Takes an address without asking, and a route to the metadata service.
    pub fn configure_statically(&self, ip: Ipv4Addr) {
        let name = self.namespace.as_str();
        run("ip", ["-n", name, "address", "replace", &format!("{ip}/24"), "dev", "eth0"]);
        run("ip", ["-n", name, "route", "replace", "169.254.169.254/32", "dev", "eth0"]);
    }

    /// HTTP status and body; `None` without an answer.
    pub fn fetch(&self, url: &str, options: &[&str]) -> Option<(u16, String)> {
        let fixed = ["-s", "--noproxy", "*", "--max-time", "5", "-w", "\n%{http_code}", url];
        let output = self.run("curl", fixed.into_iter().chain(options.iter().copied()));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n')?;
        output.status.success().then(|| (status.parse().unwrap(), body.to_owned()))
    }

    pub fn metadata(&self, path: &str) -> Option<(u16, String)> {
        self.fetch(&format!("http://169.254.169.254{path}"), &[])
    }
}

/// A network 10.0.0.0/24 (services at .2, router at .1) without ports.
pub fn network() -> NetworkSpec {
    let subnet = SubnetSpec {
        id: SubnetId::new(),
        cidr: "10.0.0.0/24".parse().unwrap(),
        gateway_ip: Some(Ipv4Addr::new(10, 0, 0, 1)),
        service_ip: Ipv4Addr::new(10, 0, 0, 2),
        enable_dhcp: true,
        dns_nameservers: vec![Ipv4Addr::new(9, 9, 9, 9)],
        host_routes: vec![HostRoute {
            destination: "172.20.0.0/16".parse().unwrap(),
            nexthop: Ipv4Addr::new(10, 0, 0, 3),
        }],
    };
    NetworkSpec {
        id: NetworkId::new(),
        mtu: 1442,
        subnets: vec![subnet],
        ports: vec![],
        ..NetworkSpec::default()
    }
}

/// Adds a port with address 10.0.0.`host`.
pub fn add_port(network: &mut NetworkSpec, host: u8) -> PortSpec {
    let port = PortSpec {
        id: PortId::new(),
        server_id: ServerId::new(),
        mac_address: format!("fa:16:3e:00:00:{host:02x}"),
        fixed_ips: vec![FixedIp {
            subnet_id: network.subnets[0].id,
            ip_address: Ipv4Addr::new(10, 0, 0, host),
        }],
        ..PortSpec::default()
    };
    network.ports.push(port.clone());
    port
}

/// Metadata for each server of the networks, named after its port's address.
pub fn metadata_of(networks: &[NetworkSpec]) -> HashMap<ServerId, InstanceMetadata> {
    let ports = networks.iter().flat_map(|network| &network.ports);
    ports
        .map(|port| {
            let name = format!("vm-{}", port.fixed_ips[0].ip_address.octets()[3]);
            let metadata = InstanceMetadata {
                uuid: port.server_id,
                name: name.clone(),
                hostname: name,
                project_id: "0123456789abcdef0123456789abcdef".to_owned(),
                availability_zone: "nova".to_owned(),
                public_keys: [("key".to_owned(), "ssh-ed25519 AAAA test".to_owned())].into(),
                meta: [("colour".to_owned(), "green".to_owned())].into(),
                // "#!/bin/sh\n"
                user_data: Some("IyEvYmluL3NoCg==".to_owned()),
                launch_index: 0,
                vendor_data: None,
                block_devices: Default::default(),
            };
            (port.server_id, metadata)
        })
        .collect()
}
