//! A network of one's own.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::geteuid;

use super::Unavailable;

/// Moves the calling thread, and what it starts from now on, into a new network namespace with `lo` up and a tap
/// `tap0` that has these addresses (`A.B.C.D/P`). The namespace goes with its last thread and process. Call it in a
/// thread made for it: there is no way back.
///
/// # Errors
/// Not root, no /dev/net/tun, no `ip`.
pub fn enter_network(addresses: &[&str]) -> Result<(), Unavailable> {
    if !geteuid().is_root() {
        return Err(Unavailable("a network namespace needs root".into()));
    }
    if !Path::new("/dev/net/tun").exists() {
        return Err(Unavailable("/dev/net/tun is missing".into()));
    }
    unshare(CloneFlags::CLONE_NEWNET)
        .map_err(|error| Unavailable(format!("a new network namespace: {error}")))?;
    ip("link set lo up")?;
    ip("tuntap add dev tap0 mode tap vnet_hdr")?;
    for address in addresses {
        ip(&format!("addr add {address} dev tap0"))?;
    }
    ip("link set tap0 up")?;
    ip("route add 255.255.255.255/32 dev tap0")
}

nix::ioctl_write_ptr_bad!(set_interface, libc::TUNSETIFF, libc::ifreq);

/// Opens a tap of this name as a monitor takes it by descriptor, in the network namespace of the calling thread; made if there is none, and
/// gone with the last descriptor then.
///
/// # Errors
/// Of /dev/net/tun.
#[expect(unsafe_code, reason = "an ioctl that takes a pointer")]
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short },
    };
    for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the argument is a live `ifreq` with a name that ends with a zero.
    unsafe { set_interface(file.as_raw_fd(), &raw const request) }?;
    Ok(file.into())
}

fn ip(arguments: &str) -> Result<(), Unavailable> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(Unavailable(format!("ip {arguments}: {why}")))
        }
        Err(error) => Err(Unavailable(format!("ip {arguments}: {error}"))),
    }
}
