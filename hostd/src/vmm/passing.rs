//! A request to a VMM that brings a descriptor along, which hyper can't send.

use std::{
    io::{self, IoSlice},
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::UnixStream,
};

use super::ANSWER_MAX;
use crate::jail;

/// `PUT` with a descriptor; status and body of the answer.
///
/// # Errors
/// Of connecting, sending or receiving, or [`io::ErrorKind::InvalidData`].
pub(super) async fn put(
    socket: &Path,
    path: &str,
    body: &str,
    descriptor: &OwnedFd,
) -> io::Result<(u16, String)> {
    let mut stream = jail::connect(socket).await?;
    let length = body.len();
    let text = format!(
        "PUT {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    let sent = send(&stream, text.as_bytes(), descriptor).await?;
    stream.write_all(&text.as_bytes()[sent..]).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX as u64).read_to_end(&mut answer).await?;
    parse(&String::from_utf8_lossy(&answer)).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Sends the first bytes with the descriptor; how many.
async fn send(stream: &UnixStream, bytes: &[u8], descriptor: &OwnedFd) -> io::Result<usize> {
    let numbers = [descriptor.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&numbers)];
    let parts = [IoSlice::new(bytes)];
    let once = || Ok(sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::MSG_NOSIGNAL, None)?);
    stream.async_io(Interest::WRITABLE, once).await
}

fn parse(answer: &str) -> Option<(u16, String)> {
    let status = answer.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Some((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_status_and_a_body() {
        let no = "HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno";
        assert_eq!(parse(no), Some((400, "no".to_owned())));
        assert_eq!(parse("HTTP/1.1 204 No Content\r\n\r\n"), Some((204, String::new())));
        for wrong in ["", "SSH-2.0-x\r\n", "HTTP/1.1 x\r\n\r\n"] {
            assert_eq!(parse(wrong), None);
        }
    }
}
