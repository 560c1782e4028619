//! Opens taps. One of the few places with unsafe code: ioctl(2).

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

const TUN_DEVICE: &str = "/dev/net/tun";

nix::ioctl_readwrite_bad!(
    /// linux/if_tun.h: makes the device that the request names, in the network namespace in which the file was opened.
    tun_set_iff,
    libc::TUNSETIFF,
    libc::ifreq
);

/// Makes a tap in the calling thread's network namespace: `IFF_NO_PI | IFF_VNET_HDR`, one queue, not persistent (it
/// goes with the last descriptor). The descriptor is non-blocking and close-on-exec.
///
/// # Errors
/// `EBUSY` when a tap of that name exists, `EINVAL`/`EEXIST` for another device of that name, `EPERM`, or `ENOENT`
/// without /dev/net/tun.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || !name.is_ascii() || name.contains(['\0', '%']) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    let file = options.open(TUN_DEVICE)?;

    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    // The constants fit in 16 bits; IFF_TUN_EXCL is bit 15, the sign of ifr_flags.
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_flags: flags as u16 as i16 };
    let mut request = libc::ifreq { ifr_name, ifr_ifru };
    // SAFETY: the descriptor is that of an open /dev/net/tun, and TUNSETIFF reads and writes one `ifreq` at the given
    // address, which is that of a live, initialised one that nothing else refers to. The kernel does not keep it.
    unsafe { tun_set_iff(file.as_raw_fd(), &raw mut request) }?;
    Ok(file.into())
}
