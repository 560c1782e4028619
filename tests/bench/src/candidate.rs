//! The programs that are compared, and how each starts the guest.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use mote_guest::host::{self, Monitor};

/// Name of the floor program in results.
pub const FLOOR: &str = "floor";
/// Name of Firecracker in results.
pub const FIRECRACKER: &str = "firecracker";

/// What machine the guest is started in.
#[derive(Debug, Clone, Copy)]
pub struct Shape<'a> {
    /// Guest memory.
    pub memory_mib: u32,
    /// Processors.
    pub vcpus: u8,
    /// A disk with this file, and a network interface on `tap0`.
    pub disk: Option<&'a Path>,
}

/// A program that starts the guest.
#[derive(Debug)]
pub enum Candidate {
    /// The minimal sequence of KVM calls.
    Floor(PathBuf),
    /// mote-vmm or Firecracker, which read the same configuration file.
    Monitor(&'static str, Monitor),
    /// Cloud Hypervisor.
    CloudHypervisor(PathBuf),
}

impl Candidate {
    /// Name in results.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Floor(_) => FLOOR,
            Self::Monitor(name, _) => name,
            Self::CloudHypervisor(_) => "cloud-hypervisor",
        }
    }

    /// Has the program's file written back: pages of a file that was just built count as dirty in every process that
    /// maps them.
    pub fn write_back(&self) -> Result<()> {
        let program = match self {
            Self::Floor(program) | Self::CloudHypervisor(program) => program,
            Self::Monitor(_, monitor) => monitor.program(),
        };
        let file = fs::File::open(program).with_context(|| format!("open {}", program.display()))?;
        file.sync_all().with_context(|| format!("write back {}", program.display()))
    }

    /// Whether it can have several vCPUs and devices.
    pub const fn takes_shapes(&self) -> bool {
        matches!(self, Self::Monitor(..))
    }

    /// The command that starts `guest` with this command line in a machine of this shape, and the serial port, whose
    /// output is the command's stdout. A configuration file is put into `directory`.
    pub fn command(&self, guest: &Path, line: &str, shape: &Shape<'_>, directory: &Path) -> Result<Command> {
        let memory_mib = shape.memory_mib;
        match self {
            Self::Floor(program) => {
                let mut command = Command::new(program);
                command.arg(guest).arg(line).arg(memory_mib.to_string());
                Ok(command)
            }
            Self::Monitor(name, monitor) => {
                let mut config = host::config(guest, line);
                config.machine_config.mem_size_mib = memory_mib as usize;
                config.machine_config.vcpu_count = shape.vcpus;
                if let Some(disk) = shape.disk {
                    host::add_drive(&mut config, "disk", disk, false);
                    host::add_tap(&mut config, "tap0", "06:00:ac:10:00:02");
                }
                let file = directory.join(format!("{name}-{}.json", shape.vcpus));
                fs::write(&file, serde_json::to_vec(&config)?)
                    .with_context(|| format!("write {}", file.display()))?;
                let mut command = Command::new(monitor.program());
                command.args(monitor.arguments(&file));
                Ok(command)
            }
            Self::CloudHypervisor(program) => {
                let mut command = Command::new(program);
                command.arg("--kernel").arg(guest).arg("--cmdline").arg(line);
                command.args(["--cpus", "boot=1", "--memory", &format!("size={memory_mib}M")]);
                command.args(["--serial", "tty", "--console", "off"]);
                Ok(command)
            }
        }
    }
}
