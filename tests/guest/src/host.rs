//! The host side: writes a configuration, starts the guest under a VMM with Firecracker's command line, reads its report.

extern crate std;

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    string::String,
    time::{Duration, Instant},
    vec::Vec,
};

use mote_vmm_api::{BootSource, Drive, Entropy, MachineConfig, NetworkInterface, VmConfig};

/// What to start.
#[derive(Debug, Clone)]
pub struct Run {
    /// The VMM's program.
    pub vmm: PathBuf,
    /// The guest's ELF file.
    pub guest: PathBuf,
    /// Its command line: see `src/guest/main.rs`.
    pub command_line: String,
    /// vCPUs.
    pub vcpus: u8,
    /// Raw disks: id, file, read-only.
    pub disks: Vec<(String, PathBuf, bool)>,
    /// Names of taps.
    pub taps: Vec<String>,
    /// With a virtio-rng device.
    pub rng: bool,
    /// After this the VMM is killed.
    pub limit: Duration,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The VMM's exit code; `None` when it was killed.
    pub code: Option<i32>,
    /// What the guest printed.
    pub output: String,
    /// What the VMM printed on stderr.
    pub errors: String,
}

/// Why the guest could not be started.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A file.
    #[error("can't write the configuration in {0}")]
    Config(PathBuf, #[source] std::io::Error),
    /// The VMM.
    #[error("can't run {0}")]
    Start(PathBuf, #[source] std::io::Error),
}

impl Run {
    /// One vCPU, no devices, ten seconds.
    pub fn new(vmm: &Path, guest: &Path, command_line: &str) -> Self {
        Self {
            vmm: vmm.into(),
            guest: guest.into(),
            command_line: command_line.into(),
            vcpus: 1,
            disks: Vec::new(),
            taps: Vec::new(),
            rng: false,
            limit: Duration::from_secs(60),
        }
    }

    /// The configuration file's content.
    pub fn config(&self) -> VmConfig {
        let drive = |(id, path, read_only): &(String, PathBuf, bool)| Drive {
            drive_id: id.clone(),
            path_on_host: path.clone(),
            is_root_device: false,
            partuuid: None,
            is_read_only: *read_only,
            cache_type: mote_vmm_api::CacheType::Writeback,
            io_engine: mote_vmm_api::IoEngine::Sync,
        };
        let nic = |(number, tap): (usize, &String)| NetworkInterface {
            iface_id: std::format!("eth{number}"),
            host_dev_name: tap.clone(),
            guest_mac: Some(std::format!("06:00:00:00:00:{number:02x}")),
            tap_fd: None,
            mtu: None,
        };
        VmConfig {
            boot_source: Some(BootSource {
                kernel_image_path: self.guest.clone(),
                initrd_path: None,
                boot_args: Some(self.command_line.clone()),
            }),
            drives: self.disks.iter().map(drive).collect(),
            machine_config: MachineConfig {
                vcpu_count: self.vcpus,
                mem_size_mib: 64,
                ..MachineConfig::default()
            },
            network_interfaces: self.taps.iter().enumerate().map(nic).collect(),
            entropy: self.rng.then(Entropy::default),
            serial: None,
        }
    }

    /// Starts it and waits for its end.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn run(&self) -> Result<Ended, HostError> {
        let dir = tempfile::tempdir().map_err(|e| HostError::Config(std::env::temp_dir(), e))?;
        let path = dir.path().join("vm.json");
        let text =
            serde_json::to_vec(&self.config()).map_err(|e| HostError::Config(path.clone(), e.into()))?;
        fs::write(&path, text).map_err(|e| HostError::Config(path.clone(), e))?;
        let start = |e| HostError::Start(self.vmm.clone(), e);
        // Output goes to files, so that neither side waits for the other.
        let [out, err] = [dir.path().join("out"), dir.path().join("err")];
        let mut child = Command::new(&self.vmm)
            .args(["--no-api", "--config-file"])
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(fs::File::create(&out).map_err(start)?)
            .stderr(fs::File::create(&err).map_err(start)?)
            .spawn()
            .map_err(start)?;
        let deadline = Instant::now() + self.limit;
        let status = loop {
            match child.try_wait().map_err(start)? {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    child.kill().map_err(start)?;
                    break child.wait().map_err(start)?;
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        Ok(Ended { code: status.code(), output: text_of(&out), errors: text_of(&err) })
    }
}

fn text_of(path: &Path) -> String {
    let mut bytes = Vec::new();
    // A file that can't be read shows as empty output, which no test takes for a pass.
    let _ = fs::File::open(path).and_then(|mut f| f.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What the guest reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Names of tests that passed.
    pub passed: Vec<String>,
    /// Lines of tests that failed.
    pub failed: Vec<String>,
    /// The closing line agrees with the lines before it.
    pub complete: bool,
}

/// Reads `ok NAME`, `FAIL NAME: why` and `mote-guest: N passed, N failed`.
pub fn report(output: &str) -> Report {
    let lines = || output.lines().map(str::trim);
    let passed: Vec<String> = lines().filter_map(|l| l.strip_prefix("ok ")).map(String::from).collect();
    let failed: Vec<String> = lines().filter_map(|l| l.strip_prefix("FAIL ")).map(String::from).collect();
    let closing = std::format!("mote-guest: {} passed, {} failed", passed.len(), failed.len());
    let complete = lines().any(|l| l == closing);
    Report { passed, failed, complete }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_complete_only_with_its_closing_line() {
        let whole = report("ok a\r\nFAIL b: why\r\nmote-guest: 1 passed, 1 failed\r\n");
        assert_eq!((whole.passed.len(), whole.failed.len(), whole.complete), (1, 1, true));
        assert!(!report("ok a\nmote-guest: 2 passed, 0 failed\n").complete);
        assert!(!report("").complete);
    }
}
