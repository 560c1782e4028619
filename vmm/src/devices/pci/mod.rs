//! PCI: one bus, reached by ECAM only, with a host bridge at 00:00.0 and up to 31 single-function devices.
//!
//! ```text
//!   vCPU ── ECAM ──► host::PciHost ──► PciFunction (configuration space: config::ConfigSpace, msix::MsiX)
//!     │                  │ a base address register or the memory-space enable bit changed
//!     │                  ▼
//!     └── MMIO ──► Bus ──► the same function (its registers)
//! ```
//!
//! There are no legacy interrupts, no I/O space, no bridges and no configuration ports: a guest finds the bus by the
//! ACPI tables (MCFG and `PNP0A08`), and interrupts are MSI-X only. What a guest writes here is hostile: every access of
//! every width is defined, and registers are only ever decoded inside of [`crate::layout::PCI_WINDOW`].

pub mod config;
pub mod host;
pub mod hotplug;
pub mod msix;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::bus::BusDevice;
use host::PciHost;
use hotplug::HotPlug;

/// The bus with what comes and goes on it. Cheap to clone: it is shared.
#[derive(Clone)]
pub struct PciBus {
    host: Arc<Mutex<PciHost>>,
    hot_plug: Arc<Mutex<HotPlug>>,
}

impl PciBus {
    /// Of its two parts.
    pub const fn new(host: Arc<Mutex<PciHost>>, hot_plug: Arc<Mutex<HotPlug>>) -> Self {
        Self { host, hot_plug }
    }

    /// The host bridge. Taken after [`PciBus::hot_plug`] where both are.
    pub fn host(&self) -> MutexGuard<'_, PciHost> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host bridge as the list of devices holds it.
    pub const fn shared_host(&self) -> &Arc<Mutex<PciHost>> {
        &self.host
    }

    /// Who is where, and the registers that the guest's ACPI methods use.
    pub fn hot_plug(&self) -> MutexGuard<'_, HotPlug> {
        self.hot_plug.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A function on the bus: a [`BusDevice`] for the registers behind its base address register 0, and a configuration
/// space.
pub trait PciFunction: BusDevice {
    /// Fills `data` from the configuration space; zeros where nothing is.
    fn read_config(&mut self, register: u64, data: &mut [u8]);

    /// Takes `data`; what makes no sense is ignored.
    fn write_config(&mut self, register: u64, data: &[u8]);

    /// Where the guest wants the registers to be: address and size, or nowhere while memory space is disabled.
    fn wanted_range(&self) -> Option<(u64, u64)>;

    /// The registers are decoded at `base` from now on, or nowhere.
    fn placed(&mut self, base: Option<u64>);
}
