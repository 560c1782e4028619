//! The devices of a PC that are no virtio devices, and saved states of every device.

use std::io;
use std::sync::{Arc, Mutex};

use mote_vmm_api as api;
use serde_json::Value;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Input;
use super::devices::{self, Nobody};
use crate::devices::EventSource;
use crate::devices::bus::{Bus, BusDevice};
use crate::devices::i8042::I8042;
use crate::devices::pci::host::PciHost;
use crate::devices::pci::hotplug::HotPlug;
use crate::devices::rtc::Rtc;
use crate::devices::serial::Serial;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::pci::PciTransport;
use crate::devices::virtio::testing::memory;
use crate::ioapic::{IoApic, Router};
use crate::kvm::Message;
use crate::layout;
use crate::outcome::Outcome;
use crate::power::{ResetRegister, SleepRegisters};
use crate::snapshot::{self, DeviceState, Stateful};

/// Most accesses of one input.
const MAX_STEPS: usize = 1000;
/// Bytes of address space that a device of [`ports`] has.
const RANGE: u64 = 0x20;

impl Router for Nobody {
    fn set(&mut self, _routes: &[Option<Message>]) -> io::Result<()> {
        Ok(())
    }
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd")
}

fn serial() -> Serial {
    let config = api::Serial { serial_out_path: Some("/dev/null".into()), ..api::Serial::default() };
    Serial::new(Some(&config), event()).expect("a serial port").0
}

fn hot_plug() -> HotPlug {
    HotPlug::new(Arc::new(Mutex::new(PciHost::new(Arc::new(Bus::default())))), event()).expect("eventfds")
}

/// Accesses of any width at any offset of the serial port, the keyboard controller, the clock, the I/O APIC, the registers of
/// hot-plug and those that end the machine.
pub fn ports(data: &[u8]) {
    let outcome = Arc::new(Outcome::new().expect("an eventfd"));
    let mut devices: [Box<dyn BusDevice>; 7] = [
        Box::new(serial()),
        Box::new(I8042::new(event(), || ())),
        Box::new(Rtc::new(|| 1_700_000_000)),
        Box::new(IoApic::new(Nobody)),
        Box::new(hot_plug()),
        Box::new(ResetRegister::new(outcome.clone())),
        Box::new(SleepRegisters::new(outcome)),
    ];
    let mut input = Input(data);
    for _ in 0..MAX_STEPS {
        let (Some(kind), Some(offset)) = (input.byte(), input.byte()) else { break };
        let offset = u64::from(offset) % RANGE;
        let width = [1, 2, 4, 8][usize::from(kind >> 4) % 4].min((RANGE - offset) as usize);
        let device = &mut devices[usize::from(kind & 0xf) % 7];
        if kind & 0x80 == 0 {
            let Some(value) = input.array::<8>() else { break };
            device.write(offset, &value[..width]);
        } else {
            device.read(offset, &mut [0xaa; 8][..width]);
        }
    }
}

/// A whole state file's body; and the state of one device, which is restored, goes on and is saved again.
pub fn snapshot(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else { return };
    if *kind == 0 {
        snapshot::parse(text);
        return;
    }
    let Ok(state) = serde_json::from_slice::<Value>(text) else { return };
    let state = DeviceState::new(&state).expect("plain data");
    let virtio = |device: Box<dyn VirtioDevice>| -> Box<dyn Stateful> {
        if kind & 0x80 == 0 {
            Box::new(MmioTransport::new(device, memory(), event()).expect("a transport"))
        } else {
            let address = layout::PCI_WINDOW as u32;
            Box::new(PciTransport::new(device, memory(), &Nobody, address).expect("a transport"))
        }
    };
    // Files outlive their devices.
    let (disk, path) = devices::disk();
    let mut device: Box<dyn Stateful> = match kind & 0x7f {
        1 => Box::new(serial()),
        2 => Box::new(I8042::new(event(), || ())),
        3 => Box::new(Rtc::new(|| 1_700_000_000)),
        4 => Box::new(IoApic::new(Nobody)),
        5 => Box::new(hot_plug()),
        6 => Box::new(PciHost::new(Arc::new(Bus::default()))),
        7 => virtio(devices::new_block(path, false)),
        8 => virtio(devices::new_net(false).0),
        9 => virtio(devices::new_net(true).0),
        10 => virtio(devices::new_rng(false)),
        11 => virtio(Box::new(devices::new_balloon())),
        12 => virtio(Box::new(devices::new_console(false))),
        13 => virtio(devices::new_pmem(path, false)),
        14 => virtio(Box::new(devices::new_mem())),
        _ => {
            let (vsock, mut file) = devices::new_vsock();
            file.finish();
            virtio(vsock)
        }
    };
    if device.restore(&state).is_ok() {
        device.resume();
        device.pause();
        device.save().expect("what could be restored can be saved");
    }
    drop(device);
    drop(disk);
}
