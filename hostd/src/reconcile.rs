//! What to do next: a pure function of what is wanted and what is seen.
//!
//! [`reconcile`] is asked again after every change and gives, for each server, at most one next action; it holds no state
//! and reads no clock. The table, for a server without a task in flight (phases: [`Phase`]):
//!
//! | wanted | VMM | phase | next |
//! |---|---|---|---|
//! | not named | runs, or phase not `Removing` | any | [`Action::Teardown`] |
//! | not named | none | `Removing` | [`Action::Forget`] once its networks are gone or wanted by others |
//! | stopped | runs | any | [`Action::Terminate`] |
//! | stopped | none | `Stopped`, `Failed` | [`Action::Prepare`] where a disk other than the first is missing, else the last row |
//! | stopped | none | else | [`Action::Settle`] → `Stopped` |
//! | running, paused | runs | `Running`, generation right | [`Action::SetPaused`] where it isn't so, else the last row |
//! | running | runs | as it should be, but for its NICs | [`Action::Rewire`], where they can be changed; not while it is paused |
//! | running | runs | `Starting`, generation right | [`Action::Adopt`] |
//! | running | runs | else | [`Action::Terminate`] (then started anew) |
//! | running | ended | `Starting`, `Running` | [`Action::Settle`] by [`outcome`] |
//! | running | none | `Stopped` by the guest, or `Failed`; generation and specification the same | – |
//! | running | none | else | [`Action::Prepare`] while a disk is missing, then [`Action::Start`] when its networks are ready |
//! | suspended | runs | `Running`, generation right; `Suspended` | [`Action::Suspend`] |
//! | suspended | none | `Suspended` | the last row |
//! | suspended | any | else | as for running |
//! | suspended, but that was given up | any | not `Suspended` | as for running |
//! | running, paused | runs | `Suspended` | [`Action::Suspend`], so that it ends as it was meant to |
//! | running, paused | none | `Suspended` | [`Action::Start`], which goes on from the files |
//! | any | as it should be | – | [`Action::Capture`] of a disk that is asked for, then [`Action::Prune`] of what nothing names |
//!
//! A suspension or a capture that keeps failing is given up ([`Wish`]) and reported, until it is wanted anew.
//!
//! A paused server is one that runs, but for [`Action::SetPaused`].
//!
//! A server with a task in flight is left alone, except that a preparation or start that is not wanted any more is
//! cancelled. Networks are brought in line by one action for all of them ([`Action::Networks`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::Timestamp;
use mote_host_api::{
    BootSpec, DesiredPower, DesiredState, ImageId, InstanceMetadata, NetworkId, NetworkSpec, PortId,
    RestartPolicy, ServerId, ServerSpec, Wish,
};
use mote_network::NetworkKey;
use mote_vmm_api::{ExitReason, ExitReport, MAX_VCPUS};

use crate::{
    backoff::doubled,
    clock::{after, since},
    errors::bounded,
    ledger::{Phase, ServerRecord, fingerprint},
    process::ProcessIdentity,
};

/// A VMM that lived this long did not fail quickly.
pub const STABLE_RUN: Duration = Duration::from_secs(120);
/// So many quick failures in a row are started again; the next is `Failed`.
pub const QUICK_FAILURES_MAX: u32 = 5;
/// Pause before the first start after a failure; doubles with each quick one.
pub const RESTART_PAUSE_FIRST: Duration = Duration::from_secs(1);
/// Longest pause before a start.
pub const RESTART_PAUSE_MAX: Duration = Duration::from_secs(60);
/// A guest that lived this long before it rebooted is started at once.
pub const QUICK_REBOOT: Duration = Duration::from_secs(10);
/// So many quick reboots in a row are carried out at once; then pauses grow.
pub const QUICK_REBOOTS_FREE: u32 = 3;

/// What is seen of the host.
#[derive(Debug, Clone)]
pub struct Observed {
    /// Every server that left a trace.
    pub servers: BTreeMap<ServerId, SeenServer>,
    /// Networks.
    pub networks: SeenNetworks,
    /// What a single server may have at most.
    pub memory_mib: u64,
    /// Now.
    pub now: Timestamp,
}

/// What is seen of one server.
#[derive(Debug, Clone)]
pub struct SeenServer {
    /// Its ledger.
    pub record: ServerRecord,
    /// Every VMM process of it that runs now.
    pub alive: Vec<ProcessIdentity>,
    /// How the recorded VMM ended, where that is known.
    pub ended: Option<Ended>,
    /// Numbers of the disks that are complete.
    pub disks: BTreeSet<u32>,
    /// Copies that were made of its root disk.
    pub captures: BTreeSet<ImageId>,
    /// What is being done.
    pub task: Option<SeenTask>,
    /// The last action failed; try again then.
    pub retry_at: Option<Timestamp>,
    /// What NICs its VMM has.
    pub nics: SeenNics,
    /// What is wanted of it but was given up.
    pub given_up: BTreeSet<Wish>,
}

/// What is known of the NICs of a VMM that runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum SeenNics {
    /// Nothing: it is to be asked.
    #[default]
    Unknown,
    /// They stay as they are until the next start.
    Fixed,
    /// Those of these ports.
    Are {
        /// Ports.
        ports: BTreeSet<PortId>,
        /// Its guest has not given up one that it was asked for; it is asked again then.
        not_before: Option<Timestamp>,
    },
}

/// A task in flight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenTask {
    /// It may be cancelled between its steps.
    pub cancellable: bool,
    /// It was told to.
    pub cancelled: bool,
    /// [`fingerprint`] of what it works for.
    pub fingerprint: Option<String>,
}

/// How a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// What it left behind; none: it was killed.
    pub report: Option<ExitReport>,
    /// The host was started again since.
    pub host_rebooted: bool,
}

/// What is seen of networks.
#[derive(Debug, Clone, Default)]
pub struct SeenNetworks {
    /// The goal that was last worked on, and what came of it; none: nothing known, look first.
    pub last: Option<(NetworkGoal, Converged)>,
    /// Time to look again even if nothing has changed.
    pub stale: bool,
    /// Being worked on.
    pub busy: bool,
    /// The last attempt failed; try again then.
    pub retry_at: Option<Timestamp>,
}

/// What the network side shall look like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkGoal {
    /// Networks and what belongs to them, complete.
    pub desired: mote_network::Desired,
    /// What the metadata service says.
    pub metadata: BTreeMap<ServerId, InstanceMetadata>,
    /// Networks that are no longer wanted but that a VMM is still plugged into: left as they are.
    pub keep: BTreeSet<NetworkId>,
}

/// What came of a [`NetworkGoal`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Converged {
    /// Networks of ours that exist now.
    pub existing: BTreeSet<NetworkKey>,
    /// Why some are not as they should be.
    pub failed: BTreeMap<NetworkKey, String>,
}

/// One next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Bring networks, DHCP and metadata in line.
    Networks(NetworkGoal),
    /// Give up the task in flight.
    Cancel(ServerId),
    /// Record the server, fetch its images, make its disk.
    Prepare(ServerId),
    /// Plug its ports and start a VMM.
    Start(ServerId),
    /// A VMM that an earlier mote-hostd started: check that it runs, record it.
    Adopt(ServerId, ProcessIdentity),
    /// Make its guest stand still, or go on.
    SetPaused(ServerId, bool),
    /// Ask which NICs its VMM has, plug in what is missing and unplug what is too much.
    Rewire(ServerId),
    /// Write what its VMM holds into files, and end it.
    Suspend(ServerId),
    /// Copy its root disk for that image.
    Capture(ServerId, ImageId),
    /// Remove disks and captures that nothing names any more.
    Prune(ServerId),
    /// End its VMMs on purpose; keep the rest.
    Terminate(ServerId),
    /// Record what became of it.
    Settle(ServerId, Outcome),
    /// End its VMMs, remove sockets and taps.
    Teardown(ServerId),
    /// Remove its directory and record.
    Forget(ServerId),
}

impl Action {
    /// The server it is about.
    pub fn server(&self) -> Option<ServerId> {
        match self {
            Self::Networks(_) => None,
            Self::Cancel(id)
            | Self::Prepare(id)
            | Self::Start(id)
            | Self::Adopt(id, _)
            | Self::SetPaused(id, _)
            | Self::Rewire(id)
            | Self::Suspend(id)
            | Self::Capture(id, _)
            | Self::Prune(id)
            | Self::Terminate(id)
            | Self::Settle(id, _)
            | Self::Teardown(id)
            | Self::Forget(id) => Some(*id),
        }
    }
}

/// What became of a server whose VMM is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is off.
    Stopped {
        /// The guest did it.
        by_guest: bool,
    },
    /// It stays off until something changes.
    Failed {
        /// Why.
        message: String,
    },
    /// It is to be started again.
    Again {
        /// Not before.
        not_before: Timestamp,
        /// New counters.
        quick_failures: u32,
        /// New counters.
        quick_reboots: u32,
        /// Why.
        message: String,
    },
}

/// What to do now, and when to look again even if nothing happens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    /// At most one per server.
    pub actions: Vec<Action>,
    /// The earliest time at which something waits to be done.
    pub wake_at: Option<Timestamp>,
}

/// Compares wanted and seen.
pub fn reconcile(desired: &DesiredState, observed: &Observed) -> Decision {
    let wanted: BTreeMap<ServerId, &ServerSpec> = desired.servers.iter().map(|s| (s.id, s)).collect();
    let goal = network_goal(desired, &wanted, observed);
    let mut decider =
        Decider { ports: port_networks(desired), goal: &goal, observed, decision: Decision::default() };
    let ids: BTreeSet<ServerId> = wanted.keys().chain(observed.servers.keys()).copied().collect();
    for id in ids {
        if let Some(action) = decider.server(id, wanted.get(&id).copied(), observed.servers.get(&id)) {
            decider.decision.actions.push(action);
        }
    }
    let networks = &observed.networks;
    let in_line = networks.last.as_ref().is_some_and(|(last, done)| *last == goal && done.failed.is_empty());
    if (!in_line || networks.stale) && !networks.busy && decider.due(networks.retry_at) {
        decider.decision.actions.push(Action::Networks(goal.clone()));
    }
    decider.decision
}

/// Which network each port is in.
fn port_networks(desired: &DesiredState) -> BTreeMap<PortId, (NetworkId, ServerId)> {
    let of = |network: &NetworkSpec| {
        let id = network.id;
        network.ports.iter().map(move |port| (port.id, (id, port.server_id))).collect::<Vec<_>>()
    };
    desired.networks.iter().flat_map(of).collect()
}

/// What the network side shall look like: what is wanted, and for now what a VMM that has to go is still plugged into.
fn network_goal(
    desired: &DesiredState,
    wanted: &BTreeMap<ServerId, &ServerSpec>,
    observed: &Observed,
) -> NetworkGoal {
    let named: BTreeSet<NetworkId> = desired.networks.iter().map(|n| n.id).collect();
    let keep = observed
        .servers
        .values()
        .filter(|seen| !seen.alive.is_empty() || seen.task.is_some())
        .flat_map(|seen| &seen.record.networks)
        .filter(|network| !named.contains(network))
        .copied()
        .collect();
    let metadata = wanted.iter().map(|(id, spec)| (*id, spec.metadata.clone())).collect();
    NetworkGoal { desired: desired.into(), metadata, keep }
}

struct Decider<'a> {
    ports: BTreeMap<PortId, (NetworkId, ServerId)>,
    goal: &'a NetworkGoal,
    observed: &'a Observed,
    decision: Decision,
}

impl Decider<'_> {
    fn server(
        &mut self,
        id: ServerId,
        want: Option<&ServerSpec>,
        seen: Option<&SeenServer>,
    ) -> Option<Action> {
        let Some(seen) = seen else {
            return want.map(|want| match self.unfit(want) {
                Some(message) => Action::Settle(id, Outcome::Failed { message }),
                None if want.power == DesiredPower::Stopped => {
                    Action::Settle(id, Outcome::Stopped { by_guest: false })
                }
                None => Action::Prepare(id),
            });
        };
        if let Some(task) = &seen.task {
            return (task.cancellable && !task.cancelled && unwanted(task, want))
                .then_some(Action::Cancel(id));
        }
        if !self.due(seen.retry_at) {
            return None;
        }
        match want {
            None => self.remove(seen),
            Some(want) if want.power == DesiredPower::Stopped => halt(want, seen, self.observed.now),
            Some(want) if want.power == DesiredPower::Suspended && !gave_up_suspend(seen) => {
                self.suspend(want, seen)
            }
            Some(want) => self.run(want, seen),
        }
    }

    /// What isn't as a suspended server or one that can be suspended has to come there first, as one that shall run.
    fn suspend(&mut self, want: &ServerSpec, seen: &SeenServer) -> Option<Action> {
        let record = &seen.record;
        match (seen.alive.as_slice(), record.phase) {
            ([], Phase::Suspended) if record.process.is_none() => tidy(want, seen),
            (_, Phase::Suspended) => Some(Action::Suspend(want.id)),
            ([process], Phase::Running)
                if record.run_generation >= want.run_generation
                    && record.process.as_ref() == Some(process) =>
            {
                Some(Action::Suspend(want.id))
            }
            _ => self.run(want, seen),
        }
    }

    fn remove(&mut self, seen: &SeenServer) -> Option<Action> {
        let record = &seen.record;
        if !seen.alive.is_empty() || record.phase != Phase::Removing {
            return Some(Action::Teardown(record.id));
        }
        // Its networks go first, so that a server that is reported gone has left nothing behind.
        let (_, done) = self.observed.networks.last.as_ref()?;
        let named = |id: &NetworkId| {
            self.goal.desired.networks.iter().any(|n| n.id == *id) || self.goal.keep.contains(id)
        };
        let lingering =
            record.networks.iter().any(|id| done.existing.contains(&NetworkKey::from(*id)) && !named(id));
        (!lingering).then_some(Action::Forget(record.id))
    }

    fn run(&mut self, want: &ServerSpec, seen: &SeenServer) -> Option<Action> {
        let record = &seen.record;
        let asked_again = record.attempted < want.run_generation;
        if let [process, others @ ..] = seen.alive.as_slice() {
            let right = record.run_generation >= want.run_generation && others.is_empty();
            return match record.phase {
                Phase::Running if right && record.process.as_ref() == Some(process) => {
                    let paused = want.power == DesiredPower::Paused;
                    match record.paused == Some(paused) {
                        true => self.rewire(want, seen, paused).or_else(|| tidy(want, seen)),
                        false => Some(Action::SetPaused(want.id, paused)),
                    }
                }
                Phase::Starting if right => Some(Action::Adopt(want.id, process.clone())),
                Phase::Suspended => Some(Action::Suspend(want.id)),
                _ => Some(Action::Terminate(want.id)),
            };
        }
        let changed = || record.fingerprint.as_deref() != Some(&fingerprint(want));
        match record.phase {
            Phase::Starting | Phase::Running if !asked_again => {
                let ended = seen.ended.as_ref()?;
                Some(Action::Settle(want.id, outcome(record, ended, want.restart_policy, self.observed.now)))
            }
            Phase::Stopped if record.stopped_by_guest && !asked_again => None,
            Phase::Failed if !asked_again && !changed() => None,
            _ => self.start(want, seen, asked_again),
        }
    }

    fn rewire(&mut self, want: &ServerSpec, seen: &SeenServer, paused: bool) -> Option<Action> {
        let is_due = match &seen.nics {
            SeenNics::Unknown => true,
            SeenNics::Fixed => false,
            SeenNics::Are { ports, not_before } => {
                let right = ports.len() == want.ports.len() && want.ports.iter().all(|p| ports.contains(p));
                let waits = want.ports.iter().any(|port| !ports.contains(port)) && !self.networks_ready(want);
                !right && !paused && !waits && self.due(*not_before)
            }
        };
        is_due.then_some(Action::Rewire(want.id))
    }

    fn start(&mut self, want: &ServerSpec, seen: &SeenServer, asked_again: bool) -> Option<Action> {
        if let Some(message) = self.unfit(want) {
            return Some(Action::Settle(want.id, Outcome::Failed { message }));
        }
        if !asked_again && !self.due(seen.record.not_before) {
            return None;
        }
        if missing_disk(want, &seen.disks) {
            return Some(Action::Prepare(want.id));
        }
        self.networks_ready(want).then_some(Action::Start(want.id))
    }

    /// Its networks are exactly as wanted, with its ports and its metadata.
    fn networks_ready(&self, want: &ServerSpec) -> bool {
        if want.ports.is_empty() {
            return true;
        }
        let Some((last, done)) = &self.observed.networks.last else { return false };
        let ready = |port: &PortId| {
            let Some((network, _)) = self.ports.get(port) else { return false };
            let find = |goal: &NetworkGoal| goal.desired.networks.iter().find(|n| n.id == *network).cloned();
            !done.failed.contains_key(&NetworkKey::from(*network))
                && find(last).is_some()
                && find(last) == find(self.goal)
        };
        want.ports.iter().all(ready) && last.metadata.get(&want.id) == self.goal.metadata.get(&want.id)
    }

    /// Why this host can never start the server as it is specified.
    fn unfit(&self, want: &ServerSpec) -> Option<String> {
        if want.vcpus == 0 || want.vcpus > MAX_VCPUS {
            return Some(format!("{} vCPUs asked for; a server can have 1 to {MAX_VCPUS}", want.vcpus));
        }
        if want.memory_mib == 0 || u64::from(want.memory_mib) > self.observed.memory_mib {
            return Some(format!(
                "{} MiB of memory asked for; this host has {} MiB",
                want.memory_mib, self.observed.memory_mib
            ));
        }
        let boots = [Some(&want.boot), want.rescue.as_ref().map(|rescue| &rescue.boot)];
        let mut images = boots.into_iter().flatten().flat_map(BootSpec::images);
        if let Some(image) = images.find(|image| !is_sha256(&image.sha256)) {
            return Some(format!("{:?} is no SHA-256 digest", bounded(&image.sha256)));
        }
        let stray =
            want.ports.iter().find(|port| self.ports.get(port).is_none_or(|(_, server)| *server != want.id));
        stray.map(|port| format!("port {port} is in none of the networks that this host was given"))
    }

    /// Whether a waiting time is over; if not, remembers to look again then.
    fn due(&mut self, at: Option<Timestamp>) -> bool {
        let Some(at) = at.filter(|at| *at > self.observed.now) else { return true };
        self.decision.wake_at = Some(self.decision.wake_at.map_or(at, |wake| wake.min(at)));
        false
    }
}

/// It could not be suspended: it runs until something else is wanted. (With complete files it is suspended all the same.)
fn gave_up_suspend(seen: &SeenServer) -> bool {
    seen.given_up.contains(&Wish::Suspend) && seen.record.phase != Phase::Suspended
}

/// A task that works for something else than what is wanted now.
fn unwanted(task: &SeenTask, want: Option<&ServerSpec>) -> bool {
    want.is_none_or(|want| {
        want.power == DesiredPower::Stopped
            || task.fingerprint.as_ref().is_some_and(|f| *f != fingerprint(want))
    })
}

fn halt(want: &ServerSpec, seen: &SeenServer, now: Timestamp) -> Option<Action> {
    if !seen.alive.is_empty() {
        return Some(Action::Terminate(want.id));
    }
    match seen.record.phase {
        // The disk of a server that never ran is made when it is started.
        Phase::Stopped if want.disk.number > 1 && missing_disk(want, &seen.disks) => {
            Some(Action::Prepare(want.id))
        }
        Phase::Stopped | Phase::Failed => tidy(want, seen),
        Phase::Running => {
            let ended = seen.ended.as_ref()?;
            let outcome = outcome(&seen.record, ended, want.restart_policy, now);
            let by_guest = outcome == Outcome::Stopped { by_guest: true };
            Some(Action::Settle(want.id, Outcome::Stopped { by_guest }))
        }
        _ => Some(Action::Settle(want.id, Outcome::Stopped { by_guest: false })),
    }
}

/// The disks that it needs are not all there.
fn missing_disk(want: &ServerSpec, disks: &BTreeSet<u32>) -> bool {
    let rescue = want.rescue.as_ref().map(|rescue| rescue.disk);
    let local = want.local_disks.iter().map(|disk| disk.number);
    !local.chain(rescue).chain([want.disk.number]).all(|number| disks.contains(&number))
}

/// The disks that must not be removed.
pub fn needed_disks(want: &ServerSpec, disks: &BTreeSet<u32>) -> BTreeSet<u32> {
    let source = want.disk.copy_of.filter(|_| !disks.contains(&want.disk.number));
    let rescue = want.rescue.as_ref().map(|rescue| rescue.disk);
    let local = want.local_disks.iter().flat_map(|disk| {
        [Some(disk.number), disk.copy_of.filter(|_| !disks.contains(&disk.number))].into_iter().flatten()
    });
    let root = [Some(want.disk.number), want.kept_disk, source, rescue].into_iter().flatten();
    root.chain(local).chain(want.kept_local_disks.iter().copied()).collect()
}

/// What is left to do for a server that is as it should be.
fn tidy(want: &ServerSpec, seen: &SeenServer) -> Option<Action> {
    let due =
        |image: &ImageId| !seen.captures.contains(image) && !seen.given_up.contains(&Wish::Capture(*image));
    let wanted = want.captures.iter().map(|capture| capture.image_id).find(due);
    if let Some(image) = wanted.filter(|_| seen.disks.contains(&want.disk.number)) {
        return Some(Action::Capture(want.id, image));
    }
    let asked_for = |image: &ImageId| want.captures.iter().any(|capture| capture.image_id == *image);
    let superfluous =
        !seen.disks.is_subset(&needed_disks(want, &seen.disks)) || !seen.captures.iter().all(asked_for);
    superfluous.then_some(Action::Prune(want.id))
}

/// What becomes of a wanted server whose VMM (`record.process`) has ended.
///
/// A reboot of the host is not the server's failure: what ran is started again, as it was, whatever its policy.
pub fn outcome(record: &ServerRecord, ended: &Ended, policy: RestartPolicy, now: Timestamp) -> Outcome {
    let lived = record.started_at.map_or(Duration::ZERO, |start| since(now, start));
    let again = |message: &str| Outcome::Again {
        not_before: now,
        quick_failures: record.quick_failures,
        quick_reboots: record.quick_reboots,
        message: message.to_owned(),
    };
    let reason = ended.report.as_ref().map(|report| report.reason);
    let told = || ended.report.as_ref().map(|report| bounded(&report.message)).unwrap_or_default();
    match reason {
        Some(ExitReason::PowerOff) => Outcome::Stopped { by_guest: true },
        None | Some(ExitReason::Terminated) if ended.host_rebooted => again("the host was started again"),
        None if record.process.is_none() => again("the start was interrupted"),
        None => failure(record, "its VMM was killed".to_owned(), policy, lived, now),
        Some(ExitReason::Terminated) => {
            failure(record, format!("its VMM was ended by a signal: {}", told()), policy, lived, now)
        }
        Some(ExitReason::Reboot) => {
            let quick_reboots = if lived < QUICK_REBOOT { record.quick_reboots.saturating_add(1) } else { 0 };
            let pause = match quick_reboots.checked_sub(QUICK_REBOOTS_FREE) {
                None | Some(0) => Duration::ZERO,
                Some(more) => doubled(RESTART_PAUSE_FIRST, more - 1, RESTART_PAUSE_MAX),
            };
            Outcome::Again {
                not_before: after(now, pause),
                quick_failures: 0,
                quick_reboots,
                message: "the guest rebooted".to_owned(),
            }
        }
        Some(ExitReason::BadConfig | ExitReason::BadArguments) => {
            Outcome::Failed { message: format!("it cannot be started: {}", told()) }
        }
        Some(ExitReason::Crash) => {
            let told = told();
            let what = told.strip_prefix("guest crash: ").unwrap_or(&told);
            failure(record, format!("the guest crashed: {what}"), policy, lived, now)
        }
        Some(ExitReason::HostError) => {
            failure(record, format!("its VMM failed: {}", told()), policy, lived, now)
        }
    }
}

fn failure(
    record: &ServerRecord,
    message: String,
    policy: RestartPolicy,
    lived: Duration,
    now: Timestamp,
) -> Outcome {
    if policy == RestartPolicy::Never {
        return Outcome::Failed { message };
    }
    let failures = if lived < STABLE_RUN { record.quick_failures.saturating_add(1) } else { 1 };
    if failures > QUICK_FAILURES_MAX {
        return Outcome::Failed {
            message: format!("{message} (given up after {QUICK_FAILURES_MAX} quick restarts)"),
        };
    }
    let pause = doubled(RESTART_PAUSE_FIRST, failures - 1, RESTART_PAUSE_MAX);
    Outcome::Again {
        not_before: after(now, pause),
        quick_failures: failures,
        quick_reboots: 0,
        message: format!("{message}; starting it again (restart {failures})"),
    }
}

/// 64 lower-case hex digits: also what makes a digest safe as a file name.
pub fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests;
