//! What Rust's own start does for a process before `main` and this one needs as well (`main.rs` says why it has none).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::IntoRawFd;

/// Sees to it that the standard descriptors are open, so that no file of the VM gets one of their numbers and is written
/// to as a log; that a broken pipe is an error and no end; and that the allocator has one arena: threads here seldom
/// allocate, and an arena for each would only cost memory and time to start.
///
/// # Errors
/// The kernel refused.
pub fn prepare() -> io::Result<()> {
    let mut standard = [0, 1, 2].map(|fd| libc::pollfd { fd, events: 0, revents: 0 });
    // SAFETY: the array is live, and as long as is said.
    if unsafe { libc::poll(standard.as_mut_ptr(), 3, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    for closed in standard.iter().filter(|fd| fd.revents & libc::POLLNVAL != 0) {
        // The lowest number that is free is taken.
        let opened = OpenOptions::new().read(true).write(true).open("/dev/null")?.into_raw_fd();
        debug_assert_eq!(opened, closed.fd);
    }
    // SAFETY: no handler is installed.
    if unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: sets a number in the allocator, before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    Ok(())
}
