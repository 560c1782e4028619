//! Devices of the microVM: the [`bus`] that vCPU exits go through, virtio devices on the mmio or the [`pci`] transport,
//! and the few legacy devices that a PC guest expects.
//!
//! Device ≠ transport ≠ backend: a transport ([`virtio::mmio`], [`virtio::pci`]) is registers only, a device ([`virtio::block`],
//! [`virtio::net`], [`virtio::rng`] …) turns descriptor chains into requests, a backend (a file, a tap, the kernel's RNG)
//! serves them. Each runs alone in its unit tests, without KVM.
//!
//! Everything a guest can reach is written for a hostile guest: nothing here panics, loops without bound or grows
//! without bound because of what a guest writes.

use std::os::fd::RawFd;

pub mod bus;
pub mod controls;
pub mod generation;
pub mod i8042;
pub mod pci;
pub mod rtc;
pub mod serial;
pub mod virtio;

/// Something that the VMM's main event loop serves: level-triggered, one descriptor each.
///
/// A source with several descriptors of its own (the serial port's console clients) nests them in an epoll instance, so
/// that the loop never has to follow their comings and goings.
pub trait EventSource: Send {
    /// The descriptor to poll for input; constant for the life of the source.
    fn fd(&self) -> RawFd;
    /// The descriptor is readable: do what is due without blocking.
    fn ready(&mut self);
    /// Nothing will be ready any more: its device is gone.
    fn is_gone(&self) -> bool {
        false
    }
    /// The process is about to end, or the device is gone: write out what is buffered, undo what outlives the process.
    fn finish(&mut self) {}
}

/// Why a device could not be made or activated.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A drive.
    #[error(transparent)]
    Block(#[from] virtio::block::BlockError),
    /// A network interface.
    #[error(transparent)]
    Net(#[from] virtio::net::NetError),
    /// A balloon.
    #[error(transparent)]
    Balloon(#[from] virtio::balloon::BalloonError),
    /// Memory that can be plugged.
    #[error(transparent)]
    Mem(#[from] virtio::mem::MemError),
    /// Persistent memory.
    #[error(transparent)]
    Pmem(#[from] virtio::pmem::PmemError),
    /// A drive that another process serves.
    #[error(transparent)]
    VhostUser(#[from] virtio::vhost::block::VhostUserError),
    /// A network interface that the kernel serves.
    #[error(transparent)]
    VhostNet(#[from] virtio::vhost::net::VhostNetError),
    /// Sockets.
    #[error(transparent)]
    Vsock(#[from] virtio::vsock::VsockError),
    /// Two consoles and one stdout.
    #[error(
        "the console has no output_path and no socket_path, and the serial port has stdout: give either something else"
    )]
    Stdio,
    /// The serial port, or what it shares with the console.
    #[error(transparent)]
    Serial(#[from] serial::SerialError),
    /// No eventfd could be made for a device.
    #[error("create an eventfd for a device")]
    EventFd(#[source] std::io::Error),
    /// A device's worker thread could not be started.
    #[error("start the worker thread {name}")]
    Worker {
        /// Name of the thread.
        name: String,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The transport gave a device another number of queues than it asked for.
    #[error("{device} was given {given} queues")]
    QueueCount {
        /// Which device.
        device: &'static str,
        /// How many there were.
        given: usize,
    },
}

/// Most messages about devices that one process writes to stderr.
const MAX_REPORTS: u32 = 64;

/// Tells the host's operator what went wrong with a device, with all causes; bounded, since a guest may be able to
/// provoke it again and again.
pub(crate) fn report(device: &str, error: &dyn std::error::Error) {
    use std::sync::atomic::{AtomicU32, Ordering};
    static REPORTS: AtomicU32 = AtomicU32::new(0);
    // The counter stops at the limit: it can't wrap.
    let counted =
        REPORTS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < MAX_REPORTS).then_some(n + 1));
    if counted.is_err() {
        return;
    }
    crate::log::error!("{device}: {}", crate::error_chain(error));
}
