//! `mote-vmm cpu-template`: what guests of this host see of their processors, and what a custom template makes of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use argh::FromArgs;
use mote_vmm_api::{
    Bitmap, CpuConfig, CpuidLeafModifier, CpuidRegister, CpuidRegisterModifier, ExitReason, MsrModifier,
    Number,
};

use crate::config::{self, ConfigError};
use crate::error_chain;
use crate::kvm::{KvmError, ProcessorView, Vm};
use crate::memory::{self, MemoryError};

/// Leaves that are made anew for each VM, whatever KVM and template say.
const TOPOLOGY_LEAVES: [u32; 2] = [0xb, 0x1f];
/// Memory of the VM that is looked at and never runs.
const MEMORY_MIB: usize = 1;

/// Shows and checks custom CPU templates on this host.
#[derive(Debug, FromArgs)]
#[argh(help_triggers("-h", "--help"))]
pub struct TemplateOptions {
    #[argh(subcommand)]
    command: Command,
}

#[derive(Debug, FromArgs)]
#[argh(subcommand)]
enum Command {
    Dump(Dump),
    Verify(Verify),
    Strip(Strip),
}

/// Write what a guest of this host sees of its processor as a template.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "dump", help_triggers("-h", "--help"))]
struct Dump {
    /// with this template
    #[argh(option, arg_name = "PATH")]
    template: Option<PathBuf>,
    /// to this file instead of stdout
    #[argh(option, arg_name = "PATH")]
    output: Option<PathBuf>,
}

/// Apply a template and print what it changes on this host, and what of it does not hold.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "verify", help_triggers("-h", "--help"))]
struct Verify {
    /// the template
    #[argh(option, arg_name = "PATH")]
    template: PathBuf,
}

/// Reduce dumps to what is not the same in all of them.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "strip", help_triggers("-h", "--help"))]
struct Strip {
    /// the dumps, two or more
    #[argh(positional, arg_name = "PATH")]
    paths: Vec<PathBuf>,
    /// the results go to files with this before the extension [default: _stripped]
    #[argh(option, arg_name = "SUFFIX", default = "\"_stripped\".to_owned()")]
    suffix: String,
}

/// Why nothing can be said.
#[derive(Debug, thiserror::Error)]
enum TemplateFailure {
    #[error(transparent)]
    Read(#[from] ConfigError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("cannot write {}", .0.display())]
    Write(PathBuf, #[source] std::io::Error),
    #[error("two dumps or more can be compared: give their paths")]
    OneDump,
    #[error("the template does not hold on this host")]
    DoesNotHold,
}

/// Does what is asked for; the exit code.
pub fn run(options: &TemplateOptions) -> u8 {
    let result = match &options.command {
        Command::Dump(Dump { template, output }) => dump(template.as_deref(), output.as_deref()),
        Command::Verify(Verify { template }) => verify(template),
        Command::Strip(Strip { paths, suffix }) => strip(paths, suffix),
    };
    let Err(error) = result else { return 0 };
    eprintln!("mote-vmm cpu-template: {}", error_chain(&error));
    let reason = match error {
        TemplateFailure::OneDump => ExitReason::BadArguments,
        TemplateFailure::Read(_)
        | TemplateFailure::Kvm(KvmError::Template(_))
        | TemplateFailure::DoesNotHold => ExitReason::BadConfig,
        _ => ExitReason::HostError,
    };
    reason.code()
}

/// A register that a template can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Cpuid { leaf: u32, subleaf: u32, register: usize },
    Msr(u32),
}

const REGISTERS: [CpuidRegister; 4] =
    [CpuidRegister::Eax, CpuidRegister::Ebx, CpuidRegister::Ecx, CpuidRegister::Edx];

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpuid { leaf, subleaf, register } => {
                write!(formatter, "CPUID {leaf:#x}.{subleaf:#x} {:?}", REGISTERS[*register])
            }
            Self::Msr(number) => write!(formatter, "MSR {number:#x}"),
        }
    }
}

/// Values, or changes of them, by place; and the flags of leaves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Places {
    bits: BTreeMap<Place, Bitmap<64>>,
    flags: BTreeMap<(u32, u32), u32>,
}

impl Places {
    fn of_view(view: &ProcessorView) -> Self {
        let mut places = Self::default();
        for entry in &view.leaves {
            let (leaf, subleaf) = (entry.function, entry.index);
            places.flags.insert((leaf, subleaf), entry.flags);
            for (register, value) in [entry.eax, entry.ebx, entry.ecx, entry.edx].into_iter().enumerate() {
                let bitmap = Bitmap { mask: u32::MAX.into(), value: value.into() };
                places.bits.insert(Place::Cpuid { leaf, subleaf, register }, bitmap);
            }
        }
        places.bits.extend(view.msrs.iter().map(|(msr, value)| (Place::Msr(*msr), Bitmap::exactly(*value))));
        places
    }

    fn of_template(template: &CpuConfig) -> Self {
        let mut places = Self::default();
        for modifier in &template.cpuid_modifiers {
            let (leaf, subleaf) = (modifier.leaf.0, modifier.subleaf.0);
            places.flags.insert((leaf, subleaf), modifier.flags);
            for change in &modifier.modifiers {
                let register = REGISTERS.iter().position(|one| *one == change.register).unwrap_or(0);
                let Bitmap { mask, value } = change.bitmap;
                places.bits.insert(Place::Cpuid { leaf, subleaf, register }, Bitmap { mask, value });
            }
        }
        for change in &template.msr_modifiers {
            places.bits.insert(Place::Msr(change.addr.0), change.bitmap);
        }
        places
    }

    fn to_template(&self) -> CpuConfig {
        let mut template = CpuConfig::default();
        for (place, bitmap) in &self.bits {
            match *place {
                Place::Msr(number) => {
                    template.msr_modifiers.push(MsrModifier { addr: Number(number), bitmap: *bitmap });
                }
                Place::Cpuid { leaf, subleaf, register } => {
                    let (mask, value) = (bitmap.mask, bitmap.value);
                    let change = CpuidRegisterModifier {
                        register: REGISTERS[register],
                        bitmap: Bitmap { mask, value },
                    };
                    match template.cpuid_modifiers.last_mut() {
                        Some(last) if (last.leaf.0, last.subleaf.0) == (leaf, subleaf) => {
                            last.modifiers.push(change);
                        }
                        _ => template.cpuid_modifiers.push(CpuidLeafModifier {
                            leaf: Number(leaf),
                            subleaf: Number(subleaf),
                            flags: self.flags.get(&(leaf, subleaf)).copied().unwrap_or(0),
                            modifiers: vec![change],
                        }),
                    }
                }
            }
        }
        template
    }
}

/// What a guest sees, with the template or without.
fn look(template: Option<&CpuConfig>) -> Result<Places, TemplateFailure> {
    let memory = memory::create(MEMORY_MIB)?;
    let vm = Vm::create(&memory, false)?;
    vm.create_interrupt_controllers()?;
    Ok(Places::of_view(&vm.look_at_processor(template)?))
}

fn dump(template: Option<&Path>, output: Option<&Path>) -> Result<(), TemplateFailure> {
    let template = template.map(config::read_cpu_template).transpose()?;
    let mut seen = look(template.as_ref())?.to_template();
    // So that what is written is a template again.
    seen.cpuid_modifiers.retain(|leaf| !TOPOLOGY_LEAVES.contains(&leaf.leaf.0));
    match output {
        Some(path) => write(path, &seen),
        None => {
            println!("{}", text(&seen));
            Ok(())
        }
    }
}

fn text(template: &CpuConfig) -> String {
    serde_json::to_string_pretty(template).expect("plain data")
}

fn write(path: &Path, template: &CpuConfig) -> Result<(), TemplateFailure> {
    std::fs::write(path, text(template) + "\n")
        .map_err(|source| TemplateFailure::Write(path.to_owned(), source))
}

/// What a template changes, and what of it does not hold, as lines.
fn compare(before: &Places, wanted: &Places, after: &Places) -> (Vec<String>, Vec<String>) {
    let value = |places: &Places, place| places.bits.get(place).map_or(0, |bitmap| bitmap.value);
    let all: BTreeSet<&Place> = before.bits.keys().chain(after.bits.keys()).collect();
    let changed = all.into_iter().filter(|place| value(before, place) != value(after, place));
    let changes = changed
        .map(|place| format!("{place}: {:#x} becomes {:#x}", value(before, place), value(after, place)));
    let broken = wanted.bits.iter().filter(|(place, bitmap)| !bitmap.fits(value(after, place)));
    let broken = broken.map(|(place, bitmap)| {
        let off = (value(after, place) ^ bitmap.value) & bitmap.mask;
        format!("{place}: bits {off:#x} are not as the template has them, but {:#x}", value(after, place))
    });
    (changes.collect(), broken.collect())
}

fn verify(path: &Path) -> Result<(), TemplateFailure> {
    let template = config::read_cpu_template(path)?;
    let (changes, broken) = compare(&look(None)?, &Places::of_template(&template), &look(Some(&template))?);
    for line in &changes {
        println!("{line}");
    }
    println!("{} registers change", changes.len());
    for line in &broken {
        println!("does not hold: {line}");
    }
    if broken.is_empty() { Ok(()) } else { Err(TemplateFailure::DoesNotHold) }
}

/// Of each dump, the bits that are not the same in all of them.
fn differences(dumps: &[Places]) -> Vec<Places> {
    let common = |place: &Place| {
        let mut bits = dumps.iter().map(|dump| dump.bits.get(place));
        let Some(first) = bits.next().flatten() else { return 0 };
        bits.fold(first.mask, |common, other| match other {
            Some(other) => common & other.mask & !(first.value ^ other.value),
            None => 0,
        })
    };
    let strip = |dump: &Places| {
        let differs = |(place, bitmap): (&Place, &Bitmap<64>)| {
            let mask = bitmap.mask & !common(place);
            (mask != 0).then_some((*place, Bitmap { mask, value: bitmap.value & mask }))
        };
        Places { bits: dump.bits.iter().filter_map(differs).collect(), flags: dump.flags.clone() }
    };
    dumps.iter().map(strip).collect()
}

fn strip(paths: &[PathBuf], suffix: &str) -> Result<(), TemplateFailure> {
    if paths.len() < 2 {
        return Err(TemplateFailure::OneDump);
    }
    let dumps: Vec<_> = paths
        .iter()
        .map(|path| config::read_cpu_template(path).map(|template| Places::of_template(&template)))
        .collect::<Result<_, _>>()?;
    for (path, stripped) in paths.iter().zip(differences(&dumps)) {
        let mut name = path.file_stem().unwrap_or_default().to_owned();
        name.push(suffix);
        if let Some(extension) = path.extension() {
            name.push(".");
            name.push(extension);
        }
        write(&path.with_file_name(name), &stripped.to_template())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(json: &str) -> Places {
        Places::of_template(&serde_json::from_str(json).unwrap())
    }

    fn dump_with(eax: &str, msr: &str) -> Places {
        places(&format!(
            r#"{{"cpuid_modifiers":[{{"leaf":"0x1","subleaf":"0x0","flags":1,"modifiers":
                [{{"register":"eax","bitmap":"{eax}"}},{{"register":"ebx","bitmap":"0b11"}}]}}],
                "msr_modifiers":[{{"addr":"0x10a","bitmap":"{msr}"}}]}}"#
        ))
    }

    #[test]
    fn only_what_differs_is_left_of_dumps() {
        let stripped = differences(&[dump_with("0b1010", "0b1"), dump_with("0b1001", "0b1")]);
        let template = stripped[0].to_template();
        assert_eq!(template.msr_modifiers, []);
        let [leaf] = template.cpuid_modifiers.as_slice() else { panic!("{template:?}") };
        assert_eq!((leaf.flags, leaf.modifiers.len()), (1, 1));
        assert_eq!((leaf.modifiers[0].bitmap.mask, leaf.modifiers[0].bitmap.value), (0b11, 0b10));
        assert_eq!(stripped[1].to_template().cpuid_modifiers[0].modifiers[0].bitmap.value, 0b01);
    }

    #[test]
    fn what_changes_and_what_does_not_hold_is_told() {
        let (before, after) = (dump_with("0b1111", "0b1"), dump_with("0b1010", "0b1"));
        let (changes, broken) = compare(&before, &dump_with("0b10xx", "0b0"), &after);
        assert_eq!(changes, ["CPUID 0x1.0x0 Eax: 0xf becomes 0xa"]);
        assert_eq!(broken, ["MSR 0x10a: bits 0x1 are not as the template has them, but 0x1"]);
    }

    #[test]
    fn a_dump_is_a_template_again() {
        let dump = dump_with("0b1010", "0b1");
        assert_eq!(Places::of_template(&dump.to_template()), dump);
    }
}
