//! A simulated host: processes, networks and images that exist in memory only, so that the agent's decisions and its
//! recovery from crashes can be run through without KVM, root or time. Files are real (in a temporary directory).
//!
//! `mote-hostd run --simulated` is such a host in a real cloud ([`World::open`]): images, disks, the ledger, the clock and
//! the conversations with the controller are real, only the VMM processes and the kernel's networks are not. Its processes
//! are remembered in a file, so that they outlive the agent as real ones do.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI32, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use mote_host_api::{
    BootSpec, DesiredPower, DeviceSpec, DiskSpec, FixedIp, ImageSpec, InstanceMetadata, NetworkId,
    NetworkSpec, PortId, PortSpec, RestartPolicy, ServerId, ServerSpec, SubnetId, Traffic,
};
use mote_network::NetworkKey;
use mote_vmm_api::{ExitReason, ExitReport, NetworkInterface};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{
    clock::{Clock, after},
    files::{self, Durability},
    ledger::Ledger,
    meter::Meter,
    parts::{
        Checkpoints, ImageError, Images, Launch, MEMORY_FILE, Networks, NetworksError, Parts, STATE_FILE,
        VmmError, Vmms,
    },
    paths::StateDir,
    process::{ProcessIdentity, boot_id},
    reconcile::{Converged, NetworkGoal},
};

/// Everything outside of the agent. It outlives agents that work on it, as a machine does.
pub struct World {
    state: StateDir,
    image: PathBuf,
    inner: Mutex<Inner>,
    changes: watch::Sender<u64>,
    next_pid: AtomicI32,
    clock: SimClock,
    /// Where processes are remembered.
    memory: Option<PathBuf>,
}

/// First number of a process of a simulated host: above the largest that a kernel gives (`PID_MAX_LIMIT`).
const FIRST_PID: i32 = 5_000_000;

/// What outlives the agent of a simulated host.
#[derive(Default, Serialize, Deserialize)]
struct Memory {
    processes: Vec<(ProcessIdentity, ServerId)>,
    paused: BTreeSet<ServerId>,
    #[serde(default)]
    nics: BTreeMap<ServerId, BTreeSet<String>>,
}

#[derive(Default)]
struct Inner {
    processes: BTreeMap<ProcessIdentity, ServerId>,
    paused: BTreeSet<ServerId>,
    /// The ids of each VMM's interfaces.
    nics: BTreeMap<ServerId, BTreeSet<String>>,
    /// Guests give up no NIC.
    clinging: bool,
    networks: BTreeSet<NetworkKey>,
    /// Images that can't be had.
    missing: BTreeSet<String>,
    /// VMMs that end as soon as they are started.
    short_lived: Option<ExitReason>,
    /// Snapshots can't be written.
    full: bool,
    launches: u64,
    /// Those that were not made of a suspended one's files.
    boots: u64,
}

impl World {
    /// An empty machine with its directories under `dir`.
    ///
    /// # Errors
    /// Of making files.
    pub fn new(dir: &std::path::Path) -> std::io::Result<Arc<Self>> {
        let image = dir.join("image");
        std::fs::write(&image, kernel_file())?;
        Ok(Arc::new(Self {
            state: StateDir::new(dir.join("state")),
            image,
            inner: Mutex::default(),
            changes: watch::Sender::new(0),
            next_pid: AtomicI32::new(1000),
            clock: SimClock::default(),
            memory: None,
        }))
    }

    /// The machine of a simulated host with these directories, with the processes that it had.
    ///
    /// # Errors
    /// Of reading its memory.
    pub fn open(state: StateDir) -> Result<Arc<Self>, files::FileError> {
        let memory = state.path().join("simulated.json");
        let known: Memory = files::read_json(&memory)?.unwrap_or_default();
        let here = boot_id();
        // As with real ones, nothing runs on after the machine was started again.
        let processes: BTreeMap<_, _> =
            known.processes.into_iter().filter(|(process, _)| process.boot_id == here).collect();
        let last = processes.keys().map(|process| process.pid).max();
        let inner = Inner { processes, paused: known.paused, nics: known.nics, ..Inner::default() };
        Ok(Arc::new(Self {
            state,
            image: PathBuf::new(),
            inner: Mutex::new(inner),
            changes: watch::Sender::new(0),
            next_pid: AtomicI32::new(last.map_or(FIRST_PID, |last| last.saturating_add(1))),
            clock: SimClock::default(),
            memory: Some(memory),
        }))
    }

    /// Its VMM processes.
    pub fn vmms(self: &Arc<Self>) -> Arc<dyn Vmms> {
        Arc::new(Simulated(self.clone()))
    }

    /// Its networks.
    pub fn kernel_networks(self: &Arc<Self>) -> Arc<dyn Networks> {
        Arc::new(Simulated(self.clone()))
    }

    /// The parts for an agent that works on this machine.
    ///
    /// # Errors
    /// Of making directories.
    pub fn parts(
        self: &Arc<Self>,
        checkpoints: Arc<dyn Checkpoints>,
    ) -> Result<Arc<Parts>, files::FileError> {
        Ok(Arc::new(Parts {
            state: self.state.clone(),
            ledger: Ledger::open(self.state.clone())?,
            vmms: Arc::new(Simulated(self.clone())),
            networks: Arc::new(Simulated(self.clone())),
            meter: self.meter(),
            images: Arc::new(Simulated(self.clone())),
            clock: Arc::new(self.clock.clone()),
            checkpoints,
        }))
    }

    /// What its ports have carried: nothing.
    pub fn meter(self: &Arc<Self>) -> Arc<Meter> {
        Arc::new(Meter::new(Arc::new(Simulated(self.clone()))))
    }

    /// Its clock.
    pub fn clock(&self) -> &SimClock {
        &self.clock
    }

    /// VMMs that run now.
    pub fn running(&self) -> Vec<(ServerId, ProcessIdentity)> {
        self.lock().processes.iter().map(|(process, id)| (*id, process.clone())).collect()
    }

    /// Namespaces that exist now.
    pub fn networks(&self) -> BTreeSet<NetworkKey> {
        self.lock().networks.clone()
    }

    /// Whether there is no place for snapshots.
    pub fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    /// Whether guests keep NICs that they are asked to give up.
    pub fn set_clinging(&self, clinging: bool) {
        self.lock().clinging = clinging;
    }

    /// How many NICs that server's VMM has.
    pub fn nics(&self, id: ServerId) -> usize {
        self.lock().nics.get(&id).map_or(0, BTreeSet::len)
    }

    /// Servers whose guests stand still.
    pub fn paused(&self) -> BTreeSet<ServerId> {
        self.lock().paused.clone()
    }

    /// How many VMMs were ever started.
    pub fn launches(&self) -> u64 {
        self.lock().launches
    }

    /// How many VMMs were started that began from nothing.
    pub fn boots(&self) -> u64 {
        self.lock().boots
    }

    /// Ends a VMM as its guest or somebody else would; without a reason it leaves no report.
    pub fn end(&self, process: &ProcessIdentity, reason: Option<ExitReason>) {
        let id = self.lock().processes.remove(process);
        if let (Some(id), Some(reason)) = (id, reason) {
            self.write_report(id, reason);
        }
        self.changed();
    }

    /// The machine goes down and comes up again: nothing runs, no namespace is left.
    pub fn reboot(&self) {
        let mut inner = self.lock();
        inner.processes.clear();
        inner.networks.clear();
        drop(inner);
        self.changed();
    }

    /// Makes an image unavailable, or available again.
    pub fn set_missing(&self, sha256: &str, missing: bool) {
        let mut inner = self.lock();
        if missing {
            inner.missing.insert(sha256.to_owned());
        } else {
            inner.missing.remove(sha256);
        }
    }

    /// From now on VMMs end at once for this reason; `None`: they run.
    pub fn set_short_lived(&self, reason: Option<ExitReason>) {
        self.lock().short_lived = reason;
    }

    /// A guest's first lines on its console.
    fn say_hello(&self, id: ServerId) {
        let path = self.state.server(id).console_log();
        // The directory may be gone, as for a real VMM.
        let text = format!(
            "simulated boot\nsimulated devices: none\nsimulated network: none\nsimulated guest of server {id}\n"
        );
        let _ = std::fs::write(path, text);
    }

    fn write_report(&self, id: ServerId, reason: ExitReason) {
        let report = ExitReport { reason, message: format!("simulated {reason:?}") };
        let path = self.state.server(id).exit_report();
        // The directory may be gone, as for a real VMM: then there is nobody to tell.
        let _ = files::replace_json(&path, &report, Durability::Process);
    }

    fn remember(&self) {
        let Some(path) = &self.memory else { return };
        let inner = self.lock();
        let processes = inner.processes.iter().map(|(process, id)| (process.clone(), *id)).collect();
        let memory = Memory { processes, paused: inner.paused.clone(), nics: inner.nics.clone() };
        // Still under the lock, so that an older state never replaces a newer one.
        if let Err(e) = files::replace_json(path, &memory, Durability::Process) {
            tracing::warn!(error = crate::errors::one_line(&e), "simulated processes are not remembered");
        }
        drop(inner);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.remember();
        self.changes.send_modify(|n| *n += 1);
    }
}

/// The world as an agent's parts.
struct Simulated(Arc<World>);

impl Vmms for Simulated {
    fn scan(&self) -> BoxFuture<'_, Result<Vec<(ServerId, ProcessIdentity)>, VmmError>> {
        Box::pin(async { Ok(self.0.running()) })
    }

    fn launch(&self, launch: Launch) -> BoxFuture<'_, Result<ProcessIdentity, VmmError>> {
        Box::pin(async move {
            let pid = self.0.next_pid.fetch_add(1, Ordering::SeqCst);
            let process = ProcessIdentity { pid, start_ticks: 1, boot_id: boot_id() };
            let mut inner = self.0.lock();
            inner.launches += 1;
            let dir = self.0.state.server(launch.id);
            let load = launch.config.snapshot_load.as_ref();
            match load {
                Some(_) => inner.paused.insert(launch.id),
                None => inner.paused.remove(&launch.id),
            };
            inner.boots += u64::from(load.is_none());
            let nics: BTreeSet<String> = match load {
                Some(load) => load.network_overrides.iter().map(|nic| nic.iface_id.clone()).collect(),
                None => launch.config.network_interfaces.iter().map(|nic| nic.iface_id.clone()).collect(),
            };
            inner.nics.insert(launch.id, nics);
            let lacking = load.is_some_and(|load| !dir.outside(&load.snapshot_path).is_file());
            let ends = if lacking { Some(ExitReason::BadConfig) } else { inner.short_lived };
            match ends {
                Some(reason) => {
                    drop(inner);
                    self.0.write_report(launch.id, reason);
                }
                None => {
                    inner.processes.insert(process.clone(), launch.id);
                    drop(inner);
                    if load.is_none() {
                        self.0.say_hello(launch.id);
                    }
                    self.0.remember();
                }
            }
            Ok(process)
        })
    }

    fn running(&self, id: ServerId) -> BoxFuture<'_, ()> {
        let runs = self.0.lock().processes.values().any(|running| *running == id);
        if runs { Box::pin(std::future::ready(())) } else { Box::pin(std::future::pending()) }
    }

    fn ended(&self, process: &ProcessIdentity) -> BoxFuture<'static, ()> {
        let (world, process) = (self.0.clone(), process.clone());
        let mut changes = world.changes.subscribe();
        Box::pin(async move {
            while world.lock().processes.contains_key(&process) {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        })
    }

    fn set_paused(&self, id: ServerId, paused: bool) -> BoxFuture<'_, Result<(), VmmError>> {
        Box::pin(async move {
            let mut inner = self.0.lock();
            let what = if paused { "pause" } else { "resume" };
            if !inner.processes.values().any(|running| *running == id) {
                return Err(VmmError::Ask { what, source: "it does not run".into() });
            }
            match paused {
                true => inner.paused.insert(id),
                false => inner.paused.remove(&id),
            };
            drop(inner);
            self.0.remember();
            Ok(())
        })
    }

    fn snapshot(&self, id: ServerId, dir: PathBuf) -> BoxFuture<'_, Result<(), VmmError>> {
        Box::pin(async move {
            let what = "write its snapshot";
            let failed = |source| VmmError::Ask { what, source };
            let inner = self.0.lock();
            if !inner.processes.values().any(|running| *running == id) || !inner.paused.contains(&id) {
                return Err(failed("it does not stand still".into()));
            }
            if inner.full {
                return Err(failed("No space left on device".into()));
            }
            drop(inner);
            for name in [STATE_FILE, MEMORY_FILE] {
                std::fs::write(dir.join(name), b"simulated").map_err(|e| failed(e.into()))?;
            }
            Ok(())
        })
    }

    fn interfaces(&self, id: ServerId) -> BoxFuture<'_, Result<Vec<String>, VmmError>> {
        Box::pin(async move {
            let inner = self.0.lock();
            if !inner.processes.values().any(|running| *running == id) {
                let source = "it does not run".into();
                return Err(VmmError::Ask { what: "tell its configuration", source });
            }
            Ok(inner.nics.get(&id).into_iter().flatten().cloned().collect())
        })
    }

    fn plug(
        &self,
        id: ServerId,
        interface: NetworkInterface,
        _tap: OwnedFd,
    ) -> BoxFuture<'_, Result<(), VmmError>> {
        Box::pin(async move {
            let failed = |source| VmmError::Ask { what: "plug in a NIC", source };
            let mut inner = self.0.lock();
            let runs = inner.processes.values().any(|running| *running == id);
            if !runs || inner.paused.contains(&id) {
                return Err(failed("it does not run".into()));
            }
            if !inner.nics.entry(id).or_default().insert(interface.iface_id) {
                return Err(failed("there is already such an interface".into()));
            }
            drop(inner);
            self.0.remember();
            Ok(())
        })
    }

    fn unplug(&self, id: ServerId, interface: String) -> BoxFuture<'_, Result<(), VmmError>> {
        Box::pin(async move {
            let failed = |source| VmmError::Ask { what: "ask its guest to give up a NIC", source };
            let mut inner = self.0.lock();
            let runs = inner.processes.values().any(|running| *running == id);
            if !runs || inner.paused.contains(&id) {
                return Err(failed("it does not run".into()));
            }
            if !inner.nics.get(&id).is_some_and(|nics| nics.contains(&interface)) {
                return Err(failed("there is no such interface".into()));
            }
            if !inner.clinging {
                inner.nics.entry(id).or_default().remove(&interface);
            }
            drop(inner);
            self.0.remember();
            Ok(())
        })
    }

    fn signal(&self, process: &ProcessIdentity, signal: Signal) -> Result<(), VmmError> {
        self.0.end(process, (signal == Signal::SIGTERM).then_some(ExitReason::Terminated));
        Ok(())
    }
}

impl Networks for Simulated {
    fn converge<'a>(&'a self, goal: &'a NetworkGoal) -> BoxFuture<'a, Result<Converged, NetworksError>> {
        Box::pin(async move {
            let mut inner = self.0.lock();
            let wanted: BTreeSet<NetworkKey> =
                goal.desired.networks.iter().map(|network| network.id.into()).collect();
            let keep: BTreeSet<NetworkKey> = goal.keep.iter().map(|id| (*id).into()).collect();
            inner.networks.retain(|key| wanted.contains(key) || keep.contains(key));
            inner.networks.extend(wanted);
            Ok(Converged { existing: inner.networks.clone(), failed: BTreeMap::new() })
        })
    }

    fn open_tap<'a>(
        &'a self,
        network: NetworkId,
        port: &'a PortSpec,
        _mtu: u16,
    ) -> BoxFuture<'a, Result<OwnedFd, NetworksError>> {
        Box::pin(async move {
            let tap = |source| NetworksError::Tap { port: port.id, source };
            if !self.0.lock().networks.contains(&network.into()) {
                return Err(tap("no such network".into()));
            }
            std::fs::File::open("/dev/null").map(OwnedFd::from).map_err(|e| tap(Box::new(e)))
        })
    }

    /// Simulated taps carry nothing.
    fn counters(&self) -> BoxFuture<'_, Result<BTreeMap<String, Traffic>, NetworksError>> {
        Box::pin(async { Ok(BTreeMap::new()) })
    }
}

impl Images for Simulated {
    fn ensure<'a>(&'a self, image: &'a ImageSpec) -> BoxFuture<'a, Result<PathBuf, ImageError>> {
        Box::pin(async move {
            if self.0.lock().missing.contains(&image.sha256) {
                let source = "simulated absence".into();
                return Err(ImageError::Away { sha256: image.sha256.clone(), source });
            }
            Ok(self.0.image.clone())
        })
    }
}

/// A clock that stands still until it is told to go on.
#[derive(Debug, Clone)]
pub struct SimClock {
    elapsed_ms: Arc<AtomicU64>,
    ticks: Arc<watch::Sender<u64>>,
}

impl Default for SimClock {
    fn default() -> Self {
        Self { elapsed_ms: Arc::default(), ticks: Arc::new(watch::Sender::new(0)) }
    }
}

impl SimClock {
    /// Lets time go on.
    pub fn advance(&self, duration: Duration) {
        let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        self.elapsed_ms.fetch_add(ms, Ordering::SeqCst);
        self.ticks.send_modify(|n| *n += 1);
    }
}

impl Clock for SimClock {
    fn now(&self) -> Timestamp {
        let elapsed = Duration::from_millis(self.elapsed_ms.load(Ordering::SeqCst));
        after(Timestamp::UNIX_EPOCH, elapsed)
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let until = after(self.now(), duration);
        let (clock, mut ticks) = (self.clone(), self.ticks.subscribe());
        Box::pin(async move {
            while clock.now() < until {
                if ticks.changed().await.is_err() {
                    return;
                }
            }
        })
    }
}

/// The smallest file that passes for a kernel: an ELF header with a 64-bit entry and one loadable segment.
fn kernel_file() -> Vec<u8> {
    let mut file = vec![0_u8; 4096];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[6] = 1;
    file[16..18].copy_from_slice(&2_u16.to_le_bytes()); // e_type: ET_EXEC
    file[18..20].copy_from_slice(&62_u16.to_le_bytes()); // e_machine: x86-64
    file[20..24].copy_from_slice(&1_u32.to_le_bytes());
    file[24..32].copy_from_slice(&0x10_0000_u64.to_le_bytes()); // e_entry
    file[32..40].copy_from_slice(&64_u64.to_le_bytes()); // e_phoff
    file[52..54].copy_from_slice(&64_u16.to_le_bytes()); // e_ehsize
    file[54..56].copy_from_slice(&56_u16.to_le_bytes()); // e_phentsize
    file[56..58].copy_from_slice(&1_u16.to_le_bytes()); // e_phnum
    let segment = &mut file[64..120];
    segment[..4].copy_from_slice(&1_u32.to_le_bytes()); // PT_LOAD
    segment[4..8].copy_from_slice(&5_u32.to_le_bytes()); // read, execute
    segment[8..16].copy_from_slice(&0x400_u64.to_le_bytes()); // offset
    segment[16..24].copy_from_slice(&0x10_0000_u64.to_le_bytes()); // virtual address
    segment[24..32].copy_from_slice(&0x10_0000_u64.to_le_bytes()); // physical address
    segment[32..40].copy_from_slice(&0x400_u64.to_le_bytes()); // size in the file
    segment[40..48].copy_from_slice(&0x400_u64.to_le_bytes()); // size in memory
    file
}

/// A small server with these ports.
pub fn server_spec(ports: &[PortId]) -> ServerSpec {
    let id = ServerId::new();
    let image = |digit: char| ImageSpec { sha256: digit.to_string().repeat(64), size: 4096 };
    ServerSpec {
        id,
        power: DesiredPower::Running,
        run_generation: 1,
        vcpus: 1,
        memory_mib: 128,
        root_disk_gib: 0,
        boot: BootSpec { disk: image('d'), kernel: Some(image('c')), ramdisk: None, command_line: None },
        disk: DiskSpec::default(),
        kept_disk: None,
        local_disks: Vec::new(),
        kept_local_disks: Vec::new(),
        rescue: None,
        config_drive: Some(1),
        captures: Vec::new(),
        ports: ports.to_vec(),
        restart_policy: RestartPolicy::Never,
        metadata: InstanceMetadata {
            uuid: id,
            name: "simulated".into(),
            hostname: "simulated".into(),
            project_id: "0".repeat(32),
            availability_zone: "nova".into(),
            public_keys: BTreeMap::new(),
            meta: BTreeMap::new(),
            user_data: None,
            launch_index: 0,
            vendor_data: None,
            block_devices: BTreeMap::new(),
        },
        devices: DeviceSpec::default(),
    }
}

/// A network of its own with a server in it.
pub fn server_in_network(last_octet: u8) -> (NetworkSpec, ServerSpec) {
    let (port, subnet) = (PortId::new(), SubnetId::new());
    let server = server_spec(&[port]);
    let network = NetworkSpec {
        id: NetworkId::new(),
        mtu: 1450,
        subnets: Vec::new(),
        ports: vec![PortSpec {
            id: port,
            server_id: server.id,
            mac_address: format!("fa:16:3e:00:00:{last_octet:02x}"),
            fixed_ips: vec![FixedIp { subnet_id: subnet, ip_address: [10, 0, 0, last_octet].into() }],
            ..PortSpec::default()
        }],
        ..NetworkSpec::default()
    };
    (network, server)
}
