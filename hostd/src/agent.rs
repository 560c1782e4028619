//! The agent: one owner of everything that is known about this host's servers.
//!
//! ```text
//!  controller ──desired──► ┌───────┐ ──Work──► task (one per server at most) ──► disk, taps, mote-vmm
//!                          │ Agent │ ◄─TaskEvent── ┘
//!  VMM ends (pidfd) ─────► │       │ ──goal──► networks (one at a time)
//!  time ─────────────────► └───┬───┘
//!                              └──Snapshot──► reports to the controller, `mote-hostd status`
//! ```
//!
//! After every event the agent asks [`reconcile`] what is next and hands it out. It never waits for a task.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use jiff::Timestamp;
use mote_host_api::{
    DesiredPower, DesiredState, GivenUp, ImageId, ObservedServer, PortId, ServerId, ServerSpec, Wish,
};
use mote_vmm_api::ExitReport;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::doubled,
    clock::{after, since},
    console,
    errors::one_line,
    files::{self, FileError},
    ledger::{Phase, ServerRecord, fingerprint},
    parts::{Parts, VmmError},
    process::{ProcessIdentity, boot_id},
    reconcile::{
        Action, Converged, Ended, NetworkGoal, Observed, SeenNetworks, SeenNics, SeenServer, SeenTask,
        reconcile,
    },
    task::{Slots, TaskError, TaskEvent, Wanted, Work},
    vmm,
};

/// Events that wait for the agent; a task that has another one waits itself.
const EVENTS_MAX: usize = 1024;
/// The agent looks at networks and log files again after this time, even if nothing happened.
pub const RESYNC_EVERY: Duration = Duration::from_secs(30);
/// Pause after the first failed try of an action; doubles.
pub const RETRY_PAUSE_FIRST: Duration = Duration::from_millis(500);
/// Longest pause between tries.
pub const RETRY_PAUSE_MAX: Duration = Duration::from_secs(30);

/// What the agent knows, for others to read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Generation of the newest desired state; 0 before the first.
    pub generation: u64,
    /// See [`mote_host_api::ObservedState::applied_generation`].
    pub applied_generation: u64,
    /// Every server that left a trace.
    pub servers: Vec<ServerStatus>,
    /// Number of this host's network namespaces; none before the first look.
    pub networks: Option<usize>,
    /// What is wrong with networks, one line each.
    pub network_problems: Vec<String>,
}

impl Snapshot {
    /// Servers with their VMMs.
    pub fn running(&self) -> Vec<(ServerId, ProcessIdentity)> {
        let vmm = |server: &ServerStatus| Some((server.observed.id, server.vmm.clone()?));
        self.servers.iter().filter_map(vmm).collect()
    }
}

/// One server in a [`Snapshot`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// As it is reported.
    #[serde(flatten)]
    pub observed: ObservedServer,
    /// Process ids of its VMMs.
    pub pids: Vec<i32>,
    /// Its VMM, if exactly one runs.
    #[serde(default)]
    pub vmm: Option<ProcessIdentity>,
    /// Copies of its root disk that are finished.
    #[serde(default)]
    pub captures: BTreeSet<ImageId>,
}

/// Why the agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The ledger.
    #[error("cannot read the ledger of servers")]
    Ledger(#[from] FileError),
    /// Processes.
    #[error(transparent)]
    Vmm(#[from] VmmError),
}

struct Entry {
    record: ServerRecord,
    alive: Vec<ProcessIdentity>,
    ended: Option<Ended>,
    disks: BTreeSet<u32>,
    captures: BTreeSet<ImageId>,
    task: Option<(SeenTask, CancellationToken)>,
    retry_at: Option<Timestamp>,
    tries: u32,
    nics: SeenNics,
    /// Looks at its NICs that found one that should have gone.
    nic_tries: u32,
    /// What was given up, and why: kept as long as it is wanted, and tried again by the next process.
    given_up: BTreeMap<Wish, String>,
}

enum Event {
    Task(TaskEvent),
    VmmEnded(ServerId, ProcessIdentity),
    Networks(Box<NetworkGoal>, Result<Converged, String>),
}

/// See the module's documentation.
pub struct Agent {
    parts: Arc<Parts>,
    slots: Arc<Slots>,
    memory_mib: u64,
    servers: BTreeMap<ServerId, Entry>,
    networks: SeenNetworks,
    network_tries: u32,
    network_error: Option<String>,
    desired: Option<Arc<DesiredState>>,
    applied_generation: u64,
    looked_at: Timestamp,
    tasks: JoinSet<Option<Event>>,
    from_tasks: mpsc::Receiver<TaskEvent>,
    to_agent: mpsc::Sender<TaskEvent>,
    snapshot: watch::Sender<Snapshot>,
}

impl Agent {
    /// Reads the ledger and looks for VMMs that run already.
    ///
    /// # Errors
    /// [`AgentError`]: without both, nothing can be decided.
    pub async fn new(parts: Arc<Parts>, memory_mib: u64) -> Result<Self, AgentError> {
        let now = parts.clock.now();
        let found = parts.ledger.load(now)?;
        let mut running = BTreeMap::<ServerId, Vec<ProcessIdentity>>::new();
        for (id, process) in parts.vmms.scan().await? {
            running.entry(id).or_default().push(process);
        }
        let (to_agent, from_tasks) = mpsc::channel(EVENTS_MAX);
        let mut agent = Self {
            slots: Arc::default(),
            memory_mib,
            servers: BTreeMap::new(),
            networks: SeenNetworks::default(),
            network_tries: 0,
            network_error: None,
            desired: None,
            applied_generation: 0,
            looked_at: now,
            tasks: JoinSet::new(),
            from_tasks,
            to_agent,
            snapshot: watch::Sender::new(Snapshot::default()),
            parts,
        };
        // A VMM without a record is one whose server's directory was lost: it gets a record, and has to go.
        let strays = running.keys().filter(|id| !found.records.iter().any(|r| r.id == **id));
        let strays: Vec<_> = strays.map(|id| ServerRecord::new(*id, now)).collect();
        for record in found.records.into_iter().chain(strays) {
            let alive = running.remove(&record.id).unwrap_or_default();
            tracing::info!(server = %record.id, phase = ?record.phase, vmms = alive.len(), "found");
            let id = record.id;
            agent.insert(record);
            for process in alive {
                agent.watch(id, process);
            }
        }
        agent.publish();
        Ok(agent)
    }

    /// What the agent knows, always the newest.
    pub fn snapshots(&self) -> watch::Receiver<Snapshot> {
        self.snapshot.subscribe()
    }

    /// Works until `stop`; VMMs are left running. Tasks in flight are dropped where they are: the ledger allows it.
    pub async fn run(
        mut self,
        mut desired: watch::Receiver<Option<Arc<DesiredState>>>,
        stop: CancellationToken,
    ) {
        self.desired = desired.borrow_and_update().clone();
        let mut listening = true;
        loop {
            let wake_at = self.pass();
            let now = self.parts.clock.now();
            let wake_at = wake_at.unwrap_or(Timestamp::MAX).min(after(self.looked_at, RESYNC_EVERY));
            let sleep = self.parts.clock.sleep(since(wake_at, now));
            tokio::select! {
                () = stop.cancelled() => return,
                changed = desired.changed(), if listening => match changed {
                    Ok(()) => {
                        let new = desired.borrow_and_update().clone();
                        self.take_desired(new);
                    }
                    // Nobody will ever say anything new; VMMs are still to be looked after.
                    Err(_) => listening = false,
                },
                event = self.from_tasks.recv() => if let Some(event) = event {
                    self.take(Event::Task(event));
                },
                Some(joined) = self.tasks.join_next() => match joined {
                    Ok(Some(event)) => self.take(event),
                    Ok(None) => {}
                    Err(e) => tracing::error!(error = one_line(&e), "a task was lost"),
                },
                () = sleep => self.resync_if_due(),
            }
            // What has piled up meanwhile is taken in one go, so that one decision serves all.
            while let Ok(event) = self.from_tasks.try_recv() {
                self.take(Event::Task(event));
            }
        }
    }

    fn take_desired(&mut self, new: Option<Arc<DesiredState>>) {
        let changed = |id: &ServerId, old: Option<&DesiredState>| {
            let of = |state: Option<&DesiredState>| {
                let spec = state?.servers.iter().find(|s| s.id == *id)?;
                let captures: Vec<ImageId> = spec.captures.iter().map(|capture| capture.image_id).collect();
                Some((spec.power, spec.run_generation, fingerprint(spec), captures))
            };
            of(old) != of(new.as_deref())
        };
        // What failed as it was wanted before need not fail as it is wanted now.
        for (id, entry) in &mut self.servers {
            if changed(id, self.desired.as_deref()) {
                entry.retry_at = None;
                entry.tries = 0;
                entry.nic_tries = 0;
                if let SeenNics::Are { not_before, .. } = &mut entry.nics {
                    *not_before = None;
                }
            }
            let spec = new.as_ref().and_then(|new| new.servers.iter().find(|spec| spec.id == *id));
            entry.given_up.retain(|wish, _| spec.is_some_and(|spec| is_wished(spec, *wish)));
        }
        self.networks.retry_at = None;
        self.desired = new;
    }

    /// One decision: asks the reconciler and hands out what it says. Returns when to look again at the latest.
    fn pass(&mut self) -> Option<Timestamp> {
        let wake_at = self.desired.clone().and_then(|desired| {
            for entry in self.servers.values_mut() {
                entry.find_out_how_it_ended(&self.parts);
            }
            let decision = reconcile(&desired, &self.observe());
            for action in decision.actions {
                self.hand_out(action, &desired);
            }
            // From here on every wanted server has an entry, and every other one that exists has one, too.
            self.applied_generation = desired.generation;
            decision.wake_at
        });
        self.publish();
        wake_at
    }

    fn observe(&self) -> Observed {
        let seen = |entry: &Entry| SeenServer {
            record: entry.record.clone(),
            alive: entry.alive.clone(),
            ended: entry.ended.clone(),
            disks: entry.disks.clone(),
            captures: entry.captures.clone(),
            task: entry.task.as_ref().map(|(task, _)| task.clone()),
            retry_at: entry.retry_at,
            nics: entry.nics.clone(),
            given_up: entry.given_up.keys().copied().collect(),
        };
        Observed {
            servers: self.servers.iter().map(|(id, entry)| (*id, seen(entry))).collect(),
            networks: self.networks.clone(),
            memory_mib: self.memory_mib,
            now: self.parts.clock.now(),
        }
    }

    fn hand_out(&mut self, action: Action, desired: &DesiredState) {
        tracing::debug!(?action, "next");
        match action {
            Action::Networks(goal) => self.converge(goal),
            Action::Cancel(id) => {
                if let Some((task, cancel)) = self.servers.get_mut(&id).and_then(|e| e.task.as_mut()) {
                    task.cancelled = true;
                    cancel.cancel();
                }
            }
            Action::Adopt(id, _)
            | Action::Prepare(id)
            | Action::Start(id)
            | Action::SetPaused(id, _)
            | Action::Rewire(id)
            | Action::Suspend(id)
            | Action::Capture(id, _)
            | Action::Prune(id)
            | Action::Terminate(id)
            | Action::Settle(id, _)
            | Action::Teardown(id)
            | Action::Forget(id) => self.begin(id, action, desired),
        }
    }

    fn begin(&mut self, id: ServerId, action: Action, desired: &DesiredState) {
        if !self.servers.contains_key(&id) {
            self.insert(ServerRecord::new(id, self.parts.clock.now()));
        }
        let Some(entry) = self.servers.get_mut(&id) else { return };
        let spec = desired.servers.iter().find(|spec| spec.id == id);
        let cancel = CancellationToken::new();
        let task = SeenTask {
            // What is prepared for a server that is off is wanted all the same.
            cancellable: matches!(action, Action::Prepare(_) | Action::Start(_))
                && spec.is_none_or(|spec| spec.power != DesiredPower::Stopped),
            cancelled: false,
            fingerprint: spec.map(fingerprint),
        };
        entry.task = Some((task, cancel.clone()));
        entry.retry_at = None;
        let work = Work {
            parts: self.parts.clone(),
            slots: self.slots.clone(),
            record: entry.record.clone(),
            want: spec.map(|spec| Wanted::of(desired, spec)),
            alive: entry.alive.clone(),
            tries: entry.tries,
            cancel,
            events: self.to_agent.clone(),
        };
        self.tasks.spawn(async move {
            let panicked = std::panic::AssertUnwindSafe(work.run(action)).catch_unwind().await.is_err();
            let error = || TaskError::Local("internal error (panic)".to_owned());
            panicked.then(|| Event::Task(TaskEvent::Done(id, Err(error()))))
        });
    }

    fn converge(&mut self, goal: NetworkGoal) {
        self.networks.busy = true;
        self.networks.retry_at = None;
        let parts = self.parts.clone();
        self.tasks.spawn(async move {
            parts.checkpoints.reach("before networks").await;
            let work = std::panic::AssertUnwindSafe(parts.networks.converge(&goal)).catch_unwind().await;
            let result = work.map_err(|_| "internal error (panic)".to_owned());
            let result = result.and_then(|result| result.map_err(|e| one_line(&e)));
            parts.checkpoints.reach("after networks").await;
            Some(Event::Networks(Box::new(goal), result))
        });
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Task(TaskEvent::Recorded(record)) => {
                if let Some(entry) = self.servers.get_mut(&record.id) {
                    if record.process != entry.record.process {
                        entry.ended = None;
                    }
                    entry.record = *record;
                }
            }
            Event::Task(TaskEvent::Spawned(id, process)) => self.watch(id, process),
            Event::Task(TaskEvent::Ended(id, process)) => self.take(Event::VmmEnded(id, process)),
            Event::Task(TaskEvent::Disks(id, disks, captures)) => {
                if let Some(entry) = self.servers.get_mut(&id) {
                    (entry.disks, entry.captures) = (disks, captures);
                }
            }
            Event::Task(TaskEvent::Nics(id, nics)) => self.take_nics(id, nics),
            Event::Task(TaskEvent::Forgotten(id)) => {
                self.servers.remove(&id);
            }
            Event::Task(TaskEvent::GaveUp(id, wish, message)) => {
                let wished = |spec: &ServerSpec| spec.id == id && is_wished(spec, wish);
                let desired = self.desired.as_ref().filter(|desired| desired.servers.iter().any(wished));
                if let Some(entry) = self.servers.get_mut(&id).filter(|_| desired.is_some()) {
                    entry.given_up.insert(wish, message);
                }
            }
            Event::Task(TaskEvent::Done(id, result)) => {
                let now = self.parts.clock.now();
                if let Some(entry) = self.servers.get_mut(&id) {
                    entry.done(result, now);
                }
            }
            Event::VmmEnded(id, process) => {
                if let Some(entry) = self.servers.get_mut(&id)
                    && let Some(at) = entry.alive.iter().position(|alive| *alive == process)
                {
                    tracing::info!(server = %id, pid = process.pid, "VMM ended");
                    entry.alive.remove(at);
                    entry.nics = SeenNics::Unknown;
                }
            }
            Event::Networks(goal, result) => self.take_networks(*goal, result),
        }
    }

    fn take_nics(&mut self, id: ServerId, nics: Option<BTreeSet<PortId>>) {
        let now = self.parts.clock.now();
        let wanted = self.desired.as_ref().and_then(|desired| desired.servers.iter().find(|s| s.id == id));
        let Some(entry) = self.servers.get_mut(&id) else { return };
        let Some(ports) = nics else {
            entry.nics = SeenNics::Fixed;
            return;
        };
        let clings = wanted.is_some_and(|spec| ports.iter().any(|port| !spec.ports.contains(port)));
        entry.nic_tries = if clings { entry.nic_tries.saturating_add(1) } else { 0 };
        let not_before = clings.then(|| retry_time(now, entry.nic_tries));
        entry.nics = SeenNics::Are { ports, not_before };
    }

    fn take_networks(&mut self, goal: NetworkGoal, result: Result<Converged, String>) {
        self.networks.busy = false;
        self.networks.stale = false;
        let failed = match &result {
            Ok(done) => !done.failed.is_empty(),
            Err(_) => true,
        };
        self.network_error = result.as_ref().err().cloned();
        match result {
            Ok(done) => {
                for (network, problem) in &done.failed {
                    tracing::warn!(%network, "{problem}");
                }
                self.networks.last = Some((goal, done));
            }
            Err(problem) => {
                tracing::warn!("{problem}");
                self.networks.stale = true;
            }
        }
        self.network_tries = if failed { self.network_tries + 1 } else { 0 };
        self.networks.retry_at = failed.then(|| self.retry_time(self.network_tries));
    }

    fn retry_time(&self, tries: u32) -> Timestamp {
        retry_time(self.parts.clock.now(), tries)
    }

    fn insert(&mut self, record: ServerRecord) {
        let dir = self.parts.state.server(record.id);
        let id = record.id;
        let entry = Entry {
            record,
            alive: Vec::new(),
            ended: None,
            disks: dir.disks(),
            captures: dir.captures(),
            task: None,
            retry_at: None,
            tries: 0,
            nics: SeenNics::Unknown,
            nic_tries: 0,
            given_up: BTreeMap::new(),
        };
        self.servers.insert(id, entry);
    }

    /// Counts a process as alive until it ends.
    fn watch(&mut self, id: ServerId, process: ProcessIdentity) {
        if let Some(entry) = self.servers.get_mut(&id) {
            entry.alive.push(process.clone());
            entry.nics = SeenNics::Unknown;
        }
        let ended = self.parts.vmms.ended(&process);
        self.tasks.spawn(async move {
            ended.await;
            Some(Event::VmmEnded(id, process))
        });
    }

    /// From time to time: networks are compared anew, log files are kept bounded.
    fn resync_if_due(&mut self) {
        let now = self.parts.clock.now();
        if since(now, self.looked_at) < RESYNC_EVERY {
            return;
        }
        self.looked_at = now;
        self.networks.stale = true;
        let dirs: Vec<_> = self.servers.keys().map(|id| (*id, self.parts.state.server(*id))).collect();
        self.tasks.spawn_blocking(move || {
            for (id, dir) in dirs {
                let console = console::observe(&dir).map_err(|e| one_line(&e));
                let log = vmm::trim_log(&dir).map_err(|e| one_line(&e));
                if let Err(error) = console.and(log) {
                    tracing::debug!(server = %id, error, "log files not looked at");
                }
            }
            None
        });
    }

    fn publish(&self) {
        let problem =
            |(id, problem): (&mote_network::NetworkKey, &String)| format!("network {id}: {problem}");
        let last = self.networks.last.as_ref().map(|(_, done)| done);
        let mut network_problems: Vec<_> =
            last.iter().flat_map(|done| done.failed.iter().map(problem)).collect();
        network_problems.extend(self.network_error.clone());
        let snapshot = Snapshot {
            generation: self.desired.as_ref().map_or(0, |desired| desired.generation),
            applied_generation: self.applied_generation,
            servers: self.servers.values().map(|entry| entry.status(&network_problems)).collect(),
            networks: last.map(|done| done.existing.len()),
            network_problems,
        };
        self.snapshot.send_if_modified(|old| {
            let changed = *old != snapshot;
            *old = snapshot;
            changed
        });
    }
}

impl Entry {
    fn status(&self, network_problems: &[String]) -> ServerStatus {
        let mut observed = self.record.observed(self.disks.clone());
        let given_up = |(wish, message): (&Wish, &String)| GivenUp { wish: *wish, message: message.clone() };
        observed.given_up = self.given_up.iter().map(given_up).collect();
        if let (SeenNics::Are { ports, .. }, Phase::Running, [_]) =
            (&self.nics, self.record.phase, self.alive.as_slice())
        {
            observed.ports = Some(ports.clone());
        }
        if self.record.phase == Phase::Preparing
            && !self.disks.is_empty()
            && self.task.is_none()
            && observed.message.is_none()
        {
            let waiting = network_problems.first().cloned();
            observed.message = Some(waiting.unwrap_or_else(|| "waiting for its networks".to_owned()));
        }
        let pids = self.alive.iter().map(|process| process.pid).collect();
        let vmm = match self.alive.as_slice() {
            [one] => Some(one.clone()),
            _ => None,
        };
        ServerStatus { observed, pids, vmm, captures: self.captures.clone() }
    }

    /// Reads the exit report of a VMM that is gone.
    fn find_out_how_it_ended(&mut self, parts: &Parts) {
        let over = matches!(self.record.phase, Phase::Starting | Phase::Running) && self.alive.is_empty();
        if !over || self.task.is_some() || self.ended.is_some() {
            return;
        }
        let path = parts.state.server(self.record.id).exit_report();
        let report = files::read_json::<ExitReport>(&path).unwrap_or_else(|e| {
            tracing::warn!(server = %self.record.id, error = one_line(&e), "exit report not readable");
            None
        });
        let host_rebooted = self.record.process.as_ref().is_some_and(|process| process.boot_id != boot_id());
        self.ended = Some(Ended { report, host_rebooted });
    }

    fn done(&mut self, result: Result<(), TaskError>, now: Timestamp) {
        self.task = None;
        self.ended = None;
        let message = match result {
            Ok(()) => {
                self.retry_at = None;
                self.tries = 0;
                return;
            }
            Err(TaskError::Cancelled) => return,
            Err(TaskError::Away(message) | TaskError::Local(message) | TaskError::Permanent(message)) => {
                message
            }
        };
        tracing::debug!(server = %self.record.id, tries = self.tries, message, "to be tried again");
        self.tries = self.tries.saturating_add(1);
        self.retry_at = Some(retry_time(now, self.tries));
    }
}

/// Whether a specification still has a wish.
fn is_wished(spec: &ServerSpec, wish: Wish) -> bool {
    match wish {
        Wish::Suspend => spec.power == DesiredPower::Suspended,
        Wish::Capture(image) => spec.captures.iter().any(|capture| capture.image_id == image),
    }
}

fn retry_time(now: Timestamp, tries: u32) -> Timestamp {
    after(now, doubled(RETRY_PAUSE_FIRST, tries.saturating_sub(1), RETRY_PAUSE_MAX))
}
