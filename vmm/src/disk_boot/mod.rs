//! What a whole-disk image boots, without firmware and boot loader: kernel, initrd and command line are read from its own file system, as its
//! boot loader would.
//!
//! ```text
//!   partition table ──► ext4 ──► loader/entries/*.conf or grub.cfg ──► kernel, initrd, options
//! ```
//!
//! The disk is a tenant's and hostile. All of it is read by a process that is forked for it ([`reader`]): it can read the disk's
//! files and write three files in memory, and nothing else. What it brings is as little trusted as a kernel that a
//! client names.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;

use mote_vmm_api::Drive;

use crate::devices::DeviceError;
use crate::devices::virtio::block::Image;

pub mod bls;
pub mod grub;
pub mod partitions;
mod reader;
mod search;

/// A disk can't be booted.
#[derive(Debug, thiserror::Error)]
pub enum DiskBootError {
    /// No root device.
    #[error("boot_from_disk needs a drive with is_root_device (PUT /drives/{{id}})")]
    NoRoot,
    /// Its content is another process's.
    #[error(
        "boot_from_disk cannot read drive {0:?}, which has a socket: name a kernel (kernel_image_path), or give path_on_host"
    )]
    VhostUser(String),
    /// The drive's files can't be opened.
    #[error("cannot open the root drive {drive_id} to boot from it")]
    Open {
        /// Which.
        drive_id: String,
        /// Cause.
        #[source]
        source: DeviceError,
    },
    /// The host refuses.
    #[error("cannot make a process that reads the root drive")]
    Process(#[source] io::Error),
    /// There is nothing to boot.
    #[error("the root drive cannot be booted: {0}")]
    Refused(String),
    /// The reader came to grief.
    #[error(
        "the root drive cannot be booted: its content is damaged in a way that could not be read to an end"
    )]
    Broken,
}

impl DiskBootError {
    /// Whether the host is to blame, and not what was configured.
    pub const fn is_hosts(&self) -> bool {
        matches!(self, Self::Process(_))
    }
}

/// What a disk boots.
#[derive(Debug)]
pub struct Found {
    /// The kernel.
    pub kernel: File,
    /// The initrd, if there is one.
    pub initrd: Option<File>,
    /// The command line that the boot loader would give the kernel.
    pub options: String,
}

/// An entry of a boot menu.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// Path of the kernel.
    linux: String,
    /// Paths of the initrds, in order.
    initrds: Vec<String>,
    /// The command line.
    options: String,
}

/// A disk as a sequence of bytes.
pub trait Disk {
    /// Its length.
    fn bytes(&self) -> u64;

    /// Fills `to` from `offset` on.
    ///
    /// # Errors
    /// It can't be read, or ends before.
    fn read(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()>;
}

impl Disk for Image {
    fn bytes(&self) -> u64 {
        self.sectors() * 512
    }

    fn read(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.read_bytes(to, offset)
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl Disk for Vec<u8> {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let from = start.checked_add(to.len()).and_then(|end| self.get(start..end));
        to.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Reads what the root device of `drives` boots. Kernel and initrd together may have `limit` bytes.
///
/// # Errors
/// See [`DiskBootError`].
pub fn read(drives: &[Drive], limit: u64) -> Result<Found, DiskBootError> {
    let drive = drives.iter().find(|drive| drive.is_root_device).ok_or(DiskBootError::NoRoot)?;
    if drive.socket.is_some() {
        return Err(DiskBootError::VhostUser(drive.drive_id.clone()));
    }
    let opened = Image::open(&drive.path_on_host, true, drive.format, &drive.backing_files);
    let failed = |source| DiskBootError::Open { drive_id: drive.drive_id.clone(), source };
    reader::read(Box::new(opened.map_err(DeviceError::from).map_err(failed)?), limit)
}

/// `$name` and `${name}` replaced by their values, or by nothing.
fn expand(text: &str, environment: &BTreeMap<String, String>) -> String {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let (name, behind) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some(braced) => braced,
            None => after.split_at(after.find(|c| !is_name(c)).unwrap_or(after.len())),
        };
        match name {
            "" => expanded.push('$'),
            name => expanded.push_str(environment.get(name).map_or("", String::as_str)),
        }
        rest = behind;
    }
    expanded + rest
}

#[cfg(test)]
mod tests;
