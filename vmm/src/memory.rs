//! Guest memory.

/// The guest's physical memory as devices and loaders see it. Cheap to clone: it is shared.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
