//! `mote-hostd run`: puts the real parts together and keeps them going.

use std::{path::PathBuf, sync::Arc, time::Duration};

use mote_host_api::Inventory;
use mote_images::store::{Store, StoreError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    agent::{Agent, AgentError, Snapshot},
    clock::SystemClock,
    connection::{Connection, ConnectionStatus},
    controller::{ControllerError, HttpController},
    errors::one_line,
    files::{self, FileError},
    identity::{self, Identity, IdentityError},
    image_cache::ImageCache,
    inventory::{self, InventoryError},
    kvm_check,
    ledger::Ledger,
    lock::{self, LockError},
    meter::Meter,
    parts::{Networks, Parts, PassThrough, Vmms},
    paths::{RunDir, SOCKET_PATH_MAX, StateDir},
    requests::Requests,
    sim::World,
    status::{self, Status, StatusError},
    vmm::VmmProcesses,
    wiring::{self, KernelNetworks, Underlay},
};

/// The inventory is taken anew after this time.
const INVENTORY_EVERY: Duration = Duration::from_secs(300);

/// What `run` is told.
#[derive(Debug, Clone)]
pub struct Options {
    /// State directory.
    pub state: StateDir,
    /// Run directory.
    pub run: RunDir,
    /// mote-vmm.
    pub vmm: PathBuf,
    /// What leads to other hosts and to physical networks.
    pub underlay: Underlay,
    /// Only simulate VMMs and networks: a host for trying out and testing a cloud, on any machine.
    pub simulated: bool,
}

/// What a simulated host says that it has.
const SIMULATED: (u32, u64, u64) = (64, 256 << 10, 4 << 10);

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Not joined, or no identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Another one runs.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Run directory.
    #[error(
        "--run-dir is too long: a socket in it would have a path of {0} bytes, at most {SOCKET_PATH_MAX} are possible"
    )]
    RunDirTooLong(usize),
    /// mote-vmm.
    #[error("{} is not there: give the place of mote-vmm with --vmm", .0.display())]
    NoVmm(PathBuf),
    /// Namespaces.
    #[error("cannot make the network namespace of VMMs (mote-hostd has to be run by root)")]
    Jail(#[source] std::io::Error),
    /// Files.
    #[error(transparent)]
    File(#[from] FileError),
    /// Images.
    #[error("cannot open the image cache")]
    Images(#[from] StoreError),
    /// The machine.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// HTTP client.
    #[error(transparent)]
    Controller(#[from] ControllerError),
    /// Agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Status socket.
    #[error(transparent)]
    Status(#[from] StatusError),
}

/// Runs until `stop`. VMMs are left running: the next `run` finds them again.
///
/// # Errors
/// [`DaemonError`], all of them at the start.
pub async fn run(options: Options, stop: CancellationToken) -> Result<(), DaemonError> {
    let Options { state, run, vmm, mut underlay, simulated } = options;
    let identity = identity::load(&state)?;
    run.check_length().map_err(DaemonError::RunDirTooLong)?;
    if !simulated && !vmm.is_file() {
        return Err(DaemonError::NoVmm(vmm));
    }
    let _lock = lock::acquire_soon(&state).await?;
    tracing::info!(identity = ?identity, "mote-hostd {}", env!("CARGO_PKG_VERSION"));
    files::create_private_dir(run.path())?;
    let kvm = kvm_check::check();
    if simulated {
        tracing::warn!("this host is simulated: its servers are states without a machine behind them");
    } else if !kvm.message().is_empty() {
        tracing::warn!("{}", kvm.message());
    }
    underlay.tunnel_ip = underlay.tunnel_ip.or_else(|| wiring::default_tunnel_ip(&identity.url));
    let found = underlay.announce(take_inventory(&state, simulated)?);
    let memory_mib = found.memory_mib;
    let (inventory_sender, inventory) = watch::channel(found);

    let identity = watch::Sender::new(identity);
    let controller = Arc::new(HttpController::new(identity.subscribe())?);
    let (vmms, networks): (Arc<dyn Vmms>, Arc<dyn Networks>) = if simulated {
        let world = World::open(state.clone())?;
        (world.vmms(), world.kernel_networks())
    } else {
        let networks = KernelNetworks::new(&wiring::prefix(&state)?, &underlay);
        (Arc::new(VmmProcesses::new(vmm, state.clone()).map_err(DaemonError::Jail)?), Arc::new(networks))
    };
    let meter = Arc::new(Meter::new(networks.clone()));
    let parts = Arc::new(Parts {
        ledger: Ledger::open(state.clone())?,
        vmms,
        networks,
        meter: meter.clone(),
        images: Arc::new(ImageCache::new(Store::open(state.images())?, controller.clone())),
        clock: Arc::new(SystemClock),
        checkpoints: Arc::new(PassThrough),
        state: state.clone(),
    });
    let agent = Agent::new(parts, memory_mib).await?;
    let connection = Arc::new(Connection {
        controller,
        state: state.clone(),
        identity,
        status: watch::Sender::new(ConnectionStatus::unknown(jiff::Timestamp::now())),
        desired: watch::Sender::new(None),
        meter,
    });
    connection.recall();
    let listener = status::listen(&run)?;

    let snapshots = agent.snapshots();
    let conversations = converse(connection.clone(), snapshots.clone(), inventory.clone(), &state);
    let status_socket = status::serve(listener, || {
        describe(
            &connection.identity.borrow(),
            &connection.status.borrow(),
            &inventory.borrow(),
            &snapshots.borrow(),
        )
    });
    tokio::select! {
        () = agent.run(connection.desired.subscribe(), stop) => {}
        () = conversations => {}
        () = status_socket => {}
        () = keep_inventory(&state, simulated, &underlay, &inventory_sender) => {}
    }
    if let Err(e) = files::remove_file(&run.control_socket()) {
        tracing::debug!(error = one_line(&e), "status socket left");
    }
    tracing::info!("mote-hostd ends; servers go on");
    Ok(())
}

async fn converse(
    connection: Arc<Connection>,
    snapshots: watch::Receiver<Snapshot>,
    inventory: watch::Receiver<Inventory>,
    state: &StateDir,
) {
    let requests = Arc::new(Requests { state: state.clone(), meter: connection.meter.clone() });
    tokio::join!(
        connection.follow_desired(),
        connection.send_captures(snapshots.clone()),
        connection.report(snapshots, inventory),
        connection.answer(requests)
    );
}

fn take_inventory(state: &StateDir, simulated: bool) -> Result<Inventory, InventoryError> {
    let mut found = inventory::inventory(state.path())?;
    if simulated {
        (found.vcpus, found.memory_mib, found.disk_gib) = SIMULATED;
        found.traits = vec!["CUSTOM_SIMULATED".to_owned()];
    }
    Ok(found)
}

async fn keep_inventory(
    state: &StateDir,
    simulated: bool,
    underlay: &Underlay,
    inventory: &watch::Sender<Inventory>,
) {
    loop {
        tokio::time::sleep(INVENTORY_EVERY).await;
        let state = state.clone();
        match tokio::task::spawn_blocking(move || take_inventory(&state, simulated)).await {
            Ok(Ok(found)) => drop(inventory.send_replace(underlay.announce(found))),
            Ok(Err(e)) => tracing::warn!(error = one_line(&e), "inventory"),
            Err(e) => tracing::warn!(error = one_line(&e), "inventory"),
        }
    }
}

fn describe(
    identity: &Identity,
    controller: &ConnectionStatus,
    inventory: &Inventory,
    snapshot: &Snapshot,
) -> Status {
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        host_id: identity.host_id,
        name: identity.name.clone(),
        availability_zone: identity.availability_zone.clone(),
        cloud_id: identity.cloud_id,
        controller_url: identity.url.clone(),
        controller: controller.clone(),
        inventory: inventory.clone(),
        snapshot: snapshot.clone(),
    }
}
