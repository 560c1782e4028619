//! Executes steps and observes, by netlink inside the namespaces.
//!
//! A thread enters the namespace and makes the netlink socket, which belongs to that namespace for ever; from then on
//! tokio uses it. Nothing is cached beyond a [`Session`], which is one pass: each call looks again, so that what someone
//! else did in between is an error or a repetition, never a change to the wrong object.

mod counters;
mod filter;
mod netlink;
mod observe;
mod router;
mod segment;

use std::{
    collections::HashMap,
    fs, io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use mote_host_api::{NetworkId, PortId, PortSpec};
use tokio::sync::OnceCell;

use crate::{
    Config, Desired,
    filter::{Conntrack, Memory, Ruleset},
    names::{BRIDGE, NetworkKey, tap_name},
    namespace::{self, NamespaceError},
    observed::{LinkKind, ObservedNetwork},
    plan::{Action, Plan, Step, plan_with},
    spec, tap,
};
use netlink::Netlink;

const PROC_SYS: &str = "/proc/sys";

/// A step or an observation failed.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// Namespace.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The names of all namespaces can't be read.
    #[error("cannot list {}", namespace::DIR)]
    List(#[source] io::Error),
    /// No netlink socket.
    #[error("network namespace {namespace}: cannot open a netlink socket")]
    Connect {
        /// Namespace.
        namespace: String,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("network namespace {namespace}: cannot {operation}")]
    Netlink {
        /// Namespace.
        namespace: String,
        /// What was tried.
        operation: String,
        /// Why not.
        source: io::Error,
    },
    /// A link that a step needs isn't there.
    #[error("network namespace {namespace} has no link {link}")]
    NoLink {
        /// Namespace.
        namespace: String,
        /// Link.
        link: String,
    },
    /// A sysctl can't be read or written.
    #[error("network namespace {namespace}: cannot access sysctl {path}")]
    Sysctl {
        /// Namespace.
        namespace: String,
        /// Path below /proc/sys.
        path: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The packet filter can't be loaded or read.
    #[error("network namespace {namespace}: cannot access the packet filter")]
    Filter {
        /// Namespace.
        namespace: String,
        /// Why.
        source: io::Error,
    },
    /// The host isn't connected to a physical network.
    #[error(
        "this host has no physical network {0:?}; its configuration names the interfaces that lead to them"
    )]
    PhysicalNetwork(String),
    /// The port's Ethernet address is none.
    #[error("port {0}: {1:?} is no station's Ethernet address")]
    Mac(PortId, String),
    /// The port is plugged in already.
    #[error("network namespace {namespace}: tap {tap} of port {port} is in use")]
    TapInUse {
        /// Namespace.
        namespace: String,
        /// Name.
        tap: String,
        /// Port.
        port: PortId,
    },
    /// The tap can't be made.
    #[error("network namespace {namespace}: cannot make tap {tap}")]
    Tap {
        /// Namespace.
        namespace: String,
        /// Name.
        tap: String,
        /// Why.
        source: io::Error,
    },
}

/// The hand that changes the kernel's state.
#[derive(Debug, Clone)]
pub struct Executor {
    config: Config,
    /// The filters that were loaded last: what makes a change small. Each is used only while the kernel says by its
    /// digest that it is loaded.
    filters: Arc<Mutex<HashMap<NetworkKey, Arc<Ruleset>>>>,
    conntrack: Arc<OnceCell<Conntrack>>,
    sockets: filter::Sockets,
    /// Makes planning cheap.
    memory: Arc<Mutex<Memory>>,
}

impl Executor {
    /// For the networks whose namespaces start with the configured prefix.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            filters: Arc::default(),
            conntrack: Arc::default(),
            sockets: filter::Sockets::default(),
            memory: Arc::default(),
        }
    }

    /// Name of a network's namespace.
    pub fn namespace(&self, network: impl Into<NetworkKey>) -> String {
        network.into().namespace(&self.config.prefix)
    }

    /// Where this kernel's conntrack sees bridged packets; looked at once.
    pub async fn conntrack(&self) -> Conntrack {
        *self.conntrack.get_or_init(filter::conntrack).await
    }

    /// As [`crate::plan()`], on this kernel, and quicker when little has changed since the last time.
    pub async fn plan(&self, desired: &Desired, observed: &[ObservedNetwork]) -> Plan {
        let conntrack = self.conntrack().await;
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        plan_with(&mut memory, desired, conntrack, observed)
    }

    /// Changes the loaded filter if it is the one that was loaded here last, else replaces it.
    async fn set_filter(&self, network: NetworkKey, wanted: &Arc<Ruleset>) -> Result<(), ExecutorError> {
        let namespace = self.namespace(network);
        let filters = || self.filters.lock().unwrap_or_else(PoisonError::into_inner);
        let last = filters().remove(&network);
        let changed = match last {
            Some(last) => self.sockets.change(&namespace, &last, wanted).await?,
            None => false,
        };
        if !changed {
            self.sockets.replace(&namespace, wanted).await?;
        }
        filters().insert(network, wanted.clone());
        Ok(())
    }

    /// Reads the state of all of this host's networks.
    pub async fn observe(&self) -> Result<Vec<ObservedNetwork>, ExecutorError> {
        observe::observe(&self.config, &self.sockets).await
    }

    /// Carries out a step. It may have been carried out before, wholly or in part.
    pub async fn execute(&self, step: &Step) -> Result<(), ExecutorError> {
        self.session().execute(step).await
    }

    /// For several steps.
    pub fn session(&self) -> Session<'_> {
        Session { executor: self, connected: None }
    }

    /// Makes the tap of a port in its network's namespace: attached to `br0`, up, `IFF_NO_PI | IFF_VNET_HDR`,
    /// non-blocking, not persistent: it goes with the last descriptor. The network must have been made before.
    ///
    /// # Errors
    /// [`ExecutorError::TapInUse`] while another descriptor (a VMM that still runs) holds the port's tap.
    pub async fn open_tap(
        &self,
        network: NetworkId,
        port: &PortSpec,
        mtu: u16,
    ) -> Result<OwnedFd, ExecutorError> {
        let namespace = self.namespace(network);
        let mac =
            spec::station_mac(port).ok_or_else(|| ExecutorError::Mac(port.id, port.mac_address.clone()))?;
        let netlink = Netlink::connect(&namespace).await?;
        let bridge = netlink.index(BRIDGE).await?;

        let name = tap_name(port.id);
        let opened = namespace::run_in(&namespace, {
            let name = name.clone();
            move || tap::open(&name)
        });
        let tap = opened.await?.map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY | libc::EEXIST) => {
                ExecutorError::TapInUse { namespace: namespace.clone(), tap: name.clone(), port: port.id }
            }
            _ => ExecutorError::Tap { namespace: namespace.clone(), tap: name.clone(), source },
        })?;
        // From here on an error drops the descriptor, and the tap with it.
        netlink.wire(&name, bridge, mtu, mac).await?;
        Ok(tap)
    }
}

/// Carries out steps, with one connection for those of one network that follow each other.
pub struct Session<'a> {
    executor: &'a Executor,
    connected: Option<(NetworkKey, Netlink)>,
}

impl Session<'_> {
    /// As [`Executor::execute`].
    pub async fn execute(&mut self, step: &Step) -> Result<(), ExecutorError> {
        let executor = self.executor;
        let namespace = executor.namespace(step.network);
        match &step.action {
            Action::CreateNamespace => {
                self.connected = None;
                executor.sockets.forget(&namespace);
                Ok(namespace::create(&namespace).await?)
            }
            Action::DeleteNamespace => {
                self.connected = None;
                executor.sockets.forget(&namespace);
                executor.filters.lock().unwrap_or_else(PoisonError::into_inner).remove(&step.network);
                delete_namespace(&namespace).await
            }
            Action::SetFilter { filter } => executor.set_filter(step.network, filter).await,
            Action::SetSysctls { settings } => set_sysctls(&namespace, settings.clone()).await,
            Action::CreateSegment { segment, mtu } => {
                segment::create(&executor.config, &namespace, step.network, segment, *mtu).await
            }
            action => {
                if self.connected.as_ref().is_none_or(|(network, _)| *network != step.network) {
                    self.connected = Some((step.network, Netlink::connect(&namespace).await?));
                }
                match &self.connected {
                    Some((_, netlink)) => execute_by_netlink(netlink, action).await,
                    None => Ok(()),
                }
            }
        }
    }
}

async fn execute_by_netlink(netlink: &Netlink, action: &Action) -> Result<(), ExecutorError> {
    match action {
        Action::CreateBridge { mac, mtu } => netlink.create_bridge(*mac, *mtu).await,
        Action::DeleteLink { link } => netlink.delete_link(link).await,
        Action::SetMac { link, mac } => netlink.set_mac(link, *mac).await,
        Action::SetMtu { link, mtu } => netlink.set_mtu(link, *mtu).await,
        Action::SetUp { link } => netlink.set_up(link).await,
        Action::AttachPort { link } => netlink.attach(link, netlink.index(BRIDGE).await?).await,
        Action::SetPortFlags { link, flags } => netlink.set_port_flags(link, *flags).await,
        Action::AddAddress { address } => netlink.add_address(*address).await,
        Action::DeleteAddress { address } => netlink.delete_address(*address).await,
        Action::SetNeighbour { ip, mac } => netlink.set_neighbour(*ip, *mac).await,
        Action::DeleteNeighbour { ip } => netlink.delete_neighbour(*ip).await,
        Action::AddStation { link, mac } => netlink.add_station(link, *mac).await,
        Action::SetTunnel { mac, host } => netlink.set_tunnel(*mac, *host).await,
        Action::DeleteTunnel { mac } => netlink.delete_tunnel(*mac).await,
        Action::DeleteStation { link, mac } => netlink.delete_station(link, *mac).await,
        Action::CreateNamespace
        | Action::DeleteNamespace
        | Action::SetSysctls { .. }
        | Action::CreateSegment { .. }
        | Action::SetFilter { .. } => Ok(()),
    }
}

/// Unplugs what is in the namespace and removes its name. Unplugged first, since a tap whose VMM still runs would keep
/// the namespace and the traffic between its ports alive without a name. The bridge goes with the namespace, which the
/// kernel takes down by itself (deleting it here would wait tens of milliseconds for that).
async fn delete_namespace(namespace: &str) -> Result<(), ExecutorError> {
    match Netlink::connect(namespace).await {
        Ok(netlink) => {
            for link in netlink.links().await? {
                match link.kind {
                    LinkKind::Loopback | LinkKind::Bridge => {}
                    LinkKind::Tun => netlink.delete_link(&link.name).await?,
                    // Some kinds can't be deleted; they go with the namespace.
                    LinkKind::Vxlan(_) | LinkKind::Other => _ = netlink.delete_link(&link.name).await,
                }
            }
        }
        Err(ExecutorError::Namespace(
            NamespaceError::Missing(_) | NamespaceError::NotANamespace(_) | NamespaceError::Own(_),
        )) => {}
        Err(error) => return Err(error),
    }
    Ok(namespace::delete(namespace).await?)
}

async fn set_sysctls(
    namespace: &str,
    settings: Vec<(&'static str, &'static str)>,
) -> Result<(), ExecutorError> {
    let name = namespace.to_owned();
    let write = move || {
        for (path, value) in settings {
            match fs::write(format!("{PROC_SYS}/{path}"), value) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(ExecutorError::Sysctl { namespace: name, path, source });
                }
                // A kernel without the feature.
                _ => {}
            }
        }
        Ok(())
    };
    namespace::run_in(namespace, write).await?
}
