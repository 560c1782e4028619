//! What the agent needs from the world, as traits: the real ones are in [`crate::vmm`], [`crate::wiring`] and
//! [`crate::image_cache`], the simulated ones in [`crate::sim`].

use std::{collections::BTreeMap, io, os::fd::OwnedFd, path::PathBuf, sync::Arc};

use futures_util::future::BoxFuture;
use mote_host_api::{ImageSpec, NetworkId, PortSpec, ServerId, Traffic};
use mote_vmm_api::{NetworkInterface, VmConfig};
use nix::sys::signal::Signal;

use crate::{
    clock::Clock,
    ledger::Ledger,
    meter::Meter,
    paths::StateDir,
    process::ProcessIdentity,
    reconcile::{Converged, NetworkGoal},
};

/// Everything the agent and its tasks work with.
pub struct Parts {
    /// State directory.
    pub state: StateDir,
    /// The ledger in the state directory.
    pub ledger: Ledger,
    /// VMM processes.
    pub vmms: Arc<dyn Vmms>,
    /// Networks.
    pub networks: Arc<dyn Networks>,
    /// What ports have carried.
    pub meter: Arc<Meter>,
    /// Images.
    pub images: Arc<dyn Images>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Where tests interrupt.
    pub checkpoints: Arc<dyn Checkpoints>,
}

/// Starts, finds and ends VMM processes.
pub trait Vmms: Send + Sync {
    /// Every VMM process of this host agent that runs.
    fn scan(&self) -> BoxFuture<'_, Result<Vec<(ServerId, ProcessIdentity)>, VmmError>>;
    /// Starts one; it outlives this process.
    fn launch(&self, launch: Launch) -> BoxFuture<'_, Result<ProcessIdentity, VmmError>>;
    /// Completes when the VMM of that server says that its guest runs (however long that takes).
    fn running(&self, id: ServerId) -> BoxFuture<'_, ()>;
    /// Completes when the process has ended.
    fn ended(&self, process: &ProcessIdentity) -> BoxFuture<'static, ()>;
    /// Makes the vCPUs of that server's VMM stand still or go on; it need not have been otherwise.
    fn set_paused(&self, id: ServerId, paused: bool) -> BoxFuture<'_, Result<(), VmmError>>;
    /// Writes what that server's VMM, whose vCPUs stand still, holds into files of this directory ([`STATE_FILE`] and
    /// [`MEMORY_FILE`]), and on the disk.
    fn snapshot(&self, id: ServerId, dir: PathBuf) -> BoxFuture<'_, Result<(), VmmError>>;
    /// The ids of that server's VMM's network interfaces.
    fn interfaces(&self, id: ServerId) -> BoxFuture<'_, Result<Vec<String>, VmmError>>;
    /// Plugs a NIC over this tap into that server's VMM, whose vCPUs don't stand still.
    fn plug(
        &self,
        id: ServerId,
        interface: NetworkInterface,
        tap: OwnedFd,
    ) -> BoxFuture<'_, Result<(), VmmError>>;
    /// Asks that server's guest to give up the NIC with this id, which its VMM has; it is there until the guest has.
    fn unplug(&self, id: ServerId, interface: String) -> BoxFuture<'_, Result<(), VmmError>>;
    /// Sends a signal; a process that is gone is fine.
    fn signal(&self, process: &ProcessIdentity, signal: Signal) -> Result<(), VmmError>;
}

/// The machine's state in the directory of a suspended VMM.
pub const STATE_FILE: &str = "state";
/// The guest's memory in the directory of a suspended VMM.
pub const MEMORY_FILE: &str = "memory";

/// What to start. `vmm.json` has been written already.
#[derive(Debug)]
pub struct Launch {
    /// Server.
    pub id: ServerId,
    /// What `vmm.json` says.
    pub config: VmConfig,
    /// The taps that `config` names by number; they stay open until the process has its own.
    pub taps: Vec<OwnedFd>,
}

/// Why a VMM could not be started or reached.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// Looking at processes.
    #[error("cannot look for VMM processes")]
    Scan(#[source] io::Error),
    /// Starting.
    #[error("cannot start {}", program.display())]
    Spawn {
        /// mote-vmm.
        program: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Its log file.
    #[error("cannot open {}", path.display())]
    Log {
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// It was gone before it could be identified.
    #[error("the process {0} ended at once")]
    EndedAtOnce(u32),
    /// Asking its API for something.
    #[error("its VMM does not {what}")]
    Ask {
        /// What it was asked for.
        what: &'static str,
        /// Cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Signalling.
    #[error("cannot signal process {pid}")]
    Signal {
        /// Process.
        pid: i32,
        /// Cause.
        source: io::Error,
    },
}

/// Tenant networks of this host.
pub trait Networks: Send + Sync {
    /// Brings kernel, DHCP and metadata in line with the goal.
    ///
    /// An error means that nothing is known; what concerns one network only is told in [`Converged::failed`].
    fn converge<'a>(&'a self, goal: &'a NetworkGoal) -> BoxFuture<'a, Result<Converged, NetworksError>>;
    /// Opens the tap of a port in its network (which exists), plugged into its bridge.
    fn open_tap<'a>(
        &'a self,
        network: NetworkId,
        port: &'a PortSpec,
        mtu: u16,
    ) -> BoxFuture<'a, Result<OwnedFd, NetworksError>>;
    /// What the kernel has counted of every tap, by its name.
    fn counters(&self) -> BoxFuture<'_, Result<BTreeMap<String, Traffic>, NetworksError>>;
}

/// Why a network operation failed.
#[derive(Debug, thiserror::Error)]
pub enum NetworksError {
    /// Looking at what there is.
    #[error("cannot look at this host's networks")]
    Observe(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Plugging in a port.
    #[error("cannot plug in port {port}")]
    Tap {
        /// Port.
        port: mote_host_api::PortId,
        /// Cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Images by content.
pub trait Images: Send + Sync {
    /// The file with that content, fetched if it is not here yet.
    fn ensure<'a>(&'a self, image: &'a ImageSpec) -> BoxFuture<'a, Result<PathBuf, ImageError>>;
}

/// Why an image is not here.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The controller can't be asked now.
    #[error("image {sha256} cannot be fetched now")]
    Away {
        /// Image.
        sha256: String,
        /// Cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The controller has none.
    #[error("the controller has no image {sha256}")]
    Unknown {
        /// Image.
        sha256: String,
    },
    /// What came is something else.
    #[error("image {sha256} came with another content or length")]
    Wrong {
        /// Image.
        sha256: String,
        /// Cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It can't be stored.
    #[error("image {sha256} cannot be stored")]
    Store {
        /// Image.
        sha256: String,
        /// Cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Named points between the steps of a task. In production nothing happens there; a test can end the agent at any of
/// them, as `kill -9` would.
pub trait Checkpoints: Send + Sync {
    /// The task has come to `step`.
    fn reach(&self, step: &'static str) -> BoxFuture<'_, ()>;
}

/// Passes every checkpoint.
#[derive(Debug, Clone, Copy, Default)]
pub struct PassThrough;

impl Checkpoints for PassThrough {
    fn reach(&self, _step: &'static str) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }
}
