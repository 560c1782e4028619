//! Debian's own kernel under `mote-vmm` alone, without a cloud: what it finds of the machine by itself. On this machine
//! where it has hardware virtualization, else in the lab.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use mote_tests::{
    lab::{self, Lab},
    place::Place,
    programs::{program, why_no_servers},
};
use serde_json::{Value, json};

/// Seconds that a boot may take: emulated code is slow, and the machine may be loaded.
const PATIENCE_S: u32 = 180;
/// Where Debian's page and shell are ready.
const READY: &str = "mote-debian: ready";

/// Where Debian runs, and its files.
struct Machines {
    /// Dropped last: the place is inside of it.
    place: Place,
    _lab: Option<Lab>,
    debian: PathBuf,
    /// Made here, and writable there.
    directory: String,
}

impl Machines {
    /// `None`, and a line that says why, where Debian can't be booted.
    fn new(name: &str) -> anyhow::Result<Option<Self>> {
        if let Some(reason) = why_no_servers() {
            eprintln!("SKIPPED: {reason}");
            return Ok(None);
        }
        let Some(debian) = lab::debian_dir() else {
            eprintln!("SKIPPED: the Debian image is not built (./test builds it: mote-image build-debian)");
            return Ok(None);
        };
        let lab = match lab::needed() {
            None => None,
            Some(reason) => {
                eprintln!("a lab is needed: {reason}");
                Some(Lab::start(&format!("{name}{}", std::process::id()))?)
            }
        };
        let place = lab.as_ref().map_or(Place::Here, Lab::place);
        let directory = place.sh("mktemp -d /run/mote-test-XXXXXX")?.trim().to_owned();
        Ok(Some(Self { place, _lab: lab, debian, directory }))
    }

    /// The path of a file that can be written there.
    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.directory)
    }

    /// A machine that boots Debian from `drive`; there is nothing about devices on its command line.
    fn config(&self, drive: &Value) -> Value {
        json!({
            "boot-source": {
                "kernel_image_path": self.debian.join("vmlinux"),
                "initrd_path": self.debian.join("initrd.img"),
                "boot_args": "console=ttyS0 quiet noxsave",
            },
            "drives": [drive],
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
        })
    }

    /// Boots, has the guest's shell run `commands` and switch off, and gives what it printed.
    fn run(&self, config: &Value, commands: &str) -> anyhow::Result<String> {
        let vmm = program("mote-vmm");
        let script = format!(
            r#"cd {directory} && rm -f in out log && mkfifo in && cat >config.json <<'END'
{config}
END
timeout {PATIENCE_S} {vmm} --no-api --enable-pci --config-file config.json <>in >out 2>log & vmm=$!
until grep -q '{READY}' out; do kill -0 $vmm || {{ cat out log; exit 1; }}; sleep 0.5; done
cat >in <<'END'
{commands}
poweroff -f
END
wait $vmm; code=$?
cat out; [ $code = 0 ] || {{ cat log; exit $code; }}"#,
            directory = self.directory,
            vmm = vmm.display(),
        );
        self.place.sh(&script)
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        // A lab's files go with it.
        let _ = self.place.sh(&format!("rm -rf {}", self.directory));
    }
}

/// What a command of the guest printed between the marks `<<NAME` and `NAME>>`.
fn part<'a>(output: &'a str, name: &str) -> anyhow::Result<&'a str> {
    let found =
        output.split(&format!("\n<<{name}")).nth(1).and_then(|rest| rest.split(&format!("{name}>>")).next());
    found.map(str::trim).with_context(|| format!("the guest printed no {name}: {output}"))
}

/// A command between the marks that [`part`] looks for; the echo of the typed line doesn't have them.
fn marked(name: &str, command: &str) -> String {
    format!("echo; echo '<''<{name}'; {command}; echo '{name}>''>'")
}

/// A qcow2 image over `base`; `None` without qemu-img.
fn overlay(base: &Path) -> anyhow::Result<Option<tempfile::NamedTempFile>> {
    let image = tempfile::NamedTempFile::new()?;
    let mut command = std::process::Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(base).arg(image.path());
    match command.output() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).context("running qemu-img"),
        Ok(output) if !output.status.success() => {
            bail!("qemu-img: {}", String::from_utf8_lossy(&output.stderr))
        }
        Ok(_) => Ok(Some(image)),
    }
}

fn debian_on_pci() -> anyhow::Result<()> {
    let Some(machines) = Machines::new("pci")? else { return Ok(()) };
    let disk = machines.debian.join("disk.raw");
    let Some(image) = overlay(&disk)? else {
        eprintln!("SKIPPED: no qemu-img");
        return Ok(());
    };
    // The lab sees this machine's files, but read-only.
    let root = machines.path("root.qcow2");
    machines.place.sh(&format!("cp {} {root}", image.path().display()))?;
    let mut config = machines.config(&json!({
        "drive_id": "root", "path_on_host": root, "is_root_device": false, "format": "Qcow2",
        "backing_files": [{"path_on_host": disk}],
    }));
    config["entropy"] = json!({});
    config["smbios"] = json!({
        "manufacturer": "OpenStack Foundation", "product_name": "OpenStack Nova", "serial_number": "5e71a1",
        "uuid": "00112233-4455-6677-8899-aabbccddeeff", "chassis_asset_tag": "rack 7",
    });
    let names = "sys_vendor product_name product_serial product_uuid chassis_asset_tag";
    let commands = [
        marked("dmi", &format!("cd /sys/class/dmi/id; cat {names}")),
        marked("drivers", "cd /sys/bus/virtio/drivers; ls -d virtio_blk/virtio* virtio_rng/virtio*"),
        marked("line", "cat /proc/cmdline"),
        marked("clock", "cat /sys/class/rtc/rtc0/since_epoch; date +%s"),
        marked("generation", "ls /sys/bus/*/drivers/vmgenid; grep -c Ged /proc/interrupts"),
        marked("root", "cd /; echo kept >/kept; sync; cat /kept; grep ' / ' /proc/mounts"),
    ];
    let output = machines.run(&config, &commands.join("\n"))?;
    let lines: Vec<&str> = part(&output, "dmi")?.lines().map(str::trim).collect();
    let expected = [
        "OpenStack Foundation",
        "OpenStack Nova",
        "5e71a1",
        "00112233-4455-6677-8899-aabbccddeeff",
        "rack 7",
    ];
    ensure!(lines == expected, "{lines:?}");
    ensure!(part(&output, "drivers")?.lines().count() == 2, "{output}");
    ensure!(part(&output, "line")? == "console=ttyS0 quiet noxsave", "{output}");
    let clocks: Vec<i64> =
        part(&output, "clock")?.lines().filter_map(|line| line.trim().parse().ok()).collect();
    ensure!(clocks.len() == 2 && clocks[0].abs_diff(clocks[1]) < 60, "{clocks:?}");
    let generation = part(&output, "generation")?;
    ensure!(generation.contains("MOTE0001:00") && generation.ends_with('1'), "{output}");
    ensure!(part(&output, "root")?.starts_with("kept"), "{output}");
    // What was written is in the image, not in the file below it, which nobody may write in the lab.
    let written = machines.place.sh(&format!("stat -c %s {root}"))?.trim().parse::<u64>()?;
    ensure!(written > image.as_file().metadata()?.len(), "{written} bytes");
    Ok(())
}

#[test]
fn debian_on_a_layered_disk_finds_its_machine_without_a_word_on_its_command_line() {
    if let Err(error) = debian_on_pci() {
        panic!("{error:#}");
    }
}
