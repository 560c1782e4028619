//! Requests to a monitor's API socket.

use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Longest wait for a socket to be there, and for an answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Sends one request, waiting for the socket if it isn't there yet, and returns status and body of the answer.
///
/// # Errors
/// Nobody listens within the time limit, or what comes is no HTTP answer.
pub fn request(socket: &Path, method: &str, path: &str, body: &str) -> io::Result<(u16, String)> {
    request_with::<&UnixStream>(socket, method, path, body, &[])
}

/// As [`request`], with descriptors that are sent along.
///
/// # Errors
/// As [`request`].
pub fn request_with<F: AsFd>(
    socket: &Path,
    method: &str,
    path: &str,
    body: &str,
    descriptors: &[F],
) -> io::Result<(u16, String)> {
    let mut stream = connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let length = body.len();
    let text = format!(
        "{method} {path} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    let numbers: Vec<_> = descriptors.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[][..] } else { &rights[..] };
    let bytes = [IoSlice::new(text.as_bytes())];
    let sent = sendmsg::<()>(stream.as_raw_fd(), &bytes, control, MsgFlags::empty(), None)?;
    io::Write::write_all(&mut stream, &text.as_bytes()[sent..])?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| io::Error::other(format!("no HTTP answer: {answer:?}")))?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok((status, body.to_owned()))
}

fn connect(socket: &Path) -> io::Result<UnixStream> {
    let end = Instant::now() + TIMEOUT;
    loop {
        match UnixStream::connect(socket) {
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
            result => return result,
        }
    }
}
