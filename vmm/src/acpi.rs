//! ACPI tables: a hardware-reduced platform (ACPI 6.5 §4.1) with its processors, I/O APIC, serial port, keyboard
//! controller and virtio devices: each one of them with mmio registers, or the PCI bus that they are on.
//!
//! Hardware-reduced means no PIC, PIT, PM timer or SCI for the kernel to probe, each of which costs exits; the
//! kernel switches off by the sleep control register and restarts by the reset register.

use acpi_tables::aml::{
    AddressSpace as Window, AddressSpaceCacheable, And, Arg, Device, EISAName, Equal, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall,
    Name, Notify, ONE, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::devices::pci::host::DEVICES as PCI_DEVICES;
use crate::devices::pci::hotplug::HotPlug;
use crate::devices::rtc::CENTURY;
use crate::layout;
use crate::memory::GuestMemory;

const OEM_ID: [u8; 6] = *b"MOTE  ";
const OEM_TABLE: [u8; 8] = *b"MOTEVM  ";
const OEM_REVISION: u32 = 1;
/// Bytes of the header that every table but the RSDP starts with.
const HEADER: u32 = 36;

/// `_S5` sleep type that means "off" here.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// What to write to the reset register.
pub const RESET_VALUE: u8 = 0x06;

/// Value of the notification that a VM generation id has changed.
const NOTIFY_CHANGED: u8 = 0x80;
/// Value of the notification that a device is to be ejected (ACPI 6.5 §5.6.6).
const NOTIFY_EJECT: u8 = 3;

/// FADT IAPC_BOOT_ARCH: there is a keyboard controller.
const BOOT_ARCH_8042: u16 = 1 << 1;
/// FADT IAPC_BOOT_ARCH: do not probe for VGA.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;

/// The tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// Guest memory ends below them.
    #[error("cannot write the ACPI tables into guest memory")]
    Write(#[from] GuestMemoryError),
    /// A bound in `layout` is wrong.
    #[error("the ACPI tables need {0} bytes, more than there is room for")]
    TooLarge(usize),
}

/// A virtio-mmio device to declare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioDevice {
    /// Address of its registers.
    pub address: u32,
    /// Its interrupt.
    pub irq: u32,
}

/// What the tables describe.
#[derive(Debug, Clone, Copy)]
pub struct Platform<'a> {
    /// Number of processors.
    pub vcpus: u8,
    /// Devices with mmio registers.
    pub virtio: &'a [VirtioDevice],
    /// There is a PCI bus.
    pub pci: bool,
}

/// Writes all tables and returns the address of the RSDP.
pub fn write_tables(memory: &GuestMemory, platform: &Platform<'_>) -> Result<u64, AcpiError> {
    let mut tables = Tables { bytes: vec![0; Rsdp::len().next_multiple_of(16)] };
    let dsdt = tables.append(&dsdt(platform));
    let fadt = tables.append(&fadt(dsdt));
    let madt = tables.append(&madt(platform.vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if platform.pci {
        let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE, OEM_REVISION);
        mcfg.add_ecam(layout::PCI_ECAM, 0, 0, 0);
        xsdt.add_entry(tables.append(&mcfg));
    }
    let xsdt = tables.append(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    tables.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    if tables.bytes.len() as u64 > layout::ACPI_TABLES_END - layout::ACPI_TABLES {
        return Err(AcpiError::TooLarge(tables.bytes.len()));
    }
    memory.write_slice(&tables.bytes, GuestAddress(layout::ACPI_TABLES))?;
    Ok(layout::ACPI_TABLES)
}

/// The tables' bytes, the first of which goes to [`layout::ACPI_TABLES`].
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Adds a table and returns its guest address.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        let offset = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(offset, 0);
        table.to_aml_bytes(&mut self.bytes);
        layout::ACPI_TABLES + offset as u64
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let io = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::FixRtc);
    fadt.iapc_boot_arch = (BOOT_ARCH_8042 | BOOT_ARCH_NO_VGA).into();
    fadt.century = CENTURY;
    fadt.reset_reg = io(layout::RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = io(layout::ACPI_SLEEP_PORT);
    fadt.sleep_status_reg = io(layout::ACPI_SLEEP_PORT + 1);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"MOTE    ").into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let mut madt =
        MADT::new(OEM_ID, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    for index in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn dsdt(platform: &Platform<'_>) -> Sdt {
    let mut aml = Vec::new();
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &ZERO]);
    Name::new(Path::new("_S5_"), &off).to_aml_bytes(&mut aml);
    legacy_devices(&mut aml);
    generation_id(&mut aml);
    for (index, device) in platform.virtio.iter().enumerate() {
        virtio_device(&mut aml, index, device);
    }
    if platform.pci {
        pci_bus(&mut aml);
        hot_plug(&mut aml);
    }
    events(&mut aml, platform.pci);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, 2, OEM_ID, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&aml);
    dsdt
}

fn legacy_devices(aml: &mut dyn AmlSink) {
    let serial_io = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8);
    let serial_irq = Interrupt::new(true, true, false, false, layout::SERIAL_IRQ);
    let serial_resources = ResourceTemplate::new(vec![&serial_io, &serial_irq]);
    let data_io = IO::new(layout::I8042_PORT, layout::I8042_PORT, 1, 1);
    let command_io = IO::new(layout::I8042_PORT + 4, layout::I8042_PORT + 4, 1, 1);
    let keyboard_irq = Interrupt::new(true, true, false, false, layout::I8042_IRQ);
    let keyboard_resources = ResourceTemplate::new(vec![&data_io, &command_io, &keyboard_irq]);
    let clock_io = IO::new(layout::RTC_PORT, layout::RTC_PORT, 1, 2);
    let clock_resources = ResourceTemplate::new(vec![&clock_io]);
    Scope::new(
        Path::new("_SB_"),
        vec![
            &Device::new(
                Path::new("COM1"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(Path::new("_CRS"), &serial_resources),
                ],
            ),
            &Device::new(
                Path::new("PS2K"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0303")),
                    &Name::new(Path::new("_CRS"), &keyboard_resources),
                ],
            ),
            // Without an interrupt: the clock has no alarm.
            &Device::new(
                Path::new("RTC_"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
                    &Name::new(Path::new("_CRS"), &clock_resources),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// Where the VM generation id is.
fn generation_id(aml: &mut dyn AmlSink) {
    let (low, high) = (layout::VM_GENERATION_ID as u32, ZERO);
    let address = Package::new(vec![&low, &high]);
    // The name of the specification is longer than ACPI allows for an id; Windows knows both.
    let (name, short) = ("VM_Gen_Counter", "VMGENCTR");
    let names = Package::new(vec![&name, &short]);
    let (id, names) = (Name::new(Path::new("_HID"), &"MOTE0001"), Name::new(Path::new("_CID"), &names));
    let (text, address) = (Name::new(Path::new("_DDN"), &name), Name::new(Path::new("ADDR"), &address));
    let device = Device::new(Path::new("VGEN"), vec![&id, &names, &text, &address]);
    Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(aml);
}

/// Events of a hardware-reduced platform are interrupts of the Generic Event Device (ACPI 6.5 §5.6.9): that the VM generation id has changed, and
/// that functions on the PCI bus come or go.
fn events(aml: &mut dyn AmlSink, pci: bool) {
    let changed_irq = Interrupt::new(true, true, false, false, layout::GENERATION_IRQ);
    let plug_irq = Interrupt::new(true, true, false, false, layout::HOT_PLUG_IRQ);
    let mut interrupts: Vec<&dyn Aml> = vec![&changed_irq];
    let is_changed = Equal::new(&Arg(0), &layout::GENERATION_IRQ);
    let counter = Path::new("\\_SB_.VGEN");
    let changed = Notify::new(&counter, &NOTIFY_CHANGED);
    let changed = If::new(&is_changed, vec![&changed]);
    let is_plug = Equal::new(&Arg(0), &layout::HOT_PLUG_IRQ);
    let scan = MethodCall::new(Path::new("\\_SB_.PHPR.SCAN"), vec![]);
    let plug = If::new(&is_plug, vec![&scan]);
    let mut handlers: Vec<&dyn Aml> = vec![&changed];
    if pci {
        interrupts.push(&plug_irq);
        handlers.push(&plug);
    }
    let resources = ResourceTemplate::new(interrupts);
    let id = Name::new(Path::new("_HID"), &"ACPI0013");
    let (unique, current) = (Name::new(Path::new("_UID"), &ZERO), Name::new(Path::new("_CRS"), &resources));
    let event = Method::new(Path::new("_EVT"), 1, true, handlers);
    let device = Device::new(Path::new("GED_"), vec![&id, &unique, &current, &event]);
    Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(aml);
}

/// The registers of `devices::pci::hotplug` and the methods that use them: `PHPR.SCAN` reads which slots have news and notifies them, each slot's `_EJ0`
/// says that the guest has given it up.
fn hot_plug(aml: &mut dyn AmlSink) {
    let port = layout::HOT_PLUG_PORT;
    let region = OpRegion::new(Path::new("REGS"), OpRegionSpace::SystemIO, &port, &(HotPlug::PORTS as u8));
    let fields = Field::new(
        Path::new("REGS"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        [b"INSD", b"LEAV", b"EJCT"].map(|name| FieldEntry::Named(*name, 32)).to_vec(),
    );
    let (inserted, leaving) = (Path::new("INSD"), Path::new("LEAV"));
    let (first, second) = (Local(0), Local(1));
    // Stored first: reading clears.
    let (read_inserted, read_leaving) = (Store::new(&first, &inserted), Store::new(&second, &leaving));
    let tell = |slots| MethodCall::new(Path::new("\\_SB_.PCI0.TELL"), slots);
    let (new, gone) = (tell(vec![&first, &ONE]), tell(vec![&second, &NOTIFY_EJECT]));
    let scan = Method::new(Path::new("SCAN"), 0, true, vec![&read_inserted, &read_leaving, &new, &gone]);
    let ports = IO::new(port, port, 1, HotPlug::PORTS as u8);
    let ports = ResourceTemplate::new(vec![&ports]);
    let id = Name::new(Path::new("_HID"), &EISAName::new("PNP0A06"));
    let (unique, current) =
        (Name::new(Path::new("_UID"), &"PCI hot-plug"), Name::new(Path::new("_CRS"), &ports));
    let registers = Device::new(Path::new("PHPR"), vec![&id, &unique, &current, &region, &fields, &scan]);
    Scope::new(Path::new("_SB_"), vec![&registers]).to_aml_bytes(aml);

    let mut body = Vec::new();
    let mut handlers = Vec::new();
    for slot in 1..PCI_DEVICES as u8 {
        let (name, bit) = (format!("S{slot:03}"), 1_u32 << slot);
        let eject_register = Path::new("\\_SB_.PHPR.EJCT");
        let eject = Store::new(&eject_register, &bit);
        let address = Name::new(Path::new("_ADR"), &(u32::from(slot) << 16));
        let number = Name::new(Path::new("_SUN"), &slot);
        let eject = Method::new(Path::new("_EJ0"), 1, true, vec![&eject]);
        Device::new(Path::new(&name), vec![&address, &number, &eject]).to_aml_bytes(&mut body);
        let is_this = And::new(&ZERO, &Arg(0), &bit);
        let device = Path::new(&name);
        If::new(&is_this, vec![&Notify::new(&device, &Arg(1))]).to_aml_bytes(&mut handlers);
    }
    let handlers = Raw(handlers);
    Method::new(Path::new("TELL"), 2, true, vec![&handlers]).to_aml_bytes(&mut body);
    Scope::new(Path::new("\\_SB_.PCI0"), vec![&Raw(body)]).to_aml_bytes(aml);
}

/// AML that is made already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// The host bridge of bus 0 with the window for its functions' registers. There is no `_PRT`: no function has a legacy
/// interrupt. Without `_OSC` the kernel leaves native hot-plug, AER and power management alone.
fn pci_bus(aml: &mut dyn AmlSink) {
    let end = (layout::PCI_WINDOW + layout::PCI_WINDOW_SIZE - 1) as u32;
    let buses = Window::<u16>::new_bus_number(0, 0);
    let start = layout::PCI_WINDOW as u32;
    let memory = Window::new_memory(AddressSpaceCacheable::NotCacheable, true, start, end, None);
    let windows = ResourceTemplate::new(vec![&buses, &memory]);
    let express = Name::new(Path::new("_HID"), &EISAName::new("PNP0A08"));
    let conventional = Name::new(Path::new("_CID"), &EISAName::new("PNP0A03"));
    let unique = Name::new(Path::new("_UID"), &ZERO);
    let segment = Name::new(Path::new("_SEG"), &ZERO);
    let base_bus = Name::new(Path::new("_BBN"), &ZERO);
    let coherent = Name::new(Path::new("_CCA"), &ONE);
    let current = Name::new(Path::new("_CRS"), &windows);
    let children: Vec<&dyn Aml> =
        vec![&express, &conventional, &unique, &segment, &base_bus, &coherent, &current];
    let ecam = Memory32Fixed::new(true, layout::PCI_ECAM as u32, layout::PCI_ECAM_SIZE as u32);
    let ecam = ResourceTemplate::new(vec![&ecam]);
    let board = Name::new(Path::new("_HID"), &EISAName::new("PNP0C02"));
    let reserved = Name::new(Path::new("_CRS"), &ecam);
    Scope::new(
        Path::new("_SB_"),
        vec![
            &Device::new(Path::new("PCI0"), children),
            &Device::new(Path::new("MBRD"), vec![&board, &unique, &reserved]),
        ],
    )
    .to_aml_bytes(aml);
}

fn virtio_device(aml: &mut dyn AmlSink, index: usize, device: &VirtioDevice) {
    let registers = Memory32Fixed::new(true, device.address, layout::VIRTIO_MMIO_SIZE as u32);
    let interrupt = Interrupt::new(true, true, false, false, device.irq);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    let id = Name::new(Path::new("_HID"), &"LNRO0005");
    let unique = Name::new(Path::new("_UID"), &index);
    let coherent = Name::new(Path::new("_CCA"), &ONE);
    let current = Name::new(Path::new("_CRS"), &resources);
    let device = Device::new(Path::new(&format!("V{index:03}")), vec![&id, &unique, &coherent, &current]);
    Scope::new(Path::new("_SB_"), vec![&device]).to_aml_bytes(aml);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table at `address`: its signature and bytes, with the checksum verified.
    fn table(memory: &GuestMemory, address: u64) -> ([u8; 4], Vec<u8>) {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        assert_eq!(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum");
        (bytes[..4].try_into().unwrap(), bytes)
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn tables_are_reachable_from_the_rsdp_with_valid_checksums() {
        let memory = crate::memory::create(2).unwrap();
        let devices: Vec<_> = (0..layout::MAX_VIRTIO_DEVICES as u32)
            .map(|n| VirtioDevice { address: 0xc000_1000 + n * 0x1000, irq: 5 + n })
            .collect();
        let rsdp = write_tables(&memory, &Platform { vcpus: 32, virtio: &devices, pci: true }).unwrap();
        let mut bytes = [0; 36];
        memory.read_slice(&mut bytes, GuestAddress(rsdp)).unwrap();
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let (signature, xsdt) = table(&memory, u64_at(&bytes, 24));
        assert_eq!(&signature, b"XSDT");
        let (signature, fadt) = table(&memory, u64_at(&xsdt, 36));
        assert_eq!(&signature, b"FACP");
        let (signature, dsdt) = table(&memory, u64_at(&fadt, 140));
        assert_eq!(&signature, b"DSDT");
        assert_eq!(dsdt.windows(8).filter(|bytes| *bytes == b"LNRO0005").count(), layout::MAX_VIRTIO_DEVICES);
        let (signature, madt) = table(&memory, u64_at(&xsdt, 44));
        assert_eq!(&signature, b"APIC");
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
        let (signature, mcfg) = table(&memory, u64_at(&xsdt, 52));
        assert_eq!(&signature, b"MCFG");
        assert_eq!(u64_at(&mcfg, 44), layout::PCI_ECAM);
        assert!(dsdt.windows(4).any(|bytes| bytes == b"PCI0"));
        // ADDR as a package of a 32-bit number and zero.
        let address = dsdt.windows(4).position(|bytes| bytes == b"ADDR").unwrap();
        assert_eq!(dsdt[address + 4..][..8], [0x12, 8, 2, 0x0c, 0, 0xf0, 0x0d, 0]);
    }
}
