//! `mote-bench lab-boot`: an ordinary distribution kernel until its user space, in the lab's repeatable mode, where time is
//! the number of instructions of the host's kernel, the monitor and the guest together.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;

use crate::startup::{Spread, spread};
use plan::{DRIVE_READ, PROFILE, Plan, RESULT, Start, Subject, USER_SPACE};

mod inside;
mod plan;

pub use inside::run as run_inside;

/// Memory of the lab: its root file system is in it, with the kernel that is booted.
const LAB_MEMORY_MIB: u32 = 2048;
const DRIVE_BYTES: u64 = 16 << 20;
/// Modules of the lab's kernel that make it a host, in the order of their loading.
const HOST_MODULES: [&str; 3] = ["irqbypass", "kvm", "kvm-amd"];
/// Modules of the guest that its drive needs.
const GUEST_MODULES: [&str; 2] = ["virtio_mmio", "virtio_blk"];
/// What is the same for all. `noxsave`: QEMU 7.2's SVM doesn't intercept XSETBV.
const COMMAND_LINE: &str = "console=ttyS0 quiet reboot=k panic=-1 noxsave";

/// What `lab-boot` measures.
#[derive(Debug, clap::Args)]
pub struct LabBootArguments {
    /// mote-vmm
    #[arg(long, value_name = "PATH")]
    vmm: PathBuf,
    /// Firecracker
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// The script of the lab
    #[arg(long, value_name = "PATH", default_value = "tests/lab/lab")]
    lab: PathBuf,
    /// Where `lab prepare` keeps what it makes
    #[arg(long, value_name = "PATH", default_value = "/var/cache/mote/lab", env = "MOTE_LAB_CACHE")]
    cache: PathBuf,
    /// Starts of each that count
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=10))]
    rounds: u32,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(64..=512))]
    memory_mib: u32,
    /// The guest's command line, to which each monitor adds what it must
    #[arg(long, value_name = "TEXT", default_value = COMMAND_LINE)]
    command_line: String,
    /// Count KVM's events by kind, and print the most frequent ones; times are longer then
    #[arg(long)]
    profile: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Results of all programs.
#[derive(Debug, Serialize)]
pub struct Report {
    /// In the order of the runs.
    starts: Vec<Start>,
    /// Counted events, if they were asked for.
    profile: Vec<String>,
}

/// Measures.
pub fn run(arguments: &LabBootArguments) -> Result<Report> {
    let directory = tempfile::tempdir().context("a temporary directory")?;
    let root = directory.path().join("root");
    make_root(arguments, &root)?;
    make_guest(arguments, &directory.path().join("guest"), &root.join("guest"))?;
    let output = Command::new(&arguments.lab)
        .args(["repeat", "--mem", &LAB_MEMORY_MIB.to_string(), "--root"])
        .arg(&root)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("running {}", arguments.lab.display()))?;
    let console = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}: {console}", output.status);
    let lines = |prefix| console.lines().filter_map(move |line| line.trim_end().strip_prefix(prefix));
    let starts = lines(RESULT).map(serde_json::from_str).collect::<Result<Vec<Start>, _>>()?;
    let wanted = arguments.rounds as usize * subjects(arguments).len();
    ensure!(starts.len() == wanted, "{} of {wanted} starts: {console}", starts.len());
    Ok(Report { starts, profile: lines(PROFILE).map(str::to_owned).collect() })
}

fn subjects(arguments: &LabBootArguments) -> Vec<Subject> {
    let subject = |name: &str, program: &str, arguments: &[&str]| Subject {
        name: name.to_owned(),
        program: Path::new("/bin").join(program),
        arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
    };
    let mut all = Vec::new();
    if arguments.firecracker.is_some() {
        // Its log goes to stdout.
        all.push(subject("firecracker", "firecracker", &["--level", "Error"]));
    }
    all.push(subject("mote-vmm", "mote-vmm", &[]));
    all.push(subject("mote-vmm, PCI", "mote-vmm", &["--enable-pci"]));
    all
}

/// The lab's root file system: busybox, KVM's modules, the programs with their libraries, the plan.
fn make_root(arguments: &LabBootArguments, root: &Path) -> Result<()> {
    for name in ["bin", "dev", "proc", "sys", "run", "tmp", "modules", "guest"] {
        fs::create_dir_all(root.join(name)).context("making the lab's root")?;
    }
    copy(&find_program("busybox")?, &root.join("bin/busybox"))?;
    copy_modules(arguments, &HOST_MODULES, &root.join("modules"))?;
    add_program(&std::env::current_exe().context("path of this program")?, root, "mote-bench")?;
    add_program(&arguments.vmm, root, "mote-vmm")?;
    if let Some(firecracker) = &arguments.firecracker {
        add_program(firecracker, root, "firecracker")?;
    }
    let modules = HOST_MODULES.join(" ");
    let init = format!(
        "#!/bin/busybox sh
export PATH=/bin
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs dev /dev
$bb mount -t debugfs debugfs /sys/kernel/debug
$bb mount -t tracefs tracefs /sys/kernel/tracing
for module in {modules}; do $bb insmod /modules/$module.ko || echo \"can't load $module\"; done
RUST_BACKTRACE=0 mote-bench lab-boot-inside /plan.json
$bb poweroff -f
"
    );
    write_program(&root.join("init"), &init)?;
    File::create(root.join("guest/drive")).and_then(|file| file.set_len(DRIVE_BYTES)).context("a drive")?;
    let plan = Plan {
        subjects: subjects(arguments),
        rounds: arguments.rounds,
        requests: requests(arguments),
        profile: arguments.profile,
    };
    fs::write(root.join("plan.json"), serde_json::to_vec(&plan)?).context("writing the plan")
}

fn requests(arguments: &LabBootArguments) -> Vec<(String, serde_json::Value)> {
    let kernel = json!({
        "kernel_image_path": "/guest/vmlinux", "initrd_path": "/guest/initrd",
        "boot_args": arguments.command_line,
    });
    let drive = json!({
        "drive_id": "root", "path_on_host": "/guest/drive", "is_root_device": true, "is_read_only": false,
    });
    let machine = json!({"vcpu_count": 1, "mem_size_mib": arguments.memory_mib});
    [("/machine-config", machine), ("/boot-source", kernel), ("/drives/root", drive)]
        .map(|(path, body)| (path.to_owned(), body))
        .into()
}

/// The guest's kernel, which is the lab's, and its initial ramdisk: a line at the start of user space, another one when the
/// drive has been read.
fn make_guest(arguments: &LabBootArguments, work: &Path, to: &Path) -> Result<()> {
    for name in ["bin", "dev", "modules"] {
        fs::create_dir_all(work.join(name)).context("making the guest's root")?;
    }
    copy(&find_program("busybox")?, &work.join("bin/busybox"))?;
    copy_modules(arguments, &GUEST_MODULES, &work.join("modules"))?;
    let modules = GUEST_MODULES.join(" ");
    let init = format!(
        "#!/bin/busybox sh
echo '{USER_SPACE}'
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
for module in {modules}; do $bb insmod /modules/$module.ko; done
until [ -b /dev/vda ]; do $bb usleep 1000; done
$bb dd if=/dev/vda of=/dev/null bs=4096 count=1 2>/dev/null && echo '{DRIVE_READ}'
while :; do $bb sleep 1000; done
"
    );
    write_program(&work.join("init"), &init)?;
    let pack = "find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 --reproducible";
    let initrd = File::create(to.join("initrd")).context("the guest's ramdisk")?;
    let status = Command::new("sh").args(["-c", pack]).current_dir(work).stdout(initrd).status();
    ensure!(status.context("running cpio")?.success(), "packing the guest's ramdisk");
    copy(&arguments.cache.join("current/vmlinux"), &to.join("vmlinux"))
}

fn write_program(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).context("making it a program")
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(directory) = to.parent() {
        fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
    }
    fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// Copies modules of the lab's kernel.
fn copy_modules(arguments: &LabBootArguments, names: &[&str], to: &Path) -> Result<()> {
    let tree = arguments.cache.join("current/tree");
    for name in names {
        let output = Command::new("find").arg(&tree).args(["-name", &format!("{name}.ko")]).output();
        let found = String::from_utf8(output.context("running find")?.stdout)?;
        let path = found.lines().next().with_context(|| format!("no module {name} in {}", tree.display()))?;
        copy(Path::new(path), &to.join(format!("{name}.ko")))?;
    }
    Ok(())
}

fn find_program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").context("no PATH")?;
    let found =
        std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file());
    found.with_context(|| format!("no {name} in PATH"))
}

/// Copies a program and the libraries that it is linked with.
fn add_program(program: &Path, root: &Path, name: &str) -> Result<()> {
    copy(program, &root.join("bin").join(name))?;
    let output = Command::new("ldd").arg(program).output().context("running ldd")?;
    // A static program has none.
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Some(library) = line.split_whitespace().find(|word| word.starts_with('/')) else { continue };
        let to = root.join(library.trim_start_matches('/'));
        if !to.exists() {
            copy(Path::new(library), &to)?;
        }
    }
    Ok(())
}

type Column = (&'static str, fn(&Start) -> f64);

const COLUMNS: [Column; 4] = [
    ("InstanceStart → user space ms", |start| start.user_space_ms),
    ("→ drive read ms", |start| start.drive_read_ms),
    ("process → user space ms", |start| start.whole_ms),
    ("exits", |start| start.counters.get("exits").map_or(f64::NAN, |exits| *exits as f64)),
];

/// A table of min/median/max with the ratios to Firecracker, then the counters that differ.
pub fn render(report: &Report) -> String {
    let mut names: Vec<&str> = report.starts.iter().map(|start| start.subject.as_str()).collect();
    names.dedup();
    names.truncate(names.iter().skip(1).position(|name| *name == names[0]).map_or(names.len(), |at| at + 1));
    let of = |name: &str, what: fn(&Start) -> f64| -> Spread {
        spread(report.starts.iter().filter(|start| start.subject == name).map(what))
    };
    let mut text = format!("{:16}", "");
    for (title, _) in COLUMNS {
        let _ = write!(text, "{title:>34}");
    }
    for name in &names {
        let _ = write!(text, "\n{name:16}");
        for (_, what) in COLUMNS {
            let Spread { min, median, max } = of(name, what);
            let ratio = median / of(names[0], what).median;
            let cell = format!("{min:.1} / {median:.1} / {max:.1} ({ratio:.3})");
            let _ = write!(text, "{cell:>34}");
        }
    }
    text.push('\n');
    for name in &names {
        let last = report.starts.iter().rfind(|start| start.subject == *name);
        let counters = last.into_iter().flat_map(|start| &start.counters);
        let _ = write!(text, "\n{name}:");
        for (counter, value) in counters {
            let _ = write!(text, " {counter}={value}");
        }
    }
    text.push('\n');
    for line in &report.profile {
        let _ = writeln!(text, "{line}");
    }
    text
}
