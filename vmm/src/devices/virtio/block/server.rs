//! A queue's worker: takes requests, has them served by the drive's engine, answers.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use mote_vmm_api::IoEngine;
use vmm_sys_util::epoll::EventSet;

use super::request::{Command, Request};
use super::ring::Ring;
use super::{Disk, RawFile};
use crate::devices::report;
use crate::devices::virtio::polling::PollWindow;
use crate::devices::virtio::queue::{QueueError, VirtQueue};
use crate::devices::virtio::worker::Poller;

/// After this long, used buffers are signalled although more requests are waiting, and the worker looks whether it is to
/// stop.
const TURN: Duration = Duration::from_micros(50);
/// A look takes well under a microsecond, unless the host's scheduler took the processor away meanwhile.
const DISTURBED: Duration = Duration::from_micros(25);
/// Requests that are handed to the kernel at once.
const BATCH: usize = 32;

/// Why a worker stops serving until the driver resets the device.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("a request has no room for its status")]
    Unanswerable,
    #[error("wait for requests")]
    Wait(#[source] io::Error),
    #[error("hand requests to io_uring")]
    Ring(#[source] io::Error),
}

/// Why a turn ended.
enum Turn {
    /// More may be waiting.
    Busy,
    /// Nothing was waiting.
    Dry,
    /// A request waits until the rate limit lets it pass.
    Limited(Duration),
}

/// What was found in the queue.
enum Taken {
    Command(Command),
    Nothing,
    Limited(Duration),
}

/// A queue of the device and what serving it needs. Outlives the worker, which may be stopped and started again.
pub struct Server {
    queue: VirtQueue,
    request: Request,
    polling: PollWindow,
    /// When the oldest completion that wasn't signalled was made.
    unsignalled: Option<Instant>,
}

impl Server {
    /// Over a queue that nothing else uses.
    pub fn new(queue: VirtQueue) -> Self {
        let request = Request::new(queue.new_chain(), queue.new_buffers());
        Self { queue, request, polling: PollWindow::default(), unsignalled: None }
    }

    /// The worker: serves until `stop` is readable. When it returns, no request is under way.
    pub fn work(&mut self, disk: &Disk, stop: BorrowedFd<'_>) {
        let mut ring = self.ring(disk);
        let notifier = (self.queue.notifier_fd(), EventSet::IN);
        let fds = [Some(notifier), ring.as_ref().map(|ring| (ring.fd(), EventSet::IN))];
        let fds: Vec<_> = fds.into_iter().flatten().collect();
        let poller = Poller::new(&fds).and_then(|poller| poller.watch_stop(stop).map(|()| poller));
        let mut poller = match poller {
            Ok(poller) => poller,
            Err(error) => return self.give_up(disk, &ServeError::Wait(error)),
        };
        let served =
            self.run(disk, ring.as_mut(), &mut poller).and_then(|()| self.drain(disk, ring.as_mut()));
        if let Err(error) = served {
            self.give_up(disk, &error);
            drop(ring);
            poller.wait_for_stop();
        }
    }

    /// The ring, if the drive wants one and can have it.
    fn ring(&self, disk: &Disk) -> Option<Ring> {
        if disk.engine != IoEngine::Async {
            return None;
        }
        match Ring::new(disk.image.as_raw()?, &self.queue) {
            Ok(ring) => Some(ring),
            Err(error) => {
                // Not the driver's fault, and the plain engine does the same.
                report(&format!("drive {} is served without io_uring", disk.name), &error);
                None
            }
        }
    }

    fn give_up(&self, disk: &Disk, error: &ServeError) {
        report(&format!("drive {}", disk.name), error);
        self.queue.set_needs_reset();
    }

    fn run(
        &mut self,
        disk: &Disk,
        mut ring: Option<&mut Ring>,
        poller: &mut Poller,
    ) -> Result<(), ServeError> {
        self.queue.disable_notification()?;
        let mut looked = Instant::now();
        loop {
            let turn = match ring.as_deref_mut() {
                None => self.serve(disk)?,
                Some(ring) => self.serve_through(ring, disk)?,
            };
            let go_on = match turn {
                Turn::Busy => {
                    if looked.elapsed() < TURN {
                        continue;
                    }
                    // A queue that never runs dry must not outlive a reset.
                    self.signal()?;
                    looked = Instant::now();
                    poller.wait(false, |_, _| {})
                }
                Turn::Dry => {
                    self.signal()?;
                    if !self.look_for_work(ring.as_deref_mut())? {
                        self.sleep(ring.as_deref_mut(), poller)?
                    } else if looked.elapsed() < TURN {
                        continue;
                    } else {
                        looked = Instant::now();
                        poller.wait(false, |_, _| {})
                    }
                }
                Turn::Limited(wait) => {
                    self.signal()?;
                    poller.wait_for(Some(wait), |_, _| {})
                }
            };
            if !go_on.map_err(ServeError::Wait)? {
                return Ok(());
            }
        }
    }

    /// Answers what is under way.
    fn drain(&mut self, disk: &Disk, ring: Option<&mut Ring>) -> Result<(), ServeError> {
        if let Some(ring) = ring {
            while ring.in_flight() > 0 {
                ring.submit(1).map_err(ServeError::Ring)?;
                self.reap(ring, disk)?;
            }
        }
        self.signal()
    }

    /// Waits for the driver, for completions or for the end.
    fn sleep(
        &mut self,
        ring: Option<&mut Ring>,
        poller: &mut Poller,
    ) -> Result<io::Result<bool>, ServeError> {
        let more = self.queue.enable_notification()? || ring.is_some_and(Ring::has_completions);
        let start = Instant::now();
        let go_on = poller.wait(!more, |_, _| {});
        self.polling.slept(start.elapsed());
        self.queue.disable_notification()?;
        Ok(go_on)
    }

    /// Looks for work for as long as that has been worth it lately; whether there is some.
    fn look_for_work(&mut self, mut ring: Option<&mut Ring>) -> Result<bool, QueueError> {
        let window = self.polling.get();
        if window.is_zero() {
            return Ok(false);
        }
        let start = Instant::now();
        let mut before = start;
        loop {
            if self.queue.has_available()? || ring.as_deref_mut().is_some_and(Ring::has_completions) {
                self.polling.found();
                return Ok(true);
            }
            let now = Instant::now();
            if now - before > DISTURBED {
                self.polling.disturbed();
                return Ok(false);
            }
            if now - start >= window {
                return Ok(false);
            }
            before = now;
            std::hint::spin_loop();
        }
    }

    fn signal(&mut self) -> Result<(), ServeError> {
        if self.unsignalled.take().is_some() {
            self.queue.signal()?;
        }
        Ok(())
    }

    /// Puts an answered request into the used ring; the driver is told now or a little later.
    fn answer(&mut self, head: u16, written: u32) -> Result<(), ServeError> {
        self.queue.push_used(head, written)?;
        match self.unsignalled {
            Some(since) if since.elapsed() > TURN => self.signal(),
            Some(_) => Ok(()),
            None => {
                self.unsignalled = Some(Instant::now());
                Ok(())
            }
        }
    }

    /// Serves some requests one by one.
    fn serve(&mut self, disk: &Disk) -> Result<Turn, ServeError> {
        for _ in 0..BATCH {
            let command = match take(&mut self.queue, &mut self.request, disk)? {
                Taken::Command(command) => command,
                Taken::Nothing => return Ok(Turn::Dry),
                Taken::Limited(wait) => return Ok(Turn::Limited(wait)),
            };
            let result = self.request.execute(disk, command);
            let written = self.request.finish(&disk.metrics, result);
            self.answer(self.request.chain.head, written)?;
        }
        Ok(Turn::Busy)
    }

    /// Hands some requests to the kernel and answers those that are done.
    fn serve_through(&mut self, ring: &mut Ring, disk: &Disk) -> Result<Turn, ServeError> {
        let mut turn = Turn::Busy;
        let mut queued = false;
        for _ in 0..BATCH {
            let Some(request) = ring.vacant() else { break };
            let command = match take(&mut self.queue, request, disk)? {
                Taken::Command(command) => command,
                Taken::Nothing => {
                    turn = Turn::Dry;
                    break;
                }
                Taken::Limited(wait) => {
                    turn = Turn::Limited(wait);
                    break;
                }
            };
            let may_wait = match command {
                Command::Read(_) | Command::Flush => true,
                // io_uring has kernel workers do all buffered writes (but on XFS), which for memory takes far longer than
                // the copy.
                Command::Write(_) => !disk.image.as_raw().is_some_and(RawFile::is_in_memory),
                _ => false,
            };
            if may_wait {
                ring.start(command);
                queued = true;
            } else {
                // Rare, or answered from memory.
                let result = request.execute(disk, command);
                let (head, written) = (request.chain.head, request.finish(&disk.metrics, result));
                self.answer(head, written)?;
            }
        }
        // When all requests are under way there is nothing to do but to wait for one.
        let wait = usize::from(ring.vacant().is_none());
        if queued || wait > 0 {
            ring.submit(wait).map_err(ServeError::Ring)?;
        }
        let reaped = self.reap(ring, disk)?;
        if reaped && matches!(turn, Turn::Dry) { Ok(Turn::Busy) } else { Ok(turn) }
    }

    /// Answers what is done; whether something was.
    fn reap(&mut self, ring: &mut Ring, disk: &Disk) -> Result<bool, ServeError> {
        let mut reaped = false;
        while let Some(done) = ring.reap(disk) {
            self.answer(done.head, done.written)?;
            reaped = true;
        }
        if ring.in_flight() > 0 {
            // The rest of what was done in part; nothing otherwise.
            ring.submit_rest().map_err(ServeError::Ring)?;
        }
        Ok(reaped)
    }
}

/// Takes the next request off the queue, if the rate limit lets it pass.
fn take(queue: &mut VirtQueue, request: &mut Request, disk: &Disk) -> Result<Taken, ServeError> {
    if !queue.pop(&mut request.chain)? {
        return Ok(Taken::Nothing);
    }
    let Ok(command) = request.parse(disk) else { return Err(ServeError::Unanswerable) };
    if let Err(wait) = disk.limit(request.data_bytes(command)) {
        queue.undo_pop();
        return Ok(Taken::Limited(wait));
    }
    Ok(Taken::Command(command))
}
