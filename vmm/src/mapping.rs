//! A file in this process's address space.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// Memory of a file, and behind it, up to a length of choice, private zeros. Nothing of this process refers to what is in it.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: an address range, whose content is only ever reached by way of the kernel.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing here can be changed by a shared reference.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `file_bytes` of `file`, shared, and zeros behind them up to `len` bytes.
    ///
    /// # Errors
    /// As mmap(2); `InvalidInput` unless 0 < `file_bytes` ≤ `len`.
    pub fn of_file(file: &File, file_bytes: usize, len: usize, read_only: bool) -> io::Result<Self> {
        if file_bytes == 0 || file_bytes > len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let access = if read_only { libc::PROT_READ } else { libc::PROT_READ | libc::PROT_WRITE };
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice: no memory that anything refers to changes.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, access, private, -1, 0) };
        let start = Self::checked(start)?;
        // From here on the range is unmapped when this goes.
        let mapping = Self { start, len };
        let shared = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: replaces the first pages of the range that was just made, to which nothing refers.
        let file = unsafe { libc::mmap(start.as_ptr(), file_bytes, access, shared, file.as_raw_fd(), 0) };
        Self::checked(file)?;
        Ok(mapping)
    }

    fn checked(start: *mut libc::c_void) -> io::Result<NonNull<libc::c_void>> {
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(start).ok_or_else(|| io::Error::other("mapped at 0"))
    }

    /// Where it starts.
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that was mapped; who was given its address keeps this alive.
        unsafe { libc::munmap(self.start.as_ptr(), self.len) };
    }
}
