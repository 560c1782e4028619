//! `start` and `adopt`: a VMM that runs the server's guest.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use mote_host_api::{Bucket, LocalDiskSpec, NetworkId, PortSpec, ServerId, ServerSpec};
use mote_images::kernel::{KernelError, check_kernel};
use mote_vmm_api::{
    BootSource, CacheType, Drive, Entropy, MachineConfig, RateLimiter, Serial, Smbios, TokenBucket, VmConfig,
};

use super::{
    TaskError, TaskEvent, Wanted, Work,
    nics::{interface, ports_of_config},
    prepare::boot,
};
use crate::{
    console,
    errors::one_line,
    files::{self, Durability, FileError},
    jail,
    ledger::Phase,
    parts::Launch,
    paths::ServerDir,
    process::ProcessIdentity,
};

/// A VMM that has not said within this time that its guest runs is ended.
pub const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of console output after which the VMM starts a new file (and keeps one older).
pub const CONSOLE_LOG_LIMIT: u64 = 1 << 20;
/// Drive id of the root disk.
const ROOT_DRIVE: &str = "root";
/// Drive id of the disk that a rescued server boots from.
const RESCUE_DRIVE: &str = "rescue";
/// Beginning of the drive ids of disks beside the root disk.
const LOCAL_DRIVE: &str = "local";
/// Drive id of the config drive.
const CONFIG_DRIVE: &str = "config";

impl Work {
    pub(super) async fn start(&mut self) -> Result<(), TaskError> {
        let wanted = self.wanted()?;
        if self.goes_on(&wanted) {
            return self.resume(&wanted).await;
        }
        let boot = boot(&wanted.spec);
        let kernel = match &boot.kernel {
            Some(image) => Some(self.image(image).await?),
            None => None,
        };
        let ramdisk = match &boot.ramdisk {
            Some(image) => Some(self.image(image).await?),
            None => None,
        };
        if let Some(path) = kernel.clone() {
            self.blocking(move || check_bootable(&path)).await??;
        }
        let slots = self.slots.clone();
        let _slot = slots.start.acquire().await.map_err(|_| TaskError::Cancelled)?;
        self.check_cancelled()?;

        // What an earlier VMM left must not be taken for what this one does.
        self.clean_up_before_start().await?;
        let dir = self.parts.state.server(self.record.id);
        self.blocking(move || console::start_over(&dir)).await??;
        self.forget_suspended().await?;
        self.ensure_config_drive().await?;
        self.record.paused = Some(false);
        self.record.pci = true;
        self.enter_start(&wanted).await?;

        let dir = self.parts.state.server(self.record.id);
        let (kernel, ramdisk) = self
            .blocking(move || -> Result<_, FileError> {
                let linked = |image: Option<PathBuf>, path: PathBuf| -> Result<Option<PathBuf>, FileError> {
                    match image {
                        Some(image) => jail::link_image(&image, &path).map(|()| Some(dir.inside(&path))),
                        None => files::remove_file(&path).map(|()| None),
                    }
                };
                Ok((linked(kernel, dir.kernel())?, linked(ramdisk, dir.initrd())?))
            })
            .await??;
        let taps = self.open_taps(&wanted.ports).await?;
        let config = self.vm_config(&wanted, kernel, ramdisk, &taps);
        self.launch(config, taps).await
    }

    /// A VMM is about to be started.
    pub(super) async fn enter_start(&mut self, wanted: &Wanted) -> Result<(), TaskError> {
        self.note_attempt(&wanted.spec);
        self.record.run_generation = wanted.spec.run_generation;
        self.record.process = None;
        self.record.stopped_by_guest = false;
        self.record.started_at = Some(self.parts.clock.now());
        // What is in the files of a suspended VMM may have left meanwhile.
        let leaving = wanted.leaving.iter().filter(|_| self.record.suspended);
        self.record.networks = wanted.ports.iter().chain(leaving).map(|(network, ..)| *network).collect();
        self.enter(Phase::Starting, None).await
    }

    /// Starts a VMM and waits until it has its guest.
    pub(super) async fn launch(&mut self, config: VmConfig, taps: Vec<OwnedFd>) -> Result<(), TaskError> {
        let (id, dir) = (self.record.id, self.parts.state.server(self.record.id));
        let file = config.clone();
        self.blocking(move || {
            files::replace_json(&dir.vmm_config(), &file, Durability::Process)?;
            jail::hand_over(id, &dir, &file)
        })
        .await??;

        self.reach("before launch").await;
        let nics = ports_of_config(&config).filter(|_| self.record.pci);
        let process = self.parts.vmms.launch(Launch { id: self.record.id, config, taps }).await?;
        self.reach("after launch").await;
        tracing::info!(server = %self.record.id, pid = process.pid, "VMM started");
        self.record.process = Some(process.clone());
        self.tell(TaskEvent::Spawned(self.record.id, process.clone())).await;
        self.save().await?;
        self.wait_running(&process).await?;
        self.tell(TaskEvent::Nics(self.record.id, nics)).await;
        Ok(())
    }

    /// A VMM that an earlier process of this agent started, found again.
    pub(super) async fn adopt(&mut self, process: ProcessIdentity) -> Result<(), TaskError> {
        tracing::info!(server = %self.record.id, pid = process.pid, "VMM found again");
        self.record.process = Some(process.clone());
        self.save().await?;
        self.wait_running(&process).await
    }

    /// Waits until the guest runs. If the VMM ends instead, the record stays `Starting` and the reconciler finds out why.
    async fn wait_running(&mut self, process: &ProcessIdentity) -> Result<(), TaskError> {
        let parts = self.parts.clone();
        let running = tokio::select! {
            () = parts.vmms.running(self.record.id) => true,
            () = parts.vmms.ended(process) => {
                self.tell(TaskEvent::Ended(self.record.id, process.clone())).await;
                return Ok(());
            }
            () = parts.clock.sleep(START_TIMEOUT) => false,
        };
        if !running {
            self.end_processes(std::slice::from_ref(process)).await?;
            return Err(TaskError::Permanent(format!(
                "its VMM did not run a guest within {} s (see vmm.log in its directory)",
                START_TIMEOUT.as_secs()
            )));
        }
        self.sync_disk_later();
        self.record.not_before = None;
        if self.record.suspended {
            return self.go_on().await;
        }
        self.enter(Phase::Running, None).await?;
        tracing::info!(server = %self.record.id, run_generation = self.record.run_generation, "running");
        Ok(())
    }

    /// Makes the guest stand still or go on. What the VMM was told is unknown until it has answered.
    pub(super) async fn set_paused(&mut self, paused: bool) -> Result<(), TaskError> {
        self.record.paused = None;
        self.save().await?;
        self.reach("before pause").await;
        self.parts.vmms.set_paused(self.record.id, paused).await?;
        self.reach("after pause").await;
        self.record.paused = Some(paused);
        self.record.message = None;
        self.record.since = self.parts.clock.now();
        tracing::info!(server = %self.record.id, paused, "told to stand still or go on");
        self.save().await
    }

    pub(super) async fn clean_up_before_start(&self) -> Result<(), TaskError> {
        let (id, dir) = (self.record.id, self.parts.state.server(self.record.id));
        self.blocking(move || {
            files::remove_dir(&dir.vm_run())?;
            jail::make_directories(id, &dir)
        })
        .await??;
        Ok(())
    }

    pub(super) async fn open_taps(
        &self,
        ports: &[(NetworkId, u16, PortSpec)],
    ) -> Result<Vec<OwnedFd>, TaskError> {
        let mut taps = Vec::with_capacity(ports.len());
        for (network, mtu, port) in ports {
            taps.push(self.parts.networks.open_tap(*network, port, *mtu).await?);
            self.reach("after tap").await;
        }
        Ok(taps)
    }

    fn vm_config(
        &self,
        wanted: &Wanted,
        kernel: Option<PathBuf>,
        ramdisk: Option<PathBuf>,
        taps: &[OwnedFd],
    ) -> VmConfig {
        let dir = self.parts.state.server(self.record.id);
        let spec = &wanted.spec;
        let boot = boot(spec);
        // A command line that names its own root (or a guest that needs none) is left as it is; a whole disk is read.
        let root = kernel.is_none() || !names_root(boot.command_line.as_deref());
        let nics = wanted.ports.iter().zip(taps);
        let nics = nics.map(|((_, mtu, port), tap)| interface(spec, *mtu, port, Some(tap)));
        VmConfig {
            boot_source: Some(BootSource {
                boot_from_disk: kernel.is_none(),
                kernel_image_path: kernel.unwrap_or_default(),
                initrd_path: ramdisk,
                boot_args: boot.command_line.clone(),
            }),
            drives: drives(spec, &dir, root),
            machine_config: MachineConfig {
                vcpu_count: spec.vcpus,
                mem_size_mib: spec.memory_mib as usize,
                ..MachineConfig::default()
            },
            network_interfaces: nics.collect(),
            entropy: (!spec.devices.without_random)
                .then(|| Entropy { rate_limiter: limiter(spec.devices.random_bytes, None) }),
            serial: Some(serial(&dir)),
            smbios: Some(smbios(self.record.id)),
            ..VmConfig::default()
        }
    }
}

/// What Nova's own servers say of themselves, so that cloud-init and others see in which kind of cloud they are.
fn smbios(id: ServerId) -> Smbios {
    Smbios {
        manufacturer: Some("OpenStack Foundation".to_owned()),
        product_name: Some("OpenStack Nova".to_owned()),
        version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        serial_number: Some(id.to_string()),
        uuid: Some(id.to_string()),
        family: Some("Virtual Machine".to_owned()),
        ..Smbios::default()
    }
}

/// The serial console: a file, and a socket for both ways.
pub(super) fn serial(dir: &ServerDir) -> Serial {
    Serial {
        serial_out_path: Some(dir.inside(&dir.console_log())),
        log_limit_bytes: Some(CONSOLE_LOG_LIMIT),
        socket_path: Some(dir.inside(&dir.console_socket())),
        ..Serial::default()
    }
}

/// What it boots from comes first, then its other disks, the config drive last: other drives keep their names in the guest.
fn drives(spec: &ServerSpec, dir: &ServerDir, root: bool) -> Vec<Drive> {
    let mut drives = match &spec.rescue {
        None => vec![drive(ROOT_DRIVE, dir.inside(&dir.disk(spec.disk.number)), root)],
        Some(rescue) => vec![
            drive(RESCUE_DRIVE, dir.inside(&dir.disk(rescue.disk)), root),
            drive(ROOT_DRIVE, dir.inside(&dir.disk(spec.disk.number)), false),
        ],
    };
    let local = |disk: &LocalDiskSpec| {
        drive(&format!("{LOCAL_DRIVE}{}", disk.number), dir.inside(&dir.disk(disk.number)), false)
    };
    drives.extend(spec.local_disks.iter().map(local));
    drives.extend(spec.config_drive.map(|number| Drive {
        is_read_only: true,
        ..drive(CONFIG_DRIVE, dir.inside(&dir.config_drive(number)), false)
    }));
    for drive in &mut drives {
        drive.rate_limiter = limiter(spec.devices.disk_bytes, spec.devices.disk_operations);
    }
    drives
}

fn drive(id: &str, path_on_host: PathBuf, is_root_device: bool) -> Drive {
    Drive {
        drive_id: id.to_owned(),
        path_on_host,
        is_root_device,
        cache_type: CacheType::Writeback,
        ..Drive::default()
    }
}

pub(super) fn limiter(bytes: Option<Bucket>, operations: Option<Bucket>) -> Option<RateLimiter> {
    let bucket = |bucket: Bucket| TokenBucket {
        size: bucket.tokens,
        one_time_burst: None,
        refill_time: bucket.refill_ms,
    };
    let limiter = RateLimiter { bandwidth: bytes.map(bucket), ops: operations.map(bucket) };
    (limiter != RateLimiter::default()).then_some(limiter)
}

fn names_root(command_line: Option<&str>) -> bool {
    command_line.is_some_and(|line| line.split_ascii_whitespace().any(|word| word.starts_with("root=")))
}

/// A kernel that no VMM can boot is found out here, with a message for the tenant.
fn check_bootable(kernel: &Path) -> Result<(), TaskError> {
    match check_kernel(kernel) {
        Ok(_) => Ok(()),
        Err(e @ KernelError::Io { .. }) => Err(TaskError::Local(one_line(&e))),
        Err(e) => Err(TaskError::Permanent(format!("its kernel cannot be booted: {}", one_line(&e)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_drive_gets_the_limits_of_the_flavor() {
        let mut spec = crate::sim::server_spec(&[]);
        spec.local_disks = vec![LocalDiskSpec { number: 2, copy_of: None, size_mib: 64, swap: true }];
        let directory = crate::paths::StateDir::new("/state").server(spec.id);
        assert!(drives(&spec, &directory, true).iter().all(|drive| drive.rate_limiter.is_none()));
        spec.devices.disk_operations = Some(Bucket { tokens: 5, refill_ms: 100 });
        let limited = drives(&spec, &directory, true);
        let ops = Some(TokenBucket { size: 5, one_time_burst: None, refill_time: 100 });
        assert_eq!(limited.len(), 3);
        assert_eq!(
            limited.iter().map(|drive| drive.drive_id.as_str()).collect::<Vec<_>>(),
            ["root", "local2", "config"]
        );
        for drive in limited {
            assert_eq!(drive.rate_limiter, Some(RateLimiter { bandwidth: None, ops }));
        }
    }

    #[test]
    fn a_command_line_that_names_its_root_gets_no_second_one() {
        assert!(names_root(Some("quiet root=/dev/vda1 rw")));
        assert!(!names_root(Some("quiet fakeroot=1")));
        assert!(!names_root(None));
    }
}
