//! virtio-net (virtio 1.2 §5.1) over a tap: one pair of queues or several ([`pairs`]), checksum and segmentation offloads in both directions,
//! mergeable receive buffers, MAC, MTU and link state.
//!
//! One thread for each pair, started when the driver activates the device, serves both directions ([`server`]): frames go between tap
//! and guest memory by vectored reads and writes without a copy. Rate limits and the link's state can be changed
//! meanwhile ([`NetControl`]).

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use mote_vmm_api::{MAX_QUEUE_PAIRS, NetworkInterface};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net as abi;
use vmm_sys_util::epoll::EventSet;

use super::queue::VirtQueue;
use super::worker::{Poller, Worker};
use super::{Activation, VirtioDevice, device_type, read_config_bytes};
use crate::devices::DeviceError;
use crate::mmds::Endpoint;
use crate::snapshot::{DeviceState, StateError};

mod control;
mod pairs;
mod receive;
mod server;
mod tap;
mod transmit;

pub use control::NetControl;
use control::Shared;
use pairs::{Control, Pairs, Switch};
use server::Server;
pub use tap::{HEADER_BYTES, NetError, Tap};

const QUEUE_SIZE: u16 = 256;
/// Most queues: two for each pair, and the control queue.
const MAX_QUEUES: usize = 2 * MAX_QUEUE_PAIRS as usize + 1;
const ETHERNET_HEADER_BYTES: usize = 14;
/// Longest thing that passes a tap: header, Ethernet header with a VLAN tag, 64 KiB of IP.
const MAX_FRAME: usize = HEADER_BYTES + 18 + 65_535;
/// virtio 1.2 §5.1.4.1.
const MIN_MTU: u16 = 68;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// Bytes of the configuration space: MAC, status, number of queue pairs, MTU.
pub(super) const CONFIG_BYTES: usize = 12;
/// Place of the link's state in the configuration space.
const STATUS_AT: usize = 6;

/// Place of the number of queue pairs.
const PAIRS_AT: usize = 8;
/// Features of an interface with several queue pairs.
const SEVERAL: u64 = bit(abi::VIRTIO_NET_F_MQ) | bit(abi::VIRTIO_NET_F_CTRL_VQ);

/// Features of every interface: offloads that a tap does, both ways, mergeable buffers and the link's state.
const FEATURES: u64 = bit(abi::VIRTIO_NET_F_CSUM)
    | bit(abi::VIRTIO_NET_F_GUEST_CSUM)
    | bit(abi::VIRTIO_NET_F_GUEST_TSO4)
    | bit(abi::VIRTIO_NET_F_GUEST_TSO6)
    | bit(abi::VIRTIO_NET_F_GUEST_UFO)
    | bit(abi::VIRTIO_NET_F_HOST_TSO4)
    | bit(abi::VIRTIO_NET_F_HOST_TSO6)
    | bit(abi::VIRTIO_NET_F_HOST_UFO)
    | bit(abi::VIRTIO_NET_F_MRG_RXBUF)
    | bit(abi::VIRTIO_NET_F_STATUS);

/// A virtio network device.
pub struct Net {
    /// One for each queue pair.
    taps: Vec<Arc<Mutex<Tap>>>,
    pairs: Arc<Pairs>,
    /// MAC, status (filled in when read), number of queue pairs, MTU.
    config: [u8; 12],
    features: u64,
    /// With anti-spoofing: the address that the guest may send from.
    source: Option<[u8; 6]>,
    /// Where frames to the metadata service's address go.
    service: Option<Service>,
    shared: Arc<Shared>,
    workers: Vec<Worker>,
}

/// In snapshots of interfaces with several queue pairs.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedState {
    pairs_used: usize,
}

/// The metadata service, of the one worker that runs.
type Service = Arc<Mutex<Endpoint>>;

impl Net {
    /// Opens the tap (`passed` is the one that came with the request), so that one that can't be opened is refused when it is configured.
    ///
    /// # Errors
    /// The tap can't be had, or MAC or MTU are no such thing.
    pub fn open(interface: &NetworkInterface, passed: Option<OwnedFd>) -> Result<Self, DeviceError> {
        let iface = &interface.iface_id;
        let (config, features) = config_space(interface)?;
        if interface.anti_spoofing && interface.guest_mac.is_none() {
            return Err(NetError::NoMac { iface: iface.clone() }.into());
        }
        let name = &interface.host_dev_name;
        let pairs = interface.num_queue_pairs.unwrap_or(1);
        if pairs > 1 {
            let queues = Tap::open_queues(iface, name, pairs.min(MAX_QUEUE_PAIRS).into())?;
            return Self::over_queues(queues, interface, config, features);
        }
        Self::over(open_tap(interface, passed)?, interface, config, features)
    }

    /// A device with several queue pairs, of which the driver uses the first until it says otherwise.
    fn over_queues(
        queues: Vec<(Tap, Switch)>,
        interface: &NetworkInterface,
        mut config: [u8; 12],
        features: u64,
    ) -> Result<Self, DeviceError> {
        config[PAIRS_AT..PAIRS_AT + 2].copy_from_slice(&(queues.len() as u16).to_le_bytes());
        let (mut taps, switches): (Vec<_>, Vec<_>) = queues.into_iter().unzip();
        let more = taps.split_off(1);
        let mut net = match taps.pop() {
            Some(first) => Self::over(first, interface, config, features | SEVERAL)?,
            None => return Err(DeviceError::QueueCount { device: "net", given: 0 }),
        };
        net.taps.extend(more.into_iter().map(|tap| Arc::new(Mutex::new(tap))));
        net.pairs = Arc::new(Pairs::new(switches));
        net.use_pairs(1);
        Ok(net)
    }

    /// Attaches the queues of the first `count` pairs.
    fn use_pairs(&self, count: usize) {
        if let Err(error) = self.pairs.set_used(count) {
            // A tap that was removed: the device works and nothing comes or goes, as with a pulled cable.
            crate::devices::report("attach the queues of a tap", &error);
        }
    }

    /// How many pairs a driver with these features may use.
    fn pairs_with(&self, features: u64) -> usize {
        if features & bit(abi::VIRTIO_NET_F_MQ) != 0 { self.pairs.max() } else { 1 }
    }

    fn over(
        tap: Tap,
        interface: &NetworkInterface,
        config: [u8; 12],
        features: u64,
    ) -> Result<Self, DeviceError> {
        let mut source = [0; 6];
        source.copy_from_slice(&config[0..6]);
        Ok(Self {
            taps: vec![Arc::new(Mutex::new(tap))],
            pairs: Arc::new(Pairs::new(Vec::new())),
            config,
            features,
            source: interface.anti_spoofing.then_some(source),
            service: None,
            shared: Shared::new(interface)?,
            workers: Vec::new(),
        })
    }

    /// The same device with the metadata service behind it.
    #[must_use]
    pub fn with_service(mut self, endpoint: Endpoint) -> Self {
        self.service = Some(Arc::new(Mutex::new(endpoint)));
        self
    }

    /// A device whose tap is one end of a socket, with the metadata service behind it or with several queue pairs, and the other end.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn for_fuzzing(several: bool) -> (Self, std::os::unix::net::UnixDatagram) {
        let (tap, wire) = std::os::unix::net::UnixDatagram::pair().expect("sockets");
        tap.set_nonblocking(true).expect("a socket option");
        wire.set_nonblocking(true).expect("a socket option");
        let interface = NetworkInterface { iface_id: "fuzz".into(), ..NetworkInterface::default() };
        if several {
            let more = tap.try_clone().expect("a descriptor");
            let queues = [tap, more].map(|tap| Tap::queue_for_test(tap.into())).into();
            let net = Self::over_queues(queues, &interface, [0; 12], FEATURES).expect("an eventfd");
            return (net, wire);
        }
        let mmds = crate::mmds::Mmds::new("fuzz", 1000).expect("random numbers");
        let service = crate::mmds::SharedMmds::new(mmds);
        let endpoint = Endpoint::new(service, crate::config::MMDS_ADDRESS).expect("random numbers");
        let net = Self::over(Tap::for_test(tap.into()), &interface, [0; 12], FEATURES).expect("an eventfd");
        (net.with_service(endpoint), wire)
    }

    /// A handle for what may change while the guest runs.
    pub fn control(&self) -> NetControl {
        NetControl(self.shared.clone())
    }
}

/// The configuration space of an interface with one queue pair whose link is down, and the features of every tap with what is
/// in that space.
///
/// # Errors
/// MAC or MTU are no such thing.
pub(super) fn config_space(interface: &NetworkInterface) -> Result<([u8; CONFIG_BYTES], u64), NetError> {
    let iface = &interface.iface_id;
    let mut features = FEATURES;
    let mut config = [0; CONFIG_BYTES];
    if let Some(mac) = &interface.guest_mac {
        let bad = || NetError::BadMac { iface: iface.clone(), mac: mac.clone() };
        config[0..6].copy_from_slice(&parse_mac(mac).ok_or_else(bad)?);
        features |= bit(abi::VIRTIO_NET_F_MAC);
    }
    if let Some(mtu) = interface.mtu {
        if mtu < MIN_MTU {
            return Err(NetError::BadMtu { iface: iface.clone(), mtu });
        }
        config[10..12].copy_from_slice(&mtu.to_le_bytes());
        features |= bit(abi::VIRTIO_NET_F_MTU);
    }
    Ok((config, features))
}

/// The tap of an interface with one queue pair.
///
/// # Errors
/// As [`NetError`].
pub(super) fn open_tap(interface: &NetworkInterface, passed: Option<OwnedFd>) -> Result<Tap, NetError> {
    let (iface, name) = (&interface.iface_id, &interface.host_dev_name);
    match (passed, interface.tap_fd) {
        (Some(fd), _) => Tap::take_over(iface, name, fd, "the descriptor that came with the request"),
        (None, Some(fd)) => Tap::from_inherited_fd(iface, name, fd),
        (None, None) => Tap::open(iface, name),
    }
}

/// `aa:bb:cc:dd:ee:ff`, not a group address.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0).then_some(mac)
}

/// What the tap may hand over, from what the guest can take.
pub(super) fn offloads(features: u64) -> libc::c_uint {
    [
        (abi::VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
        (abi::VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
        (abi::VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        (abi::VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
    ]
    .into_iter()
    .filter(|(feature, _)| features & bit(*feature) != 0)
    // Segmentation offloads need checksum offload (virtio 1.2 §5.1.3.1, and the kernel).
    .filter(|_| features & bit(abi::VIRTIO_NET_F_GUEST_CSUM) != 0)
    .fold(0, |flags, (_, flag)| flags | flag)
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        device_type::NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        match self.pairs.max() {
            1 => &[QUEUE_SIZE; 2],
            several => &[QUEUE_SIZE; MAX_QUEUES][..2 * several + 1],
        }
    }

    fn queues_used(&self, features: u64) -> usize {
        2 * self.pairs_with(features) + usize::from(features & bit(abi::VIRTIO_NET_F_CTRL_VQ) != 0)
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.config;
        let status: u16 = if self.shared.link_up() { abi::VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        config[STATUS_AT..STATUS_AT + 2].copy_from_slice(&status.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.shared.generation()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let (features, given) = (activation.features, activation.queues.len());
        let pairs = self.pairs_with(features);
        if given != self.queues_used(features) {
            return Err(DeviceError::QueueCount { device: "net", given });
        }
        if features & bit(abi::VIRTIO_NET_F_STATUS) != 0 {
            self.shared.set_interrupt(Some(activation.interrupt));
        }
        let used = self.pairs.used().min(pairs);
        if self.pairs.max() > 1 {
            // A queue of a tap can be waited for from then on, if it is attached when the wait is set up.
            self.use_pairs(pairs);
        }
        let mut queues = activation.queues.into_iter();
        for pair in 0..pairs {
            let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) else {
                return Err(DeviceError::QueueCount { device: "net", given });
            };
            self.start_pair(pair, receive, transmit, features)?;
        }
        if self.pairs.max() > 1 {
            self.use_pairs(used);
        }
        if let Some(queue) = queues.next() {
            let mut poller =
                Poller::new(&[(queue.notifier_fd(), EventSet::IN)]).map_err(DeviceError::EventFd)?;
            let shared = self.shared.clone();
            let mut control = Control::new(queue, self.pairs.clone(), Box::new(move || shared.wake_worker()));
            self.workers.push(Worker::spawn("net-ctrl", move |stop| control.run(&mut poller, stop))?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.pause();
        if let Some(service) = &self.service {
            service.lock().unwrap_or_else(PoisonError::into_inner).reset();
        }
        if self.pairs.max() > 1 {
            self.use_pairs(1);
        }
    }

    /// Connections to the metadata service go on after a pause.
    fn pause(&mut self) {
        self.shared.set_interrupt(None);
        self.workers.clear();
    }

    /// MAC and MTU are configuration, the tap is live.
    fn save(&self) -> Result<DeviceState, StateError> {
        if self.pairs.max() == 1 {
            return Ok(DeviceState::NONE);
        }
        DeviceState::new(&SavedState { pairs_used: self.pairs.used() })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        if self.pairs.max() == 1 {
            return Ok(());
        }
        let SavedState { pairs_used } = state.get()?;
        let max = self.pairs.max();
        if !(1..=max).contains(&pairs_used) {
            return Err(StateError::new(format!(
                "{pairs_used} queue pairs are used in the snapshot, it has {max}"
            )));
        }
        self.use_pairs(pairs_used);
        Ok(())
    }
}

impl Net {
    /// Starts the thread of a pair.
    fn start_pair(
        &mut self,
        pair: usize,
        receive: VirtQueue,
        transmit: VirtQueue,
        features: u64,
    ) -> Result<(), DeviceError> {
        let tap = self.taps[pair].clone();
        let mut poller = {
            let tap = tap.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = tap.set_offload(offloads(features))
                && pair == 0
            {
                // A tap that was removed: the device works and nothing comes or goes, as with a pulled cable.
                crate::devices::report("set the offloads of a tap", &error);
            }
            Poller::new(&[
                (receive.notifier_fd(), EventSet::IN),
                (transmit.notifier_fd(), EventSet::IN),
                (tap.as_fd().as_raw_fd(), EventSet::IN | EventSet::OUT),
                (self.shared.wake.as_raw_fd(), EventSet::IN),
            ])
            .map_err(DeviceError::EventFd)?
        };
        let mergeable = features & bit(abi::VIRTIO_NET_F_MRG_RXBUF) != 0;
        let mut server = Server::new(receive, transmit, mergeable, self.source, self.shared.clone());
        if let Some(service) = &self.service {
            server.set_service(service.clone());
        }
        self.workers.push(Worker::spawn("net", move |stop| {
            let mut tap = tap.lock().unwrap_or_else(PoisonError::into_inner);
            server.run(&mut tap, &mut poller, stop);
        })?);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
