//! Finds what a disk boots and copies it out: partition table, ext4 file systems, boot loader entries, kernel and initrd.
//!
//! Everything here is computed from a tenant's bytes. It runs in a process of its own (see [`super::reader`]); it is
//! safe Rust throughout, and every list, file and loop has a limit.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::rc::Rc;

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use super::partitions::{Partition, partitions};
use super::{Disk, Entry, bls, grub};

/// Largest `grub.cfg` or boot loader entry, in bytes.
const MAX_TEXT: u64 = 1 << 20;
/// Most boot loader entries of one directory.
const MAX_ENTRIES: usize = 256;
/// Most files in a directory of boot loader entries.
const MAX_FILES: usize = 4096;
/// Most initrds of one entry.
const MAX_INITRDS: usize = 16;
/// Bytes of a disk that are read at a time.
const READ_AHEAD: usize = 256 << 10;
/// Files are copied in pieces of this many bytes.
const PIECE: usize = 256 << 10;
/// An initrd that follows another one starts at a multiple of this (`Documentation/driver-api/early-userspace/buffer-format.rst`).
const INITRD_ALIGNMENT: u64 = 4;

/// Why nothing was found, in words for a person.
pub type Refusal = String;

/// A disk that several file systems read, with the last piece kept.
struct Shared {
    disk: Box<dyn Disk>,
    piece: Vec<u8>,
    /// Where the piece is.
    at: u64,
}

impl Shared {
    fn read(&mut self, mut offset: u64, mut to: &mut [u8]) -> io::Result<()> {
        while !to.is_empty() {
            let inside = offset.checked_sub(self.at).and_then(|skip| self.piece.get(skip as usize..));
            match inside.filter(|rest| !rest.is_empty()) {
                Some(rest) => {
                    let n = rest.len().min(to.len());
                    to[..n].copy_from_slice(&rest[..n]);
                    (to, offset) = (&mut to[n..], offset + n as u64);
                }
                None => {
                    let left = self.disk.bytes().saturating_sub(offset);
                    if left == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    self.piece.resize(left.min(READ_AHEAD as u64) as usize, 0);
                    self.at = offset;
                    let read = self.disk.read(offset, &mut self.piece);
                    if read.is_err() {
                        self.piece.clear();
                    }
                    read?;
                }
            }
        }
        Ok(())
    }
}

/// One partition for ext4-view.
struct Window {
    disk: Rc<RefCell<Shared>>,
    partition: Partition,
}

impl Ext4Read for Window {
    fn read(&mut self, start: u64, to: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let end = start.checked_add(to.len() as u64).filter(|end| *end <= self.partition.bytes);
        end.ok_or(io::ErrorKind::UnexpectedEof).map_err(io::Error::from)?;
        Ok(self.disk.borrow_mut().read(self.partition.start + start, to)?)
    }
}

/// Finds the entry that the disk would boot, writes its kernel and its initrds (one after the other), at most `limit` bytes together,
/// and returns the options that its boot loader would give the kernel, and whether there is an initrd.
///
/// # Errors
/// There is none, or it can't be read.
pub fn search(
    mut disk: Box<dyn Disk>,
    limit: u64,
    kernel: &mut dyn Write,
    initrd: &mut dyn Write,
) -> Result<(String, bool), Refusal> {
    let partitions =
        partitions(disk.as_mut()).map_err(|error| format!("its partition table can't be read: {error}"))?;
    let disk = Rc::new(RefCell::new(Shared { disk, piece: Vec::new(), at: 0 }));
    let mut seen = Vec::new();
    for (number, partition) in partitions.iter().enumerate() {
        let window = Box::new(Window { disk: disk.clone(), partition: *partition });
        let fs = match Ext4::load(window) {
            Ok(fs) => fs,
            Err(error) => {
                seen.push(format!("partition at byte {}: {error}", partition.start));
                continue;
            }
        };
        // In a root file system the files are in /boot, in a boot partition at the top.
        for prefix in ["/boot", ""] {
            if let Some(entry) = default_entry(&fs, prefix) {
                return copy(&fs, prefix, &entry, limit, kernel, initrd);
            }
        }
        seen.push(format!("ext4 file system {number} at byte {}: no boot loader entry", partition.start));
    }
    Err(format!(
        "it has no ext4 file system with boot loader entries (loader/entries/*.conf) or a grub.cfg ({})",
        seen.join("; ")
    ))
}

/// The entry of the files below `prefix`.
fn default_entry(fs: &Ext4, prefix: &str) -> Option<Entry> {
    let environment = ["grub/grubenv", "grub2/grubenv"]
        .iter()
        .find_map(|file| text(fs, &format!("{prefix}/{file}")))
        .map_or_else(BTreeMap::new, |text| grub::environment(&text));
    bls::choose(&entries(fs, &format!("{prefix}{}", bls::DIRECTORY)), &environment).or_else(|| {
        let menu = ["grub/grub.cfg", "grub2/grub.cfg"]
            .iter()
            .find_map(|file| text(fs, &format!("{prefix}/{file}")))?;
        grub::default_entry(&menu, environment)
    })
}

/// The `.conf` files of a directory; none if it isn't there or isn't sound.
fn entries(fs: &Ext4, directory: &str) -> Vec<(String, String)> {
    let Ok(files) = fs.read_dir(directory) else { return Vec::new() };
    let names = files.take(MAX_FILES).map_while(Result::ok).filter_map(|file| {
        let name = file.file_name();
        name.as_str().ok()?.strip_suffix(".conf").map(str::to_owned)
    });
    let texts = names.filter_map(|name| {
        let text = text(fs, &format!("{directory}/{name}.conf"))?;
        Some((name, text))
    });
    texts.take(MAX_ENTRIES).collect()
}

fn text(fs: &Ext4, path: &str) -> Option<String> {
    let mut bytes = Vec::new();
    append(fs, path, MAX_TEXT, &mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Copies a file of at most `limit` bytes and returns its length.
fn append(fs: &Ext4, path: &str, limit: u64, to: &mut dyn Write) -> Result<u64, Refusal> {
    let failed = |error: Ext4Error| format!("{path}: {error}");
    let mut file = fs.open(path).map_err(failed)?;
    let length = file.metadata().len();
    if length > limit {
        return Err(format!("{path} has {length} bytes, and {limit} are left of the guest's memory"));
    }
    let mut piece = vec![0; PIECE];
    let mut copied = 0;
    while copied < length {
        let mut filled = 0;
        while filled < piece.len() {
            match file.read_bytes(&mut piece[filled..]).map_err(failed)? {
                0 => break,
                n => filled += n,
            }
        }
        if filled == 0 {
            return Err(format!("{path} ends before its length"));
        }
        to.write_all(&piece[..filled]).map_err(|error| format!("copying {path}: {error}"))?;
        copied += filled as u64;
    }
    Ok(copied)
}

fn copy(
    fs: &Ext4,
    prefix: &str,
    entry: &Entry,
    limit: u64,
    kernel: &mut dyn Write,
    initrd: &mut dyn Write,
) -> Result<(String, bool), Refusal> {
    if entry.initrds.len() > MAX_INITRDS {
        return Err(format!("its boot loader entry has more than {MAX_INITRDS} initrds"));
    }
    let kernel_path = located(fs, prefix, &entry.linux)?;
    let mut left = limit - append(fs, &kernel_path, limit, kernel)?;
    let mut written = 0_u64;
    for file in &entry.initrds {
        let padding = written.next_multiple_of(INITRD_ALIGNMENT) - written;
        initrd
            .write_all(&[0; INITRD_ALIGNMENT as usize][..padding as usize])
            .map_err(|error| format!("copying {file}: {error}"))?;
        let length = append(fs, &located(fs, prefix, file)?, left, initrd)?;
        (written, left) = (written + padding + length, left - length);
    }
    Ok((entry.options.clone(), written > 0))
}

/// The file that a boot loader entry names: paths are those of the file system, or start at the prefix; GRUB's may name a device.
fn located(fs: &Ext4, prefix: &str, path: &str) -> Result<String, Refusal> {
    let path = match path.split_once(')') {
        Some((device, path)) if device.starts_with('(') => path,
        _ => path,
    };
    let path = format!("/{}", path.trim_start_matches('/'));
    let with_prefix = format!("{prefix}{path}");
    let there = |path: &String| fs.exists(path.as_str()).unwrap_or(false);
    [path.clone(), with_prefix]
        .into_iter()
        .find(there)
        .ok_or_else(|| format!("its boot loader entry names {path}, which isn't there"))
}
