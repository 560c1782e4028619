//! The asynchronous engine: reads, writes and flushes through io_uring, with the file registered.
//!
//! Guest memory is not registered: that would pin (and so allocate) all of it for one drive. See docs/decisions/0010.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, opcode, squeue, types};

use super::request::{Command, Refusal, Request};
use super::{Disk, QUEUE_SIZE, RawFile};
use crate::devices::virtio::queue::VirtQueue;

/// The only registered file.
const FILE: types::Fixed = types::Fixed(0);

/// A request, and what is asked of the kernel for it.
struct Slot {
    request: Request,
    command: Command,
}

/// An io_uring with as many requests as a queue can have in flight.
pub struct Ring {
    ring: ManuallyDrop<IoUring>,
    /// The buffers of those in flight are neither changed nor freed until their completion was seen.
    slots: ManuallyDrop<Vec<Slot>>,
    free: Vec<u16>,
    in_flight: usize,
}

/// A request that the kernel is done with.
pub struct Completed {
    /// What to name in the used ring.
    pub head: u16,
    /// Bytes written to the guest.
    pub written: u32,
}

impl Ring {
    /// A ring over the image's file, for requests of `queue`.
    ///
    /// # Errors
    /// The kernel has no io_uring, or this process may not use it.
    pub fn new(image: &RawFile, queue: &VirtQueue) -> io::Result<Self> {
        let ring = IoUring::new(u32::from(QUEUE_SIZE))?;
        image.register(&ring.submitter())?;
        let slots = (0..QUEUE_SIZE).map(|_| Slot {
            request: Request::new(queue.new_chain(), queue.new_buffers()),
            command: Command::Flush,
        });
        Ok(Self {
            ring: ManuallyDrop::new(ring),
            slots: ManuallyDrop::new(slots.collect()),
            free: (0..QUEUE_SIZE).rev().collect(),
            in_flight: 0,
        })
    }

    /// Becomes readable when requests are completed.
    pub fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Requests that the kernel has.
    pub const fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// A request to fill, unless all are in flight. It is the next one that [`Ring::start`] starts.
    pub fn vacant(&mut self) -> Option<&mut Request> {
        let slot = *self.free.last()?;
        Some(&mut self.slots[usize::from(slot)].request)
    }

    /// Queues what [`Ring::vacant`] gave: a read, a write or a flush.
    pub fn start(&mut self, command: Command) {
        if let Some(slot) = self.free.pop() {
            self.in_flight += 1;
            self.slots[usize::from(slot)].command = command;
            self.queue(slot);
        }
    }

    /// Puts the rest of a slot's request into the submission queue.
    fn queue(&mut self, slot: u16) {
        let Slot { request, command } = &self.slots[usize::from(slot)];
        let entry = match *command {
            Command::Read(offset) => match request.chain.writable.iovecs() {
                [one] => {
                    let len = u32::try_from(one.iov_len).unwrap_or(u32::MAX);
                    opcode::Read::new(FILE, one.iov_base.cast(), len).offset(offset).build()
                }
                all => opcode::Readv::new(FILE, all.as_ptr(), all.len() as u32).offset(offset).build(),
            },
            Command::Write(offset) => match request.chain.readable.iovecs() {
                [one] => {
                    let len = u32::try_from(one.iov_len).unwrap_or(u32::MAX);
                    opcode::Write::new(FILE, one.iov_base.cast(), len).offset(offset).build()
                }
                all => opcode::Writev::new(FILE, all.as_ptr(), all.len() as u32).offset(offset).build(),
            },
            _ => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
        };
        self.push(&entry.user_data(slot.into()));
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the vectors and what they point to belong to a slot in flight: they stay as they are until the
        // completion was seen (`reap`), and otherwise are never freed (`drop`). The guest's memory is kept mapped by the
        // slot's buffers.
        let pushed = unsafe { self.ring.submission().push(entry) };
        // The submission queue has an entry for every slot, and each slot has at most one.
        debug_assert!(pushed.is_ok());
    }

    /// Hands what was queued to the kernel, and waits until `wait` requests are completed.
    ///
    /// # Errors
    /// As io_uring_enter(2), but for those that pass by themselves.
    pub fn submit(&self, wait: usize) -> io::Result<()> {
        match self.ring.submit_and_wait(wait) {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Hands over what [`Ring::reap`] has queued again, if anything.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn submit_rest(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() { Ok(()) } else { self.submit(0) }
    }

    /// Whether something waits to be reaped.
    pub fn has_completions(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// The next request that is done. What was done in part only is queued again: call [`Ring::submit`] afterwards.
    pub fn reap(&mut self, disk: &Disk) -> Option<Completed> {
        loop {
            let entry = self.ring.completion().next()?;
            let slot = u16::try_from(entry.user_data()).ok().filter(|slot| *slot < QUEUE_SIZE)?;
            if let Some(result) = self.slots[usize::from(slot)].progress(disk, entry.result()) {
                self.free.push(slot);
                self.in_flight -= 1;
                let request = &self.slots[usize::from(slot)].request;
                let written = request.finish(&disk.metrics, result);
                return Some(Completed { head: request.chain.head, written });
            }
            self.queue(slot);
        }
    }
}

impl Slot {
    /// Takes the kernel's answer; None if there is more to do.
    fn progress(&mut self, disk: &Disk, answer: i32) -> Option<Result<(), Refusal>> {
        if answer == -libc::EAGAIN || answer == -libc::EINTR {
            // Not now, for whatever reason: a call waits until it is done.
            return Some(self.request.execute(disk, self.command));
        }
        let (operation, buffers, offset, nothing) = match &mut self.command {
            Command::Read(offset) => {
                ("read", &mut self.request.chain.writable, offset, io::ErrorKind::UnexpectedEof)
            }
            Command::Write(offset) => {
                ("write", &mut self.request.chain.readable, offset, io::ErrorKind::WriteZero)
            }
            _ => return Some(disk.check("flush", result(answer).map(|_| ()))),
        };
        match result(answer) {
            Ok(0) if buffers.bytes() > 0 => Some(disk.check(operation, Err(nothing.into()))),
            Ok(n) => {
                buffers.skip_front(n);
                *offset += n as u64;
                (buffers.bytes() == 0).then_some(Ok(()))
            }
            Err(error) => Some(disk.check(operation, Err(error))),
        }
    }
}

fn result(answer: i32) -> io::Result<usize> {
    usize::try_from(answer).map_err(|_| io::Error::from_raw_os_error(-answer))
}

/// Waits for what is in flight, so that nothing touches guest memory afterwards.
impl Drop for Ring {
    fn drop(&mut self) {
        let mut seen = 0;
        while seen < self.in_flight {
            if self.submit(1).is_err() {
                // The kernel may still use ring and buffers: better lost than freed.
                return;
            }
            seen += self.ring.completion().count();
        }
        // SAFETY: dropped once, here; the kernel has completed all that it was given, so that nothing refers to the
        // buffers any more.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            ManuallyDrop::drop(&mut self.slots);
        }
    }
}
