//! Firecracker's custom CPU templates: what `PUT /cpu-config` takes.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

/// The static templates of `/machine-config`: what the guest sees is as close as possible to an instance type of EC2. Firecracker
/// deprecates them. (V1N1 is for arm64.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum CpuTemplate {
    /// As C3; Intel Skylake, Cascade Lake, Ice Lake.
    C3,
    /// As T2; the same.
    T2,
    /// As T2, the same on Intel Skylake and Cascade Lake.
    T2S,
    /// As T2, the same on Intel Cascade Lake and Ice Lake.
    T2CL,
    /// As T2; AMD Milan.
    T2A,
    /// No template.
    None,
}

/// `PUT /cpu-config`: changes of what the guest sees of its processors. Topology, APIC ids and what the boot protocol
/// sets come on top.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Numbers of KVM capabilities (`KVM_CAP_*`) that the host must have beside the usual ones; with `!` before it, one
    /// that it need not have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes of CPUID leaves that KVM supports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpuid_modifiers: Vec<CpuidLeafModifier>,
    /// Changes of model-specific registers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// Changes of one CPUID leaf.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CpuidLeafModifier {
    /// EAX of the instruction, `0x…` or `0b…`.
    pub leaf: Number,
    /// ECX of the instruction, `0x…` or `0b…`.
    pub subleaf: Number,
    /// KVM's flags of the leaf (`KVM_CPUID_FLAG_*`).
    pub flags: u32,
    /// Changes of its registers.
    pub modifiers: Vec<CpuidRegisterModifier>,
}

/// A change of one register of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct CpuidRegisterModifier {
    /// The register.
    pub register: CpuidRegister,
    /// Its bits, `0b…` with `0`, `1`, and `x` for those that stay; missing ones at the front stay, too. `_` separates.
    pub bitmap: Bitmap<32>,
}

/// The registers of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum CpuidRegister {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// A change of a model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its number, `0x…` or `0b…`.
    pub addr: Number,
    /// Its bits, as in [`CpuidRegisterModifier::bitmap`].
    pub bitmap: Bitmap<64>,
}

/// Why a text is no number, bitmap or capability.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// A number.
    #[error("{0:?} must be 0x and hexadecimal or 0b and binary digits of a 32-bit number")]
    Number(String),
    /// A bitmap.
    #[error("{text:?} must be 0b and at most {bits} of 0, 1 and x")]
    Bitmap {
        /// What was given.
        text: String,
        /// Width.
        bits: usize,
    },
    /// A capability.
    #[error("{0:?} must be the number of a KVM capability, with ! before it if it is not needed")]
    Capability(String),
}

/// A number that JSON has as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Number(pub u32);

impl FromStr for Number {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let parse = |digits: &str, radix| {
            let all_digits = digits.chars().all(|digit| digit.is_digit(radix));
            all_digits.then(|| u32::from_str_radix(digits, radix).ok()).flatten()
        };
        let number = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
            (Some(digits), _) => parse(digits, 16),
            (_, Some(digits)) => parse(digits, 2),
            _ => None,
        };
        number.map(Self).ok_or_else(|| TextError::Number(text.to_owned()))
    }
}

impl fmt::Display for Number {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:#x}", self.0)
    }
}

/// Bits to set and to clear in a register of `BITS` bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bitmap<const BITS: usize> {
    /// The bits that are set or cleared.
    pub mask: u64,
    /// Those that are set.
    pub value: u64,
}

impl<const BITS: usize> Bitmap<BITS> {
    /// All bits as in `value`.
    pub const fn exactly(value: u64) -> Self {
        Self { mask: u64::MAX >> (64 - BITS), value }
    }

    /// The register's value after the change.
    pub const fn apply(self, old: u64) -> u64 {
        old & !self.mask | self.value
    }

    /// Whether a register is as it would be after the change.
    pub const fn fits(self, value: u64) -> bool {
        value & self.mask == self.value
    }
}

impl<const BITS: usize> FromStr for Bitmap<BITS> {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let wrong = || TextError::Bitmap { text: text.chars().take(80).collect(), bits: BITS };
        let digits = text.strip_prefix("0b").ok_or_else(wrong)?;
        let (mut bitmap, mut count) = (Self::default(), 0);
        for digit in digits.chars().filter(|digit| *digit != '_') {
            count += 1;
            let (mask, value) = match digit {
                '0' => (1, 0),
                '1' => (1, 1),
                'x' => (0, 0),
                _ => return Err(wrong()),
            };
            if count > BITS {
                return Err(wrong());
            }
            bitmap.mask = bitmap.mask << 1 | mask;
            bitmap.value = bitmap.value << 1 | value;
        }
        if count == 0 { Err(wrong()) } else { Ok(bitmap) }
    }
}

impl<const BITS: usize> fmt::Display for Bitmap<BITS> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("0b")?;
        for bit in (0..BITS).rev() {
            let digit = match (self.mask >> bit & 1, self.value >> bit & 1) {
                (0, _) => "x",
                (_, 0) => "0",
                _ => "1",
            };
            formatter.write_str(digit)?;
        }
        Ok(())
    }
}

/// A KVM capability that is looked for, or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmCapability {
    /// `KVM_CAP_*`.
    pub number: u32,
    /// It must be there; else it need not.
    pub needed: bool,
}

impl FromStr for KvmCapability {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let digits = text.strip_prefix('!');
        let (needed, digits) = (digits.is_none(), digits.unwrap_or(text));
        let number = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten();
        let number = number.ok_or_else(|| TextError::Capability(text.to_owned()))?;
        Ok(Self { number, needed })
    }
}

impl fmt::Display for KvmCapability {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}{}", if self.needed { "" } else { "!" }, self.number)
    }
}

/// JSON has these as text.
macro_rules! as_text {
    ($(($($generics:tt)*) $type:ty, $schema:literal;)*) => {$(
        impl $($generics)* Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de, $($generics)*> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }

        #[cfg(test)]
        impl $($generics)* schemars::JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({"type": "string", "pattern": $schema})
            }
        }
    )*};
}

as_text! {
    () Number, "^(0x[0-9a-fA-F]+|0b[01]+)$";
    () KvmCapability, "^!?[0-9]+$";
}

impl<const BITS: usize> Serialize for Bitmap<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, const BITS: usize> Deserialize<'de> for Bitmap<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
impl<const BITS: usize> schemars::JsonSchema for Bitmap<BITS> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        format!("Bitmap{BITS}").into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "pattern": "^0b[01x_]+$"})
    }
}

/// `cpu-config` of the config file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum CpuConfigSource {
    /// A file with a template, as Firecracker has it.
    File(PathBuf),
    /// *Mote*: the template itself.
    Template(CpuConfig),
}

/// Not derived: the fault would not say what is wrong in the template.
impl<'de> Deserialize<'de> for CpuConfigSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(path) => Ok(Self::File(path.into())),
            value => serde_json::from_value(value).map(Self::Template).map_err(de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_set_clear_and_leave_bits() {
        let bitmap: Bitmap<32> = "0b1_0x1".parse().unwrap();
        assert_eq!((bitmap.mask, bitmap.value), (0b1101, 0b1001));
        assert_eq!(bitmap.apply(0xffff_fff0), 0xffff_fff9 & !0b0100);
        assert!(bitmap.fits(0b1011) && bitmap.fits(0b1001) && !bitmap.fits(0b1101));
        let text = format!("0b{}10x1", "x".repeat(28));
        assert_eq!(bitmap.to_string(), text);
        assert_eq!(text.parse::<Bitmap<32>>().unwrap(), bitmap);
        assert_eq!(Bitmap::<64>::exactly(u64::MAX).to_string(), format!("0b{}", "1".repeat(64)));
        for wrong in ["", "0b", "1", "0x1", "0b2", &format!("0b{}", "1".repeat(33))] {
            assert!(wrong.parse::<Bitmap<32>>().is_err(), "{wrong}");
        }
        assert!(format!("0b{}", "1".repeat(64)).parse::<Bitmap<64>>().is_ok());
    }

    #[test]
    fn numbers_and_capabilities_are_texts() {
        assert_eq!("0x8000_0008".parse::<Number>(), Err(TextError::Number("0x8000_0008".into())));
        assert_eq!("0x80000008".parse::<Number>().unwrap().0, 0x8000_0008);
        assert_eq!("0b101".parse::<Number>().unwrap().0, 5);
        for wrong in ["", "0x", "12", "0x+1", "0x100000000", "0b2"] {
            assert!(wrong.parse::<Number>().is_err(), "{wrong}");
        }
        let capability: KvmCapability = "!56".parse().unwrap();
        assert_eq!(
            (capability.number, capability.needed, capability.to_string().as_str()),
            (56, false, "!56")
        );
        for wrong in ["", "!", "!!1", "-1", "+1"] {
            assert!(wrong.parse::<KvmCapability>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn firecrackers_example_is_read_and_written_back() {
        let text = r#"{"kvm_capabilities":["!56"],"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0x0","flags":0,
            "modifiers":[{"register":"eax","bitmap":"0bxxxx000000000011xx00011011110010"}]}],
            "msr_modifiers":[{"addr":"0x10a","bitmap":"0b0"}]}"#;
        let template: CpuConfig = serde_json::from_str(text).unwrap();
        let register = template.cpuid_modifiers[0].modifiers[0];
        assert_eq!(register.register, CpuidRegister::Eax);
        assert_eq!(register.bitmap.apply(0xf000_c000), 0xf003_c6f2);
        let again = serde_json::to_string(&template).unwrap();
        assert_eq!(serde_json::from_str::<CpuConfig>(&again).unwrap(), template);
        let source: CpuConfigSource = serde_json::from_str(r#""/t.json""#).unwrap();
        assert_eq!(source, CpuConfigSource::File("/t.json".into()));
        let error = serde_json::from_str::<CpuConfigSource>(r#"{"vcpu_features":[]}"#).unwrap_err();
        assert!(error.to_string().contains("vcpu_features"), "{error}");
    }
}
