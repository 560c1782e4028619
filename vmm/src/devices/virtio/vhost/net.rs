//! virtio-net (virtio 1.2 §5.1) whose frames the kernel moves between tap and guest memory (vhost-net).
//!
//! What this process doesn't see it can't limit, check or count: rate limits, anti-spoofing, the metadata service and the link's
//! state belong to an interface without vhost, and the configuration refuses them together.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use mote_vmm_api::NetworkInterface;
use vhost::VhostBackend;
use vhost::net::VhostNet as _;
use vhost::vhost_kern::net::Net as Kernel;
use virtio_bindings::virtio_net as abi;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Addresses, Call, hand_over, memory_table, watch};
use crate::devices::virtio::net::{self, Tap};
use crate::devices::virtio::queue::VirtQueue;
use crate::devices::virtio::worker::Worker;
use crate::devices::virtio::{
    Activation, COMMON_FEATURES, F_VERSION_1, VirtioDevice, device_type, read_config_bytes,
};
use crate::devices::{DeviceError, report};
use crate::memory::GuestMemory;
use crate::snapshot::{DeviceState, StateError};

const QUEUES: [u16; 2] = [256; 2];
/// What the kernel and the driver have to agree on; everything else is between driver and tap.
const KERNEL_FEATURES: u64 = COMMON_FEATURES | 1 << abi::VIRTIO_NET_F_MRG_RXBUF;

/// The kernel can't serve an interface.
#[derive(Debug, thiserror::Error)]
pub enum VhostNetError {
    /// Not there, not allowed.
    #[error(
        "network interface {iface}: cannot use /dev/vhost-net (is the module vhost_net loaded, and the device in the jail?); \
         without \"vhost\": true it isn't needed"
    )]
    Open {
        /// The interface.
        iface: String,
        /// Cause.
        #[source]
        source: vhost::Error,
    },
    /// The kernel refused.
    #[error("network interface {iface}: {step} of vhost-net")]
    Call {
        /// The interface.
        iface: String,
        /// What was to be done.
        step: &'static str,
        /// Cause.
        #[source]
        source: vhost::Error,
    },
    /// The tap's descriptor.
    #[error("network interface {iface}: share the tap with vhost-net")]
    Tap {
        /// The interface.
        iface: String,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
}

/// A network device that the kernel serves.
pub struct VhostNet {
    iface: String,
    tap: Tap,
    /// The same tap, as the kernel is given it.
    tap_file: File,
    kernel: Kernel<Arc<GuestMemory>>,
    /// The kernel has tied it to this process.
    owned: bool,
    features: u64,
    /// MAC, status, number of queue pairs, MTU.
    config: [u8; net::CONFIG_BYTES],
    served: Option<Served>,
}

/// What there is while a driver runs the device.
struct Served {
    queues: Vec<VirtQueue>,
    _worker: Worker,
}

impl VhostNet {
    /// Opens tap and vhost.
    ///
    /// # Errors
    /// One of them can't be had, or MAC or MTU are no such thing.
    pub fn open(
        interface: &NetworkInterface,
        mem: &GuestMemory,
        passed: Option<OwnedFd>,
    ) -> Result<Self, DeviceError> {
        let iface = interface.iface_id.clone();
        let (config, features) = net::config_space(interface)?;
        let kernel = Kernel::new(Arc::new(mem.clone()))
            .map_err(|source| VhostNetError::Open { iface: iface.clone(), source })?;
        let call = |step| {
            let iface = iface.clone();
            move |source| VhostNetError::Call { iface, step, source }
        };
        let offered = kernel.get_features().map_err(call("read the features"))?;
        // The state of the link is this process's to tell, which sees nothing of it.
        let features =
            features & !(1 << abi::VIRTIO_NET_F_STATUS) & !KERNEL_FEATURES | offered & KERNEL_FEATURES;
        let tap = net::open_tap(interface, passed)?;
        let tap_file = tap.as_fd().try_clone_to_owned();
        let tap_file = tap_file.map_err(|source| VhostNetError::Tap { iface: iface.clone(), source })?.into();
        Ok(Self {
            iface,
            tap,
            tap_file,
            kernel,
            owned: false,
            features: features | F_VERSION_1,
            config,
            served: None,
        })
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(vhost::Error) -> VhostNetError {
        let iface = self.iface.clone();
        move |source| VhostNetError::Call { iface, step, source }
    }

    /// Tells the kernel everything and lets it begin.
    fn hand_over(
        &mut self,
        mem: &GuestMemory,
        features: u64,
        served: &[(VirtQueue, Call)],
        broken: &EventFd,
    ) -> Result<(), vhost::Error> {
        let kernel = &self.kernel;
        if !self.owned {
            kernel.set_owner()?;
            self.owned = true;
        }
        kernel.set_features(features & KERNEL_FEATURES)?;
        kernel.set_mem_table(&memory_table(mem)?)?;
        for (queue, call) in served {
            hand_over(kernel, queue, &call.event, Addresses::Guest)?;
            kernel.set_vring_err(queue.index().into(), broken)?;
        }
        served
            .iter()
            .try_for_each(|(queue, _)| kernel.set_backend(queue.index().into(), Some(&self.tap_file)))
    }

    /// Takes the tap away from the kernel's queues: when this returns, it does nothing with them any more.
    fn stop(&self) {
        for index in 0..QUEUES.len() {
            if let Err(error) = self.kernel.set_backend(index, None) {
                report("vhost-net", &self.failed("stop a queue")(error));
            }
        }
    }
}

impl VirtioDevice for VhostNet {
    fn device_type(&self) -> u32 {
        device_type::NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn common_features(&self) -> u64 {
        // The kernel's, too.
        self.features & COMMON_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation { mem, features, queues, interrupt } = activation;
        if queues.len() != QUEUES.len() {
            return Err(DeviceError::QueueCount { device: "net", given: queues.len() });
        }
        if let Err(error) = self.tap.set_offload(net::offloads(features)) {
            // A tap that was removed: the device works and nothing comes or goes, as with a pulled cable.
            report("set the offloads of a tap", &error);
        }
        let with_call = |queue| Ok((Call::of(&queue, &interrupt)?, queue));
        let (calls, queues): (Vec<_>, Vec<_>) =
            queues.into_iter().map(with_call).collect::<Result<Vec<_>, DeviceError>>()?.into_iter().unzip();
        let broken = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DeviceError::EventFd)?;
        let served: Vec<_> = queues.into_iter().zip(calls).collect();
        if let Err(error) = self.hand_over(&mem, features, &served, &broken) {
            self.stop();
            return Err(self.failed("hand the queues over")(error).into());
        }
        let (queues, calls): (Vec<_>, Vec<_>) = served.into_iter().unzip();
        let (line, iface) = (interrupt.clone(), self.iface.clone());
        let fd = broken.as_raw_fd();
        let worker = watch("vhost-net", calls, Some((fd, EventSet::IN)), interrupt, move || {
            // Kept as long as it is watched.
            let _ = broken.read();
            let error = std::io::Error::from(std::io::ErrorKind::InvalidData);
            report(&format!("network interface {iface}: its guest broke a ring of vhost-net"), &error);
            line.set_needs_reset();
        });
        match worker {
            Ok(worker) => self.served = Some(Served { queues, _worker: worker }),
            Err(error) => {
                self.stop();
                return Err(error);
            }
        }
        // Chains may have come before the kernel had the eventfd.
        for notifier in self.served.iter().flat_map(|served| &served.queues).filter_map(VirtQueue::notifier) {
            // Fails only if the counter is full, and then it is readable anyway.
            let _ = notifier.write(1);
        }
        Ok(())
    }

    fn reset(&mut self) {
        let Some(Served { mut queues, _worker: worker }) = self.served.take() else { return };
        self.stop();
        for queue in &mut queues {
            match self.kernel.get_vring_base(queue.index().into()) {
                Ok(next_avail) => queue.left_at(next_avail as u16),
                Err(error) => report("vhost-net", &self.failed("read the position of a queue")(error)),
            }
        }
        // After the last interrupts.
        drop(worker);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        Err(StateError::new("a network interface with \"vhost\": true cannot be part of a snapshot"))
    }
}
