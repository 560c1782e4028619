//! The processors and the clock in a snapshot: reading them from KVM, and giving them to it.
//!
//! The order of the calls is KVM's (Linux `Documentation/virt/kvm/api.rst`): reading the multiprocessing state first lets
//! pending INIT and start-up interrupts take effect; CPUID comes before everything that it decides, the local APIC's base
//! (in `sregs`) before its registers, the TSC before the timer that is measured by it, and the timer's mode (one of the local
//! APIC's registers) before a deadline, which KVM drops in another mode.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use kvm_bindings::{
    CpuId, KVM_CLOCK_REALTIME, Msrs, Xsave, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{KvmError, Shared};

/// A structure of KVM's as its bytes, in base64.
#[derive(Debug, Clone, Copy, Default)]
pub struct Raw<T>(pub T);

impl<T: IntoBytes + Immutable> Serialize for Raw<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(self.0.as_bytes()))
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Raw<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = BASE64.decode(String::deserialize(deserializer)?).map_err(de::Error::custom)?;
        let wrong = || de::Error::custom(format_args!("{} bytes instead of {}", bytes.len(), size_of::<T>()));
        T::read_from_bytes(&bytes).map(Self).map_err(|_| wrong())
    }
}

/// One CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leaf {
    function: u32,
    index: u32,
    flags: u32,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

impl Leaf {
    /// From KVM's form.
    pub const fn new(entry: &kvm_cpuid_entry2) -> Self {
        let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *entry;
        Self { function, index, flags, eax, ebx, ecx, edx }
    }

    fn entry(self) -> kvm_cpuid_entry2 {
        let Self { function, index, flags, eax, ebx, ecx, edx } = self;
        kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
    }
}

/// A processor.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    cpuid: Vec<Leaf>,
    mp_state: u32,
    regs: Raw<kvm_regs>,
    sregs: Raw<kvm_sregs>,
    /// FPU, SSE, AVX and so on: the XSAVE area as 32-bit words.
    xsave: Words,
    xcrs: Raw<kvm_xcrs>,
    debug_regs: Raw<kvm_debugregs>,
    lapic: Raw<kvm_lapic_state>,
    events: Raw<kvm_vcpu_events>,
    /// By number, with those of the paravirtual clock.
    msrs: BTreeMap<u32, u64>,
    /// Frequency of the time stamp counter, where KVM tells it.
    tsc_khz: Option<u32>,
}

impl VcpuState {
    /// The identification that the guest was given.
    pub fn cpuid(&self) -> &[Leaf] {
        &self.cpuid
    }
}

/// 32-bit words as base64 of their little-endian bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Words(Vec<u32>);

impl Serialize for Words {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = self.0.iter().flat_map(|word| word.to_le_bytes()).collect();
        serializer.serialize_str(&BASE64.encode(bytes))
    }
}

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = BASE64.decode(String::deserialize(deserializer)?).map_err(de::Error::custom)?;
        let (words, rest) = bytes.as_chunks::<4>();
        if !rest.is_empty() {
            return Err(de::Error::custom("not a number of 32-bit words"));
        }
        Ok(Self(words.iter().map(|word| u32::from_le_bytes(*word)).collect()))
    }
}

/// KVM's clock, from which guests have their time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// Nanoseconds of the guest's monotonic time.
    pub clock: u64,
    /// The host's time of day at the same moment, in nanoseconds since 1970.
    pub realtime: Option<u64>,
}

/// Why a processor can't be made here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuMismatch {
    /// Intel's and AMD's cannot replace each other.
    #[error("the snapshot was taken on a {saved:?} processor, this is a {here:?}")]
    Vendor {
        /// In the snapshot.
        saved: String,
        /// Of this host.
        here: String,
    },
    /// Something the guest may use.
    #[error(
        "this host lacks processor features that the guest was given: bits {bits:#x} of CPUID {function:#x}.{index} {register}"
    )]
    Features {
        /// Leaf.
        function: u32,
        /// Subleaf.
        index: u32,
        /// Register.
        register: &'static str,
        /// What is missing.
        bits: u32,
    },
    /// Fewer physical address bits.
    #[error("the guest was given {saved} physical address bits, this host has {here}")]
    AddressBits {
        /// In the snapshot.
        saved: u32,
        /// Of this host.
        here: u32,
    },
}

/// A register of a leaf.
type Register = (&'static str, fn(&Leaf) -> u32);
const EAX: Register = ("EAX", |leaf| leaf.eax);
const EBX: Register = ("EBX", |leaf| leaf.ebx);
const ECX: Register = ("ECX", |leaf| leaf.ecx);
const EDX: Register = ("EDX", |leaf| leaf.edx);

/// Where feature bits are, and those of them that only mirror a control register (OSXSAVE, OSPKE) or an APIC's state.
const FEATURES: [(u32, u32, Register, u32); 17] = [
    (0x1, 0, ECX, 1 << 27),
    (0x1, 0, EDX, 1 << 9),
    (0x6, 0, EAX, 0),
    (0x7, 0, EBX, 0),
    (0x7, 0, ECX, 1 << 4),
    (0x7, 0, EDX, 0),
    (0x7, 1, EAX, 0),
    (0x7, 1, EDX, 0),
    (0x7, 2, EDX, 0),
    (0xd, 0, EAX, 0),
    (0xd, 0, EDX, 0),
    (0xd, 1, EAX, 0),
    (0x8000_0001, 0, ECX, 0),
    (0x8000_0001, 0, EDX, 1 << 9),
    (0x8000_0007, 0, EDX, 0),
    (0x8000_0008, 0, EBX, 0),
    (0x4000_0001, 0, EAX, 0),
];

/// Whether a host that would show `here` can run a guest that was shown `saved`: the same vendor, and every feature. The
/// model may differ: the guest goes on seeing the one it was started with.
fn check_cpu(saved: &[Leaf], here: &[Leaf]) -> Result<(), CpuMismatch> {
    let find = |leaves: &[Leaf], function, index| {
        leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).copied()
    };
    let vendor = |leaves| {
        let Leaf { ebx, ecx, edx, .. } = find(leaves, 0, 0).unwrap_or(NO_LEAF);
        String::from_utf8_lossy([ebx, edx, ecx].map(u32::to_le_bytes).as_flattened()).into_owned()
    };
    if vendor(saved) != vendor(here) {
        return Err(CpuMismatch::Vendor { saved: vendor(saved), here: vendor(here) });
    }
    for (function, index, (register, value), ignored) in FEATURES {
        let wanted = find(saved, function, index).map_or(0, |leaf| value(&leaf));
        let offered = find(here, function, index).map_or(0, |leaf| value(&leaf));
        let bits = wanted & !offered & !ignored;
        if bits != 0 {
            return Err(CpuMismatch::Features { function, index, register, bits });
        }
    }
    let address_bits = |leaves| find(leaves, 0x8000_0008, 0).map_or(36, |leaf| leaf.eax & 0xff);
    let (saved, here) = (address_bits(saved), address_bits(here));
    if saved > here { Err(CpuMismatch::AddressBits { saved, here }) } else { Ok(()) }
}

const NO_LEAF: Leaf = Leaf { function: 0, index: 0, flags: 0, eax: 0, ebx: 0, ecx: 0, edx: 0 };

pub(super) const MSR_TSC: u32 = 0x10;
pub(super) const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// What is restored after the local APIC's registers.
const AFTER_LAPIC: [u32; 1] = [MSR_TSC_DEADLINE];
/// The memory type range registers, which KVM_GET_MSR_INDEX_LIST leaves out (SDM vol. 3A §12.11).
const MTRRS: [u32; 28] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e,
    0x20f, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x2ff,
];
/// KVM takes this many at a time.
const MSRS_AT_A_TIME: usize = 256;

/// Frequencies of time stamp counters that count as the same (250 parts in a million, as QEMU has it).
const fn same_frequency(a: u32, b: u32) -> bool {
    a.abs_diff(b) as u64 * 4000 <= a as u64
}

/// The processor calls, with errors that name them.
pub(super) struct Processor<'a> {
    pub fd: &'a VcpuFd,
    pub index: u8,
    pub vm: &'a Shared,
    /// The identification that the guest was given. KVM's own copy isn't asked: where the processor answers CPUID by
    /// itself, it has been seen to hold the host's.
    pub cpuid: &'a [Leaf],
}

impl Processor<'_> {
    fn failed(&self, call: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError + use<> {
        let vcpu = self.index;
        move |source| KvmError::Vcpu { call, vcpu, source }
    }

    /// Everything about the processor, which must not be running.
    pub fn save(&self) -> Result<VcpuState, KvmError> {
        let fd = self.fd;
        let mp_state = fd.get_mp_state().map_err(self.failed("KVM_GET_MP_STATE"))?.mp_state;
        Ok(VcpuState {
            cpuid: self.cpuid.to_vec(),
            mp_state,
            regs: Raw(fd.get_regs().map_err(self.failed("KVM_GET_REGS"))?),
            sregs: Raw(fd.get_sregs().map_err(self.failed("KVM_GET_SREGS"))?),
            xsave: self.xsave()?,
            xcrs: Raw(fd.get_xcrs().map_err(self.failed("KVM_GET_XCRS"))?),
            debug_regs: Raw(fd.get_debug_regs().map_err(self.failed("KVM_GET_DEBUGREGS"))?),
            lapic: Raw(fd.get_lapic().map_err(self.failed("KVM_GET_LAPIC"))?),
            events: Raw(fd.get_vcpu_events().map_err(self.failed("KVM_GET_VCPU_EVENTS"))?),
            msrs: self.msrs(&self.msr_numbers()?)?,
            tsc_khz: fd.get_tsc_khz().ok(),
        })
    }

    /// Makes a processor that was just created the saved one.
    pub fn restore(&self, state: &VcpuState) -> Result<(), KvmError> {
        check_cpu(&state.cpuid, self.cpuid)?;
        let fd = self.fd;
        let entries: Vec<_> = state.cpuid.iter().map(|leaf| leaf.entry()).collect();
        let cpuid = CpuId::from_entries(&entries).map_err(|_| KvmError::TooManyLeaves(entries.len()))?;
        fd.set_cpuid2(&cpuid).map_err(self.failed("KVM_SET_CPUID2"))?;
        self.restore_frequency(state.tsc_khz)?;
        let mp_state = kvm_mp_state { mp_state: state.mp_state };
        fd.set_mp_state(mp_state).map_err(self.failed("KVM_SET_MP_STATE"))?;
        fd.set_regs(&state.regs.0).map_err(self.failed("KVM_SET_REGS"))?;
        fd.set_sregs(&state.sregs.0).map_err(self.failed("KVM_SET_SREGS"))?;
        self.restore_xsave(&state.xsave)?;
        fd.set_xcrs(&state.xcrs.0).map_err(self.failed("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&state.debug_regs.0).map_err(self.failed("KVM_SET_DEBUGREGS"))?;
        // The timer runs from here on, so that the counter by which the guest measures it must already: time that passes
        // between the two is time that the guest sees, where the other order would take it away.
        let (last, first): (BTreeMap<_, _>, BTreeMap<_, _>) =
            state.msrs.clone().into_iter().partition(|(index, _)| AFTER_LAPIC.contains(index));
        self.restore_msrs(&first)?;
        fd.set_lapic(&state.lapic.0).map_err(self.failed("KVM_SET_LAPIC"))?;
        self.restore_msrs(&last)?;
        fd.set_vcpu_events(&state.events.0).map_err(self.failed("KVM_SET_VCPU_EVENTS"))
    }

    /// The guest has measured its counter: where this host's differs, KVM must scale.
    fn restore_frequency(&self, saved: Option<u32>) -> Result<(), KvmError> {
        let (Some(saved), Ok(here)) = (saved, self.fd.get_tsc_khz()) else { return Ok(()) };
        if same_frequency(saved, here) {
            return Ok(());
        }
        self.fd.set_tsc_khz(saved).map_err(self.failed("KVM_SET_TSC_KHZ"))
    }

    /// Bytes of KVM's XSAVE area on this host.
    fn xsave_bytes(&self) -> usize {
        usize::try_from(self.vm.fd.check_extension_int(Cap::Xsave2)).unwrap_or(0)
    }

    fn xsave(&self) -> Result<Words, KvmError> {
        let bytes = self.xsave_bytes();
        if bytes <= size_of::<kvm_xsave>() {
            let xsave = self.fd.get_xsave().map_err(self.failed("KVM_GET_XSAVE"))?;
            return Ok(Words(xsave.region.to_vec()));
        }
        let mut xsave = new_xsave(bytes);
        // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 reports.
        unsafe { self.fd.get_xsave2(&mut xsave) }.map_err(self.failed("KVM_GET_XSAVE2"))?;
        let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
        words.extend_from_slice(xsave.as_slice());
        Ok(Words(words))
    }

    fn restore_xsave(&self, Words(words): &Words) -> Result<(), KvmError> {
        let bytes = self.xsave_bytes().max(size_of::<kvm_xsave>());
        if words.len() < REGION_WORDS || words.len() * 4 > bytes {
            return Err(KvmError::XsaveSize { saved: words.len() * 4, here: bytes });
        }
        let (region, extra) = words.split_at(REGION_WORDS);
        let mut xsave = new_xsave(bytes);
        // SAFETY: only the contents change; the length is left alone.
        unsafe { xsave.as_mut_fam_struct() }.xsave.region.copy_from_slice(region);
        for (to, from) in xsave.as_mut_slice().iter_mut().zip(extra) {
            *to = *from;
        }
        // SAFETY: the buffer has at least the size that KVM_CAP_XSAVE2 reports.
        unsafe { self.fd.set_xsave2(&xsave) }.map_err(self.failed("KVM_SET_XSAVE"))
    }

    /// The registers that are part of a snapshot.
    pub fn msr_numbers(&self) -> Result<Vec<u32>, KvmError> {
        let list = self
            .vm
            .kvm
            .get_msr_index_list()
            .map_err(|source| KvmError::Call("KVM_GET_MSR_INDEX_LIST", source))?;
        Ok(list.as_slice().iter().copied().chain(MTRRS).collect())
    }

    /// The values of those registers that this processor has.
    pub fn msrs(&self, numbers: &[u32]) -> Result<BTreeMap<u32, u64>, KvmError> {
        let mut values = BTreeMap::new();
        let mut left = numbers;
        while !left.is_empty() {
            let some = &left[..left.len().min(MSRS_AT_A_TIME)];
            let entries: Vec<_> =
                some.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
            let mut msrs = Msrs::from_entries(&entries).expect("at most as many as KVM takes");
            let read = self.fd.get_msrs(&mut msrs).map_err(self.failed("KVM_GET_MSRS"))?;
            values.extend(msrs.as_slice()[..read].iter().map(|entry| (entry.index, entry.data)));
            // KVM stops at one that it lists, but this guest hasn't got.
            let skipped = usize::from(read < some.len());
            left = &left[read + skipped..];
        }
        Ok(values)
    }

    /// Sets what is not so already: not every register that can be read can also be written.
    fn restore_msrs(&self, saved: &BTreeMap<u32, u64>) -> Result<(), KvmError> {
        let numbers: Vec<u32> = saved.keys().copied().collect();
        let fresh = self.msrs(&numbers)?;
        let entries: Vec<_> = saved
            .iter()
            .filter(|(index, value)| **index == MSR_TSC || fresh.get(index) != Some(value))
            .map(|(&index, &data)| kvm_msr_entry { index, data, ..Default::default() })
            .collect();
        for some in entries.chunks(MSRS_AT_A_TIME) {
            let msrs = Msrs::from_entries(some).expect("at most as many as KVM takes");
            let written = self.fd.set_msrs(&msrs).map_err(self.failed("KVM_SET_MSRS"))?;
            if let Some(refused) = some.get(written) {
                return Err(KvmError::Msr { index: refused.index, vcpu: self.index });
            }
        }
        Ok(())
    }
}

const REGION_WORDS: usize = size_of::<kvm_xsave>() / 4;

/// An empty XSAVE area of `bytes`, at least those of the structure before extensions.
fn new_xsave(bytes: usize) -> Xsave {
    let extra = bytes.saturating_sub(size_of::<kvm_xsave>()).div_ceil(4);
    Xsave::new(extra).expect("a few KiB")
}

/// KVM's clock of a VM.
#[derive(Debug)]
pub struct Clock {
    pub(super) shared: std::sync::Arc<Shared>,
}

impl Clock {
    /// What it says.
    pub fn save(&self) -> Result<ClockState, KvmError> {
        let data = self.shared.fd.get_clock().map_err(|source| KvmError::Call("KVM_GET_CLOCK", source))?;
        // KVM tells when that was only where its clock follows the processor's counter.
        let told = (data.flags & KVM_CLOCK_REALTIME != 0).then_some(data.realtime);
        Ok(ClockState { clock: data.clock, realtime: told.or_else(realtime) })
    }

    /// Sets it; with `advance`, as if it had run on since.
    pub fn restore(&self, state: &ClockState, advance: bool) -> Result<(), KvmError> {
        let data = kvm_clock_data { clock: state.at(realtime().filter(|_| advance)), ..Default::default() };
        self.shared.fd.set_clock(&data).map_err(|source| KvmError::Call("KVM_SET_CLOCK", source))
    }
}

impl ClockState {
    /// What the clock says at this time of the host, if it ran on, else what it said.
    fn at(&self, now: Option<u64>) -> u64 {
        let passed = self.realtime.zip(now).map_or(0, |(then, now)| now.saturating_sub(then));
        self.clock.saturating_add(passed)
    }
}

/// Nanoseconds of the host's clock since 1970; None in a time before.
fn realtime() -> Option<u64> {
    SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_nanos().try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_ran_on_has_what_passed_and_never_goes_back() {
        let state = ClockState { clock: 5, realtime: Some(100) };
        assert_eq!(
            [Some(130), Some(90), None, Some(u64::MAX)].map(|now| state.at(now)),
            [35, 5, 5, u64::MAX - 95]
        );
        assert_eq!(ClockState { realtime: None, ..state }.at(Some(130)), 5);
    }

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Leaf {
        Leaf { function, index, flags: 0, eax, ebx, ecx, edx }
    }

    fn intel(features: u32) -> Vec<Leaf> {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        vec![
            leaf(0, 0, [0xd, word(b"Genu"), word(b"ntel"), word(b"ineI")]),
            leaf(1, 0, [0, 0, features, 0]),
            leaf(0x8000_0008, 0, [46, 0, 0, 0]),
        ]
    }

    #[test]
    fn a_host_with_all_features_and_more_is_accepted() {
        assert_eq!(check_cpu(&intel(0b01), &intel(0b11)), Ok(()));
        // OSXSAVE mirrors CR4 of the guest.
        assert_eq!(check_cpu(&intel(1 << 27), &intel(0)), Ok(()));
    }

    #[test]
    fn missing_features_another_vendor_and_fewer_address_bits_are_refused_and_named() {
        let error = check_cpu(&intel(0b110), &intel(0b010)).unwrap_err();
        assert_eq!(error, CpuMismatch::Features { function: 1, index: 0, register: "ECX", bits: 0b100 });
        let mut amd = intel(0);
        amd[0].ecx = u32::from_le_bytes(*b"cAMD");
        let error = check_cpu(&intel(0), &amd).unwrap_err().to_string();
        assert!(error.contains("GenuineIntel") && error.contains("cAMD"), "{error}");
        let mut small = intel(0);
        small[2].eax = 39;
        assert_eq!(check_cpu(&intel(0), &small), Err(CpuMismatch::AddressBits { saved: 46, here: 39 }));
    }

    #[test]
    fn structures_go_through_text_unchanged_and_other_sizes_are_refused() {
        let regs = kvm_regs { rip: 0x1234_5678_9abc, ..Default::default() };
        let text = serde_json::to_string(&Raw(regs)).unwrap();
        assert_eq!(serde_json::from_str::<Raw<kvm_regs>>(&text).unwrap().0, regs);
        assert!(serde_json::from_str::<Raw<kvm_sregs>>(&text).is_err());
        let words = Words(vec![1, 2, u32::MAX]);
        let text = serde_json::to_string(&words).unwrap();
        assert_eq!(serde_json::from_str::<Words>(&text).unwrap(), words);
        assert!(serde_json::from_str::<Words>("\"AAA=\"").is_err());
    }

    #[test]
    fn frequencies_within_250_ppm_are_the_same() {
        assert!(same_frequency(2_000_000, 2_000_500));
        assert!(!same_frequency(2_000_000, 2_000_501));
    }
}
