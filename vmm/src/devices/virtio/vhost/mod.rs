//! Devices whose queues are served elsewhere: by another process (vhost-user) or by the kernel (vhost).
//!
//! ```text
//!   guest ──notifies──► ioeventfd ──────────────────────────► backend
//!   guest ◄──────────── irqfd of the MSI-X vector ◄────────── backend      (PCI)
//!   guest ◄── irqfd ◄── worker: interrupt status ◄── eventfd ─ backend      (mmio, or a driver without MSI-X)
//! ```
//!
//! The backend gets the guest's memory, the places of the rings and two eventfds for each queue, and nothing of its work comes
//! through this process again but, where an interrupt has a register beside it, the interrupts.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Interrupt;
use super::queue::VirtQueue;
use super::worker::{Poller, Worker};
use crate::devices::{DeviceError, report};
use crate::memory::GuestMemory;

pub mod block;
pub mod net;

/// All of the guest's memory, as a backend is told of it.
///
/// # Errors
/// A region is no part of a file: there is none.
fn memory_table(mem: &GuestMemory) -> Result<Vec<VhostUserMemoryRegionInfo>, vhost::Error> {
    mem.iter().map(|region| VhostUserMemoryRegionInfo::from_guest_region(region.mapping())).collect()
}

/// What a backend signals when it has used buffers of a queue.
struct Call {
    queue: u16,
    event: Arc<EventFd>,
    /// It doesn't interrupt by itself.
    relayed: bool,
}

impl Call {
    fn of(queue: &VirtQueue, interrupt: &Interrupt) -> Result<Self, DeviceError> {
        let (event, relayed) = match interrupt.direct(queue.index()) {
            Some(event) => (event, false),
            None => {
                let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DeviceError::EventFd)?;
                (Arc::new(event), true)
            }
        };
        Ok(Self { queue: queue.index(), event, relayed })
    }
}

/// In which addresses a backend is told where the rings are.
#[derive(Clone, Copy)]
enum Addresses {
    /// Those of this process, which the backend finds in the memory table.
    Process,
    /// The guest's, which the crate looks up.
    Guest,
}

/// Tells the backend everything about a queue. It may begin to serve it.
fn hand_over(
    backend: &impl VhostBackend,
    queue: &VirtQueue,
    call: &EventFd,
    addresses: Addresses,
) -> Result<(), vhost::Error> {
    let (index, rings) = (usize::from(queue.index()), queue.rings());
    let address = |guest| match addresses {
        Addresses::Process => queue.host_address(guest).ok_or(vhost::Error::InvalidQueue),
        Addresses::Guest => Ok(guest),
    };
    let places = VringConfigData {
        queue_max_size: rings.size,
        queue_size: rings.size,
        flags: 0,
        desc_table_addr: address(rings.desc_table)?,
        used_ring_addr: address(rings.used_ring)?,
        avail_ring_addr: address(rings.avail_ring)?,
        log_addr: None,
    };
    backend.set_vring_num(index, rings.size)?;
    backend.set_vring_base(index, rings.next_avail)?;
    backend.set_vring_addr(index, &places)?;
    backend.set_vring_call(index, call)?;
    // The last: with it the backend begins.
    let notifier = queue.notifier().ok_or(vhost::Error::InvalidQueue)?;
    backend.set_vring_kick(index, notifier)
}

/// Starts the thread that passes on interrupts which the backend can't raise by itself, and calls `gone` at the first such
/// event of `other`.
fn watch(
    name: &'static str,
    calls: Vec<Call>,
    other: Option<(RawFd, EventSet)>,
    interrupt: Arc<Interrupt>,
    gone: impl FnOnce() + Send + 'static,
) -> Result<Worker, DeviceError> {
    let relayed: Vec<Call> = calls.into_iter().filter(|call| call.relayed).collect();
    let mut events: Vec<(RawFd, EventSet)> =
        relayed.iter().map(|call| (std::os::fd::AsRawFd::as_raw_fd(&*call.event), EventSet::IN)).collect();
    events.extend(other);
    let mut poller = Poller::new(&events).map_err(DeviceError::EventFd)?;
    Worker::spawn(name, move |stop: BorrowedFd<'_>| {
        let mut gone = Some(gone);
        let mut run = || {
            poller.watch_stop(stop)?;
            while poller.wait(true, |token, _| {
                match usize::try_from(token).ok().and_then(|token| relayed.get(token)) {
                    Some(call) => interrupt.used_buffers(call.queue),
                    None => gone.take().into_iter().for_each(|gone| gone()),
                }
            })? {}
            std::io::Result::Ok(())
        };
        if let Err(error) = run() {
            report(name, &error);
            interrupt.set_needs_reset();
        }
    })
}
