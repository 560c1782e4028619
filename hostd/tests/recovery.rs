//! The agent on a simulated host: a server's whole life, and `kill -9` of the agent at every single step of it.
#![expect(clippy::unwrap_used, reason = "tests: what goes wrong shall stop them")]

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use mote_host_api::{
    CaptureSpec, CloudId, DesiredPower, DesiredState, GivenUp, HostId, ImageId, NetworkSpec, PortId,
    RestartPolicy, ServerSpec, ServerState, Wish,
};
use mote_hostd::{
    agent::{Agent, Snapshot},
    parts::{Checkpoints, Parts, PassThrough},
    sim::{World, server_in_network},
};
use mote_vmm_api::ExitReason;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// Longest real time that anything may take before the test gives up on it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Stops for ever at the n-th checkpoint, and says so.
struct StopAt {
    remaining: AtomicUsize,
    stopped: CancellationToken,
}

impl StopAt {
    fn new(n: usize) -> Arc<Self> {
        Arc::new(Self { remaining: AtomicUsize::new(n), stopped: CancellationToken::new() })
    }
}

impl Checkpoints for StopAt {
    fn reach(&self, _step: &'static str) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let before =
                self.remaining.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
            if before.unwrap_or(0) <= 1 {
                self.stopped.cancel();
                std::future::pending::<()>().await;
            }
        })
    }
}

/// An agent at work; dropping it is `kill -9`.
struct Running {
    parts: Arc<Parts>,
    task: JoinHandle<()>,
    ticking: JoinHandle<()>,
    snapshots: watch::Receiver<Snapshot>,
    desired: watch::Sender<Option<Arc<DesiredState>>>,
}

impl Running {
    async fn start(world: &Arc<World>, checkpoints: Arc<dyn Checkpoints>, desired: &DesiredState) -> Self {
        let parts = world.parts(checkpoints).unwrap();
        let agent = Agent::new(parts.clone(), 1024).await.unwrap();
        let snapshots = agent.snapshots();
        let desired = watch::Sender::new(Some(Arc::new(desired.clone())));
        let task = tokio::spawn(agent.run(desired.subscribe(), CancellationToken::new()));
        let clock = world.clock().clone();
        let ticking = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(1)).await;
                clock.advance(Duration::from_millis(200));
            }
        });
        Self { parts, task, ticking, snapshots, desired }
    }

    fn want(&self, desired: &DesiredState) {
        self.desired.send_replace(Some(Arc::new(desired.clone())));
    }

    async fn until(&mut self, what: &str, is_so: impl Fn(&Snapshot) -> bool) -> Snapshot {
        if let Ok(Ok(snapshot)) = tokio::time::timeout(PATIENCE, self.snapshots.wait_for(is_so)).await {
            return snapshot.clone();
        }
        panic!("not {what}: {:?}", self.snapshots.borrow());
    }

    async fn kill(self) {
        self.task.abort();
        self.ticking.abort();
        // Blocking work under way can't be aborted; the next agent must not meet it.
        while Arc::strong_count(&self.parts) > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn desired(generation: u64, parts: &[(NetworkSpec, ServerSpec)]) -> DesiredState {
    let (networks, servers) = parts.iter().cloned().unzip();
    DesiredState {
        cloud_id: CloudId(uuid::Uuid::nil()),
        host_id: HostId(uuid::Uuid::nil()),
        generation,
        networks,
        servers,
        ..DesiredState::default()
    }
}

fn state(snapshot: &Snapshot, spec: &ServerSpec) -> Option<ServerState> {
    snapshot.servers.iter().find(|s| s.observed.id == spec.id).map(|s| s.observed.state)
}

fn all_run(generation: u64, parts: &[(NetworkSpec, ServerSpec)]) -> impl Fn(&Snapshot) -> bool {
    let specs: Vec<_> = parts.iter().map(|(_, spec)| spec.clone()).collect();
    move |snapshot| {
        snapshot.applied_generation == generation
            && specs.iter().all(|spec| {
                let seen = snapshot.servers.iter().find(|s| s.observed.id == spec.id);
                seen.is_some_and(|seen| {
                    seen.observed.state == ServerState::Running
                        && seen.observed.run_generation == spec.run_generation
                        && seen.pids.len() == 1
                })
            })
    }
}

fn nothing(generation: u64) -> impl Fn(&Snapshot) -> bool {
    move |snapshot| {
        snapshot.applied_generation == generation
            && snapshot.servers.is_empty()
            && snapshot.networks == Some(0)
    }
}

/// What is left in the directories of servers.
fn leftovers(dir: &std::path::Path) -> BTreeSet<String> {
    let list = |path: std::path::PathBuf| {
        let entries = std::fs::read_dir(&path).into_iter().flatten().flatten();
        entries.map(|entry| entry.path().display().to_string()).collect::<Vec<_>>()
    };
    list(dir.join("state/servers")).into_iter().chain(list(dir.join("run/servers"))).collect()
}

#[tokio::test]
async fn servers_come_run_and_go_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let parts: Vec<_> = (1..4).map(server_in_network).collect();
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(1, &parts)).await;
    agent.until("all running", all_run(1, &parts)).await;
    assert_eq!(world.running().len(), 3);
    assert_eq!(world.networks().len(), 3);

    agent.want(&desired(2, &parts[..1]));
    let first = parts[0].1.clone();
    agent
        .until("one left", |s| s.applied_generation == 2 && s.servers.len() == 1 && s.networks == Some(1))
        .await;
    assert_eq!(world.running().iter().map(|(id, _)| *id).collect::<Vec<_>>(), [first.id]);
    agent.want(&desired(3, &[]));
    agent.until("nothing left", nothing(3)).await;
    assert!(world.running().is_empty() && world.networks().is_empty());
    assert_eq!(leftovers(dir.path()), BTreeSet::new());
    assert_eq!(world.launches(), 3);
}

/// Runs `steps` (each a desired state and when it is reached) with a `kill -9` at the n-th checkpoint, then a new agent.
/// Returns false when the run had fewer checkpoints.
async fn killed_at(n: usize, restart: bool) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let mut parts = vec![server_in_network(1), server_in_network(2)];
    let stop = StopAt::new(n);
    let mut agent = Running::start(&world, stop.clone(), &desired(1, &parts)).await;

    let mut generation = 1;
    let life = async {
        agent.until("running", all_run(1, &parts)).await;
        generation = 2;
        if restart {
            parts[0].1.run_generation += 1;
            agent.want(&desired(2, &parts));
            agent.until("restarted", all_run(2, &parts)).await;
            generation = 3;
        }
        agent.want(&desired(generation, &parts[1..]));
        let gone = parts[0].1.clone();
        agent
            .until("one gone", |s| {
                s.applied_generation == generation && state(s, &gone).is_none() && s.networks == Some(1)
            })
            .await;
    };
    let killed = tokio::select! {
        () = life => false,
        () = stop.stopped.cancelled() => true,
    };
    agent.kill().await;
    let before = world.running();

    // What is wanted now, whatever was wanted when the agent was killed.
    let wanted = if generation == 1 || !killed { parts.clone() } else { parts[1..].to_vec() };
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(9, &wanted)).await;
    let snapshot = agent.until(&format!("running after kill at {n}"), all_run(9, &wanted)).await;
    if wanted.len() == 1 {
        agent.until("the other one gone", |s| s.servers.len() == 1 && s.networks == Some(1)).await;
    }
    // One VMM each, and those that ran (and were right) are the same ones.
    assert_eq!(world.running().len(), wanted.len(), "killed at {n}: {snapshot:?}");
    let second = parts[1].1.id;
    if let Some(survivor) = before.iter().find(|(id, _)| *id == second) {
        assert!(world.running().contains(survivor), "killed at {n}: a right server was touched");
    }
    agent.want(&desired(10, &[]));
    agent.until("nothing left", nothing(10)).await;
    assert!(world.running().is_empty() && world.networks().is_empty(), "killed at {n}");
    assert_eq!(leftovers(dir.path()), BTreeSet::new(), "killed at {n}");
    agent.kill().await;
    killed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_at_any_step_of_a_life_is_repaired_by_the_next_agent() {
    for restart in [false, true] {
        let mut n = 1;
        while killed_at(n, restart).await {
            n += 1;
            assert!(n < 500, "a life has an end");
        }
        assert!(n > 30, "there were only {n} checkpoints");
    }
}

/// Suspends and resumes a server, with a `kill -9` at the n-th checkpoint. Returns false when there were fewer.
async fn suspended_and_killed_at(n: usize) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let running = vec![server_in_network(1)];
    let mut suspended = running.clone();
    suspended[0].1.power = DesiredPower::Suspended;
    let spec = suspended[0].1.clone();
    let is_suspended = |snapshot: &Snapshot| state(snapshot, &spec) == Some(ServerState::Suspended);
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(1, &running)).await;
    agent.until("running", all_run(1, &running)).await;
    agent.kill().await;

    let stop = StopAt::new(n);
    let mut agent = Running::start(&world, stop.clone(), &desired(2, &suspended)).await;
    let mut was_suspended = false;
    let life = async {
        agent.until("suspended", is_suspended).await;
        assert!(world.running().is_empty(), "its memory is free");
        was_suspended = true;
        agent.want(&desired(3, &running));
        agent.until("resumed", all_run(3, &running)).await;
    };
    let killed = tokio::select! {
        () = life => false,
        () = stop.stopped.cancelled() => true,
    };
    agent.kill().await;

    let wanted = if was_suspended { &running } else { &suspended };
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(4, wanted)).await;
    if !was_suspended {
        agent.until("suspended by the next agent", is_suspended).await;
        assert!(world.running().is_empty(), "killed at {n}");
        agent.want(&desired(5, &running));
    }
    let generation = if was_suspended { 4 } else { 5 };
    agent.until(&format!("running after kill at {n}"), all_run(generation, &running)).await;
    while !world.paused().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(world.boots(), 1, "killed at {n}: its memory was lost");
    assert_eq!(world.running().len(), 1, "killed at {n}");
    let files = dir.path().join("state/servers").join(spec.id.to_string()).join("vm/suspended");
    assert!(!files.exists(), "killed at {n}: files of a moment that is over are left");

    agent.want(&desired(9, &suspended));
    agent.until("suspended once more", is_suspended).await;
    agent.want(&desired(10, &[]));
    agent.until("nothing left", nothing(10)).await;
    assert_eq!(leftovers(dir.path()), BTreeSet::new(), "killed at {n}");
    agent.kill().await;
    killed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_at_any_step_of_suspend_and_resume_loses_no_memory() {
    let mut n = 1;
    while suspended_and_killed_at(n).await {
        n += 1;
        assert!(n < 500, "it has an end");
    }
    assert!(n > 20, "there were only {n} checkpoints");
}

/// A server with one NIC or a second one, whose network may be named for as long as it has that.
struct Nics {
    network: NetworkSpec,
    other: NetworkSpec,
    spec: ServerSpec,
}

impl Nics {
    fn new() -> Self {
        let (network, spec) = server_in_network(1);
        let (mut other, _) = server_in_network(2);
        other.ports[0].server_id = spec.id;
        Self { network, other, spec }
    }

    fn desired(&self, generation: u64, second: bool, other_is_named: bool) -> DesiredState {
        let mut spec = self.spec.clone();
        spec.ports.extend(second.then_some(self.other.ports[0].id));
        let mut state = desired(generation, &[(self.network.clone(), spec)]);
        state.networks.extend(other_is_named.then(|| self.other.clone()));
        state
    }

    fn has(&self, second: bool) -> impl Fn(&Snapshot) -> bool {
        let more = second.then_some(self.other.ports[0].id);
        let ports: BTreeSet<PortId> = self.spec.ports.iter().copied().chain(more).collect();
        let id = self.spec.id;
        move |snapshot| {
            let seen = snapshot.servers.iter().find(|server| server.observed.id == id);
            seen.is_some_and(|seen| seen.observed.ports.as_ref() == Some(&ports))
        }
    }
}

/// Plugs and unplugs a NIC of a server that runs, with a `kill -9` at the n-th checkpoint. False when there were fewer.
async fn rewired_and_killed_at(n: usize) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let nics = Nics::new();
    let mut agent = Running::start(&world, Arc::new(PassThrough), &nics.desired(1, false, false)).await;
    agent.until("running with one", nics.has(false)).await;
    agent.kill().await;

    let stop = StopAt::new(n);
    let mut agent = Running::start(&world, stop.clone(), &nics.desired(2, true, true)).await;
    let mut was_plugged = false;
    let life = async {
        agent.until("plugged", nics.has(true)).await;
        assert_eq!(world.nics(nics.spec.id), 2);
        was_plugged = true;
        agent.want(&nics.desired(3, false, true));
        agent.until("unplugged", nics.has(false)).await;
    };
    let killed = tokio::select! {
        () = life => false,
        () = stop.stopped.cancelled() => true,
    };
    agent.kill().await;

    let second = !was_plugged;
    let mut agent = Running::start(&world, Arc::new(PassThrough), &nics.desired(4, second, true)).await;
    agent.until(&format!("in line after kill at {n}"), nics.has(second)).await;
    assert_eq!(world.nics(nics.spec.id), 1 + usize::from(second), "killed at {n}");
    agent.want(&nics.desired(5, false, true));
    agent.until("unplugged at last", nics.has(false)).await;
    agent.want(&nics.desired(6, false, false));
    agent.until("without the other network", |snapshot| snapshot.networks == Some(1)).await;
    assert_eq!(world.launches(), 1, "killed at {n}: it was started again");
    agent.kill().await;
    killed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_at_any_step_of_plugging_and_unplugging_a_nic_is_repaired_by_the_next_agent() {
    let mut n = 1;
    while rewired_and_killed_at(n).await {
        n += 1;
        assert!(n < 200, "it has an end");
    }
    assert!(n > 10, "there were only {n} checkpoints");
}

#[tokio::test]
async fn a_guest_that_keeps_its_nic_is_asked_again_and_the_next_start_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let mut nics = Nics::new();
    let mut agent = Running::start(&world, Arc::new(PassThrough), &nics.desired(1, true, true)).await;
    agent.until("running with two", nics.has(true)).await;
    world.set_clinging(true);
    agent.want(&nics.desired(2, false, true));
    agent.until("seen", |snapshot| snapshot.applied_generation == 2).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(world.nics(nics.spec.id), 2);
    // Other things go on meanwhile.
    nics.spec.power = DesiredPower::Paused;
    agent.want(&nics.desired(3, false, true));
    agent.until("paused", |snapshot| state(snapshot, &nics.spec) == Some(ServerState::Paused)).await;
    nics.spec.power = DesiredPower::Running;
    world.set_clinging(false);
    agent.want(&nics.desired(4, false, true));
    agent.until("given up by the guest", nics.has(false)).await;
    assert_eq!(world.launches(), 1);

    world.set_clinging(true);
    agent.want(&nics.desired(5, true, true));
    agent.until("plugged once more", nics.has(true)).await;
    nics.spec.run_generation += 1;
    agent.want(&nics.desired(6, false, true));
    agent.until("started without it", nics.has(false)).await;
    assert_eq!((world.launches(), world.nics(nics.spec.id)), (2, 1));
    agent.kill().await;
}

#[tokio::test]
async fn a_port_that_goes_while_its_server_is_suspended_is_there_until_that_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let mut nics = Nics::new();
    let mut agent = Running::start(&world, Arc::new(PassThrough), &nics.desired(1, false, false)).await;
    agent.until("running with one", nics.has(false)).await;
    agent.want(&nics.desired(2, true, true));
    agent.until("plugged", nics.has(true)).await;
    nics.spec.power = DesiredPower::Suspended;
    agent.want(&nics.desired(3, true, true));
    agent.until("suspended", |snapshot| state(snapshot, &nics.spec) == Some(ServerState::Suspended)).await;
    world.set_clinging(true);
    nics.spec.power = DesiredPower::Running;
    agent.want(&nics.desired(4, false, true));
    agent.until("as it was suspended", nics.has(true)).await;
    world.set_clinging(false);
    agent.until("unplugged", nics.has(false)).await;
    assert_eq!((world.boots(), world.launches()), (1, 2));
    agent.kill().await;
}

#[tokio::test]
async fn a_suspended_server_survives_a_reboot_of_the_host_and_a_hard_reboot_begins_from_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let mut parts = vec![server_in_network(1)];
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(1, &parts)).await;
    agent.until("running", all_run(1, &parts)).await;
    parts[0].1.power = DesiredPower::Suspended;
    let spec = parts[0].1.clone();
    let is_suspended = |snapshot: &Snapshot| state(snapshot, &spec) == Some(ServerState::Suspended);
    agent.want(&desired(2, &parts));
    agent.until("suspended", is_suspended).await;
    agent.kill().await;
    world.reboot();
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(2, &parts)).await;
    agent.until("still suspended", |s| is_suspended(s) && s.applied_generation == 2).await;
    parts[0].1.power = DesiredPower::Running;
    agent.want(&desired(3, &parts));
    agent.until("resumed", all_run(3, &parts)).await;
    assert_eq!((world.launches(), world.boots()), (2, 1));

    parts[0].1.power = DesiredPower::Suspended;
    agent.want(&desired(4, &parts));
    agent.until("suspended again", is_suspended).await;
    parts[0].1.power = DesiredPower::Running;
    parts[0].1.run_generation += 1;
    agent.want(&desired(5, &parts));
    agent.until("rebooted", all_run(5, &parts)).await;
    assert_eq!((world.launches(), world.boots()), (3, 2));
    let files = dir.path().join("state/servers").join(spec.id.to_string()).join("vm/suspended");
    assert!(!files.exists() && world.paused().is_empty());
}

fn given_up(snapshot: &Snapshot, spec: &ServerSpec) -> Vec<GivenUp> {
    let seen = snapshot.servers.iter().find(|server| server.observed.id == spec.id);
    seen.map(|server| server.observed.given_up.clone()).unwrap_or_default()
}

#[tokio::test]
async fn a_suspension_that_keeps_failing_is_given_up_with_its_reason_and_the_guest_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let running = vec![server_in_network(1)];
    let mut suspended = running.clone();
    suspended[0].1.power = DesiredPower::Suspended;
    let spec = suspended[0].1.clone();
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(1, &running)).await;
    agent.until("running", all_run(1, &running)).await;
    world.set_full(true);
    agent.want(&desired(2, &suspended));
    let seen = agent.until("given up", |s| !given_up(s, &spec).is_empty()).await;
    let [GivenUp { wish: Wish::Suspend, message }] = &given_up(&seen, &spec)[..] else { panic!("{seen:?}") };
    assert!(message.contains("No space left on device"), "{message}");
    agent.until("running as before", all_run(2, &running)).await;
    assert!(world.paused().is_empty());
    assert_eq!(world.boots(), 1, "it is the same guest");
    // Another change doesn't make the host try again.
    world.set_full(false);
    agent.want(&desired(3, &suspended));
    let seen = agent.until("seen", |s| s.applied_generation == 3).await;
    assert_eq!(given_up(&seen, &spec).len(), 1);

    agent.want(&desired(4, &running));
    agent.until("taken back", |s| s.applied_generation == 4 && given_up(s, &spec).is_empty()).await;
    agent.want(&desired(5, &suspended));
    agent.until("suspended", |s| state(s, &spec) == Some(ServerState::Suspended)).await;
    agent.kill().await;
}

#[tokio::test]
async fn a_copy_of_a_disk_that_keeps_failing_is_given_up_and_the_guest_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let mut parts = vec![server_in_network(1)];
    let spec = parts[0].1.clone();
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(1, &parts)).await;
    agent.until("running", all_run(1, &parts)).await;
    let image = ImageId(uuid::Uuid::from_u128(7));
    parts[0].1.captures.push(CaptureSpec { image_id: image });
    // Nothing can be made where a directory is that isn't empty.
    let server = mote_hostd::paths::StateDir::new(dir.path().join("state")).server(spec.id);
    std::fs::create_dir_all(server.capture(image).join("x")).unwrap();
    agent.want(&desired(2, &parts));
    let seen = agent.until("given up", |s| !given_up(s, &spec).is_empty()).await;
    assert_eq!(given_up(&seen, &spec)[0].wish, Wish::Capture(image));
    agent.until("running as before", all_run(2, &parts)).await;
    assert!(world.paused().is_empty());
    std::fs::remove_dir_all(server.capture(image)).unwrap();
    parts[0].1.captures.clear();
    agent.want(&desired(3, &parts));
    agent.until("taken back", |s| s.applied_generation == 3 && given_up(s, &spec).is_empty()).await;
    agent.kill().await;
}

#[tokio::test]
async fn after_a_reboot_of_the_host_what_ran_runs_again_and_what_was_off_stays_off() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let parts = vec![server_in_network(1), server_in_network(2)];
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(1, &parts)).await;
    agent.until("running", all_run(1, &parts)).await;
    let (_, off) = world.running().into_iter().find(|(id, _)| *id == parts[1].1.id).unwrap();
    world.end(&off, Some(ExitReason::PowerOff));
    agent.until("off", |s| state(s, &parts[1].1) == Some(ServerState::Stopped)).await;
    agent.kill().await;
    // The ledger of a real reboot names another boot id; a killed VMM under policy `never` would fail.
    let ledger = dir.path().join("state/servers").join(parts[0].1.id.to_string()).join("server.json");
    let text = std::fs::read_to_string(&ledger).unwrap();
    std::fs::write(&ledger, text.replace(&mote_hostd::process::boot_id(), "an-earlier-boot")).unwrap();
    world.reboot();

    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(1, &parts)).await;
    agent.until("running again", all_run(1, &parts[..1])).await;
    let snapshot = agent.snapshots.borrow().clone();
    assert_eq!(state(&snapshot, &parts[1].1), Some(ServerState::Stopped));
    assert_eq!(world.running().len(), 1);
    assert_eq!(world.networks().len(), 2);
}

#[tokio::test]
async fn a_killed_vmm_fails_or_is_started_again_as_its_policy_says() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let mut parts = vec![server_in_network(1), server_in_network(2)];
    parts[1].1.restart_policy = RestartPolicy::OnFailure;
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(1, &parts)).await;
    agent.until("running", all_run(1, &parts)).await;
    for (_, process) in world.running() {
        world.end(&process, None);
    }
    let failed = agent.until("failed", |s| state(s, &parts[0].1) == Some(ServerState::Failed)).await;
    let message =
        failed.servers.iter().find(|s| s.observed.id == parts[0].1.id).unwrap().observed.message.clone();
    assert!(message.unwrap().contains("killed"));
    agent.until("the other one again", all_run(1, &parts[1..])).await;

    // A hard reboot by its user.
    parts[0].1.run_generation += 1;
    agent.want(&desired(2, &parts));
    agent.until("both", all_run(2, &parts)).await;
    assert_eq!(world.launches(), 4);
}

#[tokio::test]
async fn one_that_always_fails_at_once_is_given_up_and_one_that_is_off_is_not_started() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let mut parts = vec![server_in_network(1)];
    parts[0].1.restart_policy = RestartPolicy::OnFailure;
    world.set_short_lived(Some(ExitReason::Crash));
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(1, &parts)).await;
    agent.until("given up", |s| state(s, &parts[0].1) == Some(ServerState::Failed)).await;
    assert_eq!(world.launches(), 6, "the first start and five more");

    world.set_short_lived(Some(ExitReason::PowerOff));
    parts[0].1.run_generation += 1;
    agent.want(&desired(2, &parts));
    agent.until("off", |s| state(s, &parts[0].1) == Some(ServerState::Stopped)).await;
    parts[0].1.power = DesiredPower::Stopped;
    agent.want(&desired(3, &parts));
    agent.until("seen", |s| s.applied_generation == 3).await;
    assert_eq!(world.launches(), 7);

    world.set_short_lived(None);
    parts[0].1.power = DesiredPower::Running;
    parts[0].1.run_generation += 1;
    agent.want(&desired(4, &parts));
    agent.until("running", all_run(4, &parts)).await;
    parts[0].1.power = DesiredPower::Stopped;
    agent.want(&desired(5, &parts));
    agent.until("stopped", |s| state(s, &parts[0].1) == Some(ServerState::Stopped)).await;
    assert!(world.running().is_empty());
}

#[tokio::test]
async fn an_image_that_does_not_come_holds_up_its_own_server_only_and_for_no_longer_than_it_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let mut parts = vec![server_in_network(1), server_in_network(2), server_in_network(3)];
    for (_, spec) in &mut parts[..2] {
        spec.boot.disk.sha256 = "e".repeat(64);
    }
    world.set_missing(&"e".repeat(64), true);
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(1, &parts)).await;
    agent.until("the other one runs", all_run(1, &parts[2..])).await;
    agent
        .until("told why", |s| {
            let waiting = s.servers.iter().find(|s| s.observed.id == parts[0].1.id);
            waiting.is_some_and(|s| {
                s.observed.state == ServerState::Preparing
                    && s.observed.message.as_ref().is_some_and(|m| m.contains("simulated absence"))
            })
        })
        .await;
    agent.want(&desired(2, &parts[1..]));
    agent.until("one gone", |s| s.applied_generation == 2 && s.servers.len() == 2).await;
    world.set_missing(&"e".repeat(64), false);
    agent.until("running", all_run(2, &parts[1..])).await;
}

#[tokio::test]
async fn a_vmm_without_a_record_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let parts = vec![server_in_network(1)];
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(1, &parts)).await;
    agent.until("running", all_run(1, &parts)).await;
    agent.kill().await;
    std::fs::remove_dir_all(dir.path().join("state/servers")).unwrap();
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(2, &[])).await;
    agent.until("nothing left", nothing(2)).await;
    assert!(world.running().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_servers_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::new(dir.path()).unwrap();
    let parts: Vec<_> = (0..300).map(|n| server_in_network(u8::try_from(n % 250).unwrap())).collect();
    let begun = std::time::Instant::now();
    let mut agent = Running::start(&world, Arc::new(PassThrough), &desired(1, &parts)).await;
    agent.until("all running", all_run(1, &parts)).await;
    let up = begun.elapsed();
    agent.want(&desired(2, &[]));
    agent.until("nothing left", nothing(2)).await;
    eprintln!("300 servers: up after {up:?}, gone after {:?}", begun.elapsed() - up);
    assert_eq!(world.launches(), 300);
    assert_eq!(leftovers(dir.path()), BTreeSet::new());
}
