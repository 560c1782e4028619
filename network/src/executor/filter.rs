//! Loads rulesets with nft(8) and reads back which one is loaded. One of the few places with unsafe code: nft ends with
//! this process.

use std::{
    fs::File,
    io::{self, Seek, Write},
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::Path,
    process::{Command, Stdio},
};

use nix::{
    errno::Errno,
    sys::{
        memfd::{MFdFlags, memfd_create},
        prctl::set_pdeathsig,
        signal::Signal,
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
        },
    },
    unistd::{Pid, getpid, getppid},
};

use super::ExecutorError;
use crate::{
    filter::{Conntrack, Digest, TABLE},
    namespace,
};

/// There when br_netfilter is.
const BRIDGE_NETFILTER: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";
/// Bytes of nft's complaints that are kept.
const COMPLAINT_MAX: usize = 500;

/// Runs a script as one transaction in the calling thread's namespace.
///
/// When this process is killed, nft must not load a part of the script (hence a file that is whole before nft starts, not
/// a pipe), nor all of it after the next process has looked what is loaded (hence it is killed, too).
fn run_nft(script: &str, arguments: &[&str]) -> io::Result<()> {
    let mut file = File::from(memfd_create("nft", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(script.as_bytes())?;
    file.rewind()?;
    let mut nft = Command::new("nft");
    nft.args(arguments).args(["-f", "-"]).stdin(file).stdout(Stdio::null()).stderr(Stdio::piped());
    let parent = getpid();
    // SAFETY: between fork and exec only prctl(2) and getppid(2) are called, which are async-signal-safe; nothing is
    // allocated.
    unsafe { nft.pre_exec(move || end_with(parent)) };
    let output = nft.spawn()?.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint: String = complaint.trim().chars().take(COMPLAINT_MAX).collect();
    Err(io::Error::other(format!("nft: {complaint}")))
}

/// Lets the calling process be killed when the thread that made it ends, which waits for it.
fn end_with(parent: Pid) -> io::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    if getppid() == parent { Ok(()) } else { Err(Errno::ESRCH.into()) }
}

/// Loads a ruleset in a namespace.
pub(super) async fn load(namespace: &str, script: String) -> Result<(), ExecutorError> {
    let loaded = namespace::run_in(namespace, move || run_nft(&script, &[])).await?;
    loaded.map_err(|source| ExecutorError::Filter { namespace: namespace.to_owned(), source })
}

/// Which ruleset is loaded in a namespace.
pub(super) async fn loaded(namespace: &str) -> Result<Option<Digest>, ExecutorError> {
    let chains = namespace::run_in(namespace, chains).await?;
    let chains =
        chains.map_err(|source| ExecutorError::Filter { namespace: namespace.to_owned(), source })?;
    let mut digests = chains.iter().filter(|(table, _)| table == TABLE).map(|(_, chain)| chain);
    Ok(digests.find_map(|chain| Digest::from_marker(chain)))
}

/// Whether this kernel's conntrack sees bridged packets. Nothing is changed (nft only checks).
pub(super) async fn conntrack() -> Conntrack {
    const SCRIPT: &str = "table bridge mote-probe { chain probe { type filter hook forward priority 0; ct state new accept; }; }\n";
    let probed = tokio::task::spawn_blocking(|| run_nft(SCRIPT, &["-c"])).await;
    if matches!(probed, Ok(Ok(()))) {
        return Conntrack::Bridge;
    }
    let there = || Path::new(BRIDGE_NETFILTER).exists();
    let loaded = tokio::task::spawn_blocking(move || {
        if !there() {
            // Whether it worked is what is looked at next.
            let _ = Command::new("modprobe").arg("br_netfilter").stderr(Stdio::null()).status();
        }
        there()
    });
    if matches!(loaded.await, Ok(true)) { Conntrack::BridgeNetfilter } else { Conntrack::Missing }
}

// linux/netfilter/nfnetlink.h, nf_tables.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFPROTO_INET: u8 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NLMSG_HEADER: usize = 16;
const NFGENMSG: usize = 4;
/// The kernel's dumps come in parts of at most 32 KiB.
const BUFFER: usize = 64 * 1024;

/// Table and name of each chain of the inet family in the calling thread's namespace.
fn chains() -> io::Result<Vec<(String, String)>> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    let kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN;
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    let mut request = Vec::with_capacity(NLMSG_HEADER + NFGENMSG);
    request.extend(((NLMSG_HEADER + NFGENMSG) as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(flags.to_ne_bytes());
    request.extend([0; 8]);
    request.extend([NFPROTO_INET, 0, 0, 0]);
    sendto(fd.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut found = Vec::new();
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if length == 0 || collect(&buffer[..length], &mut found)? {
            return Ok(found);
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Takes the chains from one part of a dump; true at its end.
fn collect(mut part: &[u8], found: &mut Vec<(String, String)>) -> io::Result<bool> {
    while let (Some(length), Some(kind)) = (u32_at(part, 0), u16_at(part, 4)) {
        let length = length as usize;
        let Some(message) = part.get(NLMSG_HEADER..length) else { break };
        match i32::from(kind) {
            libc::NLMSG_DONE => return Ok(true),
            libc::NLMSG_ERROR => {
                let errno = u32_at(message, 0).map_or(libc::EPROTO, |code| (code as i32).saturating_neg());
                return Err(io::Error::from_raw_os_error(errno));
            }
            _ => found.extend(chain(message.get(NFGENMSG..).unwrap_or_default())),
        }
        part = part.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

fn chain(mut attributes: &[u8]) -> Option<(String, String)> {
    let (mut table, mut name) = (None, None);
    while let (Some(length), Some(kind)) = (u16_at(attributes, 0), u16_at(attributes, 2)) {
        let length = usize::from(length);
        let value = attributes.get(4..length)?;
        let text = || String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned();
        match kind {
            NFTA_CHAIN_TABLE => table = Some(text()),
            NFTA_CHAIN_NAME => name = Some(text()),
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    table.zip(name)
}
