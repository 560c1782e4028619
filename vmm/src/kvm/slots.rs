//! Parts of the guest's physical memory beside its RAM.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::Cap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{KvmError, Shared, Wiring};
use crate::mapping::Mapping;

impl Shared {
    /// The first of so many numbers that no slot has. They are never given back: KVM has 32,764 of them, and each device takes
    /// its own once.
    fn slot_numbers(&self, count: u32) -> u32 {
        self.slots.fetch_add(count, Ordering::Relaxed)
    }
}

/// The slots of memory that can be plugged: each is there for the guest or not. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PluggableSlots {
    shared: Arc<Shared>,
    /// Number of the first.
    first: u32,
    count: u32,
    address: u64,
    slot_bytes: u64,
}

impl PluggableSlots {
    /// Shows slot `index` to the guest or hides it. A slot must not be shown twice.
    ///
    /// # Errors
    /// KVM refused; `InvalidInput` if there is no such slot or it isn't in the guest's memory.
    pub fn show(&self, index: u32, visible: bool) -> io::Result<()> {
        let none = || io::Error::from(io::ErrorKind::InvalidInput);
        let offset = u64::from(index).checked_mul(self.slot_bytes).filter(|_| index < self.count);
        let address = offset.and_then(|offset| self.address.checked_add(offset)).ok_or_else(none)?;
        let (region, offset) = self.shared.memory.to_region_addr(GuestAddress(address)).ok_or_else(none)?;
        if region.len() - offset.0 < self.slot_bytes {
            return Err(none());
        }
        let slot = kvm_userspace_memory_region {
            slot: self.first + index,
            guest_phys_addr: address,
            memory_size: if visible { self.slot_bytes } else { 0 },
            userspace_addr: region.as_ptr() as u64 + offset.0,
            flags: self.shared.memory_flags,
        };
        // SAFETY: the slot lies within a mapping that `shared` keeps until after the VM's descriptor is closed, and no other slot is
        // there: regions don't overlap, and neither do the slots of this one.
        Ok(unsafe { self.shared.fd.set_user_memory_region(slot) }?)
    }
}

impl Wiring {
    /// The slots of memory that can be plugged: `count` of `slot_bytes` each, from `address` on.
    pub fn pluggable_slots(&self, address: u64, slot_bytes: u64, count: u32) -> PluggableSlots {
        let shared = self.shared.clone();
        PluggableSlots { first: shared.slot_numbers(count), shared, count, address, slot_bytes }
    }

    /// Lets the guest see all of `mapping` at `address` for the VM's whole life. Nothing else may be there. Writes to a read-only
    /// one go to the bus, where nobody is.
    ///
    /// # Errors
    /// KVM refused.
    pub fn map(&self, mapping: Mapping, address: u64, read_only: bool) -> Result<(), KvmError> {
        let shared = &self.shared;
        if read_only && !shared.kvm.check_extension(Cap::ReadonlyMem) {
            return Err(KvmError::Capability(Cap::ReadonlyMem));
        }
        let slot = kvm_userspace_memory_region {
            slot: shared.slot_numbers(1),
            guest_phys_addr: address,
            memory_size: mapping.len() as u64,
            userspace_addr: mapping.address() as u64,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
        };
        // SAFETY: the slot is exactly the mapping, which lives until after the VM's descriptor is closed if KVM takes it (below,
        // and the order of the fields of `Shared`).
        unsafe { shared.fd.set_user_memory_region(slot) }
            .map_err(|source| KvmError::Call("KVM_SET_USER_MEMORY_REGION", source))?;
        shared.end.fetch_max(address.saturating_add(mapping.len() as u64 - 1), Ordering::Relaxed);
        shared.mappings.lock().unwrap_or_else(PoisonError::into_inner).push(mapping);
        Ok(())
    }
}
