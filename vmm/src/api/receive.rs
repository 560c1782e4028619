//! recvmsg(2) with descriptors, none of which is lost: `nix` gives up what a truncated message brought without closing it.

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Most descriptors that the kernel lets a message have (`SCM_MAX_FD`).
const MESSAGE_DESCRIPTORS: usize = 253;
/// Room for them with their header, in words, as which it is aligned.
const CONTROL_WORDS: usize = 8 + MESSAGE_DESCRIPTORS / 2;

/// What came.
pub(super) struct Received {
    /// How many bytes; 0: the other end was closed.
    pub(super) length: usize,
    /// Descriptors that came with the last of them.
    pub(super) descriptors: Vec<OwnedFd>,
}

/// Reads once, as read(2) does.
///
/// # Errors
/// As recvmsg(2).
pub(super) fn receive(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<Received> {
    let mut control = [0_u64; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all fields are integers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = mem::size_of_val(&control);
    // SAFETY: `message` points to `part`, which is `bytes`, and to `control`, with their lengths; all live longer than the call.
    let length = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    Ok(Received { length, descriptors: descriptors(&message) })
}

/// The descriptors that a message which the kernel has filled in brings.
fn descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut found = Vec::new();
    // SAFETY: control and its length are as the kernel has left them, so that the headers are within.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: not null, and so within the control buffer, which is aligned for it.
        let here = unsafe { &*header };
        if (here.cmsg_level, here.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: only the length of an empty header, computed.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = here.cmsg_len.saturating_sub(head) / size_of::<RawFd>();
            // SAFETY: the data behind the header, within the control buffer.
            let data: *const RawFd = unsafe { libc::CMSG_DATA(header) }.cast();
            for index in 0..count {
                // SAFETY: of `count` numbers, which the kernel has just given to this process; nobody else has them.
                found.push(unsafe { OwnedFd::from_raw_fd(data.add(index).read_unaligned()) });
            }
        }
        // SAFETY: as for the first.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    found
}
