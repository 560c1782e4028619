//! Firecracker's static CPU templates, as custom ones: what each changes, and for which processors it is meant. The masks are
//! those of Firecracker 1.17, so that a guest sees the same under both.

use mote_vmm_api::{
    Bitmap, CpuConfig, CpuTemplate, CpuidLeafModifier, CpuidRegister, CpuidRegisterModifier, MsrModifier,
    Number,
};

use super::template::TemplateError;
use super::{KvmError, Vm, supported_cpuid};

const INTEL: &str = "GenuineIntel";
const AMD: &str = "AuthenticAMD";

/// Signatures (CPUID leaf 1, EAX) without type and reserved bits.
const SKYLAKE: u32 = 0x0005_0654;
const CASCADE_LAKE: u32 = 0x0005_0657;
const ICE_LAKE: u32 = 0x0006_06a6;
const MILAN: u32 = 0x00a0_0f11;
/// Family, model and stepping with their extensions.
const SIGNATURE: u32 = 0x0fff_0fff;

/// `IA32_ARCH_CAPABILITIES`.
const ARCH_CAPABILITIES: u32 = 0x10a;
/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`.
const INDEXED: u32 = 1;

use CpuidRegister::{Eax, Ebx, Ecx, Edx};

/// Register, bits that change, and those of them that are set.
type Change = (CpuidRegister, u32, u32);
/// Leaf, subleaf, KVM's flags, changes.
type Leaf = (u32, u32, u32, &'static [Change]);

/// What XSAVE has for protection keys, AVX-512 and MPX; its compact forms.
const XSAVE: [Leaf; 2] = [(0xd, 0, INDEXED, &[(Eax, 0x2f8, 0)]), (0xd, 1, INDEXED, &[(Eax, 0xe, 0)])];
/// As a T2 instance: signature and features.
const T2_FEATURES: [Leaf; 2] = [
    (1, 0, 0, &[(Eax, 0x0fff_3fff, 0x0003_06f2), (Ecx, 0x0004_cdfc, 0), (Edx, 0xe864_1080, 0x0000_1080)]),
    (7, 0, INDEXED, &[(Ebx, 0xffef_da14, 0x0000_0200), (Ecx, 0x4041_5f5e, 0), (Edx, 0x0000_011c, 0)]),
];
/// PREFETCHW, MONITORX, pages of 1 GiB; WBNOINVD.
const T2_EXTENDED: [Leaf; 2] = [
    (0x8000_0001, 0, 0, &[(Ecx, 0x2000_0100, 0), (Edx, 0x0400_0000, 0)]),
    (0x8000_0008, 0, 0, &[(Ebx, 0x0000_0200, 0)]),
];
const T2CL_EXTENDED: [Leaf; 2] = [
    (0x8000_0001, 0, 0, &[(Ecx, 0x2000_01c0, 0), (Edx, 0x07c0_0000, 0)]),
    (0x8000_0008, 0, 0, &[(Ebx, 0x0000_0200, 0)]),
];
const T2A_EXTENDED: [Leaf; 2] = [
    (0x8000_0001, 0, 0, &[(Ecx, 0x2000_01c4, 0), (Edx, 0x0640_0000, 0)]),
    (0x8000_0008, 0, 0, &[(Ebx, 0x001c_0205, 0x001c_0004)]),
];
const C3_FEATURES: [Leaf; 2] = [
    (1, 0, 0, &[(Eax, 0x0fff_3fff, 0x0003_06e4), (Ecx, 0x0040_dd3c, 0), (Edx, 0xa864_1080, 0x0000_1080)]),
    (7, 0, INDEXED, &[(Ebx, 0xffaf_dd3c, 0), (Ecx, 0x4041_481e, 0), (Edx, 0x0000_000c, 0)]),
];
const C3_EXTENDED: [Leaf; 1] = [(0x8000_0001, 0, 0, &[(Ecx, 0x0000_0120, 0), (Edx, 0x0400_0000, 0)])];

/// What a template is.
struct Definition {
    vendor: &'static str,
    signatures: &'static [u32],
    leaves: [&'static [Leaf]; 3],
    /// Bits of [`ARCH_CAPABILITIES`] that change, and those of them that are set.
    arch_capabilities: Option<(u64, u64)>,
}

fn definition(template: CpuTemplate) -> Option<Definition> {
    let (signatures, leaves, arch_capabilities): (&[u32], [&[Leaf]; 3], _) = match template {
        CpuTemplate::None => return None,
        CpuTemplate::C3 => (&[SKYLAKE, CASCADE_LAKE, ICE_LAKE], [&C3_FEATURES, &XSAVE, &C3_EXTENDED], None),
        CpuTemplate::T2 => (&[SKYLAKE, CASCADE_LAKE, ICE_LAKE], [&T2_FEATURES, &XSAVE, &T2_EXTENDED], None),
        // The same on both, so that a snapshot goes from one to the other.
        CpuTemplate::T2S => {
            (&[SKYLAKE, CASCADE_LAKE], [&T2_FEATURES, &XSAVE, &T2_EXTENDED], Some((u64::MAX, 0x0c0a_0c4c)))
        }
        CpuTemplate::T2CL => (
            &[CASCADE_LAKE, ICE_LAKE],
            [&T2_FEATURES, &XSAVE, &T2CL_EXTENDED],
            Some((0xffff_ffff_e2f5_1e00, 0)),
        ),
        CpuTemplate::T2A => (&[MILAN], [&T2_FEATURES, &XSAVE, &T2A_EXTENDED], None),
    };
    let vendor = if template == CpuTemplate::T2A { AMD } else { INTEL };
    Some(Definition { vendor, signatures, leaves, arch_capabilities })
}

/// The template for a processor of this vendor and signature.
fn expand(template: CpuTemplate, vendor: &str, signature: u32) -> Result<CpuConfig, TemplateError> {
    let Some(Definition { vendor: wanted, signatures, leaves, arch_capabilities }) = definition(template)
    else {
        return Ok(CpuConfig::default());
    };
    if vendor != wanted {
        return Err(TemplateError::Vendor { template, wanted, found: vendor.to_owned() });
    }
    let signature = signature & SIGNATURE;
    if !signatures.contains(&signature) {
        return Err(TemplateError::Model { template, signature });
    }
    let modifier = |&(leaf, subleaf, flags, changes): &Leaf| CpuidLeafModifier {
        leaf: Number(leaf),
        subleaf: Number(subleaf),
        flags,
        modifiers: changes
            .iter()
            .map(|&(register, mask, value)| CpuidRegisterModifier {
                register,
                bitmap: Bitmap { mask: mask.into(), value: value.into() },
            })
            .collect(),
    };
    let msr = |(mask, value)| MsrModifier { addr: Number(ARCH_CAPABILITIES), bitmap: Bitmap { mask, value } };
    Ok(CpuConfig {
        kvm_capabilities: Vec::new(),
        cpuid_modifiers: leaves.into_iter().flatten().map(modifier).collect(),
        msr_modifiers: arch_capabilities.into_iter().map(msr).collect(),
    })
}

impl Vm {
    /// A static template as a custom one.
    ///
    /// # Errors
    /// It is meant for other processors than this host's, or KVM refused.
    pub fn static_template(&self, template: CpuTemplate) -> Result<CpuConfig, KvmError> {
        let supported = supported_cpuid(&self.shared.kvm)?;
        let leaf = |number| supported.as_slice().iter().find(|leaf| leaf.function == number);
        let vendor = leaf(0).map_or_else(String::new, |leaf| {
            let bytes: Vec<u8> =
                [leaf.ebx, leaf.edx, leaf.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let signature = leaf(1).map_or(0, |leaf| leaf.eax);
        Ok(expand(template, &vendor, signature)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [CpuTemplate; 5] =
        [CpuTemplate::C3, CpuTemplate::T2, CpuTemplate::T2S, CpuTemplate::T2CL, CpuTemplate::T2A];

    #[test]
    fn each_template_fits_its_processors_and_no_others() {
        let processors =
            [(INTEL, SKYLAKE), (INTEL, CASCADE_LAKE), (INTEL, ICE_LAKE), (AMD, MILAN), (AMD, 0x00a0_0f10)];
        let fits =
            |template| processors.map(|(vendor, signature)| expand(template, vendor, signature).is_ok());
        let found = ALL.map(fits);
        assert_eq!(found[0], [true, true, true, false, false]);
        assert_eq!(found[1], [true, true, true, false, false]);
        assert_eq!(found[2], [true, true, false, false, false]);
        assert_eq!(found[3], [false, true, true, false, false]);
        assert_eq!(found[4], [false, false, false, true, false]);
        // Type and reserved bits don't count.
        assert!(expand(CpuTemplate::T2, INTEL, SKYLAKE | 0xf000_3000).is_ok());
        let vendor = expand(CpuTemplate::T2A, INTEL, MILAN).unwrap_err().to_string();
        assert!(vendor.contains("T2A") && vendor.contains(AMD) && vendor.contains(INTEL), "{vendor}");
        let model = expand(CpuTemplate::T2S, INTEL, ICE_LAKE).unwrap_err().to_string();
        assert!(model.contains("T2S") && model.contains("0x606a6"), "{model}");
        assert_eq!(expand(CpuTemplate::None, "other", 0).unwrap(), CpuConfig::default());
    }

    /// What a guest sees in a register after the template.
    fn seen(template: &CpuConfig, leaf: u32, register: CpuidRegister, before: u32) -> u32 {
        let modifier =
            template.cpuid_modifiers.iter().find(|other| (other.leaf.0, other.subleaf.0) == (leaf, 0));
        let change = modifier.unwrap().modifiers.iter().find(|change| change.register == register).unwrap();
        change.bitmap.apply(before.into()) as u32
    }

    #[test]
    fn guests_see_the_instance_type_and_none_of_what_it_lacks() {
        for (template, vendor, signature, as_seen) in [
            (CpuTemplate::C3, INTEL, ICE_LAKE, 0x306e4),
            (CpuTemplate::T2, INTEL, ICE_LAKE, 0x306f2),
            (CpuTemplate::T2S, INTEL, SKYLAKE, 0x306f2),
            (CpuTemplate::T2CL, INTEL, CASCADE_LAKE, 0x306f2),
            (CpuTemplate::T2A, AMD, MILAN, 0x306f2),
        ] {
            let expanded = expand(template, vendor, signature).unwrap();
            assert_eq!(seen(&expanded, 1, Eax, signature), as_seen, "{template:?}");
            // AVX-512 Foundation and its XSAVE states, and pages of 1 GiB.
            assert_eq!(seen(&expanded, 7, Ebx, u32::MAX) >> 16 & 1, 0, "{template:?}");
            assert_eq!(seen(&expanded, 0xd, Eax, u32::MAX) >> 5 & 7, 0, "{template:?}");
            assert_eq!(seen(&expanded, 0x8000_0001, Edx, u32::MAX) >> 26 & 1, 0, "{template:?}");
            // A value is part of its mask, else it could not be written as a bitmap.
            for change in expanded.cpuid_modifiers.iter().flat_map(|leaf| &leaf.modifiers) {
                assert_eq!(change.bitmap.value & !change.bitmap.mask, 0, "{template:?} {change:?}");
            }
            let text = serde_json::to_string(&expanded).unwrap();
            assert_eq!(serde_json::from_str::<CpuConfig>(&text).unwrap(), expanded);
        }
        let msr = |template, signature| expand(template, INTEL, signature).unwrap().msr_modifiers;
        assert_eq!(msr(CpuTemplate::T2S, SKYLAKE), msr(CpuTemplate::T2S, CASCADE_LAKE));
        assert_eq!(msr(CpuTemplate::T2S, SKYLAKE)[0].bitmap.apply(u64::MAX), 0x0c0a_0c4c);
        assert_eq!(msr(CpuTemplate::T2CL, ICE_LAKE)[0].bitmap.apply(u64::MAX), 0x1d0a_e1ff);
        assert!(msr(CpuTemplate::T2, SKYLAKE).is_empty());
    }
}
