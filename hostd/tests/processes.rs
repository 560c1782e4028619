//! The agent with real processes (`examples/fake_vmm`) on a host that is simulated otherwise: started, found again by a
//! second agent, killed, ended.
#![expect(clippy::unwrap_used, reason = "tests: what goes wrong shall stop them")]

use std::{path::PathBuf, sync::Arc, time::Duration};

use mote_host_api::{CloudId, DesiredPower, DesiredState, HostId, NetworkSpec, ServerSpec, ServerState};
use mote_hostd::{
    agent::{Agent, ServerStatus, Snapshot},
    clock::SystemClock,
    ledger::Ledger,
    parts::{Parts, PassThrough, Vmms},
    paths::StateDir,
    sim::{World, server_in_network},
    vmm::VmmProcesses,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, getsid},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(60);

/// Built beside the tests.
fn fake_vmm() -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.join("examples/fake_vmm")
}

struct Machine {
    dir: tempfile::TempDir,
    world: Arc<World>,
}

impl Machine {
    /// None, with the reason told, without what a jail takes.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: not root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let world = World::new(dir.path()).unwrap();
        Some(Self { dir, world })
    }

    fn vmms(&self) -> VmmProcesses {
        VmmProcesses::new(fake_vmm(), self.state()).unwrap()
    }

    fn state(&self) -> StateDir {
        StateDir::new(self.dir.path().join("state"))
    }

    async fn agent(&self, desired: &DesiredState) -> Running {
        let simulated = self.world.parts(Arc::new(PassThrough)).unwrap();
        let parts = Parts {
            state: self.state(),
            ledger: Ledger::open(self.state()).unwrap(),
            vmms: Arc::new(self.vmms()),
            networks: simulated.networks.clone(),
            meter: simulated.meter.clone(),
            images: simulated.images.clone(),
            clock: Arc::new(SystemClock),
            checkpoints: Arc::new(PassThrough),
        };
        let agent = Agent::new(Arc::new(parts), 1024).await.unwrap();
        let (snapshots, desired) = (agent.snapshots(), watch::Sender::new(Some(Arc::new(desired.clone()))));
        let task = tokio::spawn(agent.run(desired.subscribe(), CancellationToken::new()));
        Running { task, snapshots, desired }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Also when a test failed: VMMs outlive agents by design.
        for (_, process) in mote_hostd::process::scan(&self.state()).unwrap_or_default() {
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
    }
}

struct Running {
    task: tokio::task::JoinHandle<()>,
    snapshots: watch::Receiver<Snapshot>,
    desired: watch::Sender<Option<Arc<DesiredState>>>,
}

impl Running {
    async fn until(&mut self, what: &str, is_so: impl Fn(&ServerStatus) -> bool) -> ServerStatus {
        let all = |snapshot: &Snapshot| snapshot.servers.len() == 1 && snapshot.servers.iter().all(&is_so);
        if let Ok(Ok(snapshot)) = tokio::time::timeout(PATIENCE, self.snapshots.wait_for(all)).await {
            return snapshot.servers[0].clone();
        }
        panic!("not {what}: {:?}", self.snapshots.borrow());
    }

    fn want(&self, desired: &DesiredState) {
        self.desired.send_replace(Some(Arc::new(desired.clone())));
    }
}

fn desired(generation: u64, network: &NetworkSpec, servers: &[ServerSpec]) -> DesiredState {
    DesiredState {
        cloud_id: CloudId(uuid::Uuid::nil()),
        host_id: HostId(uuid::Uuid::nil()),
        generation,
        networks: vec![network.clone()],
        servers: servers.to_vec(),
        ..DesiredState::default()
    }
}

fn runs(spec: &ServerSpec) -> impl Fn(&ServerStatus) -> bool {
    let run_generation = spec.run_generation;
    move |server| {
        server.observed.state == ServerState::Running && server.observed.run_generation == run_generation
    }
}

#[tokio::test]
async fn a_vmm_outlives_its_agent_is_found_again_and_its_end_is_noticed() {
    let Some(machine) = Machine::new() else { return };
    let (network, mut spec) = server_in_network(1);
    let mut first = machine.agent(&desired(1, &network, std::slice::from_ref(&spec))).await;
    let pid = first.until("running", runs(&spec)).await.pids[0];

    let dir = machine.state().server(spec.id);
    let log = std::fs::read_to_string(dir.vmm_log()).unwrap();
    let config: mote_vmm_api::VmConfig =
        serde_json::from_slice(&std::fs::read(dir.vmm_config()).unwrap()).unwrap();
    let tap = config.network_interfaces[0].tap_fd.unwrap();
    assert_eq!(
        log,
        format!("open: [0, 1, 2, {tap}]\n"),
        "nothing but the standard files and the tap is inherited"
    );
    assert_eq!(getsid(Some(Pid::from_raw(pid))), Ok(Pid::from_raw(pid)), "a session of its own");

    // kill -9 of the agent.
    first.task.abort();
    let mut second = machine.agent(&desired(1, &network, std::slice::from_ref(&spec))).await;
    assert_eq!(second.until("found again", runs(&spec)).await.pids, [pid]);

    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let failed = second.until("failed", |s| s.observed.state == ServerState::Failed).await;
    assert!(failed.observed.message.unwrap().contains("killed"));
    assert!(failed.pids.is_empty());

    spec.run_generation += 1;
    second.want(&desired(2, &network, std::slice::from_ref(&spec)));
    let again = second.until("running again", runs(&spec)).await.pids[0];
    assert_ne!(again, pid);
    spec.power = DesiredPower::Stopped;
    second.want(&desired(3, &network, std::slice::from_ref(&spec)));
    second.until("stopped", |s| s.observed.state == ServerState::Stopped).await;
    assert!(machine.vmms().scan().await.unwrap().is_empty());
    assert!(dir.disk(1).exists(), "the disk is kept");
    assert!(!dir.api_socket().exists(), "sockets are not");
}

#[tokio::test]
async fn a_nic_is_plugged_into_a_vmm_with_its_tap_and_unplugged_also_by_the_next_agent() {
    let Some(machine) = Machine::new() else { return };
    let (mut network, mut spec) = server_in_network(1);
    let (other, _) = server_in_network(2);
    network.ports.push(mote_host_api::PortSpec { server_id: spec.id, ..other.ports[0].clone() });
    let mut first = machine.agent(&desired(1, &network, std::slice::from_ref(&spec))).await;
    let pid = first.until("running", runs(&spec)).await.pids[0];
    let has = |spec: &ServerSpec| {
        let ports = spec.ports.iter().copied().collect();
        move |server: &ServerStatus| server.observed.ports.as_ref() == Some(&ports)
    };
    first.until("with one", has(&spec)).await;
    // Simulated taps are /dev/null.
    let taps = || {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let is_tap = |path: &PathBuf| path.as_path() == std::path::Path::new("/dev/null");
        open.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok()).filter(is_tap).count()
    };
    let before = taps();
    spec.ports.push(other.ports[0].id);
    first.want(&desired(2, &network, std::slice::from_ref(&spec)));
    first.until("with two", has(&spec)).await;
    assert_eq!(taps(), before + 1, "it has got one descriptor");
    first.task.abort();
    let mut second = machine.agent(&desired(2, &network, std::slice::from_ref(&spec))).await;
    second.until("still with two", has(&spec)).await;
    spec.ports.remove(0);
    second.want(&desired(3, &network, std::slice::from_ref(&spec)));
    assert_eq!(second.until("with the other", has(&spec)).await.pids, [pid]);
}

#[tokio::test]
async fn a_vmm_that_ended_while_no_agent_was_there_is_judged_by_its_report() {
    let Some(machine) = Machine::new() else { return };
    let (network, spec) = server_in_network(1);
    let wanted = desired(1, &network, std::slice::from_ref(&spec));
    let mut first = machine.agent(&wanted).await;
    let pid = first.until("running", runs(&spec)).await.pids[0];
    first.task.abort();

    // The guest switches itself off: simulated by a report in place of the one that SIGTERM makes.
    let process = mote_hostd::process::ProcessIdentity::of(pid).unwrap();
    let (vmms, dir) = (machine.vmms(), machine.state().server(spec.id));
    vmms.signal(&process, Signal::SIGTERM).unwrap();
    vmms.ended(&process).await;
    let report = std::fs::read_to_string(dir.exit_report()).unwrap();
    assert!(report.contains("terminated"), "{report}");
    std::fs::write(dir.exit_report(), report.replace("terminated", "power_off")).unwrap();

    let mut second = machine.agent(&wanted).await;
    let off = second.until("off", |s| s.observed.state == ServerState::Stopped).await;
    assert!(off.observed.message.unwrap().contains("switched itself off"));
}

#[tokio::test]
async fn a_guest_that_is_over_before_its_api_is_asked_is_seen_for_what_it_was() {
    for (end, expected, word) in [
        ("power_off", ServerState::Stopped, "switched itself off"),
        ("crash", ServerState::Failed, "crashed: as told"),
        ("bad_config", ServerState::Failed, "cannot be started: as told"),
    ] {
        let Some(machine) = Machine::new() else { return };
        let (network, mut spec) = server_in_network(1);
        spec.boot.command_line = Some(format!("quiet end={end}"));
        let mut agent = machine.agent(&desired(1, &network, std::slice::from_ref(&spec))).await;
        let over = agent.until(end, |s| s.observed.state == expected).await;
        assert!(over.observed.message.as_ref().unwrap().contains(word), "{over:?}");
        assert_eq!(over.observed.run_generation, 1);
    }
}

#[tokio::test]
async fn a_monitor_that_cannot_be_started_is_a_failure_with_its_name() {
    let Some(machine) = Machine::new() else { return };
    let vmms = VmmProcesses::new("/nonexistent/mote-vmm".into(), machine.state()).unwrap();
    let (_, spec) = server_in_network(1);
    std::fs::create_dir_all(machine.state().server(spec.id).path()).unwrap();
    let launch = mote_hostd::parts::Launch {
        id: spec.id,
        config: mote_vmm_api::VmConfig::default(),
        taps: Vec::new(),
    };
    let error = vmms.launch(launch).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot start /nonexistent/mote-vmm");
}
