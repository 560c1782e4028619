//! A network of one's own.

use std::path::Path;
use std::process::Command;

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
