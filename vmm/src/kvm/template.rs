//! Custom CPU templates: changes of the leaves that KVM supports, before topology and APIC ids are put in
//! ([`cpuid`](super::cpuid)), and of model-specific registers, before those of the boot protocol.

use std::collections::BTreeMap;

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm};
use mote_vmm_api::{CpuConfig, CpuTemplate, CpuidLeafModifier, CpuidRegister};

use super::state::{MSR_TSC, MSR_TSC_DEADLINE, Processor};
use super::{KvmError, Topology, Vm};

/// What this program can't do without; a template can't say otherwise.
pub(super) const ALWAYS_NEEDED: [Cap; 5] =
    [Cap::SplitIrqchip, Cap::Irqfd, Cap::Ioeventfd, Cap::ImmediateExit, Cap::SignalMsi];
/// Differs from run to run.
const MSR_TSC_ADJUST: u32 = 0x3b;

/// Why a template doesn't fit this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// `kvm_capabilities`.
    #[error("this host's KVM lacks the capability {0} of the CPU template")]
    Capability(u32),
    /// `kvm_capabilities` with `!`.
    #[error("kvm_capabilities of the CPU template: mote-vmm cannot run without {0}")]
    Needed(u32),
    /// A static template.
    #[error(
        "the CPU template {template:?} is for processors of {wanted:?}, this host has one of {found:?}: leave cpu_template out, or make \
         a template of your own (PUT /cpu-config)"
    )]
    Vendor {
        /// Which.
        template: CpuTemplate,
        /// For whose.
        wanted: &'static str,
        /// This host's.
        found: String,
    },
    /// A static template.
    #[error(
        "the CPU template {template:?} is not for the model of this host's processor (signature {signature:#x}): leave cpu_template \
         out, or make a template of your own (PUT /cpu-config)"
    )]
    Model {
        /// Which.
        template: CpuTemplate,
        /// Family, model and stepping, as CPUID has them.
        signature: u32,
    },
    /// `cpuid_modifiers`.
    #[error(
        "the CPU template changes CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, which this host's KVM does not support"
    )]
    Leaf {
        /// Leaf.
        leaf: u32,
        /// Subleaf.
        subleaf: u32,
    },
    /// `msr_modifiers`.
    #[error("the CPU template changes MSR {0:#x}, which guests of this host do not have")]
    Msr(u32),
}

/// Whether the host has the capabilities.
pub(super) fn check_capabilities(kvm: &Kvm, template: &CpuConfig) -> Result<(), TemplateError> {
    for capability in &template.kvm_capabilities {
        let number = capability.number;
        if !capability.needed && ALWAYS_NEEDED.iter().any(|always| *always as u32 == number) {
            return Err(TemplateError::Needed(number));
        }
        if capability.needed && kvm.check_extension_raw(number.into()) <= 0 {
            return Err(TemplateError::Capability(number));
        }
    }
    Ok(())
}

fn is_leaf(entry: &kvm_cpuid_entry2, modifier: &CpuidLeafModifier) -> bool {
    (entry.function, entry.index) == (modifier.leaf.0, modifier.subleaf.0)
}

/// The supported leaves with the template's changes.
pub(super) fn change_leaves(supported: &CpuId, template: &CpuConfig) -> Result<CpuId, TemplateError> {
    let mut changed = supported.clone();
    for modifier in &template.cpuid_modifiers {
        let (leaf, subleaf) = (modifier.leaf.0, modifier.subleaf.0);
        let entry = changed.as_mut_slice().iter_mut().find(|entry| is_leaf(entry, modifier));
        let entry = entry.ok_or(TemplateError::Leaf { leaf, subleaf })?;
        entry.flags = modifier.flags;
        for change in &modifier.modifiers {
            let register = match change.register {
                CpuidRegister::Eax => &mut entry.eax,
                CpuidRegister::Ebx => &mut entry.ebx,
                CpuidRegister::Ecx => &mut entry.ecx,
                CpuidRegister::Edx => &mut entry.edx,
            };
            *register = change.bitmap.apply((*register).into()) as u32;
        }
    }
    Ok(changed)
}

/// Changes registers of a processor that has its CPUID.
pub(super) fn change_msrs(processor: &Processor<'_>, template: &CpuConfig) -> Result<(), KvmError> {
    if template.msr_modifiers.is_empty() {
        return Ok(());
    }
    // One that KVM doesn't list would be lost in a snapshot.
    let numbers = processor.msr_numbers()?;
    for modifier in &template.msr_modifiers {
        let number = modifier.addr.0;
        let old = if numbers.contains(&number) { processor.msrs(&[number])? } else { BTreeMap::new() };
        let old = old.get(&number).ok_or(KvmError::Template(TemplateError::Msr(number)))?;
        let data = modifier.bitmap.apply(*old);
        // Not every register that can be read can also be written.
        if data == *old {
            continue;
        }
        let entry = kvm_msr_entry { index: number, data, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry]).expect("one entry fits");
        let failed = |source| KvmError::Vcpu { call: "KVM_SET_MSRS", vcpu: processor.index, source };
        if processor.fd.set_msrs(&msrs).map_err(failed)? != 1 {
            return Err(KvmError::Msr { index: number, vcpu: processor.index });
        }
    }
    Ok(())
}

/// What a guest of this host sees of its first processor.
#[derive(Debug, Clone)]
pub struct ProcessorView {
    /// CPUID, as KVM was told.
    pub leaves: Vec<kvm_cpuid_entry2>,
    /// Model-specific registers by number, as KVM tells them, without those that only count time.
    pub msrs: BTreeMap<u32, u64>,
}

impl Vm {
    /// The processor that a guest with `template` would start with.
    ///
    /// # Errors
    /// KVM refused, or the template doesn't fit.
    pub fn look_at_processor(self, template: Option<&CpuConfig>) -> Result<ProcessorView, KvmError> {
        let topology = Topology { vcpus: 1, smt: false };
        let mut leaves = Vec::new();
        let vcpus = self.each_vcpu(topology, template, |vcpu, cpuid| {
            leaves = cpuid.to_vec();
            super::registers::identify(vcpu, cpuid, template)
        })?;
        let mut msrs = BTreeMap::new();
        for vcpu in &vcpus {
            let processor = vcpu.processor();
            msrs = processor.msrs(&processor.msr_numbers()?)?;
        }
        for time in [MSR_TSC, MSR_TSC_DEADLINE, MSR_TSC_ADJUST] {
            msrs.remove(&time);
        }
        Ok(ProcessorView { leaves, msrs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(json: &str) -> CpuConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn leaves_are_changed_and_missing_ones_refused() {
        let leaf = |function, index, eax| kvm_cpuid_entry2 { function, index, eax, ..Default::default() };
        let supported = CpuId::from_entries(&[leaf(1, 0, 0xff), leaf(7, 0, 1), leaf(7, 1, 2)]).unwrap();
        let changed = template(
            r#"{"cpuid_modifiers":[{"leaf":"0x7","subleaf":"0x1","flags":1,"modifiers":
                [{"register":"eax","bitmap":"0b1x"},{"register":"edx","bitmap":"0b1"}]},
                {"leaf":"0x1","subleaf":"0x0","flags":0,"modifiers":[{"register":"eax","bitmap":"0b0000xxxx"}]}]}"#,
        );
        let changed = change_leaves(&supported, &changed).unwrap();
        let found: Vec<_> = changed.as_slice().iter().map(|leaf| (leaf.eax, leaf.edx, leaf.flags)).collect();
        assert_eq!(found, [(0xf, 0, 0), (1, 0, 0), (2, 1, 1)]);
        let missing =
            template(r#"{"cpuid_modifiers":[{"leaf":"0x7","subleaf":"0x2","flags":0,"modifiers":[]}]}"#);
        let error = change_leaves(&supported, &missing).unwrap_err();
        assert_eq!(error, TemplateError::Leaf { leaf: 7, subleaf: 2 });
    }
}
