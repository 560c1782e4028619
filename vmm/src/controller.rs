//! One command enum between the outside (HTTP, config file) and the machine, and the two phases of its life.
//!
//! ```text
//!   Phase::Configuring ──Start──► Phase::Started
//! ```
//! Before the start everything can be configured; afterwards the machine can be looked at, paused and sent keys.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mote_vmm_api::{
    Balloon, BalloonHintingStart, BalloonHintingStatus, BalloonPatch, BalloonStats, BalloonStatsPatch,
    BootSource, Console, CpuConfig, Drive, DrivePatch, Entropy, FIRECRACKER_API_VERSION, InstanceInfo,
    InstanceState, Logger, MachineConfig, MachineConfigPatch, MemoryHotplug, MemoryHotplugPatch,
    MemoryHotplugStatus, Metrics, MmdsConfig, NetworkInterface, NetworkInterfacePatch, Pmem, PmemPatch,
    Serial, Smbios, SnapshotCreate, SnapshotLoad, Version, VmConfig, Vsock,
};
use serde_json::Value;

use crate::api::http::MAX_BODY;
use crate::boot::{self, BootError, BootOptions};
use crate::config::{self, ConfigError, Origin};
use crate::devices::DeviceError;
use crate::devices::i8042::KeyboardBusy;
use crate::devices::virtio::balloon::{BalloonError, HintingOff};
use crate::devices::virtio::mem::MemError;
use crate::hotplug::{self, HotPlugError};
use crate::log;
use crate::machine::Machine;
use crate::metrics::{self, Sink};
use crate::mmds::{Mmds, MmdsError, SharedMmds};
use crate::outcome::Outcome;
use crate::snapshot::{self, CreateError, LoadError};

/// Everything that can be asked of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmmAction {
    /// What this process is and its VM's state.
    GetInstanceInfo,
    /// Versions.
    GetVersion,
    /// The whole configuration.
    GetVmConfig,
    /// vCPUs and memory.
    GetMachineConfig,
    /// Sets vCPUs and memory; before the start only.
    SetMachineConfig(MachineConfig),
    /// Changes some of them; before the start only.
    PatchMachineConfig(MachineConfigPatch),
    /// Sets the kernel; before the start only.
    SetBootSource(BootSource),
    /// Adds or replaces a drive; after the start, adds one on PCI.
    SetDrive(Drive),
    /// Asks the guest to give up a drive; after the start only.
    RemoveDrive(String),
    /// Changes a drive; after the start only.
    PatchDrive(DrivePatch),
    /// Adds or replaces a persistent memory device; before the start only.
    SetPmem(Pmem),
    /// Changes its limits; after the start only.
    PatchPmem(PmemPatch),
    /// Adds or replaces an interface; after the start, adds one on PCI.
    SetNetworkInterface(NetworkInterface),
    /// Asks the guest to give up an interface; after the start only.
    RemoveNetworkInterface(String),
    /// Changes an interface's limits and link; after the start only.
    PatchNetworkInterface(NetworkInterfacePatch),
    /// Adds the entropy device; before the start only.
    SetEntropy(Entropy),
    /// The balloon's configuration.
    GetBalloon,
    /// Sets the balloon; before the start only.
    SetBalloon(Balloon),
    /// Changes the balloon's size; after the start only, like all that follows of the balloon.
    PatchBalloon(BalloonPatch),
    /// What the guest has told of its memory.
    GetBalloonStatistics,
    /// How often it is asked.
    PatchBalloonStatistics(BalloonStatsPatch),
    /// Begins free page hinting.
    StartBalloonHinting(BalloonHintingStart),
    /// How far it is.
    GetBalloonHinting,
    /// Ends it.
    StopBalloonHinting,
    /// Sizes of the memory that can be plugged.
    GetMemoryHotplug,
    /// Sets it; before the start only.
    SetMemoryHotplug(MemoryHotplug),
    /// Asks the guest to have so much of it; after the start only.
    PatchMemoryHotplug(MemoryHotplugPatch),
    /// Sets the socket device; before the start only.
    SetVsock(Vsock),
    /// Sets a CPU template; before the start only.
    SetCpuConfig(CpuConfig),
    /// Sets how the guest reaches its metadata; before the start only.
    SetMmdsConfig(MmdsConfig),
    /// The metadata.
    GetMmds,
    /// Replaces the metadata.
    PutMmds(Value),
    /// Changes parts of the metadata.
    PatchMmds(Value),
    /// Sets where the serial port leads; before the start only.
    SetSerial(Serial),
    /// Adds a virtio console; before the start only.
    SetConsole(Console),
    /// Sets the strings of the SMBIOS tables; before the start only.
    SetSmbios(Smbios),
    /// Starts the machine; before the start only, of course.
    Start,
    /// Presses Ctrl+Alt+Del; after the start only.
    SendCtrlAltDel,
    /// Stops the vCPUs; after the start only.
    Pause,
    /// Lets them run on; after the start only.
    Resume,
    /// Writes the machine to files; after the start, paused.
    CreateSnapshot(SnapshotCreate),
    /// Makes the machine from files; before anything is configured.
    LoadSnapshot(SnapshotLoad),
    /// Sets the log; before the start only.
    SetLogger(Logger),
    /// Sets where metrics go; before the start only, and once.
    SetMetrics(Metrics),
    /// Writes metrics now; after the start only.
    FlushMetrics,
}

/// What an action gives back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Empty,
    /// To `GetInstanceInfo`.
    InstanceInfo(InstanceInfo),
    /// To `GetVersion`.
    Version(Version),
    /// To `GetVmConfig`.
    VmConfig(Box<VmConfig>),
    /// To `GetBalloon`.
    Balloon(Balloon),
    /// To `GetBalloonStatistics`.
    BalloonStatistics(Box<BalloonStats>),
    /// To `GetBalloonHinting`.
    BalloonHinting(BalloonHintingStatus),
    /// To `GetMachineConfig`.
    MachineConfig(MachineConfig),
    /// To `GetMemoryHotplug`.
    MemoryHotplug(MemoryHotplugStatus),
    /// To `GetMmds`.
    Mmds(Value),
}

/// An action was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    /// Configuration after the start.
    #[error("The requested operation is not supported after starting the microVM.")]
    NotSupportedPostBoot,
    /// Control before the start.
    #[error("The requested operation is not supported before starting the microVM.")]
    NotSupportedPreBoot,
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The machine could not be started.
    #[error("Cannot start the microVM")]
    Start(#[source] Box<BootError>),
    /// The guest takes no keys now.
    #[error("Cannot send Ctrl+Alt+Del")]
    Keyboard(#[source] KeyboardBusy),
    /// No balloon.
    #[error("there is no balloon: PUT /balloon before the start makes one")]
    NoBalloon,
    /// The balloon was configured without statistics.
    #[error("the balloon has no statistics: stats_polling_interval_s was 0 at the start")]
    NoBalloonStatistics,
    /// No memory that can be plugged.
    #[error("there is no memory to plug: PUT /hotplug/memory before the start makes some")]
    NoMemoryHotplug,
    /// A size that isn't possible.
    #[error(transparent)]
    MemoryHotplug(#[from] MemError),
    /// The balloon refuses.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// Free page hinting is off.
    #[error(transparent)]
    Hinting(#[from] HintingOff),
    /// No such interface.
    #[error("there is no network interface {0:?}")]
    NoInterface(String),
    /// A drive could not be changed.
    #[error("Cannot change drive {drive_id}")]
    Drive {
        /// Which.
        drive_id: String,
        /// Cause.
        #[source]
        source: DeviceError,
    },
    /// There is no such persistent memory device.
    #[error("There is no pmem device with the id {0:?}")]
    UnknownPmem(String),
    /// There is no such drive.
    #[error("There is no drive with the id {0:?}")]
    UnknownDrive(String),
    /// A device could not be added or taken.
    #[error(transparent)]
    HotPlug(Box<HotPlugError>),
    /// No snapshot.
    #[error("Cannot create a snapshot")]
    CreateSnapshot(#[source] Box<CreateError>),
    /// No machine from a snapshot.
    #[error("Cannot load the snapshot")]
    LoadSnapshot(#[source] Box<LoadError>),
    /// No descriptor, or more than one, where the tap is one.
    #[error("tap_from_request needs one file descriptor with the request (SCM_RIGHTS); {0} came")]
    NoTap(usize),
    /// A descriptor that nothing asks for.
    #[error(
        "{0} file descriptors came with a request that takes none: only an interface with tap_from_request does"
    )]
    Descriptors(usize),
    /// A snapshot brings its own configuration.
    #[error("Loading a microVM snapshot not allowed after configuring boot-specific resources.")]
    LoadSnapshotNotAllowed,
    /// The log can't be as wanted.
    #[error("Cannot set up the log")]
    Logger(#[source] log::LogError),
    /// Metrics can't go there.
    #[error("Cannot set up metrics")]
    Metrics(#[source] metrics::OpenError),
    /// The metadata refuses.
    #[error("MMDS error: {0}")]
    Mmds(MmdsError),
    /// No key.
    #[error("Cannot make the metadata store")]
    MmdsRandom(#[source] getrandom::Error),
    /// Metrics twice.
    #[error("Reinitialization of metrics not allowed.")]
    MetricsTwice,
    /// Metrics can't be written.
    #[error("Cannot write metrics")]
    FlushMetrics(#[source] std::io::Error),
}

#[allow(clippy::large_enum_variant, reason = "there is one, and it never moves")]
enum Phase {
    Configuring,
    Started(Machine),
}

impl From<HotPlugError> for ActionError {
    fn from(error: HotPlugError) -> Self {
        Self::HotPlug(Box::new(error))
    }
}

/// The owner of the VM.
pub struct Controller {
    id: String,
    config: VmConfig,
    phase: Phase,
    boot_timer: bool,
    enable_pci: bool,
    outcome: Arc<Outcome>,
    metrics: Option<Sink>,
    /// Most bytes of metadata.
    mmds_limit: usize,
    /// The metadata, from when it is first needed.
    mmds: Option<SharedMmds>,
}

impl Controller {
    /// A VM with the default configuration, not started.
    pub fn new(id: String, boot_timer: bool, outcome: Arc<Outcome>) -> Self {
        Self {
            id,
            config: VmConfig::default(),
            phase: Phase::Configuring,
            boot_timer,
            enable_pci: false,
            outcome,
            metrics: None,
            mmds_limit: MAX_BODY,
            mmds: None,
        }
    }

    /// Sets how many bytes of metadata there may be, before there are any.
    pub fn set_mmds_limit(&mut self, bytes: usize) {
        self.mmds_limit = bytes;
    }

    /// The metadata store.
    fn mmds(&mut self) -> Result<SharedMmds, ActionError> {
        if let Some(mmds) = &self.mmds {
            return Ok(mmds.clone());
        }
        let mmds = Mmds::new(&self.id, self.mmds_limit).map_err(ActionError::MmdsRandom)?;
        Ok(self.mmds.insert(SharedMmds::new(mmds)).clone())
    }

    /// The metadata of a machine that may run: without `mmds-config` a running one has none.
    fn reachable_mmds(&mut self) -> Result<SharedMmds, ActionError> {
        if matches!(self.phase, Phase::Started(_)) && self.config.mmds_config.is_none() {
            return Err(ActionError::Mmds(MmdsError::NotInitialized));
        }
        self.mmds()
    }

    /// Puts the devices on a PCI bus when the machine starts.
    pub fn set_enable_pci(&mut self, enable_pci: bool) {
        self.enable_pci = enable_pci;
    }

    /// Takes the configuration from the config file. One that names a snapshot is a machine when this returns.
    ///
    /// # Errors
    /// It is wrong, or the machine runs already.
    pub fn configure(&mut self, mut config: VmConfig) -> Result<(), ActionError> {
        if matches!(self.phase, Phase::Started(_)) {
            return Err(ActionError::NotSupportedPostBoot);
        }
        if let Some(logger) = config.logger.take() {
            self.set_logger(logger)?;
        }
        if let Some(metrics) = config.metrics.take() {
            self.set_metrics(metrics)?;
        }
        if let Some(from) = config.snapshot_load.take() {
            if config != VmConfig::default() {
                return Err(ConfigError::SnapshotLoad.into());
            }
            return self.load_snapshot(&from, Origin::File);
        }
        let (logger, metrics) = (self.config.logger.take(), self.config.metrics.take());
        self.config = VmConfig { logger, metrics, ..config::validate(config)? };
        Ok(())
    }

    /// The running machine.
    pub fn machine_mut(&mut self) -> Option<&mut Machine> {
        match &mut self.phase {
            Phase::Configuring => None,
            Phase::Started(machine) => Some(machine),
        }
    }

    /// Closes devices that the guest has given up, and forgets their configuration.
    pub fn collect_ejected(&mut self) {
        if let Phase::Started(machine) = &mut self.phase {
            hotplug::collect(machine, &mut self.config);
        }
    }

    /// Carries out one action.
    ///
    /// # Errors
    /// See [`ActionError`]; nothing has changed then.
    pub fn execute(&mut self, action: VmmAction) -> Result<Answer, ActionError> {
        self.execute_with(action, Vec::new())
    }

    /// Carries out one action with the descriptors that came with its request; those that aren't used are closed.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn execute_with(
        &mut self,
        action: VmmAction,
        mut descriptors: Vec<OwnedFd>,
    ) -> Result<Answer, ActionError> {
        self.collect_ejected();
        let takes_tap =
            matches!(&action, VmmAction::SetNetworkInterface(interface) if interface.tap_from_request);
        match descriptors.len() {
            1 if takes_tap => {}
            count if takes_tap => return Err(ActionError::NoTap(count)),
            0 => {}
            count => return Err(ActionError::Descriptors(count)),
        }
        match action {
            VmmAction::GetInstanceInfo => Ok(Answer::InstanceInfo(self.instance_info())),
            VmmAction::GetVersion => Ok(Answer::Version(version())),
            VmmAction::GetVmConfig => Ok(Answer::VmConfig(Box::new(self.config.clone()))),
            VmmAction::GetMachineConfig => Ok(Answer::MachineConfig(self.config.machine_config.clone())),
            VmmAction::FlushMetrics => match (&self.phase, &mut self.metrics) {
                (Phase::Configuring, _) => Err(ActionError::NotSupportedPreBoot),
                (_, Some(sink)) => sink.flush().map(|()| Answer::Empty).map_err(ActionError::FlushMetrics),
                (_, None) => Ok(Answer::Empty),
            },
            VmmAction::GetBalloon => {
                self.config.balloon.clone().map(Answer::Balloon).ok_or(ActionError::NoBalloon)
            }
            VmmAction::GetMemoryHotplug => self.memory_hotplug_status(),
            VmmAction::GetMmds => {
                let mmds = self.reachable_mmds()?;
                let document = mmds.lock().document();
                Ok(Answer::Mmds(document))
            }
            VmmAction::PutMmds(document) => {
                let put = self.reachable_mmds()?.lock().put(document);
                put.map(|()| Answer::Empty).map_err(ActionError::Mmds)
            }
            VmmAction::PatchMmds(patch) => {
                let patched = self.reachable_mmds()?.lock().patch(patch);
                patched.map(|()| Answer::Empty).map_err(ActionError::Mmds)
            }
            VmmAction::GetBalloonStatistics | VmmAction::GetBalloonHinting => self.ask_balloon(&action),
            action => {
                match &mut self.phase {
                    Phase::Configuring => self.execute_before_start(action)?,
                    Phase::Started(machine) => {
                        execute_after_start(machine, &mut self.config, &action, descriptors.pop())?;
                    }
                }
                Ok(Answer::Empty)
            }
        }
    }

    fn execute_before_start(&mut self, action: VmmAction) -> Result<(), ActionError> {
        let action = match action {
            VmmAction::SetLogger(logger) => return self.set_logger(logger),
            VmmAction::SetMetrics(metrics) => return self.set_metrics(metrics),
            action => action,
        };
        let config = &mut self.config;
        match action {
            VmmAction::SetMachineConfig(machine) => config::set_machine(config, machine)?,
            VmmAction::PatchMachineConfig(patch) => config::patch_machine(config, &patch)?,
            VmmAction::SetBootSource(source) => config::set_boot_source(config, source)?,
            VmmAction::SetDrive(drive) => config::set_drive(config, drive)?,
            VmmAction::SetPmem(pmem) => config::set_pmem(config, pmem)?,
            VmmAction::SetNetworkInterface(interface) => {
                config::set_network_interface(config, interface, Origin::Api)?;
            }
            VmmAction::SetEntropy(entropy) => config.entropy = Some(entropy),
            VmmAction::SetBalloon(balloon) => config::set_balloon(config, balloon)?,
            VmmAction::SetMemoryHotplug(hotplug) => config::set_memory_hotplug(config, hotplug)?,
            VmmAction::SetVsock(vsock) => config::set_vsock(config, vsock)?,
            VmmAction::SetCpuConfig(template) => config::set_cpu_config(config, template),
            VmmAction::SetMmdsConfig(mmds) => config::set_mmds(config, mmds)?,
            VmmAction::SetSerial(serial) => config::set_serial(config, serial)?,
            VmmAction::SetConsole(console) => config::set_console(config, console)?,
            VmmAction::SetSmbios(smbios) => config::set_smbios(config, smbios)?,
            VmmAction::LoadSnapshot(from) => self.load_snapshot(&from, Origin::Api)?,
            VmmAction::Start => self.start()?,
            _ => return Err(ActionError::NotSupportedPreBoot),
        }
        Ok(())
    }

    /// Starts the machine.
    ///
    /// # Errors
    /// It cannot be started; it can be configured further then.
    pub fn start(&mut self) -> Result<(), ActionError> {
        let start = Instant::now();
        let mmds = match self.config.mmds_config.clone() {
            Some(service) => {
                let mmds = self.mmds()?;
                mmds.lock().configure(&service);
                Some(mmds)
            }
            None => None,
        };
        let boot_timer = self.boot_timer.then_some(start);
        let options = BootOptions { boot_timer, enable_pci: self.enable_pci, mmds };
        let booted = boot::boot(&self.config, &options, &self.outcome);
        self.phase = Phase::Started(booted.map_err(|error| ActionError::Start(Box::new(error)))?);
        log::info!("microVM started in {} us", start.elapsed().as_micros());
        Ok(())
    }

    /// Sizes; before the start, those of a guest that has nothing yet.
    fn memory_hotplug_status(&self) -> Result<Answer, ActionError> {
        let control = match &self.phase {
            Phase::Configuring => None,
            Phase::Started(machine) => machine.controls().memory.as_ref(),
        };
        let status = match (control, &self.config.memory_hotplug) {
            (Some(control), _) => control.status(),
            (None, Some(config)) => MemoryHotplugStatus {
                total_size_mib: config.total_size_mib,
                slot_size_mib: config.slot_size_mib,
                block_size_mib: config.block_size_mib,
                ..MemoryHotplugStatus::default()
            },
            (None, None) => return Err(ActionError::NoMemoryHotplug),
        };
        Ok(Answer::MemoryHotplug(status))
    }

    /// Statistics or the state of hinting.
    fn ask_balloon(&self, action: &VmmAction) -> Result<Answer, ActionError> {
        let Phase::Started(machine) = &self.phase else { return Err(ActionError::NotSupportedPreBoot) };
        let control = machine.controls().balloon.as_ref().ok_or(ActionError::NoBalloon)?;
        if *action == VmmAction::GetBalloonHinting {
            return Ok(Answer::BalloonHinting(control.hinting_status()?));
        }
        if self.config.balloon.as_ref().is_none_or(|balloon| balloon.stats_polling_interval_s == 0) {
            return Err(ActionError::NoBalloonStatistics);
        }
        Ok(Answer::BalloonStatistics(Box::new(control.statistics())))
    }

    /// Sets the log.
    ///
    /// # Errors
    /// No such level, or the file can't be opened.
    pub fn set_logger(&mut self, logger: Logger) -> Result<(), ActionError> {
        log::configure(&logger).map_err(ActionError::Logger)?;
        self.config.logger = Some(logger);
        Ok(())
    }

    /// Sets where metrics go.
    ///
    /// # Errors
    /// They go somewhere already, or the file can't be opened.
    pub fn set_metrics(&mut self, metrics: Metrics) -> Result<(), ActionError> {
        if self.metrics.is_some() {
            return Err(ActionError::MetricsTwice);
        }
        self.metrics = Some(Sink::open(&self.id, metrics.clone()).map_err(ActionError::Metrics)?);
        self.config.metrics = Some(metrics);
        Ok(())
    }

    /// Time until metrics are to be written, if they are.
    pub fn metrics_due_in(&self) -> Option<Duration> {
        self.metrics.as_ref().map(Sink::due_in)
    }

    /// Writes metrics, if they go anywhere; a failure is counted.
    pub fn flush_metrics(&mut self) {
        if let Some(sink) = &mut self.metrics {
            let _ = sink.flush();
        }
    }

    /// Makes the machine from a snapshot.
    ///
    /// # Errors
    /// It can't be made, or something has been configured or started already.
    pub fn load_snapshot(&mut self, from: &SnapshotLoad, origin: Origin) -> Result<(), ActionError> {
        match self.phase {
            Phase::Configuring if self.is_unconfigured() => {}
            Phase::Configuring => return Err(ActionError::LoadSnapshotNotAllowed),
            Phase::Started(_) => return Err(ActionError::NotSupportedPostBoot),
        }
        let start = Instant::now();
        let mmds = self.mmds()?;
        let load = || snapshot::load(from, origin, &mmds, &self.outcome);
        let (machine, config) = metrics::timed(&metrics::LOAD_SNAPSHOT_US, load)
            .map_err(|error| ActionError::LoadSnapshot(Box::new(error)))?;
        self.phase = Phase::Started(machine);
        let (logger, metrics) = (self.config.logger.take(), self.config.metrics.take());
        self.config = VmConfig { logger, metrics, ..config };
        log::info!("microVM loaded from a snapshot in {} us", start.elapsed().as_micros());
        Ok(())
    }

    /// Whether nothing but logger and metrics was configured.
    fn is_unconfigured(&self) -> bool {
        let config = &self.config;
        let logger_and_metrics = VmConfig {
            logger: config.logger.clone(),
            metrics: config.metrics.clone(),
            ..VmConfig::default()
        };
        *config == logger_and_metrics
    }

    fn instance_info(&self) -> InstanceInfo {
        let state = match &self.phase {
            Phase::Configuring => InstanceState::NotStarted,
            Phase::Started(machine) if machine.is_paused() => InstanceState::Paused,
            Phase::Started(_) => InstanceState::Running,
        };
        InstanceInfo {
            app_name: "mote-vmm".to_owned(),
            id: self.id.clone(),
            state,
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

fn execute_after_start(
    machine: &mut Machine,
    config: &mut VmConfig,
    action: &VmmAction,
    tap: Option<OwnedFd>,
) -> Result<(), ActionError> {
    match action {
        VmmAction::SetDrive(drive) => hotplug::add_drive(machine, config, drive)?,
        VmmAction::SetNetworkInterface(interface) => {
            hotplug::add_interface(machine, config, interface, tap)?;
        }
        VmmAction::RemoveDrive(id) => hotplug::ask_for(machine, &hotplug::drive_name(id))?,
        VmmAction::RemoveNetworkInterface(id) => hotplug::ask_for(machine, &hotplug::interface_name(id))?,
        VmmAction::PatchNetworkInterface(patch) => patch_interface(machine, config, patch)?,
        VmmAction::PatchDrive(patch) => {
            let drive_id = || patch.drive_id.clone();
            let control = machine.controls().drives.get(&patch.drive_id);
            let control = control.ok_or_else(|| ActionError::UnknownDrive(drive_id()))?;
            control.update(patch).map_err(|source| ActionError::Drive { drive_id: drive_id(), source })?;
            config::patch_drive(config, patch);
        }
        VmmAction::PatchPmem(patch) => {
            let pmem = machine.controls().pmem.get(&patch.id);
            pmem.ok_or_else(|| ActionError::UnknownPmem(patch.id.clone()))?.update(patch);
            config::patch_pmem(config, patch);
        }
        VmmAction::PatchMemoryHotplug(patch) => {
            let control = machine.controls().memory.as_ref().ok_or(ActionError::NoMemoryHotplug)?;
            control.request(patch.requested_size_mib)?;
        }
        VmmAction::PatchBalloon(_)
        | VmmAction::PatchBalloonStatistics(_)
        | VmmAction::StartBalloonHinting(_)
        | VmmAction::StopBalloonHinting => change_balloon(machine, config, action)?,
        VmmAction::Pause => metrics::timed(&metrics::PAUSE_VM_US, || {
            machine.pause();
            Ok::<_, ActionError>(())
        })?,
        VmmAction::Resume => metrics::timed(&metrics::RESUME_VM_US, || {
            machine.resume();
            Ok::<_, ActionError>(())
        })?,
        VmmAction::SendCtrlAltDel => machine.send_ctrl_alt_del().map_err(ActionError::Keyboard)?,
        VmmAction::CreateSnapshot(to) => {
            let create = || snapshot::create(machine, config, to);
            metrics::timed(&metrics::FULL_CREATE_SNAPSHOT_US, create)
                .map_err(|error| ActionError::CreateSnapshot(Box::new(error)))?;
        }
        _ => return Err(ActionError::NotSupportedPostBoot),
    }
    Ok(())
}

fn change_balloon(machine: &Machine, config: &mut VmConfig, action: &VmmAction) -> Result<(), ActionError> {
    let control = machine.controls().balloon.as_ref().ok_or(ActionError::NoBalloon)?;
    match action {
        VmmAction::PatchBalloon(patch) => {
            config::check_balloon_amount(config, patch.amount_mib)?;
            control.set_amount(patch.amount_mib)?;
            if let Some(balloon) = &mut config.balloon {
                balloon.amount_mib = patch.amount_mib;
            }
        }
        VmmAction::PatchBalloonStatistics(patch) => {
            let Some(balloon) = &mut config.balloon else { return Err(ActionError::NoBalloon) };
            if (balloon.stats_polling_interval_s == 0) != (patch.stats_polling_interval_s == 0) {
                return Err(ConfigError::BalloonStatistics.into());
            }
            balloon.stats_polling_interval_s = patch.stats_polling_interval_s;
            control.set_statistics_interval(patch.stats_polling_interval_s);
        }
        VmmAction::StartBalloonHinting(start) => control.start_hinting(start.acknowledge_on_stop)?,
        _ => control.stop_hinting()?,
    }
    Ok(())
}

fn patch_interface(
    machine: &Machine,
    config: &mut VmConfig,
    patch: &NetworkInterfacePatch,
) -> Result<(), ActionError> {
    if config.network_interfaces.iter().any(|other| other.vhost && other.iface_id == patch.iface_id) {
        let id = patch.iface_id.clone();
        return Err(ConfigError::VhostInterface { id, field: "PATCH" }.into());
    }
    let interface = machine.controls().interfaces.get(&patch.iface_id);
    let interface = interface.ok_or_else(|| ActionError::NoInterface(patch.iface_id.clone()))?;
    interface.update_limits(patch.rx_rate_limiter.as_ref(), patch.tx_rate_limiter.as_ref());
    if let Some(up) = patch.link_up {
        interface.set_link_up(up);
    }
    config::patch_network_interface(config, patch);
    Ok(())
}

fn version() -> Version {
    Version {
        firecracker_version: FIRECRACKER_API_VERSION.to_owned(),
        mote_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller() -> Controller {
        Controller::new("test".to_owned(), false, Arc::new(Outcome::new().unwrap()))
    }

    #[test]
    fn control_is_refused_before_the_start() {
        let patch = VmmAction::PatchDrive(DrivePatch::default());
        for action in [VmmAction::Pause, VmmAction::Resume, VmmAction::SendCtrlAltDel, patch] {
            let error = controller().execute(action).unwrap_err();
            assert!(matches!(error, ActionError::NotSupportedPreBoot), "{error}");
        }
    }

    #[test]
    fn a_start_without_a_kernel_fails_and_leaves_the_vm_configurable() {
        let mut controller = controller();
        assert!(matches!(controller.execute(VmmAction::Start), Err(ActionError::Start(_))));
        let machine = MachineConfig { vcpu_count: 2, ..Default::default() };
        controller.execute(VmmAction::SetMachineConfig(machine.clone())).unwrap();
        assert_eq!(controller.execute(VmmAction::GetMachineConfig).unwrap(), Answer::MachineConfig(machine));
    }

    #[test]
    fn metadata_is_kept_before_the_start_up_to_its_limit() {
        let mut controller = controller();
        controller.set_mmds_limit(20);
        assert_eq!(controller.execute(VmmAction::GetMmds).unwrap(), Answer::Mmds(Value::Null));
        let document = serde_json::json!({"a": 1});
        let error = controller.execute(VmmAction::PatchMmds(document.clone())).unwrap_err();
        assert_eq!(error.to_string(), "MMDS error: The MMDS data store is not initialized.");
        controller.execute(VmmAction::PutMmds(document.clone())).unwrap();
        let long = VmmAction::PatchMmds(serde_json::json!({"b": "01234567890"}));
        assert!(matches!(
            controller.execute(long),
            Err(ActionError::Mmds(MmdsError::DataStoreLimitExceeded))
        ));
        assert_eq!(controller.execute(VmmAction::GetMmds).unwrap(), Answer::Mmds(document));
        // Metadata doesn't hinder a snapshot from being loaded.
        assert!(controller.is_unconfigured());
    }

    #[test]
    fn the_state_is_told_before_the_start() {
        let Answer::InstanceInfo(info) = controller().execute(VmmAction::GetInstanceInfo).unwrap() else {
            panic!("an instance info was asked for");
        };
        assert_eq!((info.id.as_str(), info.state), ("test", InstanceState::NotStarted));
    }
}
