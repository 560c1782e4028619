//! stdin as the console's keyboard.

use std::io;
use std::os::fd::BorrowedFd;

use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};

/// stdin; a terminal is put into character mode for as long as this lives.
pub struct Stdin {
    saved: Option<Termios>,
}

fn stdin() -> BorrowedFd<'static> {
    // SAFETY: nothing in this process closes descriptor 0.
    unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) }
}

impl Stdin {
    /// If stdin is a terminal and ours to use, keys (also Ctrl-C) come one by one and are echoed by the guest only.
    pub fn attach() -> Self {
        let saved = tcgetattr(stdin()).ok().filter(|_| in_foreground());
        if let Some(saved) = &saved {
            let mut raw = saved.clone();
            raw.local_flags &= !(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG);
            // Then it stays as it was.
            let _ = tcsetattr(stdin(), SetArg::TCSANOW, &raw);
        }
        Self { saved }
    }

    /// Reads what is there.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // A background process that reads from its terminal would be stopped.
        if self.saved.is_some() && !in_foreground() {
            return Ok(0);
        }
        nix::unistd::read(stdin(), buffer).map_err(io::Error::from)
    }
}

fn in_foreground() -> bool {
    tcgetpgrp(stdin()).is_ok_and(|foreground| foreground == getpgrp())
}

impl Drop for Stdin {
    fn drop(&mut self) {
        if let Some(saved) = self.saved.as_ref().filter(|_| in_foreground()) {
            let _ = tcsetattr(stdin(), SetArg::TCSANOW, saved);
        }
    }
}
