//! The page on port 80: every GET gets it, on a few connections at once.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;
use smoltcp::time::Duration;

use super::stack::Stack;
use crate::cpu;

/// Connections at once; more are refused.
const CONNECTIONS: usize = 32;
const PORT: u16 = 80;
const MAX_REQUEST_BYTES: usize = 2048;
const SEND_BUFFER_BYTES: usize = 4 << 10;
/// How long a connection may take from its first packet to its end.
const CONNECTION_US: u64 = 10_000_000;
const LONGEST_WAIT_US: u64 = 1_000_000;

#[derive(Default)]
struct Connection {
    /// When it was first seen open.
    since: Option<u64>,
    request: Vec<u8>,
    answer: Option<(String, usize)>,
}

/// Serves for ever, and looks after something else each time it was woken.
pub fn serve(stack: &mut Stack, page: impl Fn(&Stack) -> String, mut look: impl FnMut()) -> ! {
    let mut connections: Vec<(SocketHandle, Connection)> =
        (0..CONNECTIONS).map(|_| (listen(stack), Connection::default())).collect();
    loop {
        stack.wait(LONGEST_WAIT_US);
        look();
        for (handle, connection) in &mut connections {
            if over(stack, *handle, connection) {
                // A fresh socket rather than the old one: it may be in TIME-WAIT, which would keep it for 10 s.
                stack.sockets.remove(*handle);
                (*handle, *connection) = (listen(stack), Connection::default());
                continue;
            }
            if connection.answer.is_none() && receive(stack, *handle, connection) {
                connection.answer = Some((answer(&connection.request, || page(stack)), 0));
            }
            send(stack, *handle, connection);
        }
    }
}

fn listen(stack: &mut Stack) -> SocketHandle {
    let buffer = |bytes| tcp::SocketBuffer::new(vec![0; bytes]);
    let mut socket = tcp::Socket::new(buffer(MAX_REQUEST_BYTES), buffer(SEND_BUFFER_BYTES));
    socket.set_timeout(Some(Duration::from_micros(CONNECTION_US)));
    socket.set_nagle_enabled(false);
    socket.listen(PORT).expect("a new socket listens on a fixed port");
    stack.sockets.add(socket)
}

fn over(stack: &mut Stack, handle: SocketHandle, connection: &mut Connection) -> bool {
    let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
    if socket.is_listening() {
        return false;
    }
    let since = *connection.since.get_or_insert_with(cpu::now_us);
    let late = cpu::now_us() - since > CONNECTION_US;
    late || !socket.is_open() || socket.state() == tcp::State::TimeWait
}

/// Takes what came; tells whether the request is there, or can't become one.
fn receive(stack: &mut Stack, handle: SocketHandle, connection: &mut Connection) -> bool {
    let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
    while socket.can_recv() && connection.request.len() < MAX_REQUEST_BYTES {
        let request = &mut connection.request;
        if socket.recv(|bytes| (bytes.len(), request.extend_from_slice(bytes))).is_err() {
            return false;
        }
    }
    let ended = socket.state() == tcp::State::CloseWait;
    let complete = connection.request.windows(4).any(|window| window == b"\r\n\r\n");
    complete || ended || connection.request.len() >= MAX_REQUEST_BYTES
}

fn send(stack: &mut Stack, handle: SocketHandle, connection: &mut Connection) {
    let Some((text, sent)) = &mut connection.answer else { return };
    let socket = stack.sockets.get_mut::<tcp::Socket>(handle);
    if socket.can_send() {
        *sent += socket.send_slice(&text.as_bytes()[*sent..]).unwrap_or(0);
    }
    if *sent == text.len() {
        socket.close();
    }
}

fn answer(request: &[u8], page: impl FnOnce() -> String) -> String {
    let complete = request.windows(4).any(|window| window == b"\r\n\r\n");
    let (status, body) = match request.split(|&byte| byte == b' ').next() {
        Some(b"GET") if complete => ("200 OK", page()),
        Some(b"GET") => ("400 Bad Request", String::from("incomplete request\n")),
        _ => ("405 Method Not Allowed", String::from("only GET\n")),
    };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}
