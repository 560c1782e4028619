//! Requests to a monitor's API socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest wait for a socket to be there, and for an answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Sends one request, waiting for the socket if it isn't there yet, and returns status and body of the answer.
///
/// # Errors
/// Nobody listens within the time limit, or what comes is no HTTP answer.
pub fn request(socket: &Path, method: &str, path: &str, body: &str) -> io::Result<(u16, String)> {
    let mut stream = connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
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
