//! The backend: a tap device, by name or as an inherited descriptor.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::pairs::Switch;
use crate::devices::report;
use crate::devices::virtio::buffers::GuestBuffers;

/// Length of the header before each frame: `virtio_net_hdr_v1` (virtio 1.2 §5.1.6).
pub const HEADER_BYTES: usize = 12;
/// Flags that every tap must have: Ethernet frames with a virtio header and nothing else before them.
const TAP_FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Why a network interface can't be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// /dev/net/tun isn't there or not allowed.
    #[error("open /dev/net/tun for network interface {iface}")]
    OpenTun {
        /// The interface.
        iface: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Not a name that a network device could have.
    #[error("network interface {iface}: host_dev_name {name:?} is not 1 to 15 characters without '/'")]
    BadName {
        /// The interface.
        iface: String,
        /// The name.
        name: String,
    },
    /// `tap_fd` isn't open or is one of the standard descriptors.
    #[error("network interface {iface}: tap_fd {fd} is not an inherited file descriptor")]
    BadFd {
        /// The interface.
        iface: String,
        /// The number.
        fd: RawFd,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A descriptor is that of something else, or of a tap of another mode.
    #[error("network interface {iface}: {what} is not a tap opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR")]
    WrongMode {
        /// The interface.
        iface: String,
        /// Which descriptor.
        what: String,
    },
    /// The tap can't be set up.
    #[error("{operation} on tap {name} of network interface {iface}")]
    Tap {
        /// The interface.
        iface: String,
        /// The tap.
        name: String,
        /// Name of the ioctl.
        operation: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// `guest_mac` isn't the address of a network card.
    #[error(
        "network interface {iface}: guest_mac {mac:?} is not a unicast address of the form aa:bb:cc:dd:ee:ff"
    )]
    BadMac {
        /// The interface.
        iface: String,
        /// What was given.
        mac: String,
    },
    /// Anti-spoofing compares with `guest_mac`.
    #[error("network interface {iface}: anti_spoofing needs guest_mac")]
    NoMac {
        /// The interface.
        iface: String,
    },
    /// virtio 1.2 §5.1.4.1 allows no MTU under 68.
    #[error("network interface {iface}: mtu {mtu} is less than 68")]
    BadMtu {
        /// The interface.
        iface: String,
        /// What was given.
        mtu: u16,
    },
}

/// An open tap: reads and writes are frames, each after its header. Non-blocking.
pub struct Tap {
    fd: OwnedFd,
    /// One of several queues: whether it is attached. What isn't carries nothing.
    attached: Option<Arc<AtomicBool>>,
    /// The last transfer found it down or gone.
    failed: bool,
}

impl Tap {
    /// Attaches to the tap `name` of this network namespace; made if there is none and the process may.
    ///
    /// # Errors
    /// As [`NetError`].
    pub fn open(iface: &str, name: &str) -> Result<Self, NetError> {
        Self::open_queue(iface, name, TAP_FLAGS)
    }

    /// Attaches `count` queues to the tap `name`, each with its switch. The tap must be one with several queues, or there must be
    /// none and the process may make it.
    ///
    /// # Errors
    /// As [`NetError`].
    pub fn open_queues(iface: &str, name: &str, count: usize) -> Result<Vec<(Self, Switch)>, NetError> {
        let open = |_| {
            let mut tap = Self::open_queue(iface, name, TAP_FLAGS | libc::IFF_MULTI_QUEUE)?;
            let attached = Arc::new(AtomicBool::new(true));
            let fd = tap.fd.try_clone().map_err(|source| tap_error(iface, name, "dup", source))?;
            tap.attached = Some(attached.clone());
            Ok((tap, Switch { fd: Some(fd), attached }))
        };
        (0..count).map(open).collect()
    }

    fn open_queue(iface: &str, name: &str, flags: libc::c_int) -> Result<Self, NetError> {
        let bytes = name.as_bytes();
        if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ || bytes.iter().any(|b| matches!(b, b'/' | 0)) {
            return Err(NetError::BadName { iface: iface.to_owned(), name: name.to_owned() });
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(|source| NetError::OpenTun { iface: iface.to_owned(), source })?;
        let tap = Self { fd: file.into(), attached: None, failed: false };
        let mut request = interface_request(flags as libc::c_short);
        for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        tap.ioctl(libc::TUNSETIFF, &raw mut request).and_then(|()| tap.set_header_size()).map_err(
            |(operation, source)| {
                let several = flags & libc::IFF_MULTI_QUEUE != 0 && operation == "TUNSETIFF";
                let operation = if several {
                    "TUNSETIFF with several queues (was it made with multi_queue?)"
                } else {
                    operation
                };
                tap_error(iface, name, operation, source)
            },
        )?;
        Ok(tap)
    }

    /// Whether frames may come and go.
    fn is_attached(&self) -> bool {
        self.attached.as_ref().is_none_or(|attached| attached.load(Ordering::Acquire))
    }

    /// Takes over the inherited descriptor `fd`, which must be an attached tap with a virtio header.
    ///
    /// # Errors
    /// As [`NetError`].
    pub fn from_inherited_fd(iface: &str, name: &str, fd: RawFd) -> Result<Self, NetError> {
        let bad = |source| NetError::BadFd { iface: iface.to_owned(), fd, source };
        if fd <= libc::STDERR_FILENO {
            return Err(bad(io::ErrorKind::InvalidInput.into()));
        }
        // SAFETY: no pointers are passed; an invalid descriptor is an error.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(bad(io::Error::last_os_error()));
        }
        // SAFETY: the configuration names this descriptor as one that was inherited for this interface, so that nothing
        // else in the process owns it; it is open, as was just seen.
        Self::take_over(iface, name, unsafe { OwnedFd::from_raw_fd(fd) }, &format!("tap_fd {fd}"))
    }

    /// Takes over a descriptor, which must be an attached tap with a virtio header; an error calls it `what`.
    ///
    /// # Errors
    /// As [`NetError`].
    pub fn take_over(iface: &str, name: &str, fd: OwnedFd, what: &str) -> Result<Self, NetError> {
        let tap = Self { fd, attached: None, failed: false };
        let mut request = interface_request(0);
        let mode = tap.ioctl(libc::TUNGETIFF, &raw mut request).map(|()| {
            // SAFETY: the kernel has filled the flags.
            libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags })
        });
        if !mode.is_ok_and(|mode| mode & TAP_FLAGS == TAP_FLAGS) {
            return Err(NetError::WrongMode { iface: iface.to_owned(), what: what.to_owned() });
        }
        let raw = tap.fd.as_raw_fd();
        // SAFETY: no pointers are passed and the descriptor is ours.
        let set = unsafe {
            let flags = libc::fcntl(raw, libc::F_GETFL);
            flags >= 0
                && libc::fcntl(raw, libc::F_SETFL, flags | libc::O_NONBLOCK) == 0
                && libc::fcntl(raw, libc::F_SETFD, libc::FD_CLOEXEC) == 0
        };
        if !set {
            return Err(tap_error(iface, name, "F_SETFL", io::Error::last_os_error()));
        }
        tap.set_header_size().map_err(|(operation, source)| tap_error(iface, name, operation, source))?;
        Ok(tap)
    }

    fn set_header_size(&self) -> Result<(), (&'static str, io::Error)> {
        let mut size = HEADER_BYTES as libc::c_int;
        self.ioctl(libc::TUNSETVNETHDRSZ, &raw mut size)
    }

    /// Says which offloads (`TUN_F_*`) the guest can take: what may come unsegmented or without a checksum.
    ///
    /// # Errors
    /// As the ioctl.
    pub fn set_offload(&self, flags: libc::c_uint) -> io::Result<()> {
        // SAFETY: the argument is a number.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Calls an ioctl that takes a pointer to `T`, with the name of the ioctl in the error.
    fn ioctl<T>(&self, request: libc::Ioctl, argument: *mut T) -> Result<(), (&'static str, io::Error)> {
        let operation = match request {
            libc::TUNSETIFF => "TUNSETIFF",
            libc::TUNGETIFF => "TUNGETIFF",
            _ => "TUNSETVNETHDRSZ",
        };
        // SAFETY: the callers in this file pass a pointer to a live value of the type that the ioctl takes.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument) } < 0 {
            return Err((operation, io::Error::last_os_error()));
        }
        Ok(())
    }

    /// The descriptor, to poll.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Receives one frame into guest memory, and what doesn't fit there into `spill`.
    ///
    /// # Errors
    /// As readv(2): `WouldBlock` if there is none.
    pub fn receive(&mut self, buffers: &mut GuestBuffers, spill: &mut [u8]) -> io::Result<usize> {
        if !self.is_attached() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let received = buffers.readv_then(self.fd.as_fd(), spill);
        self.watch_state(received)
    }

    /// Receives one frame, or the start of one, to nowhere.
    ///
    /// # Errors
    /// As [`Tap::receive`].
    pub fn discard(&mut self) -> io::Result<usize> {
        if !self.is_attached() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let received = nix::unistd::read(&self.fd, &mut [0; HEADER_BYTES]).map_err(io::Error::from);
        self.watch_state(received)
    }

    /// Sends one frame: `headers`, then what is in guest memory.
    ///
    /// # Errors
    /// As writev(2).
    pub fn send(&mut self, headers: &[u8], rest: &mut GuestBuffers) -> io::Result<usize> {
        if !self.is_attached() {
            // virtio 1.2 §5.1.6.5.5: the driver must not send there. It is lost.
            return Ok(headers.len() + rest.bytes());
        }
        let sent = rest.writev_after(self.fd.as_fd(), headers);
        self.watch_state(sent)
    }

    /// Says once that the tap is down or gone, and once that it is back. `EIO` is down, `EBADFD` gone; a frame that the
    /// kernel doesn't like is the guest's affair.
    fn watch_state(&mut self, result: io::Result<usize>) -> io::Result<usize> {
        match &result {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::EBADFD)) => {
                if !std::mem::replace(&mut self.failed, true) {
                    report("a tap takes or gives no frames (is it down?)", error);
                }
            }
            Ok(_) => self.failed = false,
            Err(_) => {}
        }
        result
    }

    /// One of several queues, with its switch.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn queue_for_test(fd: OwnedFd) -> (Self, Switch) {
        let attached = Arc::new(AtomicBool::new(true));
        (Self { fd, attached: Some(attached.clone()), failed: false }, Switch { fd: None, attached })
    }

    /// Over any descriptor whose reads and writes are frames.
    #[cfg(any(test, feature = "fuzzing"))]
    pub const fn for_test(fd: OwnedFd) -> Self {
        Self { fd, attached: None, failed: false }
    }
}

/// Attaches a queue of a tap, or detaches it.
///
/// # Errors
/// As the ioctl.
pub fn attach_queue(fd: &OwnedFd, attach: bool) -> io::Result<()> {
    let flags = if attach { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    let request = interface_request(flags as libc::c_short);
    // SAFETY: the argument points to a live `ifreq`, which the kernel only reads.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn tap_error(iface: &str, name: &str, operation: &'static str, source: io::Error) -> NetError {
    NetError::Tap { iface: iface.to_owned(), name: name.to_owned(), operation, source }
}

fn interface_request(flags: libc::c_short) -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    }
}
