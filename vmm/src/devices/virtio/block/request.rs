//! From descriptor chain to request to status (virtio 1.2 §5.2.6).

use std::io;

use virtio_bindings::virtio_blk as abi;

use super::file::is_unsupported;
use super::{Disk, ID_BYTES, MAX_RANGE_SECTORS, SECTOR};
use crate::devices::virtio::buffers::GuestBuffers;
use crate::devices::virtio::queue::Chain;
use crate::metrics::BlockMetrics;

/// Length of type, reserved and sector.
const HEADER_BYTES: usize = 16;
/// Length of one range of a discard or write-zeroes.
const RANGE_BYTES: usize = 16;
/// Ranges that one discard or write-zeroes may name.
pub const MAX_RANGES: u32 = 16;

/// Why a request isn't done; becomes its status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// `VIRTIO_BLK_S_IOERR`.
    Io,
    /// `VIRTIO_BLK_S_UNSUPP`.
    Unsupported,
}

/// What a chain asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Fill the writable buffers from this offset in bytes, which is within the disk.
    Read(u64),
    /// Write the readable buffers at this offset in bytes, which is within the disk.
    Write(u64),
    /// Bring what was written to stable storage.
    Flush,
    /// Tell the serial number.
    GetId,
    /// Discard (false) or write zeroes (true) over the ranges in the readable buffers.
    Clear {
        /// The ranges must read as zeros afterwards.
        zeroes: bool,
    },
    /// Nothing that can be done.
    Refused(Refusal),
}

/// A chain being served, and its status byte. Reused for every request.
pub struct Request {
    /// Filled from the queue.
    pub chain: Chain,
    status: GuestBuffers,
    /// Bytes of the chain's writable part, with the status.
    room: usize,
    /// What was asked for, and how many bytes of data it has: an engine uses up the buffers.
    asked: (Command, u64),
}

/// A chain that has no room for a status byte can't be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unanswerable;

impl Request {
    /// Over an empty chain and empty buffers of the same memory.
    pub const fn new(chain: Chain, status: GuestBuffers) -> Self {
        Self { chain, status, room: 0, asked: (Command::Refused(Refusal::Io), 0) }
    }

    /// Reads the chain, whatever it holds; what is left in its buffers are the data.
    ///
    /// # Errors
    /// The chain can't be answered.
    pub fn parse(&mut self, disk: &Disk) -> Result<Command, Unanswerable> {
        self.room = self.chain.writable.bytes();
        if !self.chain.tail_valid || self.room == 0 {
            return Err(Unanswerable);
        }
        self.status.clear();
        self.chain.writable.split_last(1, &mut self.status);
        let command = self.command(disk).unwrap_or_else(Command::Refused);
        self.asked = (command, self.data_bytes(command));
        Ok(command)
    }

    fn command(&mut self, disk: &Disk) -> Result<Command, Refusal> {
        let Chain { readable, writable, faulty, .. } = &mut self.chain;
        let mut header = [0; HEADER_BYTES];
        if *faulty || readable.read_at(0, &mut header) < HEADER_BYTES {
            return Err(Refusal::Io);
        }
        readable.skip_front(HEADER_BYTES);
        let (kind, sector) = parse_header(&header);
        match kind {
            abi::VIRTIO_BLK_T_IN => Ok(Command::Read(byte_offset(disk, sector, writable.bytes())?)),
            abi::VIRTIO_BLK_T_OUT => {
                let offset = byte_offset(disk, sector, readable.bytes())?;
                refuse_read_only(disk)?;
                Ok(Command::Write(offset))
            }
            abi::VIRTIO_BLK_T_FLUSH if disk.flush => Ok(Command::Flush),
            abi::VIRTIO_BLK_T_GET_ID => Ok(Command::GetId),
            abi::VIRTIO_BLK_T_DISCARD | abi::VIRTIO_BLK_T_WRITE_ZEROES => {
                refuse_read_only(disk)?;
                Ok(Command::Clear { zeroes: kind == abi::VIRTIO_BLK_T_WRITE_ZEROES })
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    /// Bytes that the command moves between guest and disk, for its rate limit.
    pub fn data_bytes(&self, command: Command) -> u64 {
        match command {
            Command::Read(_) => self.chain.writable.bytes() as u64,
            Command::Write(_) => self.chain.readable.bytes() as u64,
            _ => 0,
        }
    }

    /// Does what was asked for, now.
    ///
    /// # Errors
    /// What to answer instead.
    pub fn execute(&mut self, disk: &Disk, command: Command) -> Result<(), Refusal> {
        let Chain { readable, writable, .. } = &mut self.chain;
        match command {
            Command::Read(offset) => disk.check("read", disk.image.read(writable, offset)),
            Command::Write(offset) => disk.check("write", disk.image.write(readable, offset)),
            Command::Flush => disk.check("flush", disk.image.flush()),
            Command::GetId if writable.write_at(0, &disk.serial) == ID_BYTES => Ok(()),
            Command::GetId => Err(Refusal::Io),
            Command::Clear { zeroes } => clear_ranges(disk, readable, zeroes),
            Command::Refused(refusal) => Err(refusal),
        }
    }

    /// Writes the status, and returns how many bytes of the chain's writable part were written.
    pub fn finish(&self, metrics: &BlockMetrics, result: Result<(), Refusal>) -> u32 {
        self.count(metrics, result);
        let (status, written) = match result {
            Ok(()) => (abi::VIRTIO_BLK_S_OK, self.room),
            Err(Refusal::Io) => (abi::VIRTIO_BLK_S_IOERR, 1),
            Err(Refusal::Unsupported) => (abi::VIRTIO_BLK_S_UNSUPP, 1),
        };
        self.status.write_at(0, &[status as u8]);
        // A chain holds less than 4 GiB.
        u32::try_from(written).unwrap_or(u32::MAX)
    }
}

impl Request {
    fn count(&self, metrics: &BlockMetrics, result: Result<(), Refusal>) {
        let (command, bytes) = self.asked;
        match (command, result) {
            (Command::Refused(_), _) => metrics.invalid_reqs_count.add_one(),
            (_, Err(_)) => metrics.execute_fails.add_one(),
            (Command::Read(_), Ok(())) => {
                metrics.read_bytes.add(bytes);
                metrics.read_count.add_one();
            }
            (Command::Write(_), Ok(())) => {
                metrics.write_bytes.add(bytes);
                metrics.write_count.add_one();
            }
            (Command::Flush, Ok(())) => metrics.flush_count.add_one(),
            (Command::GetId | Command::Clear { .. }, Ok(())) => {}
        }
    }
}

fn parse_header(header: &[u8; HEADER_BYTES]) -> (u32, u64) {
    let [a, b, c, d, _, _, _, _, sector @ ..] = *header;
    (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector))
}

fn refuse_read_only(disk: &Disk) -> Result<(), Refusal> {
    if disk.image.is_read_only() { Err(Refusal::Io) } else { Ok(()) }
}

/// Where `bytes` from `sector` on are, if they are whole sectors within the disk.
fn byte_offset(disk: &Disk, sector: u64, bytes: usize) -> Result<u64, Refusal> {
    let bytes = bytes as u64;
    let end = sector.checked_add(bytes / SECTOR).ok_or(Refusal::Io)?;
    if !bytes.is_multiple_of(SECTOR) || end > disk.image.sectors() {
        return Err(Refusal::Io);
    }
    // The end is within the file's length, which is a u64 in bytes.
    Ok(sector * SECTOR)
}

/// What the kernel said about an operation on the image, as a status.
pub fn refusal(error: &io::Error) -> Refusal {
    if is_unsupported(error) { Refusal::Unsupported } else { Refusal::Io }
}

/// Discard or write zeroes: the data are up to [`MAX_RANGES`] of sector, number of sectors, flags.
fn clear_ranges(disk: &Disk, data: &GuestBuffers, zeroes: bool) -> Result<(), Refusal> {
    let count = data.bytes() / RANGE_BYTES;
    if !data.bytes().is_multiple_of(RANGE_BYTES) || count == 0 || count > MAX_RANGES as usize {
        return Err(Refusal::Io);
    }
    for index in 0..count {
        let mut range = [0; RANGE_BYTES];
        data.read_at(index * RANGE_BYTES, &mut range);
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let unmap = flags & abi::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        // virtio 1.2 §5.2.6.2: unknown flags, and unmap on a discard, are unsupported.
        if flags & !abi::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (unmap && !zeroes) {
            return Err(Refusal::Unsupported);
        }
        if sectors > MAX_RANGE_SECTORS {
            return Err(Refusal::Io);
        }
        let bytes = u64::from(sectors) * SECTOR;
        let offset = byte_offset(disk, sector, bytes as usize)?;
        if sectors == 0 {
            continue;
        }
        if zeroes {
            disk.check("write zeroes to", disk.image.write_zeroes(offset, bytes, unmap))?;
        } else {
            disk.check("discard", disk.image.discard(offset, bytes))?;
        }
    }
    Ok(())
}
