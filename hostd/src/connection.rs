//! The four conversations with the controller, each in a task of its own: desired state, reports, questions, captures. When it is
//! away they ask again with growing pauses, and servers go on.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use jiff::Timestamp;
use mote_host_api::{DesiredState, ImageId, Inventory, MAX_WAIT_S, ObservedState, REPORT_EVERY_S, ServerId};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};

use crate::{
    agent::Snapshot,
    backoff::Backoff,
    controller::{Controller, ControllerError},
    errors::one_line,
    files::{self, Durability},
    identity::{self, Identity, Refusal},
    meter::Meter,
    paths::StateDir,
    requests::Requests,
};

/// First and longest pause after a failed call.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// Shortest time from one long poll to the next when the answer brings nothing new, so that a controller that does not wait
/// is not asked without end.
const POLL_PAUSE: Duration = Duration::from_secs(1);
/// Questions that are worked on at the same time; more wait on the controller's side.
const REQUESTS_MAX: usize = 32;

/// How the connection is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionStatus {
    /// The last call was answered.
    pub connected: bool,
    /// Since when that is so.
    pub since: Timestamp,
    /// Why not.
    pub error: Option<String>,
}

impl ConnectionStatus {
    /// Before the first call.
    pub fn unknown(now: Timestamp) -> Self {
        Self { connected: false, since: now, error: None }
    }
}

/// What the conversations share.
pub struct Connection {
    /// The controller.
    pub controller: Arc<dyn Controller>,
    /// State directory: identity and last desired state.
    pub state: StateDir,
    /// Who this host is.
    pub identity: watch::Sender<Identity>,
    /// How it is.
    pub status: watch::Sender<ConnectionStatus>,
    /// To the agent.
    pub desired: watch::Sender<Option<Arc<DesiredState>>>,
    /// What ports have carried.
    pub meter: Arc<Meter>,
}

impl Connection {
    /// The desired state that this host was told last, for the time until the controller answers.
    pub fn recall(&self) {
        match files::read_json::<DesiredState>(&self.state.desired()) {
            Ok(Some(desired)) => match identity::check_desired(&desired, &self.identity.borrow()) {
                Ok(()) => {
                    tracing::info!(generation = desired.generation, "desired state recalled");
                    self.desired.send_replace(Some(Arc::new(desired)));
                }
                Err(refusal) => tracing::warn!("stored desired state is not used: {refusal}"),
            },
            Ok(None) => {}
            Err(e) => tracing::warn!(error = one_line(&e), "stored desired state is not used"),
        }
    }

    /// Keeps the desired state up to date.
    ///
    /// After each interruption the whole state is asked for anew, whatever its generation: a controller whose database
    /// was put back has smaller ones.
    pub async fn follow_desired(&self) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        // Whether the controller has been asked for all since the last trouble, and what it said.
        let (mut asked, mut known) = (false, 0);
        loop {
            let wait = if asked { MAX_WAIT_S } else { 0 };
            let begun = Instant::now();
            match self.controller.desired(known, Duration::from_secs(wait)).await {
                Ok(answer) => {
                    backoff.reset();
                    let before = (asked, known);
                    asked = true;
                    match answer.map(|desired| self.take(desired)) {
                        Some(Ok(generation)) => known = generation,
                        Some(Err(refusal)) => {
                            tracing::error!("refused: {refusal}");
                            self.disconnected(refusal.to_string());
                            (asked, known) = (false, 0);
                        }
                        None => self.connected(),
                    }
                    if before == (asked, known) {
                        tokio::time::sleep(POLL_PAUSE.saturating_sub(begun.elapsed())).await;
                    }
                }
                Err(e) => {
                    (asked, known) = (false, 0);
                    self.failed(&e, &mut backoff).await;
                }
            }
        }
    }

    /// Hands a desired state on, once it is on disk, if it is for this host. Returns its generation.
    fn take(&self, desired: DesiredState) -> Result<u64, Refusal> {
        identity::check_desired(&desired, &self.identity.borrow())?;
        self.connected();
        let generation = desired.generation;
        if self.desired.borrow().as_deref() == Some(&desired) {
            return Ok(generation);
        }
        // The agent may act before this is on disk after a crash of the host: then the controller tells it again.
        if let Err(e) = files::replace_json(&self.state.desired(), &desired, Durability::Process) {
            tracing::warn!(
                error = one_line(&e),
                "desired state not stored; it is needed when the controller is away"
            );
        }
        tracing::info!(generation, servers = desired.servers.len(), "desired state");
        self.desired.send_replace(Some(Arc::new(desired)));
        Ok(generation)
    }

    /// Reports after every change, and every [`REPORT_EVERY_S`].
    pub async fn report(
        &self,
        mut snapshots: watch::Receiver<Snapshot>,
        inventory: watch::Receiver<Inventory>,
    ) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            let desired = self.desired.borrow().clone();
            if let Some(desired) = desired {
                self.meter.look(&desired, snapshot.running()).await;
            }
            let observed = ObservedState {
                host_id: self.identity.borrow().host_id,
                inventory: inventory.borrow().clone(),
                applied_generation: snapshot.applied_generation,
                servers: snapshot.servers.into_iter().map(|server| server.observed).collect(),
                traffic: self.meter.untold(),
            };
            match self.controller.report(&observed).await {
                Ok(()) => {
                    self.meter.told(&observed.traffic);
                    backoff.reset();
                    self.connected();
                    let pause = tokio::time::sleep(Duration::from_secs(REPORT_EVERY_S));
                    tokio::select! {
                        () = pause => {}
                        changed = snapshots.changed() => if changed.is_err() { return },
                    }
                }
                Err(e) => self.failed(&e, &mut backoff).await,
            }
        }
    }

    /// Sends copies of root disks that are there and wanted, one after the other, until the controller wants them no more.
    pub async fn send_captures(&self, mut snapshots: watch::Receiver<Snapshot>) {
        let mut desired = self.desired.subscribe();
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut sent: BTreeSet<ImageId> = BTreeSet::new();
        loop {
            let finished: BTreeSet<(ServerId, ImageId)> = snapshots
                .borrow_and_update()
                .servers
                .iter()
                .flat_map(|server| server.captures.iter().map(|image| (server.observed.id, *image)))
                .collect();
            let state = desired.borrow_and_update().clone();
            let wanted: Vec<(ServerId, ImageId)> = state
                .iter()
                .flat_map(|state| &state.servers)
                .flat_map(|server| server.captures.iter().map(|capture| (server.id, capture.image_id)))
                .collect();
            sent.retain(|image| wanted.iter().any(|(_, wanted)| wanted == image));
            let next = wanted.into_iter().find(|one| !sent.contains(&one.1) && finished.contains(one));
            let Some((server, image)) = next else {
                tokio::select! {
                    changed = desired.changed() => if changed.is_err() { return },
                    changed = snapshots.changed() => if changed.is_err() { return },
                }
                continue;
            };
            let path = self.state.server(server).capture(image);
            match self.controller.send_capture(image, &path).await {
                Ok(taken) => {
                    tracing::info!(%server, %image, taken, "root disk sent");
                    backoff.reset();
                    sent.insert(image);
                }
                Err(e) => {
                    tracing::warn!(%server, %image, error = one_line(&e), "root disk not sent; trying again");
                    tokio::time::sleep(backoff.next_pause()).await;
                }
            }
        }
    }

    /// Answers questions.
    pub async fn answer(&self, requests: Arc<Requests>) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let slots = Arc::new(Semaphore::new(REQUESTS_MAX));
        loop {
            // Not more than can be worked on: the rest waits, or goes to the asker as a time-out.
            let Ok(free) = slots.clone().acquire_owned().await else { return };
            drop(free);
            let begun = Instant::now();
            match self.controller.requests(Duration::from_secs(MAX_WAIT_S)).await {
                Ok(list) => {
                    backoff.reset();
                    if list.is_empty() {
                        tokio::time::sleep(POLL_PAUSE.saturating_sub(begun.elapsed())).await;
                    }
                    for request in list {
                        let Ok(slot) = slots.clone().acquire_owned().await else { return };
                        let (controller, requests) = (self.controller.clone(), requests.clone());
                        tokio::spawn(async move {
                            let reply = requests.answer(request.kind).await;
                            if let Err(e) = controller.reply(request.id, &reply).await {
                                tracing::debug!(request = %request.id, error = one_line(&e), "reply not delivered");
                            }
                            drop(slot);
                        });
                    }
                }
                Err(e) => self.failed(&e, &mut backoff).await,
            }
        }
    }

    fn connected(&self) {
        let modified = self.status.send_if_modified(|status| {
            let changed = !status.connected;
            if changed {
                *status = ConnectionStatus { connected: true, since: Timestamp::now(), error: None };
            }
            changed
        });
        if modified {
            tracing::info!("connected to the controller");
        }
    }

    fn disconnected(&self, error: String) {
        let was_connected = self.status.borrow().connected;
        if was_connected || self.status.borrow().error.as_ref() != Some(&error) {
            tracing::warn!("{error}");
        }
        self.status.send_modify(|status| {
            if status.connected {
                status.since = Timestamp::now();
            }
            status.connected = false;
            status.error = Some(error);
        });
    }

    async fn failed(&self, error: &ControllerError, backoff: &mut Backoff) {
        self.disconnected(one_line(error));
        if matches!(error, ControllerError::Unauthorized(_)) && self.joined_again() {
            return;
        }
        tokio::time::sleep(backoff.next_pause()).await;
    }

    /// After a new `join` there is a new secret (and perhaps another address) on disk.
    fn joined_again(&self) -> bool {
        let Ok(new) = identity::load(&self.state) else { return false };
        self.identity.send_if_modified(|old| {
            let same_host = (old.cloud_id, old.host_id) == (new.cloud_id, new.host_id);
            let changed = same_host && *old != new;
            if changed {
                tracing::info!("this host has joined again");
                *old = new;
            }
            changed
        })
    }
}
