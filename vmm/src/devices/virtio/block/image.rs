//! What a drive is served from: a raw file or a qcow2 image.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mote_vmm_api::{BackingFile, DriveFormat};

use super::{BlockError, RawFile, SECTOR};
use crate::devices::virtio::buffers::GuestBuffers;
use crate::disk::qcow2::{Backing, Qcow2};
use crate::disk::{Bytes, Sink, Source};

/// Zeros are written to the guest in pieces of this size.
const ZEROS: [u8; 4096] = [0; 4096];

/// An open image. Several queues may use it at the same time.
pub enum Image {
    /// Raw.
    Raw(RawFile),
    /// qcow2: one request at a time.
    Qcow2(Box<Layered>),
}

/// A qcow2 image and what of it doesn't change.
pub struct Layered {
    image: Mutex<Qcow2>,
    sectors: u64,
    read_only: bool,
}

impl Layered {
    fn lock(&self) -> MutexGuard<'_, Qcow2> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens what `files` describe, the first based on the second and so on.
fn backing(files: &[BackingFile]) -> Result<Option<Backing>, BlockError> {
    let Some((first, rest)) = files.split_first() else { return Ok(None) };
    match first.format {
        DriveFormat::Raw if rest.is_empty() => {
            let raw = RawFile::open(&first.path_on_host, true)?;
            let (file, bytes) = raw.into_file();
            Ok(Some(Backing::Raw(file, bytes)))
        }
        DriveFormat::Raw => Err(BlockError::RawBacking { path: first.path_on_host.clone() }),
        DriveFormat::Qcow2 => Ok(Some(Backing::Qcow2(Box::new(qcow2(&first.path_on_host, true, rest)?)))),
    }
}

fn qcow2(path: &Path, read_only: bool, files: &[BackingFile]) -> Result<Qcow2, BlockError> {
    let backing = backing(files)?;
    Qcow2::open(path, !read_only, backing)
        .map_err(|source| BlockError::Qcow2 { path: path.to_owned(), source })
}

impl Image {
    /// Opens a file of this format over its backing files.
    ///
    /// # Errors
    /// As [`BlockError`].
    pub fn open(
        path: &Path,
        read_only: bool,
        format: DriveFormat,
        backing_files: &[BackingFile],
    ) -> Result<Self, BlockError> {
        if format == DriveFormat::Raw {
            return if backing_files.is_empty() {
                RawFile::open(path, read_only).map(Self::Raw)
            } else {
                Err(BlockError::RawBacking { path: path.to_owned() })
            };
        }
        let image = qcow2(path, read_only, backing_files)?;
        let sectors = image.size() / SECTOR;
        if sectors == 0 {
            return Err(BlockError::TooSmall { path: path.to_owned(), bytes: image.size() });
        }
        Ok(Self::Qcow2(Box::new(Layered { image: Mutex::new(image), sectors, read_only })))
    }

    /// Capacity in sectors of 512 bytes.
    pub const fn sectors(&self) -> u64 {
        match self {
            Self::Raw(file) => file.sectors(),
            Self::Qcow2(layered) => layered.sectors,
        }
    }

    /// Whether writes are refused.
    pub const fn is_read_only(&self) -> bool {
        match self {
            Self::Raw(file) => file.is_read_only(),
            Self::Qcow2(layered) => layered.read_only,
        }
    }

    /// The file, if requests can go to it as they are.
    pub const fn as_raw(&self) -> Option<&RawFile> {
        match self {
            Self::Raw(file) => Some(file),
            Self::Qcow2(_) => None,
        }
    }

    /// Fills memory of this process from `offset` bytes on, which must be within the disk.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn read_bytes(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Raw(file) => file.read_bytes(bytes, offset),
            Self::Qcow2(layered) => {
                let len = bytes.len();
                layered.lock().read(&mut Bytes::new(bytes), offset, len)
            }
        }
    }

    /// Fills `buffers` from `offset` bytes on, which must be within the disk.
    ///
    /// # Errors
    /// The file can't be read, or the image is damaged.
    pub fn read(&self, buffers: &mut GuestBuffers, offset: u64) -> io::Result<()> {
        match self {
            Self::Raw(file) => file.read(buffers, offset),
            Self::Qcow2(layered) => {
                let len = buffers.bytes();
                layered.lock().read(buffers, offset, len)
            }
        }
    }

    /// Writes `buffers` at `offset` bytes, within the disk.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn write(&self, buffers: &mut GuestBuffers, offset: u64) -> io::Result<()> {
        match self {
            Self::Raw(file) => file.write(buffers, offset),
            Self::Qcow2(layered) => {
                let len = buffers.bytes();
                layered.lock().write(buffers, offset, len)
            }
        }
    }

    /// Brings everything written to stable storage.
    ///
    /// # Errors
    /// As fdatasync(2).
    pub fn flush(&self) -> io::Result<()> {
        match self {
            Self::Raw(file) => file.flush(),
            Self::Qcow2(layered) => layered.lock().flush(),
        }
    }

    /// Gives the space of a range back.
    ///
    /// # Errors
    /// As fallocate(2).
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self {
            Self::Raw(file) => file.discard(offset, len),
            Self::Qcow2(layered) => layered.lock().discard(offset, len),
        }
    }

    /// Makes a range read as zeros.
    ///
    /// # Errors
    /// As fallocate(2).
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        match self {
            Self::Raw(file) => file.write_zeroes(offset, len, may_unmap),
            Self::Qcow2(layered) => layered.lock().write_zeroes(offset, len),
        }
    }

    /// Leaves a clean image behind; nothing may be written afterwards.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn close(&self) -> io::Result<()> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Qcow2(layered) => layered.lock().close(),
        }
    }
}

impl Sink for GuestBuffers {
    fn take_from_file(&mut self, len: usize, file: &File, offset: u64) -> io::Result<()> {
        let mut first = self.split_first(len);
        match first.read_file(file.as_fd(), offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let left = first.bytes();
                first.take_zeros(left);
                Ok(())
            }
            read => read,
        }
    }

    fn take_zeros(&mut self, len: usize) {
        let mut left = len.min(self.bytes());
        while left > 0 {
            let n = left.min(ZEROS.len());
            self.take_bytes(&ZEROS[..n]);
            left -= n;
        }
    }

    fn take_bytes(&mut self, bytes: &[u8]) {
        self.write_at(0, bytes);
        self.skip_front(bytes.len());
    }
}

impl Source for GuestBuffers {
    fn give_to_file(&mut self, len: usize, file: &File, offset: u64) -> io::Result<()> {
        self.split_first(len).write_file(file.as_fd(), offset)
    }

    fn give_bytes(&mut self, bytes: &mut [u8]) {
        self.read_at(0, bytes);
        self.skip_front(bytes.len());
    }
}
