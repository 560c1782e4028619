//! The worker's loop.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::{GuestAddress, Permissions};

use super::control::{COMMAND_DONE, COMMAND_STOP, Shared};
use crate::devices::report;
use crate::devices::virtio::buffers::GuestBuffers;
use crate::devices::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::devices::virtio::worker::Poller;
use crate::metrics::BalloonMetrics;

/// `VIRTIO_BALLOON_PFN_SHIFT`.
const PAGE_SHIFT: u64 = 12;
/// Page numbers read at a time: what Linux sends in one buffer.
const PAGE_NUMBERS: usize = 256;
/// Most page numbers of one buffer that are looked at.
const MAX_PAGE_NUMBERS: usize = 1 << 16;
/// Chains of one queue before the others, and a stop, get their turn.
const BUDGET: usize = 64;

/// The queues; those of features that were not agreed on are missing.
pub struct Queues {
    pub inflate: VirtQueue,
    pub deflate: VirtQueue,
    pub statistics: Option<VirtQueue>,
    pub hinting: Option<VirtQueue>,
    pub reporting: Option<VirtQueue>,
}

/// Why the worker stops serving until the driver resets the device.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("wait for the driver")]
    Wait(#[source] io::Error),
}

/// The queues and what serving them needs.
pub struct Server {
    queues: Queues,
    chain: Chain,
    /// Pages of one inflation.
    pages: GuestBuffers,
    shared: Arc<Shared>,
    /// The statistics' buffer: the driver fills it again when it gets it back.
    statistics_head: Option<u16>,
    statistics_asked: Instant,
    discard: Discard,
    metrics: Arc<BalloonMetrics>,
}

/// Gives guest memory back to the host.
#[derive(Default)]
struct Discard {
    failed: bool,
}

impl Discard {
    fn discard(&mut self, memory: &GuestBuffers) {
        if let Err(error) = memory.discard()
            && !std::mem::replace(&mut self.failed, true)
        {
            report("the balloon can't give memory back to the host", &error);
        }
    }
}

/// The statistics' buffer goes back to the ring, for a queue that continues after a pause.
impl Drop for Server {
    fn drop(&mut self) {
        if let (Some(_), Some(queue)) = (self.statistics_head.take(), &mut self.queues.statistics) {
            queue.undo_pop();
        }
    }
}

impl Server {
    pub fn new(queues: Queues, shared: Arc<Shared>) -> Self {
        Self {
            chain: queues.inflate.new_chain(),
            pages: queues.inflate.new_buffers(),
            queues,
            metrics: shared.metrics.clone(),
            shared,
            statistics_head: None,
            statistics_asked: Instant::now(),
            discard: Discard::default(),
        }
    }

    /// Serves until `stop`.
    pub fn run(&mut self, poller: &mut Poller, stop: BorrowedFd<'_>) {
        let served = poller.watch_stop(stop).map_err(ServeError::Wait).and_then(|()| self.serve(poller));
        if let Err(error) = served {
            report("balloon", &error);
            self.queues.inflate.set_needs_reset();
            poller.wait_for_stop();
        }
    }

    fn serve(&mut self, poller: &mut Poller) -> Result<(), ServeError> {
        while !poller.stopped() {
            let more = [
                self.inflate()?,
                deflate(&mut self.queues.deflate, &mut self.chain, &self.metrics)?,
                self.take_statistics()?,
                self.take_hints()?,
                self.take_reports()?,
            ];
            self.ask_for_statistics()?;
            if more.contains(&true) {
                poller.wait(false, |_, _| {}).map_err(ServeError::Wait)?;
            } else {
                let due = self.statistics_due().map(|due| due.saturating_duration_since(Instant::now()));
                poller.wait_for(due, |_, _| {}).map_err(ServeError::Wait)?;
            }
        }
        Ok(())
    }

    /// The numbers of pages that the guest gives.
    fn inflate(&mut self) -> Result<bool, ServeError> {
        let Self { queues, chain, pages, discard, metrics, .. } = self;
        serve_queue(&mut queues.inflate, chain, |numbers| {
            metrics.inflate_count.add_one();
            let mut numbers_bytes = [0; 4 * PAGE_NUMBERS];
            let (mut offset, mut run) = (0, None);
            while offset < 4 * MAX_PAGE_NUMBERS {
                let n = numbers.readable.read_at(offset, &mut numbers_bytes);
                for number in numbers_bytes[..n].chunks_exact(4) {
                    let number = u64::from(u32::from_le_bytes([number[0], number[1], number[2], number[3]]));
                    // Pages side by side are given back together.
                    run = match run {
                        Some((first, count)) if number == first + count && count < PAGE_NUMBERS as u64 => {
                            Some((first, count + 1))
                        }
                        Some(other) => {
                            give_back(other, pages, discard);
                            Some((number, 1))
                        }
                        None => Some((number, 1)),
                    };
                }
                offset += n;
                if n < numbers_bytes.len() {
                    break;
                }
            }
            if let Some(run) = run {
                give_back(run, pages, discard);
            }
            true
        })
    }

    /// The guest's statistics; their buffer is kept until new ones are wanted.
    fn take_statistics(&mut self) -> Result<bool, ServeError> {
        let Some(queue) = &mut self.queues.statistics else { return Ok(false) };
        let (head, shared, metrics) = (&mut self.statistics_head, &self.shared, &self.metrics);
        let mut older = Vec::new();
        let more = serve_queue(queue, &mut self.chain, |chain| {
            metrics.stats_updates_count.add_one();
            shared.state().statistics.read(&chain.readable);
            // One buffer is kept; a driver that sends more gets the older ones back.
            older.extend(head.replace(chain.head));
            false
        })?;
        for head in older {
            queue.push_used(head, 0)?;
        }
        queue.signal()?;
        Ok(more)
    }

    fn statistics_due(&self) -> Option<Instant> {
        self.statistics_head?;
        let interval = self.shared.state().statistics_interval;
        if interval.is_zero() { None } else { self.statistics_asked.checked_add(interval) }
    }

    fn ask_for_statistics(&mut self) -> Result<(), ServeError> {
        let now = Instant::now();
        if self.statistics_due().is_none_or(|due| due > now) {
            return Ok(());
        }
        if let (Some(queue), Some(head)) = (&mut self.queues.statistics, self.statistics_head.take()) {
            self.statistics_asked = now;
            queue.push_used(head, 0)?;
            queue.signal()?;
        }
        Ok(())
    }

    /// Free pages of a run of hinting, between the run's id and an end (virtio 1.2 §5.5.6.5).
    fn take_hints(&mut self) -> Result<bool, ServeError> {
        let Some(queue) = &mut self.queues.hinting else { return Ok(false) };
        let (shared, discard, metrics) = (&self.shared, &mut self.discard, &self.metrics);
        serve_queue(queue, &mut self.chain, |chain| {
            let mut command = [0; 4];
            if chain.readable.read_at(0, &mut command) == command.len() {
                take_command(shared, u32::from_le_bytes(command));
            }
            let state = shared.state();
            // Pages of a run that is over may be in use again.
            let in_run = state.host_command > COMMAND_DONE && state.guest_command == Some(state.host_command);
            drop(state);
            if in_run && !chain.faulty {
                metrics.free_page_hint_count.add_one();
                metrics.free_page_hint_freed.add(chain.writable.bytes() as u64);
                discard.discard(&chain.writable);
            }
            true
        })
    }

    /// Free pages that the guest leaves alone until it gets them back (virtio 1.2 §5.5.6.7).
    fn take_reports(&mut self) -> Result<bool, ServeError> {
        let Some(queue) = &mut self.queues.reporting else { return Ok(false) };
        let (discard, metrics) = (&mut self.discard, &self.metrics);
        serve_queue(queue, &mut self.chain, |chain| {
            if !chain.faulty {
                metrics.free_page_report_count.add_one();
                metrics.free_page_report_freed.add(chain.writable.bytes() as u64);
                discard.discard(&chain.writable);
            }
            true
        })
    }
}

fn take_command(shared: &Shared, command: u32) {
    let mut state = shared.state();
    state.guest_command = Some(command);
    if command == COMMAND_STOP && state.host_command > COMMAND_DONE && state.acknowledge_on_stop {
        state.host_command = COMMAND_DONE;
        drop(state);
        shared.announce();
    }
}

/// Pages come back by being touched: nothing is to be done for it.
fn deflate(queue: &mut VirtQueue, chain: &mut Chain, metrics: &BalloonMetrics) -> Result<bool, ServeError> {
    serve_queue(queue, chain, |_| {
        metrics.deflate_count.add_one();
        true
    })
}

/// Pages from `first` on that are the guest's memory. Others are left out: numbers are the guest's.
fn give_back((first, count): (u64, u64), pages: &mut GuestBuffers, discard: &mut Discard) {
    pages.clear();
    // At most 256 pages of 4 KiB; a 32-bit number of a page makes an address of 44 bits.
    let bytes = (count << PAGE_SHIFT) as u32;
    if pages.push(GuestAddress(first << PAGE_SHIFT), bytes, Permissions::Write).is_ok() {
        discard.discard(pages);
    } else if count > 1 {
        for page in first..first + count {
            give_back((page, 1), pages, discard);
        }
    }
}

/// Serves up to [`BUDGET`] chains; those for which `serve` is true go back to the driver. Whether there may be more.
fn serve_queue(
    queue: &mut VirtQueue,
    chain: &mut Chain,
    mut serve: impl FnMut(&mut Chain) -> bool,
) -> Result<bool, ServeError> {
    let mut more = true;
    for _ in 0..BUDGET {
        if !queue.pop(chain)? {
            if queue.enable_notification()? {
                continue;
            }
            more = false;
            break;
        }
        if serve(chain) {
            queue.push_used(chain.head, 0)?;
        }
    }
    queue.signal()?;
    Ok(more)
}
