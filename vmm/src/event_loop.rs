//! The main thread: one epoll instance over the end of the machine, signals, API clients and devices' slow path.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use mote_vmm_api::{ExitReason, ExitReport};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::api::http::{Request, Response};
use crate::api::requests;
use crate::api::server::{Interest, Server};
use crate::controller::Controller;
use crate::devices::EventSource;
use crate::log;
use crate::metrics;
use crate::outcome::Outcome;

/// Events taken at a time.
const BATCH: usize = 16;

/// The signals that end the process in an orderly way.
const SIGNALS: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// A descriptor that reads the signals that end the process. They are blocked from now on, in all threads made later.
///
/// # Errors
/// The kernel refused.
pub fn block_signals() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero `sigset_t` is valid storage for `sigemptyset`.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is valid for writes, and the numbers are signals.
    unsafe {
        libc::sigemptyset(&raw mut set);
        SIGNALS.iter().for_each(|signal| {
            libc::sigaddset(&raw mut set, *signal);
        });
    }
    // SAFETY: `set` is initialized; the old mask is not wanted.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    // SAFETY: `set` is initialized.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What the main thread serves.
pub struct EventLoop {
    epoll: Epoll,
    signals: OwnedFd,
    outcome: Arc<Outcome>,
    controller: Controller,
    server: Option<Server>,
    sources: Vec<Box<dyn EventSource>>,
    /// What each client's descriptor is watched for.
    watched: HashMap<RawFd, Interest>,
}

impl EventLoop {
    /// Over a VM that may already run.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn new(
        controller: Controller,
        server: Option<Server>,
        outcome: Arc<Outcome>,
        signals: OwnedFd,
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut event_loop = Self {
            epoll,
            signals,
            outcome,
            controller,
            server,
            sources: Vec::new(),
            watched: HashMap::new(),
        };
        event_loop.watch(event_loop.outcome.as_raw_fd(), EpollFlags::EPOLLIN)?;
        event_loop.watch(event_loop.signals.as_raw_fd(), EpollFlags::EPOLLIN)?;
        if let Some(server) = &event_loop.server {
            event_loop.watch(server.listener_fd(), EpollFlags::EPOLLIN)?;
        }
        event_loop.watch_machine()?;
        Ok(event_loop)
    }

    /// Serves until the end is decided, and returns the decision.
    ///
    /// # Errors
    /// epoll failed.
    pub fn run(mut self) -> io::Result<ExitReport> {
        let mut events = [EpollEvent::empty(); BATCH];
        loop {
            if let Some(report) = self.outcome.report() {
                self.sources.iter_mut().for_each(|source| source.finish());
                self.controller.flush_metrics();
                return Ok(report);
            }
            let timeout = match self.controller.metrics_due_in() {
                Some(due) => EpollTimeout::try_from(due).unwrap_or(EpollTimeout::MAX),
                None => EpollTimeout::NONE,
            };
            let count = match self.epoll.wait(&mut events, timeout) {
                Err(nix::errno::Errno::EINTR) => continue,
                result => result?,
            };
            for event in &events[..count] {
                self.dispatch(event.data() as RawFd)?;
            }
            if self.controller.metrics_due_in().is_some_and(|due| due.is_zero()) {
                self.controller.flush_metrics();
            }
        }
    }

    fn dispatch(&mut self, fd: RawFd) -> io::Result<()> {
        if fd == self.outcome.as_raw_fd() {
            return Ok(());
        }
        if fd == self.signals.as_raw_fd() {
            self.outcome.decide(ExitReason::Terminated, "ended by a signal (SIGTERM, SIGINT or SIGHUP)");
            return Ok(());
        }
        if let Some(source) = self.sources.iter_mut().find(|source| source.fd() == fd) {
            source.ready();
            self.let_go();
            return Ok(());
        }
        let Some(server) = &mut self.server else { return Ok(()) };
        if fd == server.listener_fd() {
            server.accept();
        } else {
            let controller = &mut self.controller;
            server.serve(fd, &mut |request, descriptors| handle(controller, request, descriptors));
            self.let_go();
            self.watch_machine()?;
        }
        self.watch_clients()
    }

    /// Closes devices that the guest has given up, and what was watched for them.
    fn let_go(&mut self) {
        self.controller.collect_ejected();
        self.sources.retain_mut(|source| {
            let is_gone = source.is_gone();
            if is_gone {
                source.finish();
            }
            // A descriptor leaves epoll when it is closed.
            !is_gone
        });
    }

    fn watch(&self, fd: RawFd, flags: EpollFlags) -> io::Result<()> {
        // SAFETY: only borrowed for the call; all watched descriptors are owned by `self`.
        let fd_ref = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        Ok(self.epoll.add(fd_ref, EpollEvent::new(flags, fd as u64))?)
    }

    /// Watches what a machine that has just started brought along.
    fn watch_machine(&mut self) -> io::Result<()> {
        let Some(machine) = self.controller.machine_mut() else { return Ok(()) };
        for source in machine.take_event_sources() {
            self.watch(source.fd(), EpollFlags::EPOLLIN)?;
            self.sources.push(source);
        }
        Ok(())
    }

    /// Brings the watched clients in line with the server's. A closed descriptor has left epoll by itself, and its
    /// number may already be another client's: so whoever was not there before is added anew.
    fn watch_clients(&mut self) -> io::Result<()> {
        let Some(server) = &self.server else { return Ok(()) };
        let wanted: HashMap<RawFd, Interest> = server.connections().collect();
        for (fd, interest) in &wanted {
            let flags = match interest {
                Interest::Read => EpollFlags::EPOLLIN,
                Interest::Write => EpollFlags::EPOLLOUT,
            };
            match self.watch(*fd, flags) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if self.watched.get(fd) != Some(interest) {
                        // SAFETY: only borrowed for the call; the server owns it.
                        let fd_ref = unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) };
                        self.epoll.modify(fd_ref, &mut EpollEvent::new(flags, *fd as u64))?;
                    }
                }
                result => result?,
            }
        }
        self.watched = wanted;
        Ok(())
    }
}

/// From request to answer, with a line in the log.
fn handle(controller: &mut Controller, request: &Request, descriptors: Vec<OwnedFd>) -> Response {
    let response = match requests::parse(request) {
        Ok(action) => requests::respond(&controller.execute_with(action, descriptors)),
        Err(error) => Response::fault(400, error.to_string()),
    };
    let (method, path, status) = (&request.method, &request.path, response.status);
    metrics::count_request(method, path, status >= 400);
    match (status, method.as_str()) {
        (200, _) => log::debug!("{method} {path:?}: {status}"),
        (204, _) => log::info!("{method} {path:?}: {status}"),
        _ => log::error!("{method} {path:?}: {status} {}", response.body),
    }
    response
}
