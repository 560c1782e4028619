//! A network device of virtio-drivers as a device of smoltcp.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use smoltcp::iface::{Config, Interface};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress};
use virtio_drivers::device::net::VirtIONet;
use virtio_drivers::transport::Transport;

use crate::cpu;
use crate::heap::Identity;
use crate::virtio::Masked;

/// Descriptors of each queue.
const QUEUE: usize = 64;
/// Bytes of a receive buffer: header and a full frame.
const RECEIVE_BYTES: usize = 2048;
const ETHERNET_HEADER: usize = 14;
/// VIRTIO_NET_F_MTU and its place in the configuration space (virtio 1.2 §5.1.4).
const FEATURE_MTU: u64 = 1 << 3;
const CONFIG_MTU: usize = 10;
const DEFAULT_MTU: usize = 1500;

/// A network device with its receive buffers posted.
pub struct Nic {
    inner: VirtIONet<Identity, Masked, QUEUE>,
    mtu: usize,
}

impl Nic {
    /// Starts the device.
    ///
    /// # Errors
    /// What virtio-drivers has against it.
    pub fn new(mut transport: Masked) -> Result<Self, String> {
        let mut mtu = DEFAULT_MTU;
        if transport.read_device_features() & FEATURE_MTU != 0 {
            let told = transport.read_config_space::<u16>(CONFIG_MTU).map_err(|error| error.to_string())?;
            mtu = usize::from(told).min(DEFAULT_MTU);
        }
        let inner = VirtIONet::new(transport, RECEIVE_BYTES).map_err(|error| error.to_string())?;
        Ok(Self { inner, mtu })
    }

    /// The device's address.
    pub fn mac(&self) -> [u8; 6] {
        self.inner.mac_address()
    }

    /// IP MTU.
    pub fn mtu(&self) -> usize {
        self.mtu
    }

    /// Lets the device interrupt.
    pub fn enable_interrupts(&mut self) {
        self.inner.enable_interrupts();
    }

    /// Clears the device's interrupt status.
    pub fn acknowledge(&mut self) {
        self.inner.ack_interrupt();
    }

    /// Sends one frame as it is.
    ///
    /// # Errors
    /// The device's.
    pub fn send(&mut self, frame: &[u8]) -> Result<(), String> {
        self.inner.send(virtio_drivers::device::net::TxBuffer::from(frame)).map_err(|error| error.to_string())
    }

    /// An interface on this device.
    pub fn interface(&mut self) -> Interface {
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(self.mac())));
        config.random_seed = cpu::tsc()
            ^ u64::from_le_bytes([&self.mac()[..], &[0; 2]].concat().try_into().unwrap_or([0; 8]))
                .rotate_left(17);
        Interface::new(config, self, now())
    }
}

/// The time for smoltcp.
pub fn now() -> Instant {
    Instant::from_micros(cpu::now_us() as i64)
}

/// A received frame.
pub struct Received(Vec<u8>);

/// The right to send a frame.
pub struct Sending<'a>(&'a mut Nic);

impl Device for Nic {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _timestamp: Instant) -> Option<(Received, Sending<'_>)> {
        let buffer = self.inner.receive().ok()?;
        let frame = buffer.packet().to_vec();
        self.inner.recycle_rx_buffer(buffer).ok()?;
        Some((Received(frame), Sending(self)))
    }

    fn transmit(&mut self, _timestamp: Instant) -> Option<Sending<'_>> {
        self.inner.can_send().then_some(Sending(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + ETHERNET_HEADER;
        capabilities
    }
}

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut buffer = self.0.inner.new_tx_buffer(length);
        let result = f(buffer.packet_mut());
        // A frame that the device refuses is lost, as on any wire; the protocols above send again.
        let _ = self.0.inner.send(buffer);
        result
    }
}
