//! What the guest sees of its processors: KVM's supported CPUID leaves, with the topology of this VM.
//!
//! A pure transformation: nothing is added that `KVM_GET_SUPPORTED_CPUID` (or a capability, for the TSC deadline
//! timer) does not report. So CMPXCHG16B, for instance, is hidden where KVM cannot run it.
//! Leaves as in the Intel SDM vol. 2A "CPUID" and the AMD APM vol. 3 appendix E.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The processors of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u8,
    /// Pairs of vCPUs are threads of one core.
    pub smt: bool,
}

impl Topology {
    fn threads_per_core(self) -> u8 {
        if self.smt && self.vcpus > 1 { 2 } else { 1 }
    }

    fn cores(self) -> u8 {
        self.vcpus / self.threads_per_core()
    }

    /// Bits of an APIC id below the core number.
    fn thread_bits(self) -> u32 {
        bits_for(self.threads_per_core())
    }

    /// Bits of an APIC id below the package number.
    fn package_bits(self) -> u32 {
        self.thread_bits() + bits_for(self.cores())
    }
}

/// Number of bits that hold `count` different values.
fn bits_for(count: u8) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Sets bits `low..=high` of `register` to `value`.
fn set_bits(register: &mut u32, high: u32, low: u32, value: u32) {
    let mask = u32::MAX >> (31 - (high - low)) << low;
    *register = *register & !mask | value << low & mask;
}

const EDX1_HTT: u32 = 28;
const ECX1_TSC_DEADLINE: u32 = 24;
const ECX1_HYPERVISOR: u32 = 31;
const CACHE_TYPE: u32 = 0x1f;
/// `type << 8` of a level in leaves 0xb and 0x1f.
const LEVEL_SMT: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// Width of a guest-physical address (leaf 0x8000_0008).
pub(super) fn physical_address_bits(supported: &CpuId) -> u8 {
    supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == 0x8000_0008)
        .map_or(36, |entry| (entry.eax & 0xff) as u8)
}

/// The leaves of vCPU `index`, whose APIC id is its index.
pub(super) fn for_vcpu(
    supported: &CpuId,
    topology: Topology,
    index: u8,
    deadline_timer: bool,
) -> Vec<kvm_cpuid_entry2> {
    let has_leaf_1f = supported.as_slice().iter().any(|entry| entry.function == 0x1f);
    let mut leaves = Vec::with_capacity(supported.as_slice().len() + 4);
    for entry in supported.as_slice() {
        let mut entry = *entry;
        match entry.function {
            0x1 => features(&mut entry, topology, index, deadline_timer),
            0x4 => intel_cache(&mut entry, topology),
            // Power management is the host's, except that the APIC timer runs in all sleep states (ARAT).
            0x6 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (entry.eax & 1 << 2, 0, 0, 0),
            // No performance counters: they would tie a guest to this processor model.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            // Rebuilt below.
            0xb | 0x1f => continue,
            0x8000_0001 => set_bits(&mut entry.ecx, 1, 1, u32::from(topology.vcpus > 1)),
            0x8000_0008 => amd_sizes(&mut entry, topology),
            0x8000_001d => amd_cache(&mut entry, topology),
            0x8000_001e => amd_ids(&mut entry, topology, index),
            _ => {}
        }
        leaves.push(entry);
    }
    let highest = leaves.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    if highest >= 0xb {
        leaves.extend(extended_topology(0xb, topology, index));
    }
    if has_leaf_1f && highest >= 0x1f {
        leaves.extend(extended_topology(0x1f, topology, index));
    }
    leaves
}

fn features(entry: &mut kvm_cpuid_entry2, topology: Topology, index: u8, deadline_timer: bool) {
    set_bits(&mut entry.ebx, 31, 24, index.into());
    set_bits(&mut entry.ebx, 23, 16, topology.vcpus.into());
    set_bits(&mut entry.ecx, ECX1_HYPERVISOR, ECX1_HYPERVISOR, 1);
    set_bits(&mut entry.ecx, ECX1_TSC_DEADLINE, ECX1_TSC_DEADLINE, deadline_timer.into());
    set_bits(&mut entry.edx, EDX1_HTT, EDX1_HTT, u32::from(topology.vcpus > 1));
}

/// Leaf 4: how many logical processors share the cache, and cores in the package. L1 and L2 belong to a core.
fn intel_cache(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    if entry.eax & CACHE_TYPE == 0 {
        return;
    }
    let level = entry.eax >> 5 & 0x7;
    let sharing_bits = if level < 3 { topology.thread_bits() } else { topology.package_bits() };
    set_bits(&mut entry.eax, 25, 14, (1 << sharing_bits) - 1);
    set_bits(&mut entry.eax, 31, 26, (1 << bits_for(topology.cores())) - 1);
}

fn amd_cache(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    if entry.eax & CACHE_TYPE == 0 {
        return;
    }
    let level = entry.eax >> 5 & 0x7;
    let sharing = if level < 3 { topology.threads_per_core() } else { topology.vcpus };
    set_bits(&mut entry.eax, 25, 14, u32::from(sharing) - 1);
}

/// Leaf 0x8000_0008 ECX: number of threads in the package and the width of their ids.
fn amd_sizes(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    set_bits(&mut entry.ecx, 7, 0, u32::from(topology.vcpus) - 1);
    set_bits(&mut entry.ecx, 15, 12, topology.package_bits());
}

fn amd_ids(entry: &mut kvm_cpuid_entry2, topology: Topology, index: u8) {
    entry.eax = index.into();
    set_bits(&mut entry.ebx, 7, 0, (index / topology.threads_per_core()).into());
    set_bits(&mut entry.ebx, 15, 8, u32::from(topology.threads_per_core()) - 1);
    // One node in the package.
    entry.ecx = 0;
}

/// Leaves 0xb and 0x1f: one entry per level, and the empty one that ends them.
fn extended_topology(function: u32, topology: Topology, index: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |level: u32, kind: u32, bits: u32, processors: u8| kvm_cpuid_entry2 {
        function,
        index: level,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: bits,
        ebx: processors.into(),
        ecx: level | kind,
        edx: index.into(),
        ..Default::default()
    };
    [
        level(0, LEVEL_SMT, topology.thread_bits(), topology.threads_per_core()),
        level(1, LEVEL_CORE, topology.package_bits(), topology.vcpus),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn supported() -> CpuId {
        CpuId::from_entries(&[
            leaf(0, 0, [0x1f, 0, 0, 0]),
            leaf(1, 0, [0x806f8, 0xff10_0800, 0, 0]),
            leaf(4, 0, [0xfc00_4121, 0, 0, 0]),
            leaf(4, 3, [0xfc1f_c163, 0, 0, 0]),
            leaf(0xa, 0, [7, 7, 7, 7]),
            leaf(0xb, 0, [1, 2, 0x100, 77]),
            leaf(0x1f, 0, [1, 2, 0x100, 77]),
            leaf(0x4000_0001, 0, [0x1, 0, 0, 0]),
            leaf(0x8000_0008, 0, [0x302e, 0, 0x703f, 0]),
            leaf(0x8000_001e, 0, [9, 9, 9, 9]),
        ])
        .unwrap()
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves.iter().find(|leaf| leaf.function == function && leaf.index == index).unwrap()
    }

    #[test]
    fn nothing_that_kvm_hides_is_shown() {
        const CX16: u32 = 1 << 13;
        let leaves = for_vcpu(&supported(), Topology { vcpus: 1, smt: false }, 0, false);
        let features = find(&leaves, 1, 0);
        assert_eq!(features.ecx, 1 << 31, "only the hypervisor bit is added");
        assert_eq!(features.ecx & CX16, 0);
        assert_eq!(features.edx, 0);
    }

    #[test]
    fn apic_ids_equal_the_index_for_every_size_and_smt() {
        for vcpus in 1..=32u8 {
            for smt in [false, true] {
                if smt && vcpus > 1 && vcpus % 2 == 1 {
                    continue;
                }
                let topology = Topology { vcpus, smt };
                for index in 0..vcpus {
                    let leaves = for_vcpu(&supported(), topology, index, true);
                    assert_eq!(find(&leaves, 1, 0).ebx >> 24, u32::from(index));
                    assert_eq!(find(&leaves, 1, 0).ebx >> 16 & 0xff, u32::from(vcpus));
                    assert_eq!(find(&leaves, 1, 0).ebx & 0xffff, 0x0800);
                    for function in [0xb, 0x1f] {
                        let (smt_level, core_level) =
                            (find(&leaves, function, 0), find(&leaves, function, 1));
                        assert_eq!(smt_level.edx, u32::from(index));
                        assert_eq!(core_level.ebx, u32::from(vcpus));
                        assert!(u32::from(index) >> core_level.eax == 0, "all in one package");
                        assert_eq!(core_level.eax - smt_level.eax, bits_for(topology.cores()));
                    }
                    assert_eq!(find(&leaves, 0x8000_001e, 0).eax, u32::from(index));
                }
            }
        }
    }

    #[test]
    fn threads_of_a_core_share_its_caches_and_all_share_the_last_level() {
        let leaves = for_vcpu(&supported(), Topology { vcpus: 4, smt: true }, 0, true);
        assert_eq!(find(&leaves, 4, 0).eax >> 14 & 0xfff, 1);
        assert_eq!(find(&leaves, 4, 3).eax >> 14 & 0xfff, 3);
        assert_eq!(find(&leaves, 4, 0).eax >> 26, 1, "two cores");
    }

    #[test]
    fn counters_are_hidden_and_hypervisor_leaves_pass() {
        let leaves = for_vcpu(&supported(), Topology { vcpus: 1, smt: false }, 0, true);
        assert_eq!(find(&leaves, 0xa, 0), leaf(0xa, 0, [0; 4]));
        assert_eq!(find(&leaves, 0x4000_0001, 0).eax, 1);
    }

    #[test]
    fn the_address_width_is_read_from_its_leaf() {
        assert_eq!(physical_address_bits(&supported()), 46);
    }
}
