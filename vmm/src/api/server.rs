//! The API's socket: a few connections, none of which can block the process or grow without bound.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::http::{self, MAX_HEAD, Parse, Request, Response};
use super::receive::{Received, receive};

/// Most connections at a time. One more closes the one that was silent longest.
pub const MAX_CONNECTIONS: usize = 10;
/// Bytes read at a time.
const READ_SIZE: usize = 4096;
/// Most descriptors that wait for their requests in a connection. One more ends it.
const MAX_DESCRIPTORS: usize = 4;

/// What carries out requests: with each, the descriptors that came with it.
pub type Handler<'a> = dyn FnMut(&Request, Vec<OwnedFd>) -> Response + 'a;

/// The socket could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody answers there.
    #[error("the API socket {} is in use by a running process", .0.display())]
    InUse(PathBuf),
    /// There is a file of another kind.
    #[error("the API socket's path {} exists and is no socket", .0.display())]
    NotASocket(PathBuf),
    /// Something else.
    #[error("cannot listen on the API socket {}", .path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// A client.
struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
    /// What came with a byte of `received`, of which the number is how many bytes there were up to it.
    descriptors: VecDeque<(usize, OwnedFd)>,
    /// Answer bytes the client has not yet taken. While there are some, nothing more is read.
    unsent: Vec<u8>,
    /// Close when `unsent` is sent.
    closing: bool,
    told_to_continue: bool,
    /// The server's turn counter at the last activity.
    last_active: u64,
}

/// What to watch a connection for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// It has something to say.
    Read,
    /// It can take more of the answer.
    Write,
}

/// The listening socket and its clients.
pub struct Server {
    path: PathBuf,
    listener: UnixListener,
    connections: Vec<Connection>,
    /// Longest body of a request.
    max_body: usize,
    turn: u64,
}

impl Server {
    /// Listens on `path` for requests with bodies of at most `max_body` bytes. A socket left there by a process that died is replaced: a supervisor that starts a VM again
    /// after a crash need not clean up first. A socket that a live process listens on is an error.
    ///
    /// # Errors
    /// See [`BindError`].
    pub fn bind(path: &Path, max_body: usize) -> Result<Self, BindError> {
        let failed = |source| BindError::Bind { path: path.to_owned(), source };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path).map_err(failed)?
            }
            result => result.map_err(failed)?,
        };
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { path: path.to_owned(), listener, connections: Vec::new(), max_body, turn: 0 })
    }

    /// The listening socket's descriptor.
    pub fn listener_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// The clients' descriptors and what to watch them for.
    pub fn connections(&self) -> impl Iterator<Item = (RawFd, Interest)> + '_ {
        self.connections.iter().map(|connection| (connection.stream.as_raw_fd(), connection.interest()))
    }

    /// Takes the clients that wait. Returns the descriptors of those that had to go for them.
    pub fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.connections.len() == MAX_CONNECTIONS {
                let silent =
                    self.connections.iter().enumerate().min_by_key(|(_, connection)| connection.last_active);
                if let Some((index, _)) = silent {
                    self.connections.swap_remove(index);
                }
            }
            self.turn += 1;
            self.connections.push(Connection {
                stream,
                received: Vec::new(),
                descriptors: VecDeque::new(),
                unsent: Vec::new(),
                closing: false,
                told_to_continue: false,
                last_active: self.turn,
            });
        }
    }

    /// Serves the client with descriptor `fd`, which is ready. Whole requests go through `handle`.
    pub fn serve(&mut self, fd: RawFd, handle: &mut Handler<'_>) {
        let Some(index) = self.connections.iter().position(|connection| connection.stream.as_raw_fd() == fd)
        else {
            return;
        };
        self.turn += 1;
        let connection = &mut self.connections[index];
        connection.last_active = self.turn;
        let goes_on = match connection.interest() {
            Interest::Write => connection.send(),
            Interest::Read => connection.receive(),
        };
        if !(goes_on && connection.answer(self.max_body, handle)) {
            self.connections.swap_remove(index);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing can be done if it fails; the next process replaces the stale socket.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Connection {
    fn interest(&self) -> Interest {
        if self.unsent.is_empty() { Interest::Read } else { Interest::Write }
    }

    /// Reads once. False: the client is gone, or sends more descriptors than may wait.
    fn receive(&mut self) -> bool {
        let mut bytes = [0; READ_SIZE];
        let Received { length, descriptors } = match receive(&self.stream, &mut bytes) {
            Ok(received) => received,
            Err(error) => return is_temporary(&error),
        };
        if length == 0 || self.descriptors.len() + descriptors.len() > MAX_DESCRIPTORS {
            return false;
        }
        self.received.extend_from_slice(&bytes[..length]);
        // The kernel ends a read with the bytes that descriptors came with.
        let end = self.received.len();
        self.descriptors.extend(descriptors.into_iter().map(|fd| (end, fd)));
        true
    }

    /// Takes a request of so many bytes off what was received, with the descriptors that came with it.
    fn take(&mut self, length: usize) -> Vec<OwnedFd> {
        self.received.drain(..length);
        let (mut taken, mut left) = (Vec::new(), VecDeque::new());
        for (end, fd) in self.descriptors.drain(..) {
            match end.checked_sub(length) {
                None | Some(0) => taken.push(fd),
                Some(end) => left.push_back((end, fd)),
            }
        }
        self.descriptors = left;
        taken
    }

    /// Answers the whole requests that were received. False: close the connection.
    fn answer(&mut self, max_body: usize, handle: &mut Handler<'_>) -> bool {
        while self.unsent.is_empty() && !self.closing && !self.received.is_empty() {
            match http::parse(&self.received, max_body) {
                Parse::Complete(request, length) => {
                    let descriptors = self.take(length);
                    self.told_to_continue = false;
                    let response = handle(&request, descriptors);
                    self.closing = !request.keep_alive;
                    self.unsent = response.encode(request.keep_alive);
                }
                Parse::Invalid(response) => {
                    self.closing = true;
                    self.unsent = response.encode(false);
                }
                Parse::Incomplete { wants_continue } => {
                    debug_assert!(self.received.len() <= MAX_HEAD + max_body + READ_SIZE);
                    if !wants_continue || self.told_to_continue {
                        return true;
                    }
                    self.told_to_continue = true;
                    self.unsent = b"HTTP/1.1 100 Continue\r\n\r\n".to_vec();
                }
            }
            if !self.send() {
                return false;
            }
        }
        !(self.closing && self.unsent.is_empty())
    }

    /// Sends as much as the client takes. False: it is gone.
    fn send(&mut self) -> bool {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(0) => return false,
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return is_temporary(&error),
            }
        }
        true
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Removes the socket of a process that died.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::Bind { path: path.to_owned(), source };
    let metadata = std::fs::symlink_metadata(path).map_err(failed)?;
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
        Ok(_) => Err(BindError::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read};

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

    use super::super::http::MAX_BODY;
    use super::*;

    struct Client {
        server: Server,
        stream: UnixStream,
        _directory: tempfile::TempDir,
    }

    impl Client {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("s");
            let mut server = Server::bind(&path, MAX_BODY).unwrap();
            let stream = UnixStream::connect(&path).unwrap();
            server.accept();
            Self { server, stream, _directory: directory }
        }

        /// Sends `text` with these descriptors.
        fn send(&self, text: &str, descriptors: &[RawFd]) {
            let rights = [ControlMessage::ScmRights(descriptors)];
            let control = if descriptors.is_empty() { &[][..] } else { &rights[..] };
            let bytes = [IoSlice::new(text.as_bytes())];
            let sent = sendmsg::<()>(self.stream.as_raw_fd(), &bytes, control, MsgFlags::empty(), None);
            assert_eq!(sent, Ok(text.len()));
        }

        /// Sends `text`, lets the server work, and returns what it answered.
        fn ask(&mut self, text: &str) -> String {
            self.stream.write_all(text.as_bytes()).unwrap();
            let mut bytes = Vec::new();
            self.stream.set_nonblocking(true).unwrap();
            for _ in 0..text.len() / READ_SIZE + 8 {
                for (fd, _) in self.server.connections().collect::<Vec<_>>() {
                    self.server.serve(fd, &mut |request, descriptors| {
                        Response::fault(400, format!("{} {}", request.path, descriptors.len()))
                    });
                }
                // "Would block" ends it as the end of the stream does.
                let _ = self.stream.read_to_end(&mut bytes);
            }
            String::from_utf8(bytes).unwrap()
        }
    }

    #[test]
    fn pipelined_requests_are_answered_in_order_and_the_connection_stays() {
        let mut client = Client::new();
        let text = client.ask("GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\n");
        assert!(text.find("\"/a 0\"").unwrap() < text.find("\"/b 0\"").unwrap(), "{text}");
        assert_eq!(client.server.connections().count(), 1);
    }

    #[test]
    fn the_connection_is_closed_when_asked_for_and_after_nonsense() {
        let mut client = Client::new();
        assert!(client.ask("GET / HTTP/1.0\r\n\r\n").contains("Connection: close"));
        assert_eq!(client.server.connections().count(), 0);
        let mut client = Client::new();
        assert!(client.ask("nonsense\r\n\r\n").contains("400 Bad Request"));
        assert_eq!(client.server.connections().count(), 0);
    }

    #[test]
    fn a_client_that_expects_100_gets_it_once() {
        let mut client = Client::new();
        let text = client.ask("PUT /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
        assert_eq!(text.matches("100 Continue").count(), 1);
        let text = client.ask("{}");
        assert!(text.contains("\"/x 0\"") && !text.contains("100 Continue"), "{text}");
    }

    #[test]
    fn a_large_body_in_pieces_is_one_request() {
        let mut client = Client::new();
        let body = "x".repeat(MAX_BODY);
        let text = client.ask(&format!("PUT /x HTTP/1.1\r\nContent-Length: {MAX_BODY}\r\n\r\n{body}"));
        assert_eq!(text.matches("HTTP/1.1 400").count(), 1, "{text}");
    }

    #[test]
    fn descriptors_come_with_their_requests_and_are_closed_when_not_used() {
        let mut client = Client::new();
        let (ours, theirs) = UnixStream::pair().unwrap();
        client.send("GET /a HTTP/1.1\r\nContent-Le", &[]);
        client.send("ngth: 0\r\n\r\n", &[theirs.as_raw_fd(), theirs.as_raw_fd()]);
        client.send("GET /b HTTP/1.1\r\n\r\n", &[]);
        client.send("GET /c HTTP/1.1\r\n\r\n", &[theirs.as_raw_fd()]);
        let text = client.ask("GET /d HTTP/1.1\r\n\r\n");
        for answer in ["/a 2", "/b 0", "/c 1", "/d 0"] {
            assert!(text.contains(&format!("\"{answer}\"")), "{answer} in {text}");
        }
        drop(theirs);
        let mut ours = ours;
        assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0, "no copy is open");
    }

    #[test]
    fn a_client_that_sends_more_descriptors_than_may_wait_is_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut at_once = Client::new();
        at_once.send("GET", &[theirs.as_raw_fd(); MAX_DESCRIPTORS + 3]);
        at_once.ask("");
        let mut in_turn = Client::new();
        for _ in 0..=MAX_DESCRIPTORS {
            in_turn.send("G", &[theirs.as_raw_fd()]);
            in_turn.ask("");
        }
        for client in [&at_once, &in_turn] {
            assert_eq!(client.server.connections().count(), 0);
        }
        drop(theirs);
        let mut ours = ours;
        assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0, "no copy is open");
    }

    #[test]
    fn the_client_silent_longest_makes_room() {
        let mut client = Client::new();
        let path = client.server.path.clone();
        let others: Vec<_> = (0..MAX_CONNECTIONS).map(|_| UnixStream::connect(&path).unwrap()).collect();
        client.server.accept();
        assert_eq!(client.server.connections().count(), MAX_CONNECTIONS);
        assert_eq!(client.stream.read(&mut [0; 1]).unwrap(), 0, "the first client was closed");
        drop(others);
    }

    #[test]
    fn a_stale_socket_is_replaced_a_live_one_and_other_files_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let server = Server::bind(&path, MAX_BODY).unwrap();
        assert!(matches!(Server::bind(&path, MAX_BODY), Err(BindError::InUse(_))));
        drop(server);
        assert!(!path.exists());
        std::fs::write(&path, "x").unwrap();
        assert!(matches!(Server::bind(&path, MAX_BODY), Err(BindError::NotASocket(_))));
        assert!(path.exists());
    }
}
