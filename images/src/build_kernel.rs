//! A kernel for microVMs, built on this machine from Debian's `linux-source-6.12`.
//!
//! Its configuration (`microvm/config`) names what a guest of mote-vmm can meet; everything else is off. It needs no
//! initial ramdisk: virtio, ext4 and the network are built in.

use std::{fs, path::Path};

use crate::{build::BuildError, making::Making};

/// What each step runs.
const SCRIPT: &str = include_str!("microvm/build.sh");
/// The lists of options.
const FILES: [(&str, &str); 2] =
    [("config", include_str!("microvm/config")), ("config-smp", include_str!("microvm/config-smp"))];
/// The file in which the finished directory says what made it.
const RECIPE_FILE: &str = "recipe";

/// For how many processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// One: smaller, and without locks.
    Uniprocessor,
    /// Up to 32.
    Smp,
}

impl Variant {
    fn name(self) -> &'static str {
        match self {
            Self::Uniprocessor => "up",
            Self::Smp => "smp",
        }
    }

    /// What a finished directory was made by: the lists and the script themselves, so that a change of them counts.
    fn recipe(self) -> String {
        let mut recipe = format!("{}\n{SCRIPT}", self.name());
        for (_, text) in FILES {
            recipe.push_str(text);
        }
        recipe
    }
}

/// Makes the directory `out` with `vmlinux` and its whole `config`. Needs the machine's package sources, and gcc, make, flex,
/// bison, bc, libelf's headers, perl and xz; about 2 GB of disk while it runs. `progress` is told each step.
///
/// # Errors
/// [`BuildError`]; nothing is left of a failed attempt.
pub fn build_kernel(out: &Path, variant: Variant, mut progress: impl FnMut(&str)) -> Result<(), BuildError> {
    let recipe = variant.recipe();
    if fs::read_to_string(out.join(RECIPE_FILE)).is_ok_and(|made_by| made_by == recipe) {
        progress("up to date");
        return Ok(());
    }
    let making = Making::new(out, SCRIPT, &FILES)?;
    for (step, says) in [
        ("source", "downloading and unpacking linux-source-6.12 (150 MB)"),
        ("config", "configuring"),
        ("compile", "compiling (minutes)"),
    ] {
        progress(says);
        making.step(step, variant.name())?;
    }
    making.write(RECIPE_FILE, recipe.as_bytes())?;
    making.finish()
}
