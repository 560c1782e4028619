//! Part of the memory's file in this process's address space.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// Where pages begin is a multiple of this: KVM and the kernel's memory management use huge pages only where the addresses in
/// the guest, in the file and in this process are alike in these bits.
pub(crate) const HUGE_PAGE: u64 = 2 << 20;

/// A mapping, with up to [`HUGE_PAGE`] bytes around it that can't be touched.
#[derive(Debug)]
pub struct Pages {
    reserved: NonNull<libc::c_void>,
    reserved_bytes: usize,
    start: NonNull<u8>,
}

// SAFETY: an address range; who reaches its bytes does that by `GuestMemory`, which several threads may use.
unsafe impl Send for Pages {}
// SAFETY: as above; nothing here can be changed by a shared reference.
unsafe impl Sync for Pages {}

impl Pages {
    /// Maps `bytes` of `file` from `offset` on, with these flags of mmap(2), to be read and written.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn of_file(file: &File, offset: u64, bytes: usize, flags: i32) -> io::Result<Self> {
        let (alignment, offset) = (HUGE_PAGE as usize, offset.cast_signed());
        let reserved_bytes = bytes.checked_add(alignment).ok_or(io::ErrorKind::OutOfMemory)?;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice: no memory that anything refers to changes.
        let reserved =
            unsafe { libc::mmap(std::ptr::null_mut(), reserved_bytes, libc::PROT_NONE, private, -1, 0) };
        let reserved = checked(reserved)?;
        // SAFETY: at most `alignment - 1` bytes on, which is within what was reserved.
        let start = unsafe { reserved.byte_add(reserved.cast::<u8>().align_offset(alignment)) }.cast::<u8>();
        // From here on the range is unmapped when this goes.
        let pages = Self { reserved, reserved_bytes, start };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = flags | libc::MAP_FIXED;
        // SAFETY: replaces a part of the range that was just reserved, to which nothing refers.
        let mapped =
            unsafe { libc::mmap(start.as_ptr().cast(), bytes, access, flags, file.as_raw_fd(), offset) };
        checked(mapped)?;
        Ok(pages)
    }

    /// The first byte.
    pub const fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

fn checked(start: *mut libc::c_void) -> io::Result<NonNull<libc::c_void>> {
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start).ok_or_else(|| io::Error::other("mapped at 0"))
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: exactly the range that was reserved, with what was mapped into it; regions of guest memory own this.
        unsafe { libc::munmap(self.reserved.as_ptr(), self.reserved_bytes) };
    }
}
