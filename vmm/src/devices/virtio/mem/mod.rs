//! virtio-mem (virtio 1.2 §5.15): memory beside the machine's that the guest plugs and unplugs in blocks, as far as the host asks
//! for it.
//!
//! ```text
//!   region:  | slot 0          | slot 1          | …          shown to the guest while it has a plugged block
//!            | b | b | b | b … | b | b | …                    plugged or not: what devices may touch
//! ```
//! A block that the guest doesn't have is no memory for the devices ([`Region`](crate::memory::Region)), its pages are the host's again,
//! and a slot without plugged blocks is hidden from the guest's processors. In a slot that is shown, the guest can touch blocks that it
//! has unplugged; that costs the host memory, at most the slot's.
//!
//! Requests are rare and are served on the vCPU that makes them; the slots are changed in the set-up thread, since a vCPU may not.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mote_vmm_api as api;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::queue::{Chain, QueueError, VirtQueue};
use super::{Activation, Interrupt, VirtioDevice, device_type, read_config_bytes};
use crate::devices::{DeviceError, report};
use crate::kvm::PluggableSlots;
use crate::memory::{Blocks, GuestMemory, Region};
use crate::metrics::{self, MemoryHotplugMetrics};
use crate::seccomp;
use crate::snapshot::{DeviceState, StateError};

const QUEUE_SIZE: u16 = 128;
/// Most requests served for one notification: every slot of the queue, twice.
const MAX_REQUESTS: usize = 2 * QUEUE_SIZE as usize;
/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver must not touch what it hasn't plugged.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
const MIB: u64 = 1 << 20;

/// Bytes of `struct virtio_mem_req`: type, padding, address, number of blocks (and padding that nobody needs).
const REQUEST_BYTES: usize = 18;
/// Bytes of `struct virtio_mem_resp`: type, padding, state.
const ANSWER_BYTES: usize = 10;

/// What a driver asks for.
mod request {
    pub const PLUG: u16 = 0;
    pub const UNPLUG: u16 = 1;
    pub const UNPLUG_ALL: u16 = 2;
    pub const STATE: u16 = 3;
}

/// What it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// Done.
    Acknowledged = 0,
    /// Not now: more than the host asks for.
    Refused = 1,
    /// Nonsense, or it can't be done.
    Error = 3,
}

/// What a range of blocks is (`VIRTIO_MEM_STATE_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BlockState {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

/// Why the device can't be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// The memory is not part of the machine.
    #[error("the machine's memory has no part that can be plugged")]
    NoRegion,
    /// A size that isn't possible.
    #[error(
        "requested_size_mib {requested} is invalid: it must be a multiple of block_size_mib {block} and at most total_size_mib {total}"
    )]
    Size {
        /// What was asked for.
        requested: usize,
        /// The block size.
        block: usize,
        /// The total size.
        total: usize,
    },
}

/// What shows slots to the guest: KVM, but for tests.
pub trait Slots: Send + Sync {
    /// Shows slot `index` or hides it.
    ///
    /// # Errors
    /// It can't be done; then it is as it was.
    fn show(&self, index: u32, visible: bool) -> io::Result<()>;
}

impl Slots for PluggableSlots {
    fn show(&self, index: u32, visible: bool) -> io::Result<()> {
        self.show(index, visible)
    }
}

/// The variable part.
#[derive(Debug, Default)]
struct State {
    /// All in bytes.
    requested: u64,
    usable: u64,
    plugged: u64,
    /// Number of changes of the configuration space.
    generation: u32,
}

/// Shared with the API.
struct Shared {
    config: api::MemoryHotplug,
    state: Mutex<State>,
    interrupt: Mutex<Option<Arc<Interrupt>>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn interrupt(&self) -> MutexGuard<'_, Option<Arc<Interrupt>>> {
        self.interrupt.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The API's handle.
#[derive(Clone)]
pub struct MemControl(Arc<Shared>);

impl MemControl {
    /// Asks the guest to have so much.
    ///
    /// # Errors
    /// It is no multiple of the block size, or more than there is.
    pub fn request(&self, requested_mib: usize) -> Result<(), MemError> {
        let config = &self.0.config;
        if requested_mib > config.total_size_mib || !requested_mib.is_multiple_of(config.block_size_mib) {
            return Err(MemError::Size {
                requested: requested_mib,
                block: config.block_size_mib,
                total: config.total_size_mib,
            });
        }
        let mut state = self.0.state();
        state.requested = requested_mib as u64 * MIB;
        state.usable = state.usable.max(usable_for(config, state.requested));
        state.generation = state.generation.wrapping_add(1);
        drop(state);
        if let Some(interrupt) = &*self.0.interrupt() {
            interrupt.config_changed();
        }
        Ok(())
    }

    /// Sizes.
    pub fn status(&self) -> api::MemoryHotplugStatus {
        let (config, state) = (&self.0.config, self.0.state());
        api::MemoryHotplugStatus {
            total_size_mib: config.total_size_mib,
            slot_size_mib: config.slot_size_mib,
            block_size_mib: config.block_size_mib,
            plugged_size_mib: (state.plugged / MIB) as usize,
            requested_size_mib: (state.requested / MIB) as usize,
        }
    }
}

/// Where the guest may plug, to have `requested` bytes: whole slots.
fn usable_for(config: &api::MemoryHotplug, requested: u64) -> u64 {
    requested.next_multiple_of(config.slot_size_mib as u64 * MIB)
}

/// In snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedState {
    address: u64,
    requested: u64,
    usable: u64,
    /// Plugged blocks: first and count of each run.
    plugged: Vec<(usize, usize)>,
}

/// A virtio-mem device.
pub struct Mem {
    memory: GuestMemory,
    address: u64,
    blocks: Arc<Blocks>,
    blocks_of_slot: usize,
    slots: Arc<dyn Slots>,
    shared: Arc<Shared>,
    metrics: Arc<MemoryHotplugMetrics>,
    failed: bool,
    running: Option<Running>,
}

/// What there is while a driver runs the device.
struct Running {
    queue: VirtQueue,
    chain: Chain,
    /// The driver has agreed not to touch what it hasn't plugged.
    careful: bool,
}

/// The region of `memory` that can be plugged: where it starts.
pub fn region_start(memory: &GuestMemory) -> Option<u64> {
    let region = memory.iter().find(|region| region.blocks().is_some())?;
    Some(region.start_addr().0)
}

impl Mem {
    /// A device for the part of `memory` that can be plugged, nothing of which is.
    ///
    /// # Errors
    /// There is no such part.
    pub fn new(
        config: &api::MemoryHotplug,
        memory: &GuestMemory,
        slots: Arc<dyn Slots>,
    ) -> Result<Self, DeviceError> {
        let region = memory.iter().find(|region| region.blocks().is_some()).ok_or(MemError::NoRegion)?;
        let blocks = region.blocks().ok_or(MemError::NoRegion)?.clone();
        let shared = Shared { config: *config, state: Mutex::default(), interrupt: Mutex::default() };
        Ok(Self {
            address: region.start_addr().0,
            memory: memory.clone(),
            blocks,
            blocks_of_slot: config.slot_size_mib / config.block_size_mib,
            slots,
            shared: Arc::new(shared),
            metrics: metrics::device("memory_hotplug", None),
            failed: false,
            running: None,
        })
    }

    /// The API's handle.
    pub fn control(&self) -> MemControl {
        MemControl(self.shared.clone())
    }

    /// The blocks of a request, if they are all in the usable part.
    fn range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let block = self.blocks.block_bytes();
        let offset = address.checked_sub(self.address)?;
        let end = offset.checked_add(u64::from(count) * block)?;
        if count == 0 || !offset.is_multiple_of(block) || end > self.shared.state().usable {
            return None;
        }
        Some((offset / block) as usize..(end / block) as usize)
    }

    fn state_of(&self, range: Range<usize>) -> BlockState {
        match self.blocks.plugged_in(range.clone()) {
            0 => BlockState::Unplugged,
            all if all == range.len() => BlockState::Plugged,
            _ => BlockState::Mixed,
        }
    }

    /// The blocks of a slot.
    fn blocks_in(&self, slot: usize) -> Range<usize> {
        slot * self.blocks_of_slot..(slot + 1) * self.blocks_of_slot
    }

    /// The slots that these blocks are in.
    fn slots_of(&self, range: &Range<usize>) -> Range<usize> {
        range.start / self.blocks_of_slot..range.end.div_ceil(self.blocks_of_slot)
    }

    /// In the set-up thread, which may; waits for it.
    fn show(&mut self, slot: usize, visible: bool) -> bool {
        let (slots, index) = (self.slots.clone(), slot as u32);
        let shown = seccomp::set_up(move || slots.show(index, visible));
        match shown.unwrap_or_else(|| Err(io::Error::other("the set-up thread is gone"))) {
            Ok(()) => true,
            Err(error) => {
                // A guest can repeat it as often as it likes.
                if !std::mem::replace(&mut self.failed, true) {
                    report("memory hot-plug: cannot show or hide memory (told once)", &error);
                }
                false
            }
        }
    }

    /// Shows the slots of `range` that have nothing plugged yet.
    fn show_slots(&mut self, range: &Range<usize>) -> bool {
        let slots = self.slots_of(range);
        let mut shown = Vec::new();
        for slot in slots {
            if self.blocks.plugged_in(self.blocks_in(slot)) > 0 {
                continue;
            }
            if !self.show(slot, true) {
                for slot in shown {
                    self.show(slot, false);
                }
                return false;
            }
            shown.push(slot);
        }
        true
    }

    fn plug(&mut self, range: Range<usize>) -> Answer {
        let bytes = range.len() as u64 * self.blocks.block_bytes();
        if self.state_of(range.clone()) != BlockState::Unplugged {
            return Answer::Error;
        }
        let state = self.shared.state();
        if state.plugged + bytes > state.requested {
            return Answer::Refused;
        }
        drop(state);
        if !self.show_slots(&range) {
            return Answer::Error;
        }
        self.blocks.set(range, true);
        self.count_plugged();
        self.metrics.plug_bytes.add(bytes);
        Answer::Acknowledged
    }

    /// Takes plugged blocks away; those of `range` that aren't plugged stay as they are.
    fn unplug(&mut self, range: &Range<usize>) {
        let plugged = self.blocks.plugged_in(range.clone());
        if plugged == 0 {
            return;
        }
        let block = self.blocks.block_bytes();
        let slots: Vec<usize> =
            self.slots_of(range).filter(|slot| self.blocks.plugged_in(self.blocks_in(*slot)) > 0).collect();
        self.blocks.set(range.clone(), false);
        for slot in slots {
            if self.blocks.plugged_in(self.blocks_in(slot)) == 0 {
                self.show(slot, false);
            }
        }
        let region: Option<&Region> = self.memory.find_region(GuestAddress(self.address));
        let bytes = range.start as u64 * block..range.end as u64 * block;
        if let Some(Err(error)) = region.map(|region| region.discard(bytes))
            && !std::mem::replace(&mut self.failed, true)
        {
            report("memory hot-plug: cannot give memory back to the host (told once)", &error);
        }
        self.count_plugged();
        self.metrics.unplug_bytes.add(plugged as u64 * block);
    }

    fn count_plugged(&self) {
        let plugged = self.blocks.plugged_in(0..self.blocks.count()) as u64 * self.blocks.block_bytes();
        let mut state = self.shared.state();
        state.plugged = plugged;
        state.generation = state.generation.wrapping_add(1);
    }

    /// Answers one request; the state of blocks, where it was asked for.
    fn answer(&mut self, kind: u16, address: u64, count: u16) -> (Answer, Option<BlockState>) {
        let metrics = self.metrics.clone();
        let (calls, fails) = match kind {
            request::PLUG => (&metrics.plug_count, &metrics.plug_fails),
            request::UNPLUG => (&metrics.unplug_count, &metrics.unplug_fails),
            request::UNPLUG_ALL => (&metrics.unplug_all_count, &metrics.unplug_all_fails),
            _ => (&metrics.state_count, &metrics.state_fails),
        };
        calls.add_one();
        let (answer, state) = match (kind, self.range(address, count)) {
            (request::UNPLUG_ALL, _) => {
                self.unplug(&(0..self.blocks.count()));
                let mut state = self.shared.state();
                state.usable = usable_for(&self.shared.config, state.requested);
                (Answer::Acknowledged, None)
            }
            (request::PLUG, Some(range)) => (self.plug(range), None),
            (request::UNPLUG, Some(range)) => match self.state_of(range.clone()) {
                BlockState::Plugged => {
                    self.unplug(&range);
                    (Answer::Acknowledged, None)
                }
                _ => (Answer::Error, None),
            },
            (request::STATE, Some(range)) => (Answer::Acknowledged, Some(self.state_of(range))),
            _ => (Answer::Error, None),
        };
        if answer != Answer::Acknowledged {
            fails.add_one();
        }
        (answer, state)
    }

    fn serve(&mut self, running: &mut Running) -> Result<(), QueueError> {
        for _ in 0..MAX_REQUESTS {
            if !running.queue.pop(&mut running.chain)? {
                if running.queue.enable_notification()? {
                    continue;
                }
                break;
            }
            let Chain { readable, faulty, head, .. } = &running.chain;
            let mut bytes = [0; REQUEST_BYTES];
            let whole = readable.read_at(0, &mut bytes) == REQUEST_BYTES && !faulty;
            let [k0, k1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, n0, n1] = bytes;
            let (answer, state) = if whole && running.careful {
                let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
                self.answer(u16::from_le_bytes([k0, k1]), address, u16::from_le_bytes([n0, n1]))
            } else {
                (Answer::Error, None)
            };
            let mut bytes = [0; ANSWER_BYTES];
            bytes[0] = answer as u8;
            bytes[8] = state.map_or(0, |state| state as u8);
            let written = running.chain.writable.write_at(0, &bytes);
            running.queue.push_used(*head, written as u32)?;
        }
        running.queue.signal()
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        device_type::MEM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    /// `struct virtio_mem_config`.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.state();
        let region_bytes = self.blocks.count() as u64 * self.blocks.block_bytes();
        // The second word is the NUMA node, which there is none of.
        let words = [
            self.blocks.block_bytes(),
            0,
            self.address,
            region_bytes,
            state.usable,
            state.plugged,
            state.requested,
        ];
        let mut config = [0; 56];
        for (to, word) in config.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        read_config_bytes(&config, offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.shared.state().generation
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let given = activation.queues.len();
        let Ok([queue]) = <[VirtQueue; 1]>::try_from(activation.queues) else {
            return Err(DeviceError::QueueCount { device: "mem", given });
        };
        let careful = activation.features & F_UNPLUGGED_INACCESSIBLE != 0;
        *self.shared.interrupt() = Some(activation.interrupt);
        self.running = Some(Running { chain: queue.new_chain(), queue, careful });
        Ok(())
    }

    /// The guest keeps its memory: a driver that begins anew asks for all to be unplugged (virtio 1.2 §5.15.5).
    fn reset(&mut self) {
        *self.shared.interrupt() = None;
        self.running = None;
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let mut plugged: Vec<(usize, usize)> = Vec::new();
        for index in (0..self.blocks.count()).filter(|index| self.blocks.plugged_in(*index..index + 1) > 0) {
            match plugged.last_mut() {
                Some((first, count)) if *first + *count == index => *count += 1,
                _ => plugged.push((index, 1)),
            }
        }
        let state = self.shared.state();
        let (requested, usable) = (state.requested, state.usable);
        DeviceState::new(&SavedState { address: self.address, requested, usable, plugged })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let saved: SavedState = state.get()?;
        let total = self.blocks.count() as u64 * self.blocks.block_bytes();
        let blocks = self.blocks.count();
        let fits =
            |(first, count): &(usize, usize)| first.checked_add(*count).is_some_and(|end| end <= blocks);
        if saved.address != self.address || saved.usable > total || saved.requested > total {
            return Err(StateError::new(format!(
                "its memory is {total} bytes at {:#x} here, and in the snapshot at {:#x}",
                self.address, saved.address
            )));
        }
        if !saved.plugged.iter().all(fits) {
            return Err(StateError::new(format!(
                "it has {blocks} blocks, and more are plugged in the snapshot"
            )));
        }
        {
            let mut state = self.shared.state();
            (state.requested, state.usable) = (saved.requested, saved.usable);
        }
        for (first, count) in saved.plugged {
            let range = first..first + count;
            if !self.show_slots(&range) {
                return Err(StateError::new("its memory can't be shown to the guest"));
            }
            self.blocks.set(range, true);
        }
        self.count_plugged();
        Ok(())
    }

    fn serves_inline(&self) -> bool {
        true
    }

    fn notify(&mut self, _queue: u16) {
        let Some(mut running) = self.running.take() else { return };
        match self.serve(&mut running) {
            Ok(()) => self.running = Some(running),
            Err(error) => {
                report("memory hot-plug", &error);
                running.queue.set_needs_reset();
            }
        }
    }
}

#[cfg(test)]
mod tests;
