//! Tasks: what carries out one [`Action`] for one server.
//!
//! A server has at most one task at a time, and while it runs the task alone writes that server's ledger. The order in
//! each task is: record the intention, act, record the result. A task that is cut off anywhere (`kill -9`) leaves a
//! record from which the next process goes on:
//!
//! | cut off | the next process finds | and does |
//! |---|---|---|
//! | in `prepare` | `Preparing`, no `root.img` (a partial file is removed) | prepares again |
//! | while its config drive is made | no `config-1.img` | makes it before the start |
//! | in `start` before the VMM was started | `Starting`, no process | starts again |
//! | in `start` after the VMM was started | `Starting`, a process in /proc | adopts it |
//! | in `set_paused` | `Running`, not known whether it is paused | tells the VMM again |
//! | in `suspend` before the files were complete | `Running`, not known whether it is paused | suspends it again |
//! | in `suspend` after that | `Suspended`, perhaps a process | ends that |
//! | in `start` of a suspended server, before it went on | `Starting` and `suspended`, perhaps a process | starts or adopts it |
//! | in `capture` | the same, no capture | makes it again |
//! | after it had given up a `suspend` or `capture` | the same | tries anew, and gives up anew |
//! | in `rewire` | the same, and what its VMM has | plugs and unplugs what is left |
//! | in `terminate` | `Stopping` | goes on ending it; its end is no failure |
//! | in `teardown`, `forget` | `Removing`, or `.removed-…` | goes on removing |

pub(crate) mod nics;
mod prepare;
mod start;
mod stop;
mod suspend;

use std::{collections::BTreeSet, sync::Arc};

use mote_host_api::{DesiredState, ImageId, NetworkId, PortId, PortSpec, ServerId, ServerSpec, Wish};
use mote_network::services::metadata::Guest;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use crate::{
    errors::one_line,
    files::FileError,
    ledger::{Phase, ServerRecord, fingerprint},
    parts::{ImageError, NetworksError, Parts, VmmError},
    process::ProcessIdentity,
    reconcile::{Action, Outcome},
};

/// Disks that are made at the same time.
pub const DISK_TASKS_MAX: usize = 2;
/// VMMs that are started at the same time (from plugging in the ports until the guest runs).
pub const START_TASKS_MAX: usize = 16;

/// So many tries to prepare or start a server may fail for a reason on this host; then it is recorded as failed. So many to
/// suspend one or to copy its disk; then that is given up.
pub const LOCAL_TRIES_MAX: u32 = 6;

/// Why a task did not reach its end.
#[derive(Debug)]
pub enum TaskError {
    /// It will never work as it is wanted now; the server is recorded as failed.
    Permanent(String),
    /// It may work next time, but not for ever.
    Local(String),
    /// It has to wait for the controller, however long.
    Away(String),
    /// It was told to give up.
    Cancelled,
}

impl From<FileError> for TaskError {
    fn from(e: FileError) -> Self {
        Self::Local(one_line(&e))
    }
}

impl From<VmmError> for TaskError {
    fn from(e: VmmError) -> Self {
        Self::Local(one_line(&e))
    }
}

impl From<NetworksError> for TaskError {
    fn from(e: NetworksError) -> Self {
        Self::Local(one_line(&e))
    }
}

impl From<ImageError> for TaskError {
    fn from(e: ImageError) -> Self {
        match &e {
            ImageError::Away { .. } => Self::Away(one_line(&e)),
            ImageError::Store { .. } => Self::Local(one_line(&e)),
            ImageError::Unknown { .. } | ImageError::Wrong { .. } => Self::Permanent(one_line(&e)),
        }
    }
}

/// What a task tells the agent.
#[derive(Debug)]
pub enum TaskEvent {
    /// The ledger of a server has changed.
    Recorded(Box<ServerRecord>),
    /// A VMM was started.
    Spawned(ServerId, ProcessIdentity),
    /// A VMM has ended.
    Ended(ServerId, ProcessIdentity),
    /// The disks and captures that a server has now.
    Disks(ServerId, BTreeSet<u32>, BTreeSet<ImageId>),
    /// The ports that its VMM has NICs of; none if that stays so until its next start.
    Nics(ServerId, Option<BTreeSet<PortId>>),
    /// What was wanted will not be tried again.
    GaveUp(ServerId, Wish, String),
    /// The task has ended.
    Done(ServerId, Result<(), TaskError>),
    /// The server is gone from this host.
    Forgotten(ServerId),
}

/// How many tasks may do the same heavy thing at a time.
#[derive(Debug)]
pub struct Slots {
    disk: Semaphore,
    start: Semaphore,
}

impl Default for Slots {
    fn default() -> Self {
        Self { disk: Semaphore::new(DISK_TASKS_MAX), start: Semaphore::new(START_TASKS_MAX) }
    }
}

/// One task's view of its server.
pub struct Work {
    /// The world.
    pub parts: Arc<Parts>,
    /// Bounds.
    pub slots: Arc<Slots>,
    /// The server's ledger.
    pub record: ServerRecord,
    /// What is wanted; none for a server that has to go.
    pub want: Option<Wanted>,
    /// Its VMM processes at the time the task was made.
    pub alive: Vec<ProcessIdentity>,
    /// How often the server's last action failed already.
    pub tries: u32,
    /// Told when nobody wants the result any more.
    pub cancel: CancellationToken,
    /// To the agent.
    pub events: mpsc::Sender<TaskEvent>,
}

/// A server's part of the desired state.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The server.
    pub spec: ServerSpec,
    /// Its ports in order, with their network and its MTU.
    pub ports: Vec<(NetworkId, u16, PortSpec)>,
    /// Its ports that are being unplugged.
    pub leaving: Vec<(NetworkId, u16, PortSpec)>,
    /// What its config drive tells, if it has one.
    pub guest: Option<Guest>,
}

impl Wanted {
    /// A server's part of `desired`. Ports that are in no network are left out: the reconciler refuses such servers.
    pub fn of(desired: &DesiredState, spec: &ServerSpec) -> Self {
        let find = |id| {
            desired.networks.iter().find_map(|network| {
                let port = network.ports.iter().find(|port| port.id == id)?;
                Some((network.id, network.mtu, port.clone()))
            })
        };
        let leaves = |port: &&PortSpec| port.server_id == spec.id && !spec.ports.contains(&port.id);
        let leaving = desired.networks.iter().flat_map(|network| {
            let ports = network.ports.iter().filter(leaves);
            ports.map(|port| (network.id, network.mtu, port.clone())).collect::<Vec<_>>()
        });
        let guest = || Guest::of_server(&spec.metadata, &spec.ports, &desired.networks);
        Self {
            spec: spec.clone(),
            ports: spec.ports.iter().filter_map(|id| find(*id)).collect(),
            leaving: leaving.collect(),
            guest: spec.config_drive.map(|_| guest()),
        }
    }
}

impl Work {
    /// Carries out an action, and tells the agent how it went.
    pub async fn run(mut self, action: Action) {
        let id = self.record.id;
        // What is asked of a server that runs must not end it by failing.
        let has_to_end = !matches!(action, Action::Prepare(_) | Action::Start(_) | Action::Adopt(..));
        let wish = match &action {
            Action::Suspend(_) => Some(Wish::Suspend),
            Action::Capture(_, image) => Some(Wish::Capture(*image)),
            _ => None,
        };
        let last_try = self.tries + 1 >= LOCAL_TRIES_MAX;
        let result = match action {
            Action::Prepare(_) => self.prepare().await,
            Action::Start(_) => self.start().await,
            Action::Adopt(_, process) => self.adopt(process).await,
            Action::Terminate(_) => self.terminate().await,
            Action::SetPaused(_, paused) => self.set_paused(paused).await,
            Action::Rewire(_) => self.rewire().await,
            Action::Suspend(_) => self.suspend().await,
            Action::Capture(_, image) => self.capture(image).await,
            Action::Prune(_) => self.prune().await,
            Action::Settle(_, outcome) => self.settle(outcome).await,
            Action::Teardown(_) => self.teardown().await,
            Action::Forget(_) => self.forget().await,
            Action::Networks(_) | Action::Cancel(_) => Ok(()),
        };
        let result = match result {
            Ok(()) => Ok(()),
            Err(TaskError::Local(message)) if !has_to_end && last_try => {
                self.give_up(TaskError::Permanent(message)).await
            }
            Err(TaskError::Local(message)) if last_try && let Some(wish) = wish => {
                tracing::warn!(server = %id, ?wish, "{message}; given up after {LOCAL_TRIES_MAX} tries");
                self.tell(TaskEvent::GaveUp(id, wish, message)).await;
                Ok(())
            }
            Err(error) => self.give_up(error).await,
        };
        self.tell(TaskEvent::Done(id, result)).await;
    }

    /// Records why the task stopped, as far as that is possible.
    async fn give_up(&mut self, error: TaskError) -> Result<(), TaskError> {
        let id = self.record.id;
        match error {
            TaskError::Permanent(message) => {
                tracing::warn!(server = %id, "{message}");
                self.settle(Outcome::Failed { message }).await
            }
            TaskError::Local(ref message) | TaskError::Away(ref message) => {
                tracing::warn!(server = %id, "{message}; trying again");
                let phase = match self.record.phase {
                    // No VMM came of it: a start that failed is no start.
                    Phase::Starting if self.record.process.is_none() => Phase::Preparing,
                    other => other,
                };
                self.enter(phase, Some(message.clone())).await?;
                Err(error)
            }
            TaskError::Cancelled => {
                tracing::info!(server = %id, "no longer wanted; given up");
                if self.record.phase == Phase::Starting && self.record.process.is_none() {
                    self.enter(Phase::Preparing, None).await?;
                }
                Err(error)
            }
        }
    }

    async fn tell(&self, event: TaskEvent) {
        // The agent may be gone already; then nobody needs to know.
        let _ = self.events.send(event).await;
    }

    async fn reach(&self, step: &'static str) {
        self.parts.checkpoints.reach(step).await;
    }

    /// Enters a phase and writes it down.
    async fn enter(&mut self, phase: Phase, message: Option<String>) -> Result<(), TaskError> {
        self.record.enter(phase, message, self.parts.clock.now());
        self.save().await
    }

    async fn save(&mut self) -> Result<(), TaskError> {
        self.reach("before record").await;
        let (parts, record) = (self.parts.clone(), self.record.clone());
        self.blocking(move || parts.ledger.write(&record)).await??;
        self.reach("after record").await;
        self.tell(TaskEvent::Recorded(Box::new(self.record.clone()))).await;
        Ok(())
    }

    /// Runs blocking work; a panic in it is an error of the task. The parts are held until it has ended, also if nobody
    /// waits for it any more.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, TaskError> {
        let parts = self.parts.clone();
        let held = move || {
            let result = work();
            drop(parts);
            result
        };
        tokio::task::spawn_blocking(held)
            .await
            .map_err(|e| TaskError::Local(format!("internal error: {}", one_line(&e))))
    }

    fn check_cancelled(&self) -> Result<(), TaskError> {
        if self.cancel.is_cancelled() { Err(TaskError::Cancelled) } else { Ok(()) }
    }

    /// The specification; only tasks of wanted servers ask.
    fn wanted(&self) -> Result<Wanted, TaskError> {
        self.want.clone().ok_or(TaskError::Cancelled)
    }

    /// Notes for which specification the task works. A new run generation is a fresh start.
    fn note_attempt(&mut self, spec: &ServerSpec) {
        if self.record.attempted < spec.run_generation {
            self.record.quick_failures = 0;
            self.record.quick_reboots = 0;
            self.record.not_before = None;
        }
        self.record.attempted = self.record.attempted.max(spec.run_generation);
        self.record.fingerprint = Some(fingerprint(spec));
    }

    async fn settle(&mut self, outcome: Outcome) -> Result<(), TaskError> {
        let id = self.record.id;
        self.remove_sockets().await?;
        self.record.process = None;
        match outcome {
            Outcome::Stopped { by_guest } => {
                self.forget_suspended().await?;
                self.record.stopped_by_guest = by_guest;
                let message = by_guest.then(|| "the guest switched itself off".to_owned());
                tracing::info!(server = %id, by_guest, "stopped");
                self.enter(Phase::Stopped, message).await
            }
            Outcome::Failed { message } => {
                tracing::warn!(server = %id, "failed: {message}");
                if let Some(want) = self.want.clone() {
                    self.note_attempt(&want.spec);
                }
                self.enter(Phase::Failed, Some(message)).await
            }
            Outcome::Again { not_before, quick_failures, quick_reboots, message } => {
                tracing::info!(server = %id, "{message}");
                self.record.not_before = Some(not_before);
                self.record.quick_failures = quick_failures;
                self.record.quick_reboots = quick_reboots;
                self.enter(Phase::Preparing, Some(message)).await
            }
        }
    }
}
