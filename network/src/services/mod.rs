//! DHCP, DNS and metadata for the guests of each network, served by tasks of this process on sockets inside the network's
//! namespace.
//!
//! Stateless: what they answer follows from the desired state alone, so a new process that binds again goes on where the
//! old one ended.

mod advert;
mod datagrams;
pub mod dhcp;
pub mod dhcp6;
mod directory;
pub mod dns;
mod log_limit;
pub mod metadata;
mod sockets;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    sync::Arc,
};

use mote_host_api::{InstanceMetadata, NetworkId, NetworkSpec, RouterSpec, ServerId};
use nix::net::if_::if_nametoindex;
use tokio::{sync::watch, task::JoinHandle};
use tracing::{info, warn};

use crate::{
    Config,
    names::{BRIDGE, NetworkKey, bridge_mac},
    namespace::{self, NamespaceError, NamespaceIdentity},
    spec::{self, SpecError},
};
pub use advert::RouterPort;
pub use directory::Directory;

/// State after [`Services::update`].
#[derive(Debug, Default)]
pub struct UpdateOutcome {
    /// Networks that are being served.
    pub serving: Vec<NetworkId>,
    /// Networks whose namespace, bridge or addresses aren't there (yet).
    pub waiting: Vec<NetworkId>,
    /// Networks whose services can't be started.
    pub failed: Vec<(NetworkId, ServiceError)>,
}

/// A service can't be started.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The description is refused. Services that run already go on as they are.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Namespace.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// Sockets.
    #[error("network namespace {namespace}: cannot open the sockets of its services")]
    Sockets {
        /// Namespace.
        namespace: String,
        /// Why.
        source: io::Error,
    },
}

/// The services of all networks on this host. Dropping it stops them.
#[derive(Debug)]
pub struct Services {
    config: Config,
    forwarder: Arc<dns::Forwarder>,
    routers: HashMap<NetworkId, RouterPort>,
    running: BTreeMap<NetworkKey, Running>,
}

/// The services of one network.
#[derive(Debug)]
struct Running {
    identity: Identity,
    /// Dropping it ends the tasks.
    directory: watch::Sender<Arc<Directory>>,
    tasks: Tasks,
}

type Tasks = Vec<JoinHandle<io::Result<()>>>;

impl Running {
    /// Tells the tasks to end.
    fn end(self) -> Tasks {
        drop(self.directory);
        self.tasks
    }
}

/// Waits until the tasks have ended and closed their sockets.
async fn ended(network: NetworkKey, tasks: Tasks) {
    for task in tasks {
        match task.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%network, "a service ended with an error: {error}"),
            Err(error) => warn!(%network, "a service ended abnormally: {error}"),
        }
    }
    info!(%network, "services stopped");
}

/// What the sockets are bound to. Another namespace or bridge of the same name needs other sockets, and so does one that
/// gets IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    namespace: NamespaceIdentity,
    bridge: u32,
    v6: bool,
}

impl Services {
    /// No services yet.
    pub fn new(config: Config) -> Self {
        let forwarder = Arc::new(dns::Forwarder::new(&config));
        Self { config, forwarder, routers: HashMap::new(), running: BTreeMap::new() }
    }

    /// Who routes for which network, from the next update on.
    pub fn set_routers(&mut self, routers: &[RouterSpec]) {
        self.routers.clear();
        for router in routers.iter().filter(|router| router.admin_state_up) {
            for interface in &router.interfaces {
                let Ok(mac) = interface.mac_address.parse() else { continue };
                let port = RouterPort { mac, addresses: interface.addresses.clone() };
                // A network can have interfaces of several routers, and several of one: any IPv6 one will do.
                let has_v6 = port.addresses.iter().any(|address| address.addr().is_ipv6());
                if has_v6 {
                    self.routers.entry(interface.network_id).or_insert(port);
                }
            }
        }
    }

    /// Makes the running services those of `desired`: stops the others (their sockets are closed when this returns),
    /// starts what is missing or has lost its namespace or bridge, and gives the rest its new data. Idempotent.
    pub async fn update(
        &mut self,
        desired: &[NetworkSpec],
        metadata: &HashMap<ServerId, InstanceMetadata>,
    ) -> UpdateOutcome {
        let (configs, refused) = spec::validate_all(desired);
        let valid: BTreeSet<NetworkKey> = configs.iter().map(|config| config.key).collect();
        self.stop_all_but(desired).await;

        let ports = directory::ports_by_server(desired);
        let mut outcome = UpdateOutcome::default();
        for network in desired.iter().filter(|network| valid.contains(&network.id.into())) {
            let mut directory = Directory::new(network, &ports, metadata);
            directory.advertisement =
                advert::frame(network, self.routers.get(&network.id), directory.zone.domain());
            let directory = Arc::new(directory);
            match self.update_network(network, directory).await {
                Ok(()) => outcome.serving.push(network.id),
                Err(error) if is_not_there(&error) => outcome.waiting.push(network.id),
                Err(error) => outcome.failed.push((network.id, error)),
            }
        }
        outcome.failed.extend(refused.into_iter().map(|error| (error.network, error.into())));
        outcome
    }

    /// Stops all services; their sockets are closed when this returns.
    pub async fn stop(&mut self) {
        self.stop_all_but(&[]).await;
    }

    async fn stop_all_but(&mut self, desired: &[NetworkSpec]) {
        let wanted: BTreeSet<NetworkKey> = desired.iter().map(|network| network.id.into()).collect();
        let unwanted = self.running.extract_if(.., |key, _| !wanted.contains(key));
        // All are told before the first is waited for: closing a packet socket takes the kernel some milliseconds.
        let ending: Vec<_> = unwanted.map(|(key, running)| (key, running.end())).collect();
        for (key, tasks) in ending {
            ended(key, tasks).await;
        }
    }

    async fn stop_network(&mut self, key: NetworkKey) {
        if let Some(running) = self.running.remove(&key) {
            ended(key, running.end()).await;
        }
    }

    async fn update_network(
        &mut self,
        network: &NetworkSpec,
        directory: Arc<Directory>,
    ) -> Result<(), ServiceError> {
        let key = NetworkKey::from(network.id);
        let v6 = network.mtu >= spec::MTU_MIN_V6;
        let namespace = key.namespace(&self.config.prefix);
        if let Some(running) = self.running.get(&key) {
            let alive = running.tasks.iter().all(|task| !task.is_finished());
            if alive && identify(&namespace, v6).await.ok() == Some(running.identity) {
                running.directory.send_if_modified(|current| {
                    let modified = *current != directory;
                    *current = directory;
                    modified
                });
                return Ok(());
            }
            self.stop_network(key).await;
        }
        let running = self.start(network.id, &namespace, v6, directory).await?;
        self.running.insert(key, running);
        info!(network = %key, "services started");
        Ok(())
    }
}

/// The first of several that is ready; never, if there are none.
async fn any_of<F: Future + Unpin>(futures: impl Iterator<Item = F>) -> F::Output {
    let futures: Vec<F> = futures.collect();
    if futures.is_empty() {
        return std::future::pending().await;
    }
    futures_util::future::select_all(futures).await.0
}

/// Whether it is only too early: the plan has not been executed yet.
fn is_not_there(error: &ServiceError) -> bool {
    match error {
        ServiceError::Namespace(
            NamespaceError::Missing(_) | NamespaceError::NotANamespace(_) | NamespaceError::Own(_),
        ) => true,
        ServiceError::Sockets { source, .. } => {
            matches!(source.raw_os_error(), Some(libc::ENODEV | libc::EADDRNOTAVAIL))
        }
        _ => false,
    }
}

async fn identify(namespace: &str, v6: bool) -> Result<Identity, ServiceError> {
    let before = namespace::identity(namespace)?;
    let bridge = namespace::run_in(namespace, || if_nametoindex(BRIDGE)).await?;
    let bridge = bridge
        .map_err(|errno| ServiceError::Sockets { namespace: namespace.to_owned(), source: errno.into() })?;
    Ok(Identity { namespace: before, bridge, v6 })
}

impl Services {
    async fn start(
        &self,
        network: NetworkId,
        namespace: &str,
        v6: bool,
        directory: Arc<Directory>,
    ) -> Result<Running, ServiceError> {
        let key = NetworkKey::from(network);
        // Taken first: if the name gets another namespace in between, the next update sees it and starts again.
        let identity = namespace::identity(namespace)?;
        let sockets = namespace::run_in(namespace, move || sockets::open(v6)).await?;
        let sockets =
            sockets.map_err(|source| ServiceError::Sockets { namespace: namespace.to_owned(), source })?;
        let (sender, receiver) = watch::channel(directory);
        let identity = Identity { namespace: identity, bridge: sockets.bridge, v6 };
        let dhcp = dhcp::serve(key, bridge_mac(network), sockets.dhcp, receiver.clone());
        let dns = dns::serve(key, sockets.dns, self.forwarder.clone(), receiver.clone());
        let tasks = vec![
            tokio::spawn(dhcp),
            tokio::spawn(dhcp6::serve(key, bridge_mac(network), sockets.dhcp6, receiver.clone())),
            tokio::spawn(dns),
            tokio::spawn(metadata::serve(key, sockets.metadata, receiver.clone())),
            tokio::spawn(advert::serve(key, sockets.advert, receiver)),
        ];
        Ok(Running { identity, directory: sender, tasks })
    }
}
