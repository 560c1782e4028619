//! Real networks: `mote_network`'s plan, executor and services behind the agent's [`Networks`].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::OwnedFd,
};

use futures_util::future::BoxFuture;
use mote_host_api::{Inventory, NetworkId, PortSpec, Traffic};
use mote_network::{Config, Executor, NetworkKey, Services, plan::Action, plan_routers};
use tokio::sync::Mutex;

use crate::{
    errors::one_line,
    files::{self, Durability, FileError},
    parts::{Networks, NetworksError},
    paths::{DEFAULT_STATE_DIR, StateDir},
    reconcile::{Converged, NetworkGoal},
};

/// Prefix of namespaces for the default state directory.
const DEFAULT_PREFIX: &str = "mote-";

/// What leads from this host to other hosts and to physical networks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Underlay {
    /// See [`Inventory::tunnel_ip`].
    pub tunnel_ip: Option<IpAddr>,
    /// Physical networks by name, with the interfaces or bridges that lead there.
    pub physical_networks: BTreeMap<String, String>,
    /// Resolvers of names that are none of tenants' networks.
    pub dns_forwarders: Vec<IpAddr>,
}

impl Underlay {
    /// The inventory with it.
    pub fn announce(&self, inventory: Inventory) -> Inventory {
        Inventory {
            tunnel_ip: self.tunnel_ip,
            physical_networks: self.physical_networks.keys().cloned().collect(),
            ..inventory
        }
    }
}

/// `NAME=INTERFACE`.
///
/// # Errors
/// What is wrong with it.
pub fn physical_network(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, interface)) if !name.is_empty() && (1..16).contains(&interface.len()) => {
            Ok((name.to_owned(), interface.to_owned()))
        }
        _ => Err("NAME=INTERFACE is needed, e.g. public=eth1".to_owned()),
    }
}

/// This host's address on the overlay if none is configured: the one towards the controller, and if that is on this machine
/// the one towards the rest of the world, by which other hosts will be asked to join.
pub fn default_tunnel_ip(controller: &str) -> Option<IpAddr> {
    address_towards(controller).or_else(address_towards_world)
}

/// This host's address towards a URL's host, unless that is this machine itself.
fn address_towards(url: &str) -> Option<IpAddr> {
    let to = reqwest::Url::parse(url).ok()?.socket_addrs(|| None).ok()?.into_iter().next()?;
    let own = source_towards(to)?;
    (own != to.ip()).then_some(own)
}

/// This host's address towards where its default route leads.
fn address_towards_world() -> Option<IpAddr> {
    /// Addresses that nobody has (RFC 5737, RFC 3849).
    const NOBODY: [IpAddr; 2] =
        [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];
    const DISCARD: u16 = 9;
    NOBODY.into_iter().find_map(|ip| source_towards((ip, DISCARD).into()))
}

/// What this machine would send from, unless it would send to itself.
fn source_towards(to: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr =
        if to.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    // Connecting a datagram socket sends nothing: it only looks up the route.
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(to).ok()?;
    let own = socket.local_addr().ok()?.ip();
    (!own.is_loopback()).then_some(own)
}

/// This machine's network namespaces of one prefix, with their DHCP and metadata services.
pub struct KernelNetworks {
    executor: Executor,
    services: Mutex<Services>,
}

impl KernelNetworks {
    /// Networks whose namespaces start with `prefix`.
    pub fn new(prefix: &str, underlay: &Underlay) -> Self {
        let config = Config {
            prefix: prefix.to_owned(),
            physical_networks: underlay.physical_networks.clone(),
            dns_forwarders: underlay.dns_forwarders.clone(),
            ..Config::default()
        };
        Self { executor: Executor::new(config.clone()), services: Mutex::new(Services::new(config)) }
    }

    async fn pass(&self, goal: &NetworkGoal) -> Result<Converged, NetworksError> {
        let metadata: HashMap<_, _> = goal.metadata.iter().map(|(id, data)| (*id, data.clone())).collect();
        let mut services = self.services.lock().await;
        services.set_routers(&goal.desired.routers);
        services.update(&goal.desired.networks, &metadata).await;
        let mut observed = self.executor.observe().await.map_err(|e| NetworksError::Observe(Box::new(e)))?;
        let mut existing: BTreeSet<NetworkKey> = observed.iter().map(|network| network.key).collect();
        // Neither wanted nor seen: the plan leaves them alone.
        let keep: BTreeSet<NetworkKey> = goal.keep.iter().map(|id| NetworkKey::from(*id)).collect();
        observed.retain(|network| !keep.contains(&network.key));

        let mut failed = BTreeMap::new();
        let plan = self.executor.plan(&goal.desired, &observed).await;
        for refused in &plan.refused {
            failed.insert(refused.network.into(), one_line(&refused.problem));
        }
        let mut session = self.executor.session();
        for step in &plan.steps {
            if failed.contains_key(&step.network) {
                continue;
            }
            match session.execute(step).await {
                Ok(()) => match step.action {
                    Action::CreateNamespace => drop(existing.insert(step.network)),
                    Action::DeleteNamespace => drop(existing.remove(&step.network)),
                    _ => {}
                },
                Err(e) => drop(failed.insert(step.network, format!("{step}: {}", one_line(&e)))),
            }
        }
        self.routers(goal, &mut failed).await?;
        let outcome = services.update(&goal.desired.networks, &metadata).await;
        for (network, e) in &outcome.failed {
            failed.entry((*network).into()).or_insert_with(|| one_line(e));
        }
        for network in &outcome.waiting {
            failed
                .entry((*network).into())
                .or_insert_with(|| "its services wait for its namespace".to_owned());
        }
        Ok(Converged { existing, failed })
    }
}

impl KernelNetworks {
    /// Brings routers in line. What fails is told under a key that is made from the router's id: it keeps no network's
    /// servers from starting, and is tried again.
    async fn routers(
        &self,
        goal: &NetworkGoal,
        failed: &mut BTreeMap<NetworkKey, String>,
    ) -> Result<(), NetworksError> {
        let observed =
            self.executor.observe_routers().await.map_err(|e| NetworksError::Observe(Box::new(e)))?;
        let (steps, refused) = plan_routers(&goal.desired, &observed);
        for error in refused {
            failed.insert(NetworkId(error.router.0).into(), one_line(&error));
        }
        let mut stuck = BTreeSet::new();
        for step in &steps {
            if stuck.contains(&step.router) {
                continue;
            }
            if let Err(e) = self.executor.execute_router(step).await {
                stuck.insert(step.router);
                failed.insert(step.router.network_key(), format!("{step}: {}", one_line(&e)));
            }
        }
        Ok(())
    }
}

impl Networks for KernelNetworks {
    fn converge<'a>(&'a self, goal: &'a NetworkGoal) -> BoxFuture<'a, Result<Converged, NetworksError>> {
        Box::pin(self.pass(goal))
    }

    fn open_tap<'a>(
        &'a self,
        network: NetworkId,
        port: &'a PortSpec,
        mtu: u16,
    ) -> BoxFuture<'a, Result<OwnedFd, NetworksError>> {
        Box::pin(async move {
            let tap = self.executor.open_tap(network, port, mtu).await;
            tap.map_err(|e| NetworksError::Tap { port: port.id, source: Box::new(e) })
        })
    }

    fn counters(&self) -> BoxFuture<'_, Result<BTreeMap<String, Traffic>, NetworksError>> {
        Box::pin(async { self.executor.counters().await.map_err(|e| NetworksError::Observe(Box::new(e))) })
    }
}

/// What the names of this host's namespaces start with: `mote-`, or for a state directory at another place one of its
/// own, so that two host agents on one machine don't take each other's networks for leftovers. Kept in the state
/// directory, so that it stays the same if that is moved.
///
/// # Errors
/// [`FileError`].
pub fn prefix(state: &StateDir) -> Result<String, FileError> {
    use sha2::{Digest, Sha256};
    let path = state.netns_prefix();
    let valid = |prefix: &str| {
        (2..=24).contains(&prefix.len())
            && prefix.ends_with('-')
            && prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if let Ok(prefix) = std::fs::read_to_string(&path)
        && valid(prefix.trim())
    {
        return Ok(prefix.trim().to_owned());
    }
    let place = std::fs::canonicalize(state.path()).unwrap_or_else(|_| state.path().to_owned());
    let prefix = if place.as_os_str() == DEFAULT_STATE_DIR {
        DEFAULT_PREFIX.to_owned()
    } else {
        let digest = Sha256::digest(place.as_os_str().as_encoded_bytes());
        format!("mote{}-", hex::encode(&digest[..4]))
    };
    files::replace(&path, prefix.as_bytes(), Durability::Host)?;
    Ok(prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beside_a_controller_on_this_machine_the_tunnel_has_the_address_of_the_default_route() {
        assert_eq!(address_towards("http://127.0.0.1:8774"), None);
        assert_eq!(default_tunnel_ip("http://127.0.0.1:8774"), address_towards_world());
        let output = std::process::Command::new("ip").args(["-o", "route", "get", "192.0.2.1"]).output();
        let Ok(output) = output else {
            eprintln!("SKIPPED: needs iproute2's ip");
            return;
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let source = text.split_whitespace().skip_while(|word| *word != "src").nth(1);
        if let Some(source) = source {
            assert_eq!(default_tunnel_ip("http://127.0.0.1:8774"), source.parse().ok(), "{text}");
        }
    }

    #[test]
    fn physical_networks_are_read_strictly() {
        assert_eq!(physical_network("public=eth1"), Ok(("public".to_owned(), "eth1".to_owned())));
        for wrong in ["public", "=eth1", "public=", "public=a-name-that-is-too-long"] {
            assert!(physical_network(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn two_state_directories_have_two_prefixes_and_each_keeps_its_own() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let of = |dir: &tempfile::TempDir| prefix(&StateDir::new(dir.path())).unwrap();
        assert_ne!(of(&a), of(&b));
        assert_eq!(of(&a), of(&a));
        std::fs::write(StateDir::new(a.path()).netns_prefix(), "other-\n").unwrap();
        assert_eq!(of(&a), "other-");
        std::fs::write(StateDir::new(a.path()).netns_prefix(), "../x").unwrap();
        assert!(of(&a).starts_with("mote"));
    }
}
