//! Guest memory as I/O vectors, so that the kernel copies between a file or tap and the guest directly.
//!
//! The one place of the data path where guest memory is touched through raw pointers.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestAddress, GuestMemory as _, Permissions, VolatileSlice};

use crate::memory::GuestMemory;

/// Most segments of one transfer: the kernel's limit for one vectored call (`UIO_MAXIOV`).
pub const MAX_SEGMENTS: usize = 1024;

/// Why guest addresses don't make a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BufferError {
    /// Not (wholly) guest memory.
    #[error("{len} bytes at {address:#x} are not guest memory")]
    NotMemory {
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// More than [`MAX_SEGMENTS`].
    #[error("more than {MAX_SEGMENTS} segments in one transfer")]
    TooManySegments,
}

/// A sequence of stretches of guest memory. Keeps the memory mapped; the guest may change the contents at any time.
pub struct GuestBuffers {
    /// Every vector points into a mapping that `mem` keeps alive.
    iovecs: Vec<libc::iovec>,
    bytes: usize,
    mem: GuestMemory,
}

// SAFETY: the raw pointers point into mappings that `mem` (which is Send and Sync) keeps alive wherever they are sent;
// the memory is shared with the guest anyway and only accessed by system calls and volatile copies.
unsafe impl Send for GuestBuffers {}

impl GuestBuffers {
    /// Nothing yet, of `mem`.
    pub const fn new(mem: GuestMemory) -> Self {
        Self { iovecs: Vec::new(), bytes: 0, mem }
    }

    /// Forgets all segments, keeping the allocation.
    pub fn clear(&mut self) {
        self.iovecs.clear();
        self.bytes = 0;
    }

    /// Length of all segments together.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Number of segments.
    pub fn segments(&self) -> usize {
        self.iovecs.len()
    }

    /// The segments as the kernel takes them. What they point to is mapped as long as `self` lives.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// Adds guest memory at the end.
    ///
    /// # Errors
    /// The range isn't wholly memory, or there are too many segments; then nothing of it is added.
    pub fn push(&mut self, address: GuestAddress, len: u32, access: Permissions) -> Result<(), BufferError> {
        let refused = BufferError::NotMemory { address: address.0, len };
        let before = self.iovecs.len();
        let added = self.push_slices(address, len, access, refused);
        if added.is_err() {
            self.iovecs.truncate(before);
        } else {
            self.bytes += len as usize;
        }
        added
    }

    fn push_slices(
        &mut self,
        address: GuestAddress,
        len: u32,
        access: Permissions,
        refused: BufferError,
    ) -> Result<(), BufferError> {
        for slice in self.mem.get_slices(address, len as usize, access).map_err(|_| refused)? {
            let slice = slice.map_err(|_| refused)?;
            if self.iovecs.len() == MAX_SEGMENTS {
                return Err(BufferError::TooManySegments);
            }
            let guard = slice.ptr_guard_mut();
            self.iovecs.push(libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() });
        }
        Ok(())
    }

    /// Moves all segments of `other` (of the same memory) to the end of this.
    pub fn append(&mut self, other: &mut Self) {
        self.iovecs.append(&mut other.iovecs);
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Drops the first `n` bytes, or all.
    pub fn skip_front(&mut self, n: usize) {
        let mut left = n.min(self.bytes);
        self.bytes -= left;
        let mut whole = 0;
        for iovec in &mut self.iovecs {
            if left < iovec.iov_len {
                iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(left).cast();
                iovec.iov_len -= left;
                break;
            }
            left -= iovec.iov_len;
            whole += 1;
        }
        self.iovecs.drain(..whole);
    }

    /// Keeps the first `n` bytes, or all.
    pub fn truncate(&mut self, n: usize) {
        let mut left = n.min(self.bytes);
        self.bytes = left;
        self.iovecs.retain_mut(|iovec| {
            iovec.iov_len = iovec.iov_len.min(left);
            left -= iovec.iov_len;
            iovec.iov_len > 0
        });
    }

    /// Takes the first `n` bytes, or all, off.
    #[must_use]
    pub fn split_first(&mut self, n: usize) -> Self {
        let mut first = Self::new(self.mem.clone());
        let mut left = n.min(self.bytes);
        first.bytes = left;
        for iovec in &self.iovecs {
            if left == 0 {
                break;
            }
            let taken = iovec.iov_len.min(left);
            first.iovecs.push(libc::iovec { iov_base: iovec.iov_base, iov_len: taken });
            left -= taken;
        }
        self.skip_front(n);
        first
    }

    /// Drops the first `n` segments with the `bytes` they hold.
    pub fn drop_segments(&mut self, n: usize) {
        let bytes: usize = self.iovecs.drain(..n.min(self.iovecs.len())).map(|iovec| iovec.iov_len).sum();
        self.bytes -= bytes;
    }

    /// Moves the last `n` bytes (or all) to the front of `tail`, which must be of the same memory.
    pub fn split_last(&mut self, n: usize, tail: &mut Self) {
        let mut left = n.min(self.bytes);
        self.bytes -= left;
        tail.bytes += left;
        while left > 0 {
            let Some(last) = self.iovecs.last_mut() else { break };
            let taken = last.iov_len.min(left);
            last.iov_len -= taken;
            let base = last.iov_base.cast::<u8>().wrapping_add(last.iov_len).cast();
            tail.iovecs.insert(0, libc::iovec { iov_base: base, iov_len: taken });
            if last.iov_len == 0 {
                self.iovecs.pop();
            }
            left -= taken;
        }
    }

    /// Copies `data` to the bytes from `offset` on; returns how many found room.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> usize {
        self.each_from(offset, data.len(), |done, slice| {
            let n = slice.len();
            slice.copy_from(&data[done..done + n]);
        })
    }

    /// Copies the bytes from `offset` on to `data`; returns how many there were.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> usize {
        self.each_from(offset, data.len(), |done, slice| {
            let n = slice.len();
            slice.copy_to(&mut data[done..done + n]);
        })
    }

    /// Calls `copy(bytes done, slice)` over at most `len` bytes from `offset` on; returns the bytes done.
    fn each_from(&self, offset: usize, len: usize, mut copy: impl FnMut(usize, VolatileSlice<'_>)) -> usize {
        let (mut skip, mut done) = (offset, 0);
        for iovec in &self.iovecs {
            if done == len {
                break;
            }
            if skip >= iovec.iov_len {
                skip -= iovec.iov_len;
                continue;
            }
            let n = (iovec.iov_len - skip).min(len - done);
            // SAFETY: the vector lies within a mapping that `self.mem` keeps alive, and `skip + n` is within it.
            let slice = unsafe { VolatileSlice::new(iovec.iov_base.cast::<u8>().add(skip), n) };
            copy(done, slice);
            done += n;
            skip = 0;
        }
        done
    }

    /// Number of segments that one vectored call may take.
    fn iov_count(&self) -> libc::c_int {
        self.iovecs.len().min(MAX_SEGMENTS) as libc::c_int
    }

    /// One `readv`.
    ///
    /// # Errors
    /// As readv(2).
    pub fn readv(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // Not by way of the C library, whose function can be cancelled and for that does more than call the kernel.
        // SAFETY: the vectors describe mappings that `self.mem` keeps alive; the kernel checks the access.
        result(unsafe {
            libc::syscall(libc::SYS_readv, fd.as_raw_fd(), self.iovecs.as_ptr(), self.iov_count())
                as libc::ssize_t
        })
    }

    /// One `writev`.
    ///
    /// # Errors
    /// As writev(2).
    pub fn writev(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // One segment needs no vectors, which the kernel would copy and check first.
        if let [iovec] = self.iovecs[..] {
            // SAFETY: as in `readv`; the kernel only reads.
            return result(unsafe {
                libc::syscall(libc::SYS_write, fd.as_raw_fd(), iovec.iov_base, iovec.iov_len) as libc::ssize_t
            });
        }
        // SAFETY: as in `readv`; the kernel only reads.
        result(unsafe {
            libc::syscall(libc::SYS_writev, fd.as_raw_fd(), self.iovecs.as_ptr(), self.iov_count())
                as libc::ssize_t
        })
    }

    /// One `readv` to all segments and then to `tail`. There must be fewer than [`MAX_SEGMENTS`] segments.
    ///
    /// # Errors
    /// As readv(2).
    pub fn readv_then(&mut self, fd: BorrowedFd<'_>, tail: &mut [u8]) -> io::Result<usize> {
        self.iovecs.push(libc::iovec { iov_base: tail.as_mut_ptr().cast(), iov_len: tail.len() });
        let result = self.readv(fd);
        // No pointer to `tail` is left behind.
        self.iovecs.pop();
        result
    }

    /// One `writev` of `head` and then of all segments, of which there must be fewer than [`MAX_SEGMENTS`].
    ///
    /// # Errors
    /// As writev(2); `InvalidInput` if there are too many segments.
    pub fn writev_after(&mut self, fd: BorrowedFd<'_>, head: &[u8]) -> io::Result<usize> {
        if head.is_empty() {
            return self.writev(fd);
        }
        if self.iovecs.len() >= MAX_SEGMENTS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // The kernel only reads through this pointer, and none is left behind.
        self.iovecs.insert(0, libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
        let result = self.writev(fd);
        self.iovecs.remove(0);
        result
    }

    /// Fills all segments from `offset` of a file, and is empty afterwards.
    ///
    /// # Errors
    /// As preadv(2); the end of the file is `UnexpectedEof`.
    pub fn read_file(&mut self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.transfer(offset, io::ErrorKind::UnexpectedEof, |buffers, offset| {
            // SAFETY: as in `readv`.
            unsafe { libc::preadv(fd.as_raw_fd(), buffers.iovecs.as_ptr(), buffers.iov_count(), offset) }
        })
    }

    /// Writes all segments to `offset` of a file, and is empty afterwards.
    ///
    /// # Errors
    /// As pwritev(2).
    pub fn write_file(&mut self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.transfer(offset, io::ErrorKind::WriteZero, |buffers, offset| {
            // SAFETY: as in `writev`.
            unsafe { libc::pwritev(fd.as_raw_fd(), buffers.iovecs.as_ptr(), buffers.iov_count(), offset) }
        })
    }

    /// Repeats a partial transfer until all is done: each round moves at least a byte or ends.
    fn transfer(
        &mut self,
        offset: u64,
        nothing: io::ErrorKind,
        call: impl Fn(&Self, libc::off_t) -> libc::ssize_t,
    ) -> io::Result<()> {
        let mut offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        while self.bytes > 0 {
            match result(call(self, offset)) {
                Ok(0) => return Err(nothing.into()),
                Ok(n) => {
                    self.skip_front(n);
                    offset += n as libc::off_t;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Gives the whole pages in all segments back to the host; they read as zeros when they are touched again. For memory
    /// that the guest doesn't use.
    ///
    /// # Errors
    /// As madvise(2), the first error; the other segments are given back all the same.
    pub fn discard(&self) -> io::Result<()> {
        const PAGE: usize = 4096;
        let mut result = Ok(());
        for iovec in &self.iovecs {
            let start = iovec.iov_base as usize;
            let (first, end) = (start.next_multiple_of(PAGE), (start + iovec.iov_len) / PAGE * PAGE);
            if first >= end {
                continue;
            }
            let first_page = iovec.iov_base.wrapping_byte_add(first - start);
            // SAFETY: whole pages within a mapping that `self.mem` keeps alive. Rust refers to none of them, so that it
            // doesn't matter that they become zeros; the mapping stays.
            let advise = |advice| unsafe { libc::madvise(first_page, end - first, advice) } == 0;
            // Memory that is mapped privately has no file to take pages out of.
            if !advise(libc::MADV_REMOVE) && !advise(libc::MADV_DONTNEED) {
                result = result.and(Err(io::Error::last_os_error()));
            }
        }
        result
    }

    /// Fills up to the first `limit` bytes with random bytes that never block after boot; returns how many.
    pub fn fill_random(&self, limit: usize) -> usize {
        let (mut done, mut segments) = (0, self.iovecs.iter());
        while let Some(iovec) = segments.next().filter(|_| done < limit) {
            let want = iovec.iov_len.min(limit - done);
            // SAFETY: the vector lies within a mapping that `self.mem` keeps alive and `want` is within it; getrandom
            // writes at most `want` bytes.
            let n = unsafe { libc::getrandom(iovec.iov_base, want, 0) };
            let Ok(n) = usize::try_from(n) else { break };
            done += n;
            if n < want {
                break;
            }
        }
        done
    }
}

fn result(n: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;
    use crate::devices::virtio::testing::{HIGH, MEMORY_BYTES, memory};

    /// Buffers of these lengths, one after the other from 0x1000 on with a gap of 8 bytes, and their contents.
    fn buffers(lengths: &[u32]) -> (GuestBuffers, Vec<u8>) {
        let mem = memory();
        let (mut buffers, mut model, mut at) = (GuestBuffers::new(mem.clone()), Vec::new(), 0x1000);
        for (index, len) in lengths.iter().enumerate() {
            let bytes: Vec<u8> =
                (0..*len).map(|n| (n as u8).wrapping_mul(7).wrapping_add(index as u8)).collect();
            mem.write_slice(&bytes, GuestAddress(at)).unwrap();
            buffers.push(GuestAddress(at), *len, Permissions::ReadWrite).unwrap();
            model.extend(bytes);
            at += u64::from(*len) + 8;
        }
        (buffers, model)
    }

    fn contents(buffers: &GuestBuffers) -> Vec<u8> {
        let mut bytes = vec![0; buffers.bytes()];
        assert_eq!(buffers.read_at(0, &mut bytes), bytes.len());
        bytes
    }

    #[test]
    fn what_is_not_wholly_memory_is_refused_and_leaves_nothing() {
        let mut buffers = GuestBuffers::new(memory());
        let end = MEMORY_BYTES as u64;
        for (address, len) in
            [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 3, 8), (0, u32::MAX), (HIGH - 1, 1)]
        {
            let refused = Err(BufferError::NotMemory { address, len });
            assert_eq!(buffers.push(GuestAddress(address), len, Permissions::Write), refused);
            assert_eq!((buffers.bytes(), buffers.segments()), (0, 0));
        }
        buffers.push(GuestAddress(end - 1), 1, Permissions::Write).unwrap();
    }

    #[test]
    fn segments_are_limited() {
        let mut buffers = GuestBuffers::new(memory());
        for _ in 0..MAX_SEGMENTS {
            buffers.push(GuestAddress(0), 1, Permissions::Read).unwrap();
        }
        let refused = Err(BufferError::TooManySegments);
        assert_eq!(buffers.push(GuestAddress(0), 1, Permissions::Read), refused);
        assert_eq!(buffers.bytes(), MAX_SEGMENTS);
    }

    #[test]
    fn a_file_that_ends_early_is_an_error_and_others_move_wholly() {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, &[5; 100]).unwrap();
        let (mut some, _) = buffers(&[30, 60]);
        some.read_file(file.as_fd(), 10).unwrap();
        assert_eq!(some.bytes(), 0);
        let (mut many, _) = buffers(&[30, 60]);
        let ended = many.read_file(file.as_fd(), 11).unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::UnexpectedEof);
        let (mut data, model) = buffers(&[30, 60]);
        data.write_file(file.as_fd(), 1000).unwrap();
        let mut back = vec![0; 90];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut back, 1000).unwrap();
        assert_eq!(back, model);
    }

    #[test]
    fn discarded_pages_leave_the_memory_file() {
        use std::os::unix::fs::MetadataExt;
        let mem = crate::memory::create(1).unwrap();
        mem.write_slice(&[1; 4 * 4096], GuestAddress(0)).unwrap();
        let region = mem.find_region(GuestAddress(0)).unwrap();
        let file = region.file_offset().unwrap().file();
        let before = file.metadata().unwrap().blocks();
        let mut buffers = GuestBuffers::new(mem.clone());
        buffers.push(GuestAddress(100), 3 * 4096, Permissions::Write).unwrap();
        buffers.discard().unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), before - 2 * 8);
        let mut bytes = vec![0; 4 * 4096];
        mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert!(
            bytes.iter().enumerate().all(|(at, byte)| *byte == u8::from(!(4096..3 * 4096).contains(&at)))
        );
    }

    #[test]
    fn random_bytes_stop_at_the_limit() {
        let (buffers, _) = buffers(&[10, 100]);
        buffers.write_at(0, &[0; 110]);
        assert_eq!(buffers.fill_random(64), 64);
        let bytes = contents(&buffers);
        assert!(bytes[..64].iter().any(|byte| *byte != 0));
        assert_eq!(bytes[64..], [0; 46]);
        assert_eq!(buffers.fill_random(usize::MAX), 110);
    }

    proptest! {
        /// Every way of taking parts off agrees with the same on a vector of bytes.
        #[test]
        fn parts_agree_with_bytes(
            lengths in proptest::collection::vec(0u32..40, 0..8),
            front in 0usize..200, back in 0usize..200, keep in 0usize..200, at in 0usize..200, patch in proptest::collection::vec(any::<u8>(), 0..50),
        ) {
            let (mut buffers, mut model) = buffers(&lengths);
            buffers.skip_front(front);
            model.drain(..front.min(model.len()));
            prop_assert_eq!(contents(&buffers), model.clone());

            let mut tail = GuestBuffers::new(memory());
            buffers.split_last(back, &mut tail);
            let split = model.split_off(model.len() - back.min(model.len()));
            prop_assert_eq!(contents(&buffers), model.clone());
            prop_assert_eq!(contents(&tail), split.clone());

            model.truncate(keep);
            buffers.truncate(keep);
            prop_assert_eq!(contents(&buffers), model.clone());

            let first = buffers.split_first(at);
            let mut model_first: Vec<u8> = model.drain(..at.min(model.len())).collect();
            prop_assert_eq!(contents(&first), model_first.clone());
            prop_assert_eq!(contents(&buffers), model.clone());
            let mut whole = first;
            whole.append(&mut buffers);
            buffers = whole;
            model_first.append(&mut model);
            model = model_first;

            let room = model.len().saturating_sub(at).min(patch.len());
            prop_assert_eq!(buffers.write_at(at, &patch), room);
            if room > 0 {
                model[at..at + room].copy_from_slice(&patch[..room]);
            }
            buffers.append(&mut tail);
            model.extend(split);
            prop_assert_eq!(contents(&buffers), model);
            prop_assert_eq!((tail.bytes(), tail.segments()), (0, 0));
        }
    }
}
