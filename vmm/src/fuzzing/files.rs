//! Files of tenants: disk images, kernels, initial ramdisks.

use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Input;
use crate::disk::Bytes;
use crate::disk::qcow2::Qcow2;
use crate::disk_boot::partitions::{self, Partition};
use crate::disk_boot::{bls, grub};
use crate::loader;
use crate::memory::{self, GuestMemory};

/// Memory that kernels are loaded into.
const MEMORY_MIB: usize = 8;
/// Bytes of a disk that is booted from.
const BOOT_DISK: usize = 1 << 20;
/// Bytes of a disk that are read and written at a time.
const PIECE: usize = 65_536;

/// A file in memory, and a path that opens it.
pub fn memory_file(data: &[u8]) -> (File, PathBuf) {
    let name = CString::new("fuzz").expect("no zero byte");
    let mut file =
        File::from(memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC).expect("a file in memory"));
    file.write_all(data).expect("memory");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    (file, path)
}

/// A qcow2 image, of which some is read, written, zeroed and discarded.
pub fn qcow2(data: &[u8]) {
    let (_file, path) = memory_file(data);
    for writable in [false, true] {
        let Ok(mut image) = Qcow2::open(&path, writable, None) else { continue };
        let size = image.size();
        let mut bytes = vec![0; PIECE];
        for offset in [0, size / 2 / 512 * 512, size.saturating_sub(PIECE as u64)] {
            let len = PIECE.min(size.saturating_sub(offset) as usize);
            let _ = image.read(&mut Bytes::new(&mut bytes), offset, len);
            if writable {
                let len = len.min(4096);
                let _ = image.write(&mut &bytes[..len], offset, len);
                let _ = image.write_zeroes(offset, len as u64);
                let _ = image.discard(offset, len as u64);
            }
        }
        let _ = image.flush();
        let _ = image.close();
    }
}

/// A disk that boots without a kernel of its own: its partition table (the input is what is written where, in sectors), or the
/// texts of its boot loader, each ended by a zero. Its file systems are read by ext4-view, in a process that may end by it.
pub fn disk(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    if *kind == 0 {
        let mut input = Input(data);
        let mut disk = vec![0; BOOT_DISK];
        while let Some(sector) = input.u16() {
            let Some(bytes) = input.piece() else { break };
            let at = usize::from(sector) * 512 % BOOT_DISK;
            let end = BOOT_DISK.min(at + bytes.len());
            disk[at..end].copy_from_slice(&bytes[..end - at]);
        }
        let found = partitions::partitions(&mut disk).unwrap_or_default();
        let end = |partition: &Partition| partition.start.checked_add(partition.bytes);
        assert!(found.iter().all(|partition| end(partition).is_some_and(|end| end <= BOOT_DISK as u64)));
        return;
    }
    let text = String::from_utf8_lossy(data);
    let mut texts = text.split('\0').map(str::to_owned);
    let environment = grub::environment(&texts.next().unwrap_or_default());
    if *kind == 1 {
        grub::default_entry(&texts.next().unwrap_or_default(), environment);
        return;
    }
    let mut files = Vec::new();
    while let (Some(name), Some(text)) = (texts.next(), texts.next()) {
        files.push((name, text));
    }
    bls::choose(&files, &environment);
}

/// A kernel (ELF or bzImage) and what it is told; then the same bytes as its initial ramdisk.
pub fn kernel(data: &[u8]) {
    static MEMORY: Mutex<Option<GuestMemory>> = Mutex::new(None);
    let mut memory = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    let memory = memory.get_or_insert_with(|| memory::create(MEMORY_MIB).expect("memory"));
    let (_file, path) = memory_file(data);
    let Ok(kernel) = loader::load_kernel(memory, &path) else { return };
    let initrd = loader::load_initrd(memory, &kernel, &path).ok();
    let _ = loader::write_boot_information(memory, &kernel, initrd, "console=ttyS0", 0xe_0000);
}
