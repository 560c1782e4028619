//! Signals by which the kernel tells that a limit is reached (`mote-vmm jail --resource-limit`, `ulimit`): counted, and the
//! process goes on. The write that was too much fails with EFBIG, which the guest, the API's client or a counter is told;
//! with the default action a limit on the size of files would end the VM when its metrics have grown too long.

use std::io;

use crate::metrics::SIGNALS;

/// Only touches atomics, which is safe at any moment.
extern "C" fn count(signal: libc::c_int) {
    match signal {
        libc::SIGXFSZ => SIGNALS.sigxfsz.add_one(),
        _ => SIGNALS.sigxcpu.add_one(),
    }
}

/// Installs the handler for the process.
///
/// # Errors
/// The kernel refused.
pub fn count_limits() -> io::Result<()> {
    for signal in [libc::SIGXFSZ, libc::SIGXCPU] {
        // SAFETY: all-zero is a valid `sigaction`: empty mask, no flags but the one that is set below.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = count as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: `action` is initialized and its handler is safe at any moment.
        if unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
