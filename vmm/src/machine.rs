//! A running machine: its vCPU threads, and what keeps it going.
//!
//! ```text
//!   boot::boot ──► Running ──pause──► Paused
//!                     ▲                  │
//!                     └──────resume──────┘
//! ```
//! The end of a machine is the end of the process: nothing is joined or freed then.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use mote_vmm_api::ExitReason;

use crate::boot::Added;
use crate::devices::EventSource;
use crate::devices::bus::Bus;
use crate::devices::controls::Controls;
use crate::devices::i8042::{I8042, KeyboardBusy};
use crate::devices::pci::PciBus;
use crate::error_chain;
use crate::hotplug::{drive_name, interface_name};
use crate::kvm::{Clock, Kick, KvmError, Stop, Vcpu, VcpuState, Wiring};
use crate::memory::GuestMemory;
use crate::metrics::VCPU;
use crate::outcome::Outcome;
use crate::seccomp::{self, ThreadKind};
use crate::snapshot::{CreateError, DeviceState, Stateful};

/// A vCPU thread needs little: the device code it runs keeps its buffers elsewhere.
const VCPU_STACK: usize = 256 << 10;
/// While threads are waited for, whether the machine's end was decided is looked at this often.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The two address spaces of the vCPUs' exits.
#[derive(Default)]
pub struct Buses {
    /// Port I/O.
    pub ports: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
}

/// A device on the machine's list, by its name in snapshots.
pub type SharedState = (String, Arc<Mutex<dyn Stateful>>);

/// What all vCPU threads share.
struct Shared {
    buses: Buses,
    outcome: Arc<Outcome>,
    parking: Mutex<Parking>,
    changed: Condvar,
}

#[derive(Default)]
struct Parking {
    paused: bool,
    parked: usize,
    /// Those that park are asked for their state; each leaves it here, by its index.
    saving: Option<BTreeMap<u8, Result<VcpuState, KvmError>>>,
}

impl Shared {
    fn parking(&self) -> MutexGuard<'_, Parking> {
        self.parking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits here as long as the machine is paused.
    fn park(&self, vcpu: &Vcpu) {
        let mut parking = self.parking();
        if !parking.paused {
            return;
        }
        vcpu.tell_guest_of_pause();
        parking.parked += 1;
        self.changed.notify_all();
        while parking.paused {
            if let Some(states) = &mut parking.saving
                && !states.contains_key(&vcpu.index())
            {
                states.insert(vcpu.index(), vcpu.save());
                self.changed.notify_all();
            }
            parking = self.changed.wait(parking).unwrap_or_else(PoisonError::into_inner);
        }
        parking.parked -= 1;
        self.changed.notify_all();
    }
}

/// The thread of a vCPU. It returns the vCPU, so that the page that `kick` writes to stays mapped until it is joined.
struct VcpuThread {
    handle: JoinHandle<Vcpu>,
    kick: Kick,
}

/// A machine whose vCPUs run (or are paused).
pub struct Machine {
    vcpus: Vec<VcpuThread>,
    shared: Arc<Shared>,
    keyboard: Arc<Mutex<I8042>>,
    controls: Controls,
    /// Descriptors that devices want the main loop to watch; taken by it.
    event_sources: Vec<Box<dyn EventSource>>,
    devices: Vec<SharedState>,
    memory: GuestMemory,
    clock: Clock,
    /// For devices that come later.
    wiring: Wiring,
    pci: Option<PciBus>,
    paused: bool,
}

/// What `boot` has put together.
pub struct Parts {
    /// Its processors, ready to run.
    pub vcpus: Vec<Vcpu>,
    /// Where their exits go.
    pub buses: Buses,
    /// The keyboard controller.
    pub keyboard: Arc<Mutex<I8042>>,
    /// What of the devices can be changed.
    pub controls: Controls,
    /// What the main loop has to watch for the devices.
    pub event_sources: Vec<Box<dyn EventSource>>,
    /// What is stopped by a pause and goes into snapshots.
    pub devices: Vec<SharedState>,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The guest's clock.
    pub clock: Clock,
    /// What connects devices that come later.
    pub wiring: Wiring,
    /// The PCI bus, if devices are there.
    pub pci: Option<PciBus>,
    /// Don't run yet: devices and processors are as a snapshot has them, and [`Machine::resume`] lets them go on.
    pub paused: bool,
}

impl Machine {
    /// Starts the vCPUs.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn start(parts: Parts, outcome: &Arc<Outcome>) -> io::Result<Self> {
        crate::kvm::install_kick_handler()?;
        let shared = Arc::new(Shared {
            buses: parts.buses,
            outcome: outcome.clone(),
            parking: Mutex::new(Parking { paused: parts.paused, ..Parking::default() }),
            changed: Condvar::new(),
        });
        let mut vcpus = Vec::with_capacity(parts.vcpus.len());
        // No vCPU enters the guest while this is locked: every thread is restricted before the first instruction.
        let parking = shared.parking();
        // The boot processor last: until it runs, the others only wait for it.
        for vcpu in parts.vcpus.into_iter().rev() {
            let shared = shared.clone();
            let kick = vcpu.kick_handle();
            let handle = Builder::new()
                .name(format!("vcpu{}", vcpu.index()))
                .stack_size(VCPU_STACK)
                .spawn(move || run_vcpu(vcpu, &shared))
                .inspect_err(|error| {
                    // The threads that wait already cannot be called back.
                    outcome.decide(ExitReason::HostError, format!("cannot start the vCPU threads: {error}"));
                })?;
            vcpus.push(VcpuThread { handle, kick });
        }
        // The set-up thread takes work only when it is restricted, too.
        seccomp::set_up(|| ()).ok_or_else(|| io::Error::other("the set-up thread has ended"))?;
        seccomp::enter(ThreadKind::Main).map_err(io::Error::other)?;
        drop(parking);
        Ok(Self {
            vcpus,
            shared,
            keyboard: parts.keyboard,
            controls: parts.controls,
            event_sources: parts.event_sources,
            devices: parts.devices,
            memory: parts.memory,
            clock: parts.clock,
            wiring: parts.wiring,
            pci: parts.pci,
            paused: parts.paused,
        })
    }

    /// What the main loop has to watch; empty at the second call.
    pub fn take_event_sources(&mut self) -> Vec<Box<dyn EventSource>> {
        std::mem::take(&mut self.event_sources)
    }

    /// The handles of devices that can be changed.
    pub const fn controls(&self) -> &Controls {
        &self.controls
    }

    /// The PCI bus, if devices are there.
    pub const fn pci(&self) -> Option<&PciBus> {
        self.pci.as_ref()
    }

    /// What connects devices that come later.
    pub const fn wiring(&self) -> &Wiring {
        &self.wiring
    }

    /// Takes over devices that were added.
    pub(crate) fn take_over(&mut self, added: Added) {
        self.devices.extend(added.devices);
        self.event_sources.extend(added.event_sources);
        self.controls.drives.extend(added.controls.drives);
        self.controls.interfaces.extend(added.controls.interfaces);
    }

    /// Closes the device of this name, which is off the bus.
    pub fn forget(&mut self, name: &str) {
        self.devices.retain(|(other, _)| other != name);
        self.controls.drives.retain(|id, _| drive_name(id) != name);
        self.controls.interfaces.retain(|id, _| interface_name(id) != name);
    }

    /// Whether the vCPUs are stopped.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Stops all vCPUs, then all devices, and returns when nothing touches the guest's memory. Does nothing if they are
    /// stopped.
    pub fn pause(&mut self) {
        if std::mem::replace(&mut self.paused, true) {
            return;
        }
        self.shared.parking().paused = true;
        for vcpu in &self.vcpus {
            // SAFETY: the thread is joined nowhere, and it returns its vCPU rather than dropping it.
            unsafe { vcpu.kick.kick(vcpu.handle.as_pthread_t()) };
        }
        let mut parking = self.shared.parking();
        // A thread that has ended (the machine crashed) will not park.
        while parking.parked < self.vcpus.len() && !self.shared.outcome.ending().load(Ordering::Acquire) {
            let waited = self.shared.changed.wait_timeout(parking, LOOK_AGAIN);
            parking = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(parking);
        for (_, device) in &self.devices {
            device.lock().unwrap_or_else(PoisonError::into_inner).pause();
        }
    }

    /// The state of all processors, which must be stopped, in the order of their indices.
    ///
    /// # Errors
    /// KVM refused.
    pub fn save_vcpus(&self) -> Result<Vec<VcpuState>, KvmError> {
        let mut parking = self.shared.parking();
        parking.saving = Some(BTreeMap::new());
        self.shared.changed.notify_all();
        // Only a thread that has ended has nothing to say, and then the process ends, too.
        while parking.saving.as_ref().is_some_and(|states| states.len() < self.vcpus.len())
            && !self.shared.outcome.ending().load(Ordering::Acquire)
        {
            let waited = self.shared.changed.wait_timeout(parking, LOOK_AGAIN);
            parking = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        parking.saving.take().unwrap_or_default().into_values().collect()
    }

    /// The state of all devices, which must be stopped.
    ///
    /// # Errors
    /// A device can't be part of a snapshot.
    pub fn save_devices(&self) -> Result<BTreeMap<String, DeviceState>, CreateError> {
        let save = |(name, device): &SharedState| {
            let state = device.lock().unwrap_or_else(PoisonError::into_inner).save();
            let state = state.map_err(|source| CreateError::Device { device: name.clone(), source })?;
            Ok((name.clone(), state))
        };
        self.devices.iter().map(save).collect()
    }

    /// The guest's memory.
    pub const fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The guest's clock.
    pub const fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Lets devices and vCPUs run on.
    pub fn resume(&mut self) {
        if !std::mem::take(&mut self.paused) {
            return;
        }
        for (_, device) in &self.devices {
            device.lock().unwrap_or_else(PoisonError::into_inner).resume();
        }
        self.shared.parking().paused = false;
        self.shared.changed.notify_all();
    }

    /// Presses Ctrl, Alt and Del on the guest's keyboard.
    ///
    /// # Errors
    /// The guest does not take keys now.
    pub fn send_ctrl_alt_del(&self) -> Result<(), KeyboardBusy> {
        self.keyboard.lock().unwrap_or_else(PoisonError::into_inner).send_ctrl_alt_del()
    }
}

fn run_vcpu(mut vcpu: Vcpu, shared: &Shared) -> Vcpu {
    let outcome = &shared.outcome;
    if let Err(error) = seccomp::enter(ThreadKind::Vcpu) {
        outcome.decide(ExitReason::HostError, error_chain(&error));
        return vcpu;
    }
    let Buses { ports, mmio } = &shared.buses;
    loop {
        shared.park(&vcpu);
        match vcpu.run(ports, mmio, outcome.ending()) {
            Stop::Interrupted if outcome.ending().load(Ordering::Acquire) => return vcpu,
            Stop::Interrupted => {}
            Stop::Crash(crash) => {
                VCPU.failures.add_one();
                outcome.decide(ExitReason::Crash, crash.to_string());
                return vcpu;
            }
            Stop::Failed(error) => {
                VCPU.failures.add_one();
                outcome.decide(ExitReason::HostError, error_chain(&error));
                return vcpu;
            }
        }
    }
}
