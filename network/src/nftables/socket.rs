//! The netlink socket of a network namespace.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt,
        socket,
        sockopt::{RcvBufForce, SndBufForce},
    },
};

use super::{
    attributes::{parse, text, u16_at, u32_at},
    batch::{Batch, FAMILY_HEADER, GET_TABLE, MESSAGE_HEADER, SUBSYSTEM, describe},
};

/// The kernel's dumps come in parts of at most 32 KiB; an error comes with the message that it is about.
const BUFFER: usize = 128 * 1024;
/// Room for the kernel's answers: one for each message of a transaction that is wrong.
const RECEIVE_BUFFER: usize = 1 << 20;
/// What the kernel needs beside the message itself.
const SEND_OVERHEAD: usize = 4096;

/// A socket in the namespace of the thread that opened it. For one transaction or question at a time.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    /// Opens one in the calling thread's namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let kind = (AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC);
        Ok(Self(socket(kind.0, kind.1, kind.2, SockProtocol::NetlinkNetFilter)?))
    }

    fn send(&self, messages: &[u8]) -> io::Result<()> {
        self.drain()?;
        sendto(self.0.as_raw_fd(), messages, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        Ok(())
    }

    /// Throws away what a question that failed has left unread.
    fn drain(&self) -> io::Result<()> {
        let mut left = [0; 1];
        loop {
            match recv(self.0.as_raw_fd(), &mut left, MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EAGAIN) => return Ok(()),
                // There was more than the buffer could hold.
                Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Carries out a transaction, wholly or not at all.
    pub(crate) fn commit(&self, batch: Batch) -> io::Result<()> {
        self.transact(batch, true)
    }

    /// Whether the kernel would carry it out; nothing is changed.
    pub(crate) fn check(&self, batch: Batch) -> io::Result<()> {
        self.transact(batch, false)
    }

    fn transact(&self, batch: Batch, end: bool) -> io::Result<()> {
        let (messages, last) = batch.finish(end);
        // The whole transaction is one message, which the kernel takes only if the buffer could hold it.
        setsockopt(&self.0, SndBufForce, &(messages.len() + SEND_OVERHEAD))?;
        setsockopt(&self.0, RcvBufForce, &RECEIVE_BUFFER)?;
        self.send(&messages)?;
        // The kernel worked on it before `send` returned: all its answers are there.
        let (mut buffer, mut acknowledged) = (vec![0; BUFFER], false);
        loop {
            let length = match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => length,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for message in Messages(&buffer[..length]) {
                let Some((errno, number)) = message.error() else { continue };
                if errno != 0 {
                    let (what, why) = (describe(&messages, number), io::Error::from_raw_os_error(errno));
                    return Err(io::Error::new(why.kind(), format!("{what}: {why}")));
                }
                acknowledged |= number == last;
            }
        }
        if acknowledged { Ok(()) } else { Err(io::Error::other("the kernel gave no answer")) }
    }

    /// Names of the tables of a family.
    pub(crate) fn tables(&self, family: u8) -> io::Result<Vec<String>> {
        let mut request = Vec::with_capacity(MESSAGE_HEADER + FAMILY_HEADER);
        request.extend(((MESSAGE_HEADER + FAMILY_HEADER) as u32).to_ne_bytes());
        request.extend((SUBSYSTEM << 8 | GET_TABLE).to_ne_bytes());
        request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
        request.extend([0; 8]);
        request.extend([family, 0, 0, 0]);
        self.send(&request)?;
        let (mut found, mut buffer) = (Vec::new(), vec![0; BUFFER]);
        loop {
            let length = match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            for message in Messages(&buffer[..length]) {
                if i32::from(message.kind) == libc::NLMSG_DONE {
                    return Ok(found);
                }
                match message.error() {
                    Some((errno, _)) => return Err(io::Error::from_raw_os_error(errno)),
                    None => found.extend(message.name()),
                }
            }
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// The messages in a buffer.
struct Messages<'a>(&'a [u8]);

struct Message<'a> {
    kind: u16,
    body: &'a [u8],
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let (length, kind) = (u32_at(self.0, 0)? as usize, u16_at(self.0, 4)?);
        let body = self.0.get(MESSAGE_HEADER..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, body })
    }
}

impl Message<'_> {
    /// Of an error or acknowledgement: the error number, and that of the message that it is about.
    fn error(&self) -> Option<(i32, u32)> {
        const SEQUENCE: usize = 4 + 8;
        if i32::from(self.kind) != libc::NLMSG_ERROR {
            return None;
        }
        let errno = u32_at(self.body, 0).map_or(libc::EPROTO, |code| (code as i32).saturating_neg());
        Some((errno, u32_at(self.body, SEQUENCE).unwrap_or(u32::MAX)))
    }

    /// Of a table: its name.
    fn name(&self) -> Option<String> {
        let attributes = self.body.get(FAMILY_HEADER..)?;
        parse(attributes).find(|(kind, _)| *kind == 1).map(|(_, value)| text(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{filter::Family, namespace};

    #[test]
    fn what_a_failed_transaction_leaves_unread_disturbs_no_later_one() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root");
            return;
        }
        let name = format!("mt{}xsocket", std::process::id());
        namespace::create_blocking(&name).unwrap();
        let inside = namespace::in_namespace(&name, || {
            let socket = Socket::open().unwrap();
            let mut wrong = Batch::new();
            for number in 0..3 {
                wrong.delete_table(Family::Inet, &format!("none{number}"));
            }
            let error = socket.commit(wrong).unwrap_err();
            let (after_error, mut right) = (socket.tables(Family::Inet.number()), Batch::new());
            right.add_table(Family::Inet, "mote");
            (error.to_string(), after_error.unwrap(), socket.check(right).is_ok())
        });
        namespace::delete_blocking(&name).unwrap();
        let (error, tables, right) = inside.unwrap();
        assert!(error.starts_with("delete table none0: "), "{error}");
        assert_eq!((tables, right), (vec![], true));
    }
}
