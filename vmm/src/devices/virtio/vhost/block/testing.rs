//! A backend that only takes down what it is told, for tests and fuzzing.
#![allow(missing_docs, clippy::unwrap_used, reason = "nothing of it is in the program")]
#![cfg_attr(not(test), allow(dead_code, reason = "fuzzing needs only some of it"))]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicU32;
use std::thread::JoinHandle;

use super::*;
use crate::devices::virtio::F_EVENT_IDX;

// Numbers of the protocol's requests.
pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
pub const GET_CONFIG: u32 = 24;

pub const PROTOCOL: u64 = 1 << 30;
pub const SEVERAL_QUEUES: u64 = 1 << abi::VIRTIO_BLK_F_MQ;
pub const PROTOCOL_CONFIG: u64 = 1 << 9;
const PROTOCOL_MQ: u64 = 1;

/// What a backend says of itself.
#[derive(Clone, Copy)]
pub struct Manner {
    pub features: u64,
    pub protocol: u64,
    /// In the configuration.
    pub queues: u16,
    /// The answer to GET_QUEUE_NUM.
    pub most_queues: u64,
    /// Where it says that each queue was left.
    pub base: u32,
}

impl Default for Manner {
    fn default() -> Self {
        // The last is a feature that this program doesn't know.
        let drive = SEVERAL_QUEUES | 1 << abi::VIRTIO_BLK_F_FLUSH | 1 << abi::VIRTIO_BLK_F_SECURE_ERASE;
        Self {
            features: F_VERSION_1 | F_EVENT_IDX | PROTOCOL | drive,
            protocol: PROTOCOL_MQ | PROTOCOL_CONFIG,
            queues: 4,
            most_queues: 8,
            base: 7,
        }
    }
}

struct Record {
    requests: Vec<(u32, Vec<u8>)>,
    config: [u8; CONFIG_BYTES],
    connection: Option<UnixStream>,
}

pub struct Fake {
    socket: PathBuf,
    listener: Arc<UnixListener>,
    record: Arc<Mutex<Record>>,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    pub fn new(manner: Manner) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let socket = std::env::temp_dir().join(format!("mote-vhost-{}-{number}", std::process::id()));
        let listener = Arc::new(UnixListener::bind(&socket).unwrap());
        let mut config = [0; CONFIG_BYTES];
        config[..8].copy_from_slice(&2048u64.to_le_bytes());
        config[NUM_QUEUES].copy_from_slice(&manner.queues.to_le_bytes());
        let record = Arc::new(Mutex::new(Record { requests: Vec::new(), config, connection: None }));
        let (shared, accepting) = (record.clone(), listener.clone());
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                lock(&shared).connection = Some(stream.try_clone().unwrap());
                while converse(&stream, manner, &shared).is_some() {}
            }
        });
        Self { socket, listener, record, thread: Some(thread) }
    }

    pub fn open(&self, drive: &Drive) -> Result<VhostUserBlock, DeviceError> {
        VhostUserBlock::open(drive, &self.socket)
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<(u32, Vec<u8>)> {
        std::mem::take(&mut lock(&self.record).requests)
    }

    pub fn set_sectors(&self, sectors: u64) {
        lock(&self.record).config[..8].copy_from_slice(&sectors.to_le_bytes());
    }

    /// Ends the connection, if there is one.
    pub fn hang_up(&self) {
        if let Some(connection) = lock(&self.record).connection.take() {
            // The other side may have ended it.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
        nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both).unwrap();
        self.hang_up();
        let _ = self.thread.take().unwrap().join();
    }
}

/// Answers one request; none when the other side is gone.
fn converse(mut stream: &UnixStream, manner: Manner, record: &Mutex<Record>) -> Option<()> {
    let mut header = [0; 12];
    stream.read_exact(&mut header).ok()?;
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let (request, size) = (word(0), word(8));
    let mut body = vec![0; size as usize];
    stream.read_exact(&mut body).ok()?;
    let mut record = lock(record);
    record.requests.push((request, body.clone()));
    let answer = match request {
        GET_FEATURES => manner.features.to_le_bytes().to_vec(),
        GET_PROTOCOL_FEATURES => manner.protocol.to_le_bytes().to_vec(),
        GET_QUEUE_NUM => manner.most_queues.to_le_bytes().to_vec(),
        GET_CONFIG => {
            body[12..].copy_from_slice(&record.config);
            body
        }
        GET_VRING_BASE => [&body[..4], &manner.base.to_le_bytes()].concat(),
        _ => return Some(()),
    };
    // Version 1, and a reply.
    let header = [request.to_le_bytes(), 5u32.to_le_bytes(), (answer.len() as u32).to_le_bytes()].concat();
    stream.write_all(&[header, answer].concat()).ok()
}
