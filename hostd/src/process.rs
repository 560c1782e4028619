//! Processes that are not necessarily children: found, identified, watched and signalled without confusing a process with
//! a later one of the same number.

use std::{
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use mote_host_api::ServerId;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

use crate::paths::StateDir;

/// Longest command line that is looked at, in bytes.
const CMDLINE_MAX: usize = 16 << 10;

/// One process for all time: a number is used again, number with start time and boot is not.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot (field 22 of /proc/PID/stat, proc_pid_stat(5)).
    pub start_ticks: u64,
    /// /proc/sys/kernel/random/boot_id at that time.
    pub boot_id: String,
}

impl ProcessIdentity {
    /// Identifies a running process; `None` when there is none of that number (or only a zombie).
    pub fn of(pid: i32) -> Option<Self> {
        let start_ticks = start_ticks(pid)?;
        Some(Self { pid, start_ticks, boot_id: boot_id() })
    }

    /// Opens the process for waiting and signals; `None` when it is gone.
    ///
    /// # Errors
    /// Of `pidfd_open` other than ESRCH.
    pub fn open(&self) -> io::Result<Option<Pidfd>> {
        if self.boot_id != boot_id() {
            return Ok(None);
        }
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1; no memory is involved.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::ESRCH) { Ok(None) } else { Err(error) };
        }
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the kernel has just returned this descriptor (close-on-exec) and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // Only now is the number pinned: if the start time is right now, the descriptor is of the right process.
        Ok((start_ticks(self.pid) == Some(self.start_ticks)).then_some(Pidfd(fd)))
    }
}

/// A descriptor of one process (pidfd_open(2)).
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// Sends a signal; a process that is gone is fine.
    ///
    /// # Errors
    /// Of `pidfd_send_signal` other than ESRCH.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        // SAFETY: the descriptor is open as long as self; a null siginfo is allowed (pidfd_send_signal(2)).
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal as i32,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
    }

    /// Completes when the process has ended, and reaps it if it is our child.
    ///
    /// # Errors
    /// Of registering with the reactor.
    pub async fn ended(self) -> io::Result<()> {
        // A pidfd becomes readable when the process ends (pidfd_open(2)).
        // SAFETY: the descriptor is open, and `AsyncFd` owns it until it is dropped: nobody closes it before.
        let fd = unsafe { AsyncFd::register_with_interest(self.0, Interest::READABLE) }?;
        drop(fd.readable().await?);
        let id = libc::id_t::try_from(fd.get_ref().as_raw_fd()).map_err(io::Error::other)?;
        // SAFETY: all zero is a valid siginfo_t; waitid writes only into it. ECHILD (not our child: adopted) is fine.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            libc::waitid(libc::P_PIDFD, id, &raw mut info, libc::WEXITED | libc::WNOHANG);
        }
        Ok(())
    }
}

/// This boot of the machine; empty if the kernel does not tell.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// Start time of a process that is not a zombie.
fn start_ticks(pid: i32) -> Option<u64> {
    parse_start_ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Field 22 of /proc/PID/stat unless field 3 says zombie or dead. The name in field 2 may hold anything, so the count
/// starts after the last parenthesis.
fn parse_start_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Finds every VMM of this state directory among the machine's processes: one with `--id ID` and `--root` at the place
/// where this agent has that server's jail.
///
/// # Errors
/// Of reading /proc.
pub fn scan(state: &StateDir) -> io::Result<Vec<(ServerId, ProcessIdentity)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(cmdline) = read_bounded(Path::new(&format!("/proc/{pid}/cmdline"))) else { continue };
        if let Some(id) = vmm_of(&cmdline, state)
            && let Some(identity) = ProcessIdentity::of(pid)
        {
            found.push((id, identity));
        }
    }
    Ok(found)
}

/// The server whose VMM has this command line.
fn vmm_of(cmdline: &[u8], state: &StateDir) -> Option<ServerId> {
    let arguments: Vec<&[u8]> = cmdline.split(|byte| *byte == 0).collect();
    let value = |name: &[u8]| {
        arguments.iter().position(|argument| *argument == name).and_then(|at| arguments.get(at + 1)).copied()
    };
    let id: ServerId = std::str::from_utf8(value(b"--id")?).ok()?.parse().ok()?;
    let root = state.server(id).vm();
    (value(b"--root")? == root.as_os_str().as_encoded_bytes()).then_some(id)
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(CMDLINE_MAX as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn start_time_is_read_behind_a_hostile_process_name() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21";
        assert_eq!(parse_start_ticks(&format!("7 (a b) R) {tail}")), Some(4242));
        assert_eq!(parse_start_ticks(&format!("7 (x) {}", tail.replacen('S', "Z", 1))), None);
        assert_eq!(parse_start_ticks("7 (x"), None);
        assert_eq!(parse_start_ticks("7 (x) S 1"), None);
    }

    #[test]
    fn only_a_vmm_of_this_state_directory_is_ours() {
        let state = StateDir::new("/s/a");
        let id = ServerId::new();
        let line = |root: &str| format!("mote-vmm\0jail\0--id\0{id}\0--root\0{root}\0--\0").into_bytes();
        assert_eq!(vmm_of(&line(&format!("/s/a/servers/{id}/vm")), &state), Some(id));
        assert_eq!(vmm_of(&line(&format!("/s/b/servers/{id}/vm")), &state), None);
        assert_eq!(vmm_of(b"mote-vmm\0--id", &state), None);
        assert_eq!(vmm_of(b"", &state), None);
    }

    #[tokio::test]
    async fn an_ended_child_is_noticed_and_reaped_and_its_identity_opens_no_more() {
        #[expect(clippy::zombie_processes, reason = "that `ended` reaps it is what is tested")]
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let identity = ProcessIdentity::of(i32::try_from(child.id()).unwrap()).unwrap();
        let fd = identity.open().unwrap().expect("it runs");
        fd.signal(Signal::SIGKILL).unwrap();
        fd.ended().await.unwrap();
        assert!(identity.open().unwrap().is_none());
        assert!(ProcessIdentity::of(identity.pid).is_none());
    }

    #[test]
    fn another_start_time_or_boot_is_another_process() {
        let me = ProcessIdentity::of(std::process::id().cast_signed()).unwrap();
        assert!(me.open().unwrap().is_some());
        assert!(ProcessIdentity { start_ticks: me.start_ticks + 1, ..me.clone() }.open().unwrap().is_none());
        assert!(ProcessIdentity { boot_id: "x".into(), ..me }.open().unwrap().is_none());
    }
}
