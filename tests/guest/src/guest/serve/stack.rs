//! Interface, sockets and DHCP, and how to wait for any of them.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use mote_guest::routes;
use smoltcp::iface::SocketHandle;
use smoltcp::iface::{Interface, PollResult, Route, SocketSet};
use smoltcp::socket::dhcpv4;
use smoltcp::time::Duration;
use smoltcp::wire::{IpCidr, Ipv4Address, Ipv4Cidr};

use crate::nic::{Nic, now};
use crate::virtio::{EVENT_IDX, StatusWrites, Window};
use crate::{cpu, println};

/// Where instances find their metadata.
pub const METADATA: Ipv4Address = Ipv4Address::new(169, 254, 169, 254);
/// Subnet mask, router, DNS, host name, MTU, classless static routes.
const DHCP_PARAMETERS: &[u8] = &[1, 3, 6, 12, 26, OPTION_ROUTES];
const OPTION_ROUTES: u8 = 121;
const DHCP_PACKET_BYTES: usize = 1500;
const DISCOVER_INTERVAL: Duration = Duration::from_millis(500);
const REQUEST_INTERVAL: Duration = Duration::from_millis(500);
/// Longest sleep once the network device has interrupted, and before it has: then it may be that its interrupts don't
/// arrive, and the processor looks for itself.
const MAX_SLEEP_US: u64 = 1_000_000;
const MAX_SLEEP_UNPROVEN_US: u64 = 2_000;

/// The network stack of the one interface.
pub struct Stack {
    nic: Nic,
    irq: u32,
    interface: Interface,
    /// Sockets, for whoever uses them.
    pub sockets: SocketSet<'static>,
    dhcp: Option<SocketHandle>,
}

impl Stack {
    /// Starts the device and DHCP.
    pub fn new(window: &Window) -> Result<Self, String> {
        let mut stack = Self::without_dhcp(window)?;
        let mut socket = dhcpv4::Socket::new();
        let mut retry = socket.get_retry_config();
        retry.discover_timeout = DISCOVER_INTERVAL;
        retry.initial_request_timeout = REQUEST_INTERVAL;
        socket.set_retry_config(retry);
        socket.set_parameter_request_list(DHCP_PARAMETERS);
        socket.set_receive_packet_buffer(Box::leak(vec![0; DHCP_PACKET_BYTES].into_boxed_slice()));
        stack.dhcp = Some(stack.sockets.add(socket));
        Ok(stack)
    }

    /// Starts the device with an address that is known, and the metadata service on the link.
    pub fn with_address(window: &Window, address: Ipv4Cidr) -> Result<Self, String> {
        let mut stack = Self::without_dhcp(window)?;
        configure(&mut stack.interface, address, None, METADATA);
        Ok(stack)
    }

    fn without_dhcp(window: &Window) -> Result<Self, String> {
        // Without EVENT_IDX: virtio-drivers compares its indices without regard to their wrap, which can lose a
        // notification after 65,536 packets.
        let transport = window.transport(EVENT_IDX, StatusWrites::Single)?;
        let mut nic = Nic::new(transport)?;
        window.route_irq();
        nic.enable_interrupts();
        let interface = nic.interface();
        Ok(Self { nic, irq: window.pin(), interface, sockets: SocketSet::new(Vec::new()), dhcp: None })
    }

    /// The interface's address.
    pub fn address(&self) -> Option<Ipv4Cidr> {
        self.interface.ip_addrs().iter().map(|IpCidr::Ipv4(address)| *address).next()
    }

    /// Waits for DHCP for so long.
    pub fn address_within(&mut self, us: u64) -> Option<Ipv4Cidr> {
        let end = cpu::now_us() + us;
        while self.address().is_none() && cpu::now_us() < end {
            self.wait(MAX_SLEEP_US);
        }
        self.address()
    }

    /// Waits for DHCP, without end.
    pub fn wait_for_address(&mut self) -> Ipv4Cidr {
        loop {
            if let Some(address) = self.address() {
                return address;
            }
            self.wait(MAX_SLEEP_US);
        }
    }

    /// What smoltcp needs to open a connection.
    pub fn context(&mut self) -> (&mut smoltcp::iface::Context, &mut SocketSet<'static>) {
        (self.interface.context(), &mut self.sockets)
    }

    /// Handles what there is to handle; if there was nothing, halts until an interrupt, the next timer of a socket, or
    /// `max_us`.
    pub fn wait(&mut self, max_us: u64) {
        cpu::clear_pending();
        if self.poll() {
            return;
        }
        // Anything that arrived before the acknowledgement has set "pending", which ends the sleep at once.
        self.nic.acknowledge();
        let limit =
            if cpu::irq_count(self.irq) > 0 { MAX_SLEEP_US } else { MAX_SLEEP_UNPROVEN_US }.min(max_us);
        let delay = self
            .interface
            .poll_delay(now(), &self.sockets)
            .map_or(limit, |delay| delay.total_micros().min(limit));
        if delay > 0 {
            cpu::sleep(delay as u32);
        }
    }

    /// One pass; tells whether a socket's state may have changed.
    fn poll(&mut self) -> bool {
        let result = self.interface.poll(now(), &mut self.nic, &mut self.sockets);
        let configured = self.follow_dhcp();
        configured || result == PollResult::SocketStateChanged
    }

    fn follow_dhcp(&mut self) -> bool {
        let Some(dhcp) = self.dhcp else { return false };
        match self.sockets.get_mut::<dhcpv4::Socket>(dhcp).poll() {
            None => false,
            Some(dhcpv4::Event::Deconfigured) => {
                self.interface.update_ip_addrs(|list| list.clear());
                self.interface.routes_mut().update(|list| list.clear());
                true
            }
            Some(dhcpv4::Event::Configured(config)) => {
                // RFC 3442: with option 121 the router option counts for nothing.
                let packet = config.packet.as_ref();
                let option =
                    packet.and_then(|packet| packet.options().find(|option| option.kind == OPTION_ROUTES));
                let (default, metadata) = match option {
                    Some(option) => (
                        routes::next_hop(option.data, Ipv4Address::new(0, 0, 0, 1)),
                        routes::next_hop(option.data, METADATA),
                    ),
                    None => (config.router, config.router),
                };
                println!("mote-guest: address {} router {default:?}", config.address);
                configure(&mut self.interface, config.address, default, metadata.unwrap_or(METADATA));
                true
            }
        }
    }
}

/// A next hop that is its own destination is asked for on the link.
fn configure(
    interface: &mut Interface,
    address: Ipv4Cidr,
    default: Option<Ipv4Address>,
    metadata: Ipv4Address,
) {
    interface.update_ip_addrs(|list| {
        list.clear();
        let _ = list.push(IpCidr::Ipv4(address));
    });
    interface.routes_mut().update(|list| {
        list.clear();
        let _ = list.push(Route {
            cidr: IpCidr::Ipv4(Ipv4Cidr::new(METADATA, 32)),
            via_router: metadata.into(),
            preferred_until: None,
            expires_at: None,
        });
        if let Some(router) = default {
            let _ = list.push(Route::new_ipv4_gateway(router));
        }
    });
}
