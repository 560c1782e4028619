//! `rewire`: the NICs of a VMM that runs become those of the ports that are wanted.
//!
//! What a VMM has is asked of it each time, so that nothing has to be remembered: a task that is cut off anywhere leaves a
//! VMM whose NICs tell what is left to do. A tap lives as long as its descriptor, which this process closes when the VMM
//! has its own; what was not handed over is gone with it.
//!
//! A NIC goes when its guest gives it up. One that doesn't (none runs yet, or it has no driver for that) is asked again
//! after growing pauses for as long as it has the NIC; the next start ends it in any case.

use std::{collections::BTreeSet, os::fd::AsRawFd, os::fd::OwnedFd, time::Duration};

use mote_host_api::{NetworkId, PortId, PortSpec, ServerSpec};
use mote_vmm_api::{NetworkInterface, VmConfig};

use super::{TaskError, TaskEvent, Wanted, Work, start::limiter};

/// How long a guest is waited for that was asked to give up a NIC, before other things go on.
const EJECT_WAIT: Duration = Duration::from_secs(2);
/// Pause between two looks whether it has.
const EJECT_POLL: Duration = Duration::from_millis(20);
/// What ids of interfaces begin with; their port's id follows.
const INTERFACE_PREFIX: &str = "nic_";

/// The id of a port's interface.
pub(crate) fn interface_id(port: PortId) -> String {
    format!("{INTERFACE_PREFIX}{}", port.0.simple())
}

/// The ports of interfaces with these ids; none if one of them was named by an agent that couldn't change them.
pub(super) fn ports_of<'a>(interfaces: impl IntoIterator<Item = &'a str>) -> Option<BTreeSet<PortId>> {
    let port = |id: &str| id.strip_prefix(INTERFACE_PREFIX)?.parse().ok();
    interfaces.into_iter().map(port).collect()
}

/// The ports that a VMM is started with.
pub(super) fn ports_of_config(config: &VmConfig) -> Option<BTreeSet<PortId>> {
    match &config.snapshot_load {
        Some(load) => ports_of(load.network_overrides.iter().map(|nic| nic.iface_id.as_str())),
        None => ports_of(config.network_interfaces.iter().map(|nic| nic.iface_id.as_str())),
    }
}

/// A port's NIC; its tap is a descriptor of this number, or comes with the request.
pub(super) fn interface(
    spec: &ServerSpec,
    mtu: u16,
    port: &PortSpec,
    tap: Option<&OwnedFd>,
) -> NetworkInterface {
    NetworkInterface {
        iface_id: interface_id(port.id),
        host_dev_name: mote_network::names::tap_name(port.id),
        guest_mac: Some(port.mac_address.clone()),
        tap_fd: tap.map(AsRawFd::as_raw_fd),
        tap_from_request: tap.is_none(),
        mtu: Some(mtu),
        rx_rate_limiter: limiter(spec.devices.received_bytes, None),
        tx_rate_limiter: limiter(spec.devices.sent_bytes, None),
        ..NetworkInterface::default()
    }
}

impl Work {
    /// See the module's documentation.
    pub(super) async fn rewire(&mut self) -> Result<(), TaskError> {
        let wanted = self.wanted()?;
        let Some(mut has) = self.look_at_nics().await? else {
            return self.tell_nics(None).await;
        };
        // Events come and go while processors run.
        if self.record.paused == Some(false) {
            let asked = self.ask_to_leave(&wanted, &has).await;
            let plugged = self.plug_missing(&wanted, &has).await;
            has = self.wait_for_leaving(&wanted).await?;
            asked.and(plugged)?;
        }
        self.note_networks(&wanted, &has).await?;
        self.tell_nics(Some(has)).await
    }

    /// The ports that the VMM has NICs of; none if they can't be changed while it runs.
    async fn look_at_nics(&self) -> Result<Option<BTreeSet<PortId>>, TaskError> {
        if !self.record.pci {
            return Ok(None);
        }
        let interfaces = self.parts.vmms.interfaces(self.record.id).await?;
        Ok(ports_of(interfaces.iter().map(String::as_str)))
    }

    async fn tell_nics(&self, nics: Option<BTreeSet<PortId>>) -> Result<(), TaskError> {
        self.tell(TaskEvent::Nics(self.record.id, nics)).await;
        Ok(())
    }

    async fn ask_to_leave(&self, wanted: &Wanted, has: &BTreeSet<PortId>) -> Result<(), TaskError> {
        for port in has.iter().filter(|port| !wanted.spec.ports.contains(port)) {
            tracing::info!(server = %self.record.id, %port, "its guest is asked to give up a NIC");
            self.reach("before unplug").await;
            self.parts.vmms.unplug(self.record.id, interface_id(*port)).await?;
            self.reach("after unplug").await;
        }
        Ok(())
    }

    async fn plug_missing(&mut self, wanted: &Wanted, has: &BTreeSet<PortId>) -> Result<(), TaskError> {
        let missing: Vec<&(NetworkId, u16, PortSpec)> =
            wanted.ports.iter().filter(|(.., port)| !has.contains(&port.id)).collect();
        let networks = self.record.networks.len();
        self.record.networks.extend(missing.iter().map(|(network, ..)| *network));
        if self.record.networks.len() > networks {
            self.save().await?;
        }
        for (network, mtu, port) in missing {
            let tap = self.parts.networks.open_tap(*network, port, *mtu).await?;
            self.reach("after tap").await;
            let nic = interface(&wanted.spec, *mtu, port, None);
            self.parts.vmms.plug(self.record.id, nic, tap).await?;
            self.reach("after plug").await;
            tracing::info!(server = %self.record.id, port = %port.id, "a NIC was plugged in");
        }
        Ok(())
    }

    /// What the VMM has once its guest has given up what it was asked for, or time is over.
    async fn wait_for_leaving(&self, wanted: &Wanted) -> Result<BTreeSet<PortId>, TaskError> {
        let polls = EJECT_WAIT.as_millis() / EJECT_POLL.as_millis();
        let mut has = BTreeSet::new();
        for _ in 0..=polls {
            has = self.look_at_nics().await?.unwrap_or_default();
            if has.iter().all(|port| wanted.spec.ports.contains(port)) {
                break;
            }
            self.parts.clock.sleep(EJECT_POLL).await;
        }
        Ok(has)
    }

    /// Networks that none of its NICs is in any more are not its own.
    async fn note_networks(&mut self, wanted: &Wanted, has: &BTreeSet<PortId>) -> Result<(), TaskError> {
        let settled = has.iter().all(|port| wanted.spec.ports.contains(port));
        let networks: BTreeSet<NetworkId> = wanted.ports.iter().map(|(network, ..)| *network).collect();
        let changed = settled && self.record.networks != networks;
        if !changed && self.record.message.is_none() {
            return Ok(());
        }
        if settled {
            self.record.networks = networks;
        }
        self.record.message = None;
        self.save().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_names_its_port_and_those_of_earlier_agents_name_none() {
        let ports = [PortId::new(), PortId::new()];
        let ids = ports.map(interface_id);
        assert_eq!(ports_of(ids.iter().map(String::as_str)), Some(ports.into()));
        assert_eq!(ports_of(["eth0"]), None);
        assert_eq!(ports_of([]), Some(BTreeSet::new()));
    }
}
