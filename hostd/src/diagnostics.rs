//! What a server's VMM uses, as /proc tells it.

use std::{collections::BTreeMap, fs};

use mote_host_api::{Diagnostics, ServerId, Traffic};
use mote_vmm_api::VmConfig;

use crate::{
    files,
    paths::{ServerDir, StateDir},
    process,
};

/// Name of the threads that run vCPUs, followed by their number.
const VCPU_THREAD: &str = "vcpu";
/// Bytes of a MiB.
const MIB: u64 = 1 << 20;

/// Looks at the processes of the server, and for its taps into what was counted; one that is off uses nothing.
pub fn of_server(
    id: ServerId,
    dir: &ServerDir,
    state: &StateDir,
    counters: &BTreeMap<String, Traffic>,
) -> Diagnostics {
    let mut found = Diagnostics::default();
    if let Ok(Some(config)) = files::read_json::<VmConfig>(&dir.vmm_config()) {
        found.disks = u32::try_from(config.drives.len()).unwrap_or(u32::MAX);
        for nic in config.network_interfaces {
            let Some(mac) = nic.guest_mac else { continue };
            found.nics.push(mac);
            found.traffic.push(counters.get(&nic.host_dev_name).copied());
        }
    }
    let running = process::scan(state).unwrap_or_default();
    let Some((_, process)) = running.into_iter().find(|(server, _)| *server == id) else { return found };
    let read = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", process.pid)).unwrap_or_default();
    found.uptime_s = uptime_s(&fs::read_to_string("/proc/uptime").unwrap_or_default(), process.start_ticks);
    found.memory_used_mib = resident_bytes(&read("status")).map(|bytes| bytes / MIB);
    let io = read("io");
    found.disk_read_bytes = field(&io, "read_bytes:");
    found.disk_write_bytes = field(&io, "write_bytes:");
    found.vcpu_time_ns = vcpu_times(process.pid);
    found
}

/// Seconds since a process was started at that tick after boot.
fn uptime_s(uptime: &str, start_ticks: u64) -> Option<u64> {
    let now_s: u64 = uptime.split(['.', ' ']).next()?.parse().ok()?;
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    now_s.checked_sub(start_ticks.checked_div(u64::try_from(per_second).ok()?)?)
}

fn resident_bytes(status: &str) -> Option<u64> {
    field(status, "VmRSS:")?.checked_mul(1024)
}

/// The number after a name at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// Run time of the vCPUs' threads (schedstat, first field) in their order.
fn vcpu_times(pid: i32) -> Vec<u64> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let time = |thread: fs::DirEntry| -> Option<(u32, u64)> {
        let name = fs::read_to_string(thread.path().join("comm")).ok()?;
        let number = name.trim().strip_prefix(VCPU_THREAD)?.parse().ok()?;
        let times = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        Some((number, times.split_ascii_whitespace().next()?.parse().ok()?))
    };
    let mut times: Vec<(u32, u64)> = threads.flatten().filter_map(time).collect();
    times.sort_unstable();
    times.into_iter().map(|(_, time)| time).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_in_what_proc_says() {
        assert_eq!(resident_bytes("Name:\tx\nVmRSS:\t   2048 kB\n"), Some(2 << 20));
        assert_eq!(field("rchar: 1\nread_bytes: 4096\n", "read_bytes:"), Some(4096));
        assert_eq!(field("read_bytes: x", "read_bytes:"), None);
        assert_eq!(uptime_s("100.25 7.0", 0), Some(100));
        assert_eq!(uptime_s("1.0 1.0", u64::MAX), None);
        assert_eq!(uptime_s("", 0), None);
    }

    #[test]
    fn a_server_without_a_vmm_uses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let state = crate::paths::StateDir::new(dir.path());
        let found = of_server(ServerId::new(), &state.server(ServerId::new()), &state, &BTreeMap::new());
        assert_eq!(found, Diagnostics::default());
    }
}
