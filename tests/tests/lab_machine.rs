//! Debian's own kernel under `mote-vmm` alone, without a cloud: what it finds of the machine by itself. On this machine
//! where it has hardware virtualization, else in the lab.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use mote_tests::{
    lab::{self, Lab},
    place::Place,
    programs::{guest, program, source_dir, why_no_servers},
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

    /// Boots, has the guest's shell run `commands` one after the other and switch off, and gives what it printed.
    fn run(&self, config: &Value, commands: &[String]) -> anyhow::Result<String> {
        let steps: Vec<Step> = commands.iter().cloned().map(Step::Guest).collect();
        self.run_steps(config, &steps)
    }

    /// Boots, takes the steps and switches off; gives what the guest printed, and after a `---` what the host's commands did.
    fn run_steps(&self, config: &Value, steps: &[Step]) -> anyhow::Result<String> {
        let vmm = program("mote-vmm");
        let mut script = format!(
            r#"cd {directory} && rm -f in out log host api && mkfifo in && cat >config.json <<'END'
{config}
END
start() {{ rm -f api; timeout {PATIENCE_S} {vmm} --api-sock api --level Debug "$@" <>in >>out 2>>log & vmm=$!; }}
start --enable-pci --config-file config.json
expect() {{ until grep -q -e "$1" out; do kill -0 $vmm || {{ cat out log; exit 1; }}; sleep 0.3; done; }}
ask() {{ curl -sS --unix-socket api -X "$1" "localhost$2" ${{3:+-d "$3"}}; }}
expect '{READY}'
"#,
            directory = self.directory,
            vmm = vmm.display(),
        );
        for (number, step) in steps.iter().enumerate() {
            match step {
                // The echo of the typed line doesn't have the mark.
                Step::Guest(commands) => {
                    let typed = format!("cat >in <<'END'\n{commands}\necho 'step''{number}'\nEND\n");
                    script.push_str(&typed);
                    script.push_str(&format!("expect 'step{number}'\n"));
                }
                Step::Host(commands) => script.push_str(&format!("{{ {commands}\n}} >>host 2>&1\n")),
            }
        }
        script.push_str(
            "echo 'poweroff -f' >in; wait $vmm; code=$?; cat out; echo ---; cat host 2>/dev/null
[ $code = 0 ] || { cat log; exit $code; }",
        );
        self.place.sh(&script)
    }
}

/// One after the other.
enum Step {
    /// Lines for the guest's shell.
    Guest(String),
    /// Lines for the host's shell; `ask METHOD PATH BODY` asks the VMM, `start OPTIONS` makes another process.
    Host(String),
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

/// The disk of tests/lab/cloud-disk, made if it isn't there; None where it can't be.
fn cloud_disk() -> anyhow::Result<Option<PathBuf>> {
    if !std::process::Command::new("mmdebstrap").arg("--version").output().is_ok_and(|o| o.status.success()) {
        return Ok(None);
    }
    let disk = Path::new("/var/cache/mote/images/debian-cloud/disk.raw").to_owned();
    std::fs::create_dir_all("/var/cache/mote/images/debian-cloud").context("making the disk's directory")?;
    Place::Here.sh(&format!("{}/tests/lab/cloud-disk {}", source_dir().display(), disk.display()))?;
    Ok(Some(disk))
}

fn hot_plug() -> anyhow::Result<()> {
    let Some(machines) = Machines::new("plug")? else { return Ok(()) };
    let root = machines.path("root.raw");
    machines
        .place
        .sh(&format!("cp --sparse=always {} {root}", machines.debian.join("disk.raw").display()))?;
    let config = machines.config(&json!({"drive_id": "root", "path_on_host": root, "is_root_device": false}));
    let tap = format!("mplug{}", std::process::id() % 100_000);
    let data = machines.path("data.raw");
    let drive = |id: &str| json!({"drive_id": id, "path_on_host": data, "is_root_device": false}).to_string();
    let interface = json!({"iface_id": "hot", "host_dev_name": tap, "guest_mac": "06:00:00:00:00:0a"});
    let devices = "ls /sys/block | grep vd; ls /sys/class/net";
    let wait_for = |what: &str| format!("n=0; until {what} || [ $n = 100 ]; do n=$((n+1)); sleep 0.1; done");
    let steps = [
        Step::Guest(marked("before", devices)),
        Step::Host(format!(
            "modprobe tun; truncate -s 8M {data}; ask PUT /drives/data '{}'; ask PUT /network-interfaces/hot '{interface}'",
            drive("data")
        )),
        Step::Guest(wait_for("[ -b /dev/vdb -a -e /sys/class/net/eth0 ]")),
        Step::Guest(marked(
            "added",
            &format!("{devices}; cat /sys/block/vdb/size /sys/class/net/eth0/address; echo hot-mark >/dev/vdb; sync"),
        )),
        Step::Host("ask DELETE /drives/data; ask DELETE /network-interfaces/hot".to_owned()),
        Step::Guest(wait_for("[ ! -e /sys/block/vdb -a ! -e /sys/class/net/eth0 ]")),
        Step::Guest(marked("removed", devices)),
        Step::Host(format!(
            "n=0; while ask GET /vm/config '' | grep -q -e '\"data\"' -e '\"hot\"' && [ $n -lt 100 ]; do n=$((n+1)); sleep 0.1; done
             head -c 8 {data}; echo; ls -l /proc/$(pgrep -P $vmm)/fd 2>/dev/null | grep -c data.raw
             ask PUT /drives/again '{again}'",
            again = drive("again"),
        )),
        Step::Guest(wait_for("[ -b /dev/vdb ]")),
        Step::Guest(marked("again", "head -c 8 /dev/vdb")),
    ];
    let output = machines.run_steps(&config, &steps)?;
    let words = |name| Ok::<_, anyhow::Error>(part(&output, name)?.split_whitespace().collect::<Vec<_>>());
    ensure!(words("before")? == ["vda", "lo"], "{output}");
    ensure!(words("added")? == ["vda", "vdb", "eth0", "lo", "16384", "06:00:00:00:00:0a"], "{output}");
    ensure!(words("removed")? == ["vda", "lo"], "{output}");
    ensure!(words("again")? == ["hot-mark"], "{output}");
    let host = output.rsplit("---\n").next().unwrap_or_default();
    ensure!(host.lines().eq(["hot-mark", "0"]), "on the host: {host}");
    Ok(())
}

#[test]
fn debian_takes_and_gives_up_a_drive_and_an_interface_while_it_runs() {
    if let Err(error) = hot_plug() {
        panic!("{error:#}");
    }
}

fn huge_pages() -> anyhow::Result<()> {
    let Some(machines) = Machines::new("huge")? else { return Ok(()) };
    if matches!(machines.place, Place::Here) {
        eprintln!(
            "SKIPPED: this machine's pool of huge pages is left as it is (the lab's is changed where there is one)"
        );
        return Ok(());
    }
    let machine = |mem_size_mib: u32| {
        json!({
            "boot-source": {
                "kernel_image_path": guest(), "boot_args": format!("mote.test mote.memory_mib={mem_size_mib}"),
            },
            "machine-config": {"vcpu_count": 1, "mem_size_mib": mem_size_mib, "huge_pages": "2M"},
        })
    };
    let vmm = program("mote-vmm");
    let run = |mib: u32| {
        format!(
            "cat >config.json <<'END'\n{}\nEND\n{} --no-api --config-file config.json 2>&1",
            machine(mib),
            vmm.display()
        )
    };
    let script = format!(
        "cd {directory} && echo 24 >/proc/sys/vm/nr_hugepages && grep HugePages_Total /proc/meminfo
{small}
grep HugePages_Free /proc/meminfo
{large} && exit 1
true",
        directory = machines.directory,
        small = run(32),
        large = run(64),
    );
    let output = machines.place.sh(&script)?;
    ensure!(output.contains(", 0 failed"), "{output}");
    let total = output.split_once("HugePages_Total:").map(|(_, rest)| rest.split_whitespace().next());
    let free = output.split_once("HugePages_Free:").map(|(_, rest)| rest.split_whitespace().next());
    ensure!(total == free && total.flatten() == Some("24"), "{output}");
    ensure!(output.contains("cannot map 64 MiB of huge pages"), "{output}");
    Ok(())
}

#[test]
fn guest_memory_of_huge_pages_comes_from_the_pool_and_goes_back() {
    if let Err(error) = huge_pages() {
        panic!("{error:#}");
    }
}

/// Debian with programs that count, write to the disk and answer on the network, saved and gone on with in a new process.
fn snapshot(machines: &Machines, vcpus: u8) -> anyhow::Result<()> {
    let root = machines.path("root.raw");
    machines
        .place
        .sh(&format!("cp --sparse=always {} {root}", machines.debian.join("disk.raw").display()))?;
    let mut config =
        machines.config(&json!({"drive_id": "root", "path_on_host": root, "is_root_device": false}));
    config["machine-config"]["vcpu_count"] = vcpus.into();
    let tap = format!("msave{vcpus}{}", std::process::id() % 100_000);
    let interface = json!({"iface_id": "net", "host_dev_name": tap, "guest_mac": "06:00:00:00:00:0b"});
    let create = json!({"snapshot_path": "state", "mem_file_path": "memory"});
    let backend = json!({"backend_type": "File", "backend_path": "memory"});
    let load =
        json!({"snapshot_path": "state", "mem_backend": backend, "clock_realtime": true, "resume_vm": true});
    let address = format!("ip addr add 10.91.0.1/24 dev {tap}; ip link set {tap} up");
    let page = "curl -sS --retry 9 --retry-connrefused --max-time 60 http://10.91.0.2/ | grep -c hostname";
    let counters: String = (0..vcpus)
        .map(|cpu| {
            format!("taskset -c {cpu} sh -c 'while :; do n=$((n+1)); echo $n >/run/count{cpu}; sleep 0.1; done' &\n")
        })
        .collect();
    let state = "cut -d. -f1 /proc/uptime; nproc; cat /run/count*; cat /sys/devices/system/clocksource/*/current_clocksource";
    // The guest's clock between two looks at the host's.
    let clocks = |name: &str| {
        let host = |when: &str| Step::Host(format!("date +{name}-{when}=%s.%N"));
        [host("before"), Step::Guest(marked(name, "date +%s.%N")), host("after")]
    };
    let steps = [
        // The image asks a network that is there at the boot for a long time.
        Step::Host(format!("modprobe tun; ask PUT /network-interfaces/net '{interface}'; {address}")),
        Step::Guest(format!(
            "until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
             busybox ip addr add 10.91.0.2/24 dev eth0; busybox ip link set eth0 up
             head -c 1000000 /dev/urandom >/kept; sha256sum /kept >/run/sum; sync
             (while :; do date >>/written; sync; sleep 0.1; done) &
             {counters}until [ -s /run/count{last} ]; do sleep 0.1; done",
            last = vcpus - 1
        )),
        Step::Host(page.to_owned()),
        Step::Guest(marked("before", state)),
    ];
    let saved = [
        Step::Host(format!(
            "ask PATCH /vm '{{\"state\":\"Paused\"}}'; ask PUT /snapshot/create '{create}'; kill $vmm; wait $vmm; sleep 4
             start; until ask GET / >/dev/null 2>&1; do sleep 0.1; done; ask PUT /snapshot/load '{load}'; {address}"
        )),
    ];
    let after = [
        Step::Guest(marked("after", state)),
        Step::Host(page.to_owned()),
        // From the disk, not from memory.
        Step::Guest(marked(
            "disk",
            "echo 3 >/proc/sys/vm/drop_caches; sha256sum -c /run/sum; n=$(wc -l </written); \
             until [ $(wc -l </written) -gt $n ]; do sleep 0.1; done; echo grows",
        )),
        Step::Guest(marked("log", "dmesg")),
    ];
    let steps: Vec<Step> =
        [Vec::from(steps), clocks("first").into(), saved.into(), clocks("second").into(), after.into()]
            .into_iter()
            .flatten()
            .collect();
    let output = machines.run_steps(&config, &steps)?;
    let words = |name| Ok::<_, anyhow::Error>(part(&output, name)?.split_whitespace().collect::<Vec<_>>());
    let (before, after) = (words("before")?, words("after")?);
    ensure!(before.len() == 3 + usize::from(vcpus) && after.len() == before.len(), "{output}");
    let [number, then] = [&after, &before]
        .map(|words| words.iter().filter_map(|word| word.parse::<u64>().ok()).collect::<Vec<_>>());
    // Up time and counters have gone on, and every processor is there.
    ensure!(number[0] >= then[0] && number[1] == u64::from(vcpus) && number[1] == then[1], "{output}");
    ensure!(number[2..].iter().zip(&then[2..]).all(|(now, then)| now > then), "{output}");
    ensure!(after.last() == Some(&"kvm-clock") && before.last() == after.last(), "{output}");
    ensure!(words("disk")? == ["/kept:", "OK", "grows"], "{output}");
    ensure!(part(&output, "log")?.contains("crng reseeded due to virtual machine fork"), "{output}");
    let host = output.rsplit("---\n").next().unwrap_or_default();
    ensure!(host.lines().filter(|line| *line == "1").count() == 2, "the guest's page: {host}");
    // How far the guest's clock may be from the host's: the same before and after, as long as it stood in between.
    let range = |name: &str| {
        let guest: f64 = part(&output, name)?.parse()?;
        let host = |when: &str| -> anyhow::Result<f64> {
            let line = host.lines().find_map(|line| line.strip_prefix(&format!("{name}-{when}=")));
            Ok(line.context("no time of the host")?.parse()?)
        };
        anyhow::Ok((guest - host("after")?, guest - host("before")?))
    };
    let (first, second) = (range("first")?, range("second")?);
    ensure!(second.0 <= first.1 + 1.0 && second.1 >= first.0 - 1.0, "{first:?} {second:?}: {output}");
    Ok(())
}

/// The VMM's own test of Landlock, where the kernel has it.
fn landlock(machines: &Machines) -> anyhow::Result<()> {
    let name = "landlock::tests::a_restricted_thread_starts_no_program_and_reaches_nobody_outside";
    let mut found = Vec::new();
    for entry in std::fs::read_dir(program("deps")).into_iter().flatten().flatten() {
        let file_name = entry.file_name().to_string_lossy().into_owned();
        if file_name.starts_with("mote_vmm-") && !file_name.contains('.') {
            found.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    found.sort();
    let lists = |path: &PathBuf| {
        let output = std::process::Command::new(path).args(["--list", "landlock"]).output();
        output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(name))
    };
    let Some((_, test)) = found.into_iter().rev().find(|(_, path)| lists(path)) else {
        eprintln!("the unit tests of mote-vmm are not built: Landlock is not tested");
        return Ok(());
    };
    let output = machines.place.sh(&format!("{} --exact {name} --nocapture 2>&1", test.display()))?;
    ensure!(output.contains("1 passed"), "{output}");
    // Debian's kernel has it.
    ensure!(matches!(machines.place, Place::Here) || !output.contains("SKIPPED"), "{output}");
    Ok(())
}

#[test]
fn debian_goes_on_in_a_new_process_with_disk_network_and_clock() {
    let run = || {
        let Some(machines) = Machines::new("save")? else { return Ok(()) };
        landlock(&machines)?;
        snapshot(&machines, 1)
    };
    if let Err(error) = run() {
        panic!("{error:#}");
    }
}

#[test]
fn debian_with_two_processors_goes_on_in_a_new_process() {
    let run = || Machines::new("two")?.map_or(Ok(()), |machines| snapshot(&machines, 2));
    if let Err(error) = run() {
        panic!("{error:#}");
    }
}

fn whole_disk() -> anyhow::Result<()> {
    let Some(machines) = Machines::new("disk")? else { return Ok(()) };
    let Some(disk) = cloud_disk()? else {
        eprintln!("SKIPPED: no mmdebstrap");
        return Ok(());
    };
    let Some(image) = overlay(&disk)? else {
        eprintln!("SKIPPED: no qemu-img");
        return Ok(());
    };
    let root = machines.path("root.qcow2");
    machines.place.sh(&format!("cp {} {root}", image.path().display()))?;
    let config = json!({
        // What the disk can't know: the lab's emulated processor.
        "boot-source": {"boot_from_disk": true, "boot_args": "noxsave quiet"},
        "drives": [{
            "drive_id": "root", "path_on_host": root, "is_root_device": true, "format": "Qcow2",
            "backing_files": [{"path_on_host": disk}],
        }],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 512},
    });
    let commands = [
        marked("line", "cat /proc/cmdline"),
        marked("root", "findmnt -no SOURCE,FSTYPE /; readlink /dev/disk/by-partuuid/* | sort"),
        marked("init", "cat /proc/1/comm; . /etc/os-release; echo $ID; uname -r"),
    ];
    let output = machines.run(&config, &commands)?;
    let line = part(&output, "line")?;
    ensure!(line.starts_with("root=PARTUUID=") && line.ends_with("consoleblank=0 noxsave quiet"), "{line}");
    ensure!(part(&output, "root")?.starts_with("/dev/vda1 ext4"), "{output}");
    let init = part(&output, "init")?;
    ensure!(init.starts_with("systemd") && init.contains("debian") && init.contains("cloud-amd64"), "{init}");
    Ok(())
}

#[test]
fn debians_own_cloud_layout_boots_from_its_disk_alone() {
    if let Err(error) = whole_disk() {
        panic!("{error:#}");
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
    let output = machines.run(&config, &commands)?;
    let lines: Vec<&str> = part(&output, "dmi")?.lines().map(str::trim).collect();
    let expected = [
        "OpenStack Foundation",
        "OpenStack Nova",
        "5e71a1",
        "00112233-4455-6677-8899-aabbccddeeff",
        "rack 7",
    ];
    ensure!(lines == expected, "{lines:?}");
    ensure!(part(&output, "drivers")?.split_whitespace().count() == 2, "{output}");
    ensure!(part(&output, "line")? == "console=ttyS0 quiet noxsave", "{output}");
    let clocks: Vec<i64> =
        part(&output, "clock")?.lines().filter_map(|line| line.trim().parse().ok()).collect();
    ensure!(clocks.len() == 2 && clocks[0].abs_diff(clocks[1]) < 60, "{clocks:?}");
    // Its own event, and that of hot-plug.
    let generation = part(&output, "generation")?;
    ensure!(generation.contains("MOTE0001:00") && generation.ends_with('2'), "{output}");
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
