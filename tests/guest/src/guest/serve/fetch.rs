//! Requests to the metadata service.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;
use smoltcp::time::Duration;

use super::stack::{METADATA, Stack};
use crate::cpu;

/// Longest answer with its headers.
const MAX_ANSWER_BYTES: usize = 64 << 10;
const ATTEMPTS: u32 = 30;
const ATTEMPT_US: u64 = 2_000_000;
const PAUSE_US: u64 = 200_000;
const FIRST_PORT: u16 = 49_152;

/// The body of `http://169.254.169.254PATH`, asked for again until the answer is 200 or [`ATTEMPTS`] are over.
pub fn get(stack: &mut Stack, path: &str) -> Result<String, String> {
    let mut last = String::new();
    for attempt in 0..ATTEMPTS {
        let request =
            format!("GET {path} HTTP/1.0\r\nHost: 169.254.169.254\r\nUser-Agent: mote-guest\r\n\r\n");
        match once(stack, &request).and_then(|answer| body(&answer)) {
            Ok(body) => return Ok(body),
            Err(why) => last = why,
        }
        if attempt + 1 < ATTEMPTS {
            let end = cpu::now_us() + PAUSE_US;
            while cpu::now_us() < end {
                stack.wait(PAUSE_US);
            }
        }
    }
    Err(format!("{last} ({ATTEMPTS} attempts)"))
}

/// Status and body of the answer to one request.
pub fn ask(stack: &mut Stack, request: &str) -> Result<(String, String), String> {
    let answer = once(stack, request)?;
    let (head, body) = split(&answer).ok_or("no HTTP answer")?;
    let status = head.split(' ').nth(1).unwrap_or("");
    Ok((status.to_string(), String::from_utf8_lossy(body).into_owned()))
}

fn once(stack: &mut Stack, request: &str) -> Result<Vec<u8>, String> {
    let buffer = |bytes| tcp::SocketBuffer::new(vec![0; bytes]);
    let mut socket = tcp::Socket::new(buffer(16 << 10), buffer(1024));
    socket.set_timeout(Some(Duration::from_micros(ATTEMPT_US)));
    let handle = stack.sockets.add(socket);
    let result = exchange(stack, handle, request);
    stack.sockets.remove(handle);
    result
}

fn exchange(stack: &mut Stack, handle: SocketHandle, request: &str) -> Result<Vec<u8>, String> {
    let port = FIRST_PORT + (cpu::tsc() % 16_000) as u16;
    let (context, sockets) = stack.context();
    let socket = sockets.get_mut::<tcp::Socket>(handle);
    socket.connect(context, (METADATA, 80), port).map_err(|error| error.to_string())?;
    let mut sent = 0;
    let mut answer = Vec::new();
    let end = cpu::now_us() + ATTEMPT_US;
    while cpu::now_us() < end {
        stack.wait(ATTEMPT_US);
        let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
        if sent < request.len() && socket.can_send() {
            sent += socket.send_slice(&request.as_bytes()[sent..]).map_err(|error| error.to_string())?;
        }
        while socket.can_recv() {
            socket
                .recv(|bytes| (bytes.len(), answer.extend_from_slice(bytes)))
                .map_err(|error| error.to_string())?;
        }
        if answer.len() > MAX_ANSWER_BYTES {
            return Err(format!("more than {MAX_ANSWER_BYTES} bytes"));
        }
        if !socket.is_active() {
            return Err(String::from("connection refused or lost"));
        }
        if complete(&answer) || (sent == request.len() && !socket.may_recv()) {
            socket.close();
            stack.wait(0);
            return Ok(answer);
        }
    }
    Err(String::from("no answer"))
}

/// Whether the answer has all the bytes that its Content-Length announces.
fn complete(answer: &[u8]) -> bool {
    let Some((head, body)) = split(answer) else { return false };
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    length.is_some_and(|length| body.len() >= length)
}

fn split(answer: &[u8]) -> Option<(&str, &[u8])> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    Some((core::str::from_utf8(&answer[..end]).ok()?, &answer[end + 4..]))
}

fn body(answer: &[u8]) -> Result<String, String> {
    let (head, body) = split(answer).ok_or("no HTTP answer")?;
    let status = head.split(' ').nth(1).unwrap_or("");
    if status != "200" {
        return Err(format!("status {status:?}"));
    }
    String::from_utf8(body.to_vec()).map_err(|_| String::from("not UTF-8"))
}
