//! A device's thread: made when the driver activates the device (a VM whose guest drives no device has none), ended
//! when it resets it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::devices::{DeviceError, report};
use crate::seccomp::{self, ThreadKind};

/// Stack of a worker: its loops are flat and its buffers on the heap.
const STACK_BYTES: usize = 128 << 10;

/// A running thread. What must outlive it (a file, a tap) it shares with the device.
pub struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts `run(stop)`, which must return soon after `stop` becomes readable. With all signals blocked: they are for
    /// the main thread and the vCPUs.
    ///
    /// # Errors
    /// No eventfd or no thread could be made.
    pub fn spawn(name: &str, run: impl FnOnce(BorrowedFd<'_>) + Send + 'static) -> Result<Self, DeviceError> {
        let failed = |source| DeviceError::Worker { name: name.to_owned(), source };
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DeviceError::EventFd)?;
        let stop_seen = stop.try_clone().map_err(DeviceError::EventFd)?;
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let mut blocked = SigSet::all();
                // Its handler tells which system call was refused.
                blocked.remove(Signal::SIGSYS);
                // Can't fail: the arguments are constants.
                let _ = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&blocked), None);
                if let Err(error) = seccomp::enter(ThreadKind::Worker) {
                    // Nothing of a guest is served without a filter: its requests stay unanswered.
                    return report("a device's thread", &error);
                }
                // SAFETY: `stop_seen` lives until this closure ends.
                run(unsafe { BorrowedFd::borrow_raw(stop_seen.as_raw_fd()) });
            })
            .map_err(failed)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

/// Ends the thread and waits for it.
impl Drop for Worker {
    fn drop(&mut self) {
        // Fails only if the counter is full, and then the thread is being stopped anyway.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A worker that panicked has ended, too; its panic message is on stderr.
            let _ = thread.join();
        }
    }
}

/// Token of the worker's stop eventfd in a [`Poller`].
const STOP: u64 = u64::MAX;

/// An epoll instance with edge-triggered descriptors: an eventfd need not be read for each event. Edge-triggered also
/// means that a descriptor in a lasting error (a tap that went down) wakes its thread once and not for ever.
pub struct Poller {
    epoll: Epoll,
    stopped: bool,
}

impl Poller {
    /// Waits for each of `fds`; an event carries the position in `fds`.
    ///
    /// # Errors
    /// As epoll_create(2) and epoll_ctl(2).
    pub fn new(fds: &[(RawFd, EventSet)]) -> io::Result<Self> {
        let poller = Self { epoll: Epoll::new()?, stopped: false };
        for (token, &(fd, events)) in fds.iter().enumerate() {
            poller.add(fd, events, token as u64)?;
        }
        Ok(poller)
    }

    fn add(&self, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, token);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }

    /// Also watches for the worker being stopped.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn watch_stop(&self, stop: BorrowedFd<'_>) -> io::Result<()> {
        self.add(stop.as_raw_fd(), EventSet::IN, STOP)
    }

    /// Whether the worker was told to stop, as far as [`Poller::wait`] has seen.
    pub const fn stopped(&self) -> bool {
        self.stopped
    }

    /// Waits for events, for ever or not at all, and calls `each(token, events)`. Returns whether to go on: false when
    /// the worker was told to stop.
    ///
    /// # Errors
    /// As epoll_wait(2); an interruption is no event.
    pub fn wait(&mut self, block: bool, each: impl FnMut(u64, EventSet)) -> io::Result<bool> {
        self.wait_millis(if block { -1 } else { 0 }, each)
    }

    fn wait_millis(&mut self, millis: i32, mut each: impl FnMut(u64, EventSet)) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); 4];
        let count = match self.epoll.wait(millis, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &events[..count] {
            if event.data() == STOP {
                self.stopped = true;
            } else {
                each(event.data(), event.event_set());
            }
        }
        Ok(!self.stopped)
    }

    /// Waits for events until `limit` has passed (rounded up to milliseconds), or for ever. Otherwise as
    /// [`Poller::wait`].
    ///
    /// # Errors
    /// As epoll_wait(2).
    pub fn wait_for(&mut self, limit: Option<Duration>, each: impl FnMut(u64, EventSet)) -> io::Result<bool> {
        let millis = limit.map(|limit| limit.as_nanos().div_ceil(1_000_000));
        self.wait_millis(millis.map_or(-1, |millis| i32::try_from(millis).unwrap_or(i32::MAX)), each)
    }

    /// Waits for nothing but the worker's end.
    pub fn wait_for_stop(&mut self) {
        // Fails only if epoll itself does, and then there is nothing left to wait for.
        while self.wait(true, |_, _| {}).unwrap_or(false) {}
    }
}
