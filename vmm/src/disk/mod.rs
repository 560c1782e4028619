//! Formats of disk images on the data path, without virtio: bytes from an image into a [`Sink`], from a [`Source`] into an
//! image.
//!
//! Which format a file has is told by the configuration, never guessed: the guest writes what is in a raw disk, and could
//! make it look like a format that names other files.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub mod qcow2;

/// Where bytes of an image go, from the front on.
pub trait Sink {
    /// Takes the next `len` bytes from `offset` of a file on; what lies past its end is zeros.
    ///
    /// # Errors
    /// As pread(2).
    fn take_from_file(&mut self, len: usize, file: &File, offset: u64) -> io::Result<()>;
    /// The next `len` bytes are zeros.
    fn take_zeros(&mut self, len: usize);
    /// The next bytes are these.
    fn take_bytes(&mut self, bytes: &[u8]);
}

/// Where bytes for an image come from, from the front on.
pub trait Source {
    /// Gives the next `len` bytes to a file at `offset`.
    ///
    /// # Errors
    /// As pwrite(2).
    fn give_to_file(&mut self, len: usize, file: &File, offset: u64) -> io::Result<()>;
    /// Gives the next bytes, as many as `bytes` holds.
    fn give_bytes(&mut self, bytes: &mut [u8]);
}

/// Memory of this process as a sink.
pub struct Bytes<'a>(&'a mut [u8]);

impl<'a> Bytes<'a> {
    /// Fills `bytes` from the front on.
    pub const fn new(bytes: &'a mut [u8]) -> Self {
        Self(bytes)
    }

    /// The next `len` bytes, or what is left.
    fn next(&mut self, len: usize) -> &'a mut [u8] {
        let bytes = std::mem::take(&mut self.0);
        let (next, rest) = bytes.split_at_mut(len.min(bytes.len()));
        self.0 = rest;
        next
    }
}

impl Sink for Bytes<'_> {
    fn take_from_file(&mut self, len: usize, file: &File, offset: u64) -> io::Result<()> {
        read_with_zeros(file, self.next(len), offset)
    }

    fn take_zeros(&mut self, len: usize) {
        self.next(len).fill(0);
    }

    fn take_bytes(&mut self, bytes: &[u8]) {
        let next = self.next(bytes.len());
        next.copy_from_slice(&bytes[..next.len()]);
    }
}

impl Source for &[u8] {
    fn give_to_file(&mut self, len: usize, file: &File, offset: u64) -> io::Result<()> {
        let (next, rest) = self.split_at(len.min(self.len()));
        *self = rest;
        file.write_all_at(next, offset)
    }

    fn give_bytes(&mut self, bytes: &mut [u8]) {
        let (next, rest) = self.split_at(bytes.len().min(self.len()));
        *self = rest;
        bytes[..next.len()].copy_from_slice(next);
    }
}

/// Any number of zeros.
pub struct Zeros;

/// Zeros are written in pieces of this size.
const ZEROS: [u8; 4096] = [0; 4096];

impl Source for Zeros {
    fn give_to_file(&mut self, len: usize, file: &File, offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let n = (len - done).min(ZEROS.len());
            file.write_all_at(&ZEROS[..n], offset + done as u64)?;
            done += n;
        }
        Ok(())
    }

    fn give_bytes(&mut self, bytes: &mut [u8]) {
        bytes.fill(0);
    }
}

/// Fills `bytes` from `offset` of a file on, with zeros past its end.
fn read_with_zeros(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64) {
            Ok(0) => {
                bytes[done..].fill(0);
                break;
            }
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
