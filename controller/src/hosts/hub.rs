//! What the controller keeps in memory of its hosts: who waits for news, and questions under way.
//!
//! Nothing here matters if it is lost. Desired state is in the database; [`Hub::wake`] only shortens the wait of the
//! long poll that reads it. A question that is lost ends in a time-out for the one who asked.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use mote_host_api::{HostId, HostReply, HostRequest, HostRequestKind, MAX_WAIT_S, RequestId};
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    time::{Instant, timeout, timeout_at},
};

/// Questions that may be under way to one host.
const MAX_REQUESTS_PER_HOST: usize = 128;

/// With several controllers a long poll looks again after so long: a wake at another one may have been lost on the way.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// A host's desired state changes in this transaction: hand this to [`Hub::wake`] once it is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "the host waits for its next poll unless it is woken after the commit"]
pub(crate) struct Touched(pub(crate) HostId);

/// Why a question got no answer.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum AskError {
    /// Too many questions under way.
    #[error("too many requests to this host are under way")]
    Busy,
    /// No answer in time.
    #[error("the host did not answer in time")]
    TimedOut,
}

/// Shared by all handlers of one controller; clones are the same hub.
#[derive(Debug, Clone, Default)]
pub struct Hub {
    hosts: Arc<Mutex<HashMap<HostId, Entry>>>,
    /// Tells the other controllers of the same database, see [`super::share`].
    others: Arc<OnceLock<mpsc::Sender<HostId>>>,
}

#[derive(Debug)]
struct Entry {
    /// Counts changes of desired state.
    changed: watch::Sender<u64>,
    /// Says that `queue` has got something.
    asked: Arc<Notify>,
    /// Questions that the host has not fetched yet.
    queue: VecDeque<HostRequest>,
    /// Those who wait for an answer.
    waiting: HashMap<RequestId, oneshot::Sender<HostReply>>,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            changed: watch::Sender::new(0),
            asked: Arc::default(),
            queue: VecDeque::new(),
            waiting: HashMap::new(),
        }
    }
}

impl Hub {
    /// Wakes the long polls of the host, if any.
    pub(crate) fn wake(&self, touched: Touched) {
        self.wake_here(touched.0);
        if let Some(others) = self.others.get() {
            // A hint: without it the host hears of the change when its long poll looks again.
            let _ = others.try_send(touched.0);
        }
    }

    /// Tells `others` of each wake from now on.
    pub(super) fn tell(&self, others: mpsc::Sender<HostId>) {
        let _ = self.others.set(others);
    }

    /// How long a long poll may wait for a wake before it looks into the database itself.
    pub(super) fn look_again(&self) -> Duration {
        match self.others.get() {
            Some(_) => LOOK_AGAIN,
            None => Duration::from_secs(MAX_WAIT_S),
        }
    }

    /// Wakes the long polls at this controller.
    pub(super) fn wake_here(&self, host: HostId) {
        if let Some(entry) = self.lock().get(&host) {
            entry.changed.send_modify(|count| *count = count.wrapping_add(1));
        }
    }

    /// [`Hub::wake`] for several.
    pub(crate) fn wake_all(&self, touched: impl IntoIterator<Item = Touched>) {
        touched.into_iter().for_each(|one| self.wake(one));
    }

    /// Becomes ready with each [`Hub::wake`] after this call.
    pub(crate) fn changes(&self, host: HostId) -> watch::Receiver<u64> {
        self.lock().entry(host).or_default().changed.subscribe()
    }

    /// Forgets a host that was deleted; those who wait for it get an error.
    pub(crate) fn forget(&self, host: HostId) {
        self.lock().remove(&host);
    }

    /// Asks a host and waits for its answer.
    ///
    /// # Errors
    /// [`AskError`].
    pub(crate) async fn ask(
        &self,
        host: HostId,
        kind: HostRequestKind,
        patience: Duration,
    ) -> Result<HostReply, AskError> {
        let request = HostRequest { id: RequestId::new(), kind };
        let (sender, receiver) = oneshot::channel();
        let question = Question { hub: self, host, id: request.id };
        {
            let mut hosts = self.lock();
            let entry = hosts.entry(host).or_default();
            if entry.waiting.len() >= MAX_REQUESTS_PER_HOST {
                return Err(AskError::Busy);
            }
            entry.waiting.insert(request.id, sender);
            entry.queue.push_back(request);
            entry.asked.notify_one();
        }
        let answer = timeout(patience, receiver).await;
        drop(question);
        answer.ok().and_then(Result::ok).ok_or(AskError::TimedOut)
    }

    /// Takes the questions for a host, waiting up to `patience` for the first; empty without any.
    pub(crate) async fn requests(&self, host: HostId, patience: Duration) -> Vec<HostRequest> {
        let deadline = Instant::now() + patience;
        let asked = Arc::clone(&self.lock().entry(host).or_default().asked);
        loop {
            let requests = self.lock().entry(host).or_default().queue.drain(..).collect::<Vec<_>>();
            // `notify_one` is remembered while nobody waits, so that a question between the two lines isn't missed.
            if !requests.is_empty() || timeout_at(deadline, asked.notified()).await.is_err() {
                return requests;
            }
        }
    }

    /// Hands an answer of `host` to whoever asked; false if nobody waits any more.
    pub(crate) fn reply(&self, host: HostId, id: RequestId, reply: HostReply) -> bool {
        let waiting = self.lock().get_mut(&host).and_then(|entry| entry.waiting.remove(&id));
        waiting.is_some_and(|sender| sender.send(reply).is_ok())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<HostId, Entry>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a question back when its asker is gone, for whatever reason.
struct Question<'a> {
    hub: &'a Hub,
    host: HostId,
    id: RequestId,
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        if let Some(entry) = self.hub.lock().get_mut(&self.host) {
            entry.waiting.remove(&self.id);
            entry.queue.retain(|request| request.id != self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use mote_host_api::ServerId;

    use super::*;

    fn question() -> HostRequestKind {
        HostRequestKind::ConsoleOutput { server_id: ServerId::new(), lines: Some(1) }
    }

    #[tokio::test]
    async fn an_answer_reaches_the_one_who_asked() {
        let (hub, host) = (Hub::default(), HostId::new());
        let asker = tokio::spawn({
            let hub = hub.clone();
            async move { hub.ask(host, question(), Duration::from_secs(30)).await }
        });
        let requests = hub.requests(host, Duration::from_secs(30)).await;
        assert_eq!(requests.len(), 1);
        assert!(!hub.reply(HostId::new(), requests[0].id, HostReply::Done), "another host can't answer");
        assert!(hub.reply(host, requests[0].id, HostReply::Done));
        assert!(!hub.reply(host, requests[0].id, HostReply::Done), "answered once only");
        assert_eq!(asker.await.expect("no panic"), Ok(HostReply::Done));
    }

    #[tokio::test]
    async fn a_question_without_answer_times_out_and_is_taken_back() {
        let (hub, host) = (Hub::default(), HostId::new());
        let answer = hub.ask(host, question(), Duration::from_millis(1)).await;
        assert_eq!(answer, Err(AskError::TimedOut));
        assert!(hub.requests(host, Duration::ZERO).await.is_empty());
    }

    #[tokio::test]
    async fn questions_under_way_are_bounded() {
        let (hub, host) = (Hub::default(), HostId::new());
        let askers: Vec<_> = (0..MAX_REQUESTS_PER_HOST)
            .map(|_| {
                let hub = hub.clone();
                tokio::spawn(async move { hub.ask(host, question(), Duration::from_secs(30)).await })
            })
            .collect();
        let mut fetched = 0;
        while fetched < MAX_REQUESTS_PER_HOST {
            fetched += hub.requests(host, Duration::from_secs(30)).await.len();
        }
        assert_eq!(hub.ask(host, question(), Duration::from_secs(30)).await, Err(AskError::Busy));
        hub.forget(host);
        for asker in askers {
            assert_eq!(asker.await.expect("no panic"), Err(AskError::TimedOut));
        }
    }

    #[tokio::test]
    async fn a_wake_between_subscription_and_wait_is_not_missed() {
        let (hub, host) = (Hub::default(), HostId::new());
        let mut changes = hub.changes(host);
        hub.wake(Touched(host));
        assert!(timeout(Duration::from_secs(30), changes.changed()).await.is_ok());
    }
}
