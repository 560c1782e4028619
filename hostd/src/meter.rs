//! What ports have carried, for metering.
//!
//! The kernel counts at each port's tap, from the tap's making to its end, which is that of its VMM. So a count belongs to
//! one VMM, and the series that is told to the controller is named after that process: an agent that is started again finds
//! the same VMM with the same tap and goes on with the same series. Nothing is kept here that would have to survive.
//!
//! What a tap counts between the last look and the end of a VMM that ends by itself is lost; one that is ended on purpose is
//! looked at last.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mote_host_api::{DesiredState, PortId, PortTraffic, REPORT_EVERY_S, ServerId, Traffic};
use mote_network::names::tap_name;
use tokio::time::Instant;

use crate::{errors::one_line, parts::Networks, process::ProcessIdentity};

/// Looks of reports are at least this far apart.
const LOOK_EVERY: Duration = Duration::from_secs(REPORT_EVERY_S);

/// Ports of a server, and its only VMM.
type Wired = (BTreeSet<PortId>, ProcessIdentity);

/// See the module's documentation.
pub struct Meter {
    networks: Arc<dyn Networks>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    looked_at: Option<Instant>,
    /// Servers as they were when they were last looked at.
    servers: BTreeMap<ServerId, Wired>,
    /// The last counts.
    counts: BTreeMap<(PortId, String), Traffic>,
    /// Those that the controller has.
    told: BTreeMap<(PortId, String), Traffic>,
}

impl Meter {
    /// Counts in these networks.
    pub fn new(networks: Arc<dyn Networks>) -> Self {
        Self { networks, seen: Mutex::default() }
    }

    /// Looks at all servers' ports unless that was done a moment ago.
    pub async fn look(&self, desired: &DesiredState, running: Vec<(ServerId, ProcessIdentity)>) {
        {
            let mut seen = self.seen();
            if seen.looked_at.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
                return;
            }
            seen.looked_at = Some(Instant::now());
        }
        let mut ports = BTreeMap::<ServerId, BTreeSet<PortId>>::new();
        for port in desired.networks.iter().flat_map(|network| &network.ports) {
            ports.entry(port.server_id).or_default().insert(port.id);
        }
        let mut wired: BTreeMap<ServerId, Wired> = BTreeMap::new();
        for (id, process) in running {
            if let Some(ports) = ports.remove(&id).or_else(|| self.ports_of(id)) {
                wired.insert(id, (ports, process));
            }
        }
        self.seen().servers.clone_from(&wired);
        self.count(&wired).await;
    }

    /// A last look at a server whose VMMs are about to be ended.
    pub async fn last_look(&self, id: ServerId) {
        let wired = self.seen().servers.get(&id).cloned();
        if let Some(wired) = wired {
            self.count(&BTreeMap::from([(id, wired)])).await;
        }
    }

    /// What the kernel has counted by now at each tap.
    pub async fn counters(&self) -> BTreeMap<String, Traffic> {
        self.networks.counters().await.unwrap_or_else(|e| {
            tracing::debug!(error = one_line(&e), "ports not looked at");
            BTreeMap::new()
        })
    }

    /// What the controller has not been told yet.
    pub fn untold(&self) -> Vec<PortTraffic> {
        let seen = self.seen();
        let new = seen.counts.iter().filter(|(key, traffic)| seen.told.get(*key) != Some(traffic));
        new.map(|((port_id, series), traffic)| PortTraffic {
            port_id: *port_id,
            series: series.clone(),
            traffic: *traffic,
        })
        .collect()
    }

    /// The controller has this. What will not grow any more is forgotten.
    pub fn told(&self, traffic: &[PortTraffic]) {
        let mut seen = self.seen();
        for one in traffic {
            seen.told.insert((one.port_id, one.series.clone()), one.traffic);
        }
        let Seen { servers, counts, told, .. } = &mut *seen;
        let grows: BTreeSet<(PortId, String)> = servers
            .values()
            .flat_map(|(ports, process)| ports.iter().map(|port| (*port, series(process))))
            .collect();
        counts.retain(|key, traffic| grows.contains(key) || told.get(key) != Some(traffic));
        told.retain(|key, _| counts.contains_key(key));
    }

    async fn count(&self, wired: &BTreeMap<ServerId, Wired>) {
        if wired.is_empty() {
            return;
        }
        let counters = self.counters().await;
        let mut seen = self.seen();
        for (ports, process) in wired.values() {
            // It ran before the counters were read and runs still: they are of its taps.
            if ProcessIdentity::of(process.pid).as_ref() != Some(process) {
                continue;
            }
            for port in ports {
                if let Some(traffic) = counters.get(&tap_name(*port)) {
                    seen.counts.insert((*port, series(process)), *traffic);
                }
            }
        }
    }

    fn ports_of(&self, id: ServerId) -> Option<BTreeSet<PortId>> {
        self.seen().servers.get(&id).map(|(ports, _)| ports.clone())
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of what one VMM's taps count.
fn series(process: &ProcessIdentity) -> String {
    format!("{}-{}-{}", process.boot_id, process.start_ticks, process.pid)
}

#[cfg(test)]
mod tests {
    use std::{os::fd::OwnedFd, process::Child};

    use futures_util::future::BoxFuture;
    use mote_host_api::{CloudId, HostId, NetworkId, PortSpec};

    use super::*;
    use crate::{
        parts::NetworksError,
        reconcile::{Converged, NetworkGoal},
        sim::server_in_network,
    };

    /// Taps that count what a test says.
    #[derive(Default)]
    struct Taps(Mutex<BTreeMap<String, Traffic>>);

    impl Taps {
        fn carry(&self, port: PortId, bytes: u64) {
            let traffic = Traffic { rx_bytes: bytes, rx_packets: 1, ..Traffic::default() };
            self.0.lock().unwrap().insert(tap_name(port), traffic);
        }
    }

    impl Networks for Taps {
        fn converge<'a>(&'a self, _: &'a NetworkGoal) -> BoxFuture<'a, Result<Converged, NetworksError>> {
            unreachable!("meters only count")
        }

        fn open_tap<'a>(
            &'a self,
            _: NetworkId,
            _: &'a PortSpec,
            _: u16,
        ) -> BoxFuture<'a, Result<OwnedFd, NetworksError>> {
            unreachable!("meters only count")
        }

        fn counters(&self) -> BoxFuture<'_, Result<BTreeMap<String, Traffic>, NetworksError>> {
            Box::pin(async { Ok(self.0.lock().unwrap().clone()) })
        }
    }

    /// A process that stands for a VMM.
    struct Vmm(Child);

    impl Vmm {
        fn start() -> Self {
            Self(std::process::Command::new("sleep").arg("60").spawn().unwrap())
        }

        fn identity(&self) -> ProcessIdentity {
            ProcessIdentity::of(self.0.id().try_into().unwrap()).unwrap()
        }
    }

    impl Drop for Vmm {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    struct Host {
        taps: Arc<Taps>,
        meter: Meter,
        desired: DesiredState,
        server: ServerId,
        port: PortId,
    }

    impl Host {
        fn new() -> Self {
            let (network, server) = server_in_network(5);
            let (id, port) = (server.id, network.ports[0].id);
            let desired = DesiredState {
                cloud_id: CloudId::new(),
                host_id: HostId::new(),
                generation: 1,
                networks: vec![network],
                servers: vec![server],
                tunnel: None,
                security_groups: Vec::new(),
                address_sets: Vec::new(),
                routers: Vec::new(),
            };
            let taps = Arc::new(Taps::default());
            Self { meter: Meter::new(taps.clone()), taps, desired, server: id, port }
        }

        async fn look(&self, vmm: &Vmm) {
            self.meter.seen().looked_at = None;
            self.meter.look(&self.desired, vec![(self.server, vmm.identity())]).await;
        }

        fn untold(&self) -> Vec<u64> {
            self.meter.untold().iter().map(|one| one.traffic.rx_bytes).collect()
        }
    }

    #[tokio::test]
    async fn what_was_told_is_not_told_again_and_what_was_not_stays_until_it_was() {
        let host = Host::new();
        let vmm = Vmm::start();
        host.taps.carry(host.port, 100);
        host.look(&vmm).await;
        let first = host.meter.untold();
        assert_eq!(host.untold(), [100]);
        host.taps.carry(host.port, 150);
        // Nobody looks so soon after the last look.
        host.meter.look(&host.desired, vec![(host.server, vmm.identity())]).await;
        assert_eq!(host.untold(), [100]);
        host.meter.told(&first);
        assert!(host.untold().is_empty());
        host.look(&vmm).await;
        assert_eq!(host.untold(), [150]);
        // An answer to what was told before says nothing of this.
        host.meter.told(&first);
        assert_eq!(host.untold(), [150]);
    }

    #[tokio::test]
    async fn each_vmm_is_a_series_of_its_own_and_an_agent_started_again_goes_on_with_it() {
        let mut host = Host::new();
        let first = Vmm::start();
        host.taps.carry(host.port, 100);
        host.look(&first).await;
        let named = host.meter.untold()[0].series.clone();
        host.meter = Meter::new(host.taps.clone());
        host.taps.carry(host.port, 120);
        host.look(&first).await;
        assert_eq!((host.untold(), &host.meter.untold()[0].series), (vec![120], &named));
        // A last look before it is ended; then there is another one, whose tap counts anew.
        host.taps.carry(host.port, 130);
        host.meter.last_look(host.server).await;
        drop(first);
        let second = Vmm::start();
        host.taps.carry(host.port, 7);
        host.look(&second).await;
        let mut untold = host.untold();
        untold.sort_unstable();
        assert_eq!(untold, [7, 130]);
        let all = host.meter.untold();
        host.meter.told(&all);
        assert_eq!(host.meter.seen().counts.len(), 1, "the first can't grow any more");
    }

    #[tokio::test]
    async fn counts_of_a_vmm_that_has_ended_are_nobodys() {
        let host = Host::new();
        let vmm = Vmm::start();
        let identity = vmm.identity();
        drop(vmm);
        host.taps.carry(host.port, 100);
        host.meter.look(&host.desired, vec![(host.server, identity)]).await;
        assert!(host.untold().is_empty());
    }
}
