//! Desired state of one host: what the controller wants to exist there.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::{
    AddressPair, AddressSetSpec, CloudId, DnsName, FixedIpV6, HostId, ImageId, NetworkId, PortId, QosSpec,
    RemotePort, RouterSpec, SecurityGroupId, SecurityGroupSpec, SegmentSpec, ServerId, SubnetId,
    SubnetV6Spec, TunnelSpec,
};

/// `GET …/desired`: the whole of what shall exist on one host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesiredState {
    /// The installation that speaks. A host that has joined one refuses every other.
    pub cloud_id: CloudId,
    /// The host that is spoken to.
    pub host_id: HostId,
    /// Grows with every change of this host's desired state.
    pub generation: u64,
    /// The networks that must exist here: those that the servers below are on, and all that a router in `routers` has an
    /// interface or its gateway in (with no ports of this host in them, then). Others are not named.
    pub networks: Vec<NetworkSpec>,
    /// Servers.
    pub servers: Vec<ServerSpec>,
    /// This host's end of the overlay; needed as soon as a network has a VXLAN segment.
    #[serde(default)]
    pub tunnel: Option<TunnelSpec>,
    /// Every security group that a port in `networks` names, once.
    #[serde(default)]
    pub security_groups: Vec<SecurityGroupSpec>,
    /// Every address set that a rule in `security_groups` names, once.
    #[serde(default)]
    pub address_sets: Vec<AddressSetSpec>,
    /// Every router that has an interface in a network in which this host has a server's port, and those whose gateway
    /// this host holds.
    #[serde(default)]
    pub routers: Vec<RouterSpec>,
}

/// One tenant network as far as this host needs it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Id.
    pub id: NetworkId,
    /// MTU of bridge, taps and guests.
    pub mtu: u16,
    /// Its IPv4 subnets.
    pub subnets: Vec<SubnetSpec>,
    /// Every port of a server on *this host* in this network.
    pub ports: Vec<PortSpec>,
    /// Its IPv6 subnets.
    #[serde(default)]
    pub subnets_v6: Vec<SubnetV6Spec>,
    /// How it reaches other hosts and the world; without, it ends at this host.
    #[serde(default)]
    pub segment: Option<SegmentSpec>,
    /// For a VXLAN segment: every bound port of this network on *other* hosts, and nothing else. No router interfaces:
    /// each host has the router itself. Empty for other segments.
    #[serde(default)]
    pub remote_ports: Vec<RemotePort>,
    /// `dns_domain`, without or with the closing dot; the search domain of guests and the zone that the resolver
    /// answers for. None: `openstacklocal`.
    #[serde(default)]
    pub dns_domain: Option<String>,
    /// Names that the network's resolver knows: every port of the network, on whatever host, that has a name.
    #[serde(default)]
    pub dns_names: Vec<DnsName>,
}

/// A subnet (IPv4).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetSpec {
    /// Id.
    pub id: SubnetId,
    /// Address range.
    pub cidr: Ipv4Net,
    /// Router's address, announced to guests; nothing answers there unless a router has its interface there.
    pub gateway_ip: Option<Ipv4Addr>,
    /// The address of this network's own services (DHCP server, next hop to 169.254.169.254) in this subnet: that of the
    /// port with device owner `network:distributed`, the same on every host.
    pub service_ip: Ipv4Addr,
    /// Serve DHCP.
    pub enable_dhcp: bool,
    /// Announced to guests.
    pub dns_nameservers: Vec<Ipv4Addr>,
    /// Announced to guests (RFC 3442).
    pub host_routes: Vec<HostRoute>,
}

/// A static route of a subnet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRoute {
    /// Destination.
    pub destination: Ipv4Net,
    /// Next hop.
    pub nexthop: Ipv4Addr,
}

/// A port of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortSpec {
    /// Id.
    pub id: PortId,
    /// The server it is plugged into.
    pub server_id: ServerId,
    /// `fa:16:3e:xx:xx:xx`.
    pub mac_address: String,
    /// IPv4 addresses, the first is the one DHCP offers.
    pub fixed_ips: Vec<FixedIp>,
    /// IPv6 addresses, those of slaac subnets too (the controller makes them from prefix and Ethernet address).
    #[serde(default)]
    pub fixed_ips_v6: Vec<FixedIpV6>,
    /// `port_security_enabled`. False (what an absent field means): no filter at all, the guest may send and get
    /// anything, and the two fields below mean nothing.
    #[serde(default)]
    pub port_security: bool,
    /// Its security groups. With port security and no group nothing passes but ARP, neighbour discovery, DHCP and
    /// metadata.
    #[serde(default)]
    pub security_groups: Vec<SecurityGroupId>,
    /// What it may send from beside its own addresses.
    #[serde(default)]
    pub allowed_address_pairs: Vec<AddressPair>,
    /// `admin_state_up`; while it is false nothing passes.
    #[serde(default = "yes")]
    pub admin_state_up: bool,
    /// The QoS policy in force: the port's own, else its network's.
    #[serde(default)]
    pub qos: Option<QosSpec>,
}

fn yes() -> bool {
    true
}

impl Default for PortSpec {
    /// A port without addresses and filter, with nil ids.
    fn default() -> Self {
        Self {
            id: PortId::default(),
            server_id: ServerId::default(),
            mac_address: String::new(),
            fixed_ips: Vec::new(),
            fixed_ips_v6: Vec::new(),
            port_security: false,
            security_groups: Vec::new(),
            allowed_address_pairs: Vec::new(),
            admin_state_up: true,
            qos: None,
        }
    }
}

/// An address of a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FixedIp {
    /// Subnet.
    pub subnet_id: SubnetId,
    /// Address.
    pub ip_address: Ipv4Addr,
}

/// A server that shall exist on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerSpec {
    /// Id.
    pub id: ServerId,
    /// Whether it shall run.
    pub power: DesiredPower,
    /// Counts the times that a user asked for a (hard) reboot or a new start: a host restarts a server whose VMM was
    /// started for a smaller number.
    pub run_generation: u64,
    /// vCPUs.
    pub vcpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Size of the root disk in GiB; 0 means as large as the image.
    pub root_disk_gib: u32,
    /// What to boot.
    pub boot: BootSpec,
    /// Which of its disks is the root disk.
    #[serde(default)]
    pub disk: DiskSpec,
    /// Another of its disks that must not be lost: that of before a resize.
    #[serde(default)]
    pub kept_disk: Option<u32>,
    /// Its disks beside the root disk, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub local_disks: Vec<LocalDiskSpec>,
    /// Numbers of further disks that must not be lost, as [`Self::kept_disk`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept_local_disks: Vec<u32>,
    /// Boot this instead, with the root disk as second drive.
    #[serde(default)]
    pub rescue: Option<RescueSpec>,
    /// Number of its config drive: a read-only disk with its metadata. As with disks, another number is another drive,
    /// made of the metadata of that time. None: it has none.
    #[serde(default)]
    pub config_drive: Option<u32>,
    /// Copies of its root disk that the controller wants to have.
    #[serde(default)]
    pub captures: Vec<CaptureSpec>,
    /// Its ports in order; the first is the guest's first NIC. Each is named in a network above. What a running VMM has
    /// otherwise is plugged in and out. A port of this server that is in a network and not here is being unplugged.
    pub ports: Vec<PortId>,
    /// What to do when the VMM dies or the guest crashes.
    pub restart_policy: RestartPolicy,
    /// What the metadata service tells the guest.
    pub metadata: InstanceMetadata,
    /// What its flavor says of its devices; counts from the next start on.
    #[serde(default)]
    pub devices: DeviceSpec,
}

/// What a flavor says of the devices of a server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceSpec {
    /// It has no random number generator.
    pub without_random: bool,
    /// Bytes of the random number generator.
    pub random_bytes: Option<Bucket>,
    /// Bytes read and written, of each of its disks.
    pub disk_bytes: Option<Bucket>,
    /// Requests of each of its disks.
    pub disk_operations: Option<Bucket>,
    /// Bytes that each of its ports receives.
    pub received_bytes: Option<Bucket>,
    /// Bytes that each of its ports sends.
    pub sent_bytes: Option<Bucket>,
}

/// A token bucket; it starts full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// What it holds.
    pub tokens: u64,
    /// Milliseconds in which an empty one becomes full.
    pub refill_ms: u64,
}

/// A disk of a server. Disks are numbered, and a number never comes back with other content: a new number is a new disk.
/// Those that nothing names any more are removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// From 1.
    pub number: u32,
    /// It begins as a copy of this one, without as the image of [`BootSpec::disk`].
    pub copy_of: Option<u32>,
}

impl Default for DiskSpec {
    /// The first one.
    fn default() -> Self {
        Self { number: 1, copy_of: None }
    }
}

/// A disk beside the root disk; its number is another one than that of any other disk of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalDiskSpec {
    /// From 1.
    pub number: u32,
    /// It begins as a copy of this one, which is not larger; without it is empty.
    #[serde(default)]
    pub copy_of: Option<u32>,
    /// MiB.
    pub size_mib: u64,
    /// It begins as swap space: an empty one gets the header that `swapon` looks for.
    #[serde(default)]
    pub swap: bool,
}

/// What a server boots to be rescued.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RescueSpec {
    /// Number of the disk that is made of the image.
    pub disk: u32,
    /// Image, kernel, command line.
    pub boot: BootSpec,
}

/// A root disk that is to become an image: a copy is made of it while no vCPU runs, and sent as
/// `PUT /mote/v1/hosts/{id}/captures/{image_id}`. Done when the controller no longer names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureSpec {
    /// The image that it shall be.
    pub image_id: ImageId,
}

/// Wanted power state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DesiredPower {
    /// A VMM runs.
    Running,
    /// A VMM is there with all it holds, but its vCPUs stand still.
    Paused,
    /// The disk is kept, no VMM runs.
    Stopped,
    /// No VMM runs, but what it held is on the disk: [`Running`](Self::Running) with the same run generation goes on from
    /// there.
    Suspended,
}

/// What to do when a server's VMM ends without the guest or a user having asked for it (server metadata key
/// `mote:restart_policy`, default `never`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// The server goes to ERROR.
    #[default]
    Never,
    /// It is started again (with a growing pause, and ERROR after several quick failures).
    OnFailure,
}

/// What a server boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSpec {
    /// The image of the root disk.
    pub disk: ImageSpec,
    /// Kernel (image property `kernel_id`). Without one the disk is a whole disk that brings its own.
    pub kernel: Option<ImageSpec>,
    /// Initial ramdisk (`ramdisk_id`).
    pub ramdisk: Option<ImageSpec>,
    /// `os_command_line`, as it is; the VMM appends what its devices need.
    pub command_line: Option<String>,
}

impl BootSpec {
    /// All images that it names.
    pub fn images(&self) -> impl Iterator<Item = &ImageSpec> {
        [Some(&self.disk), self.kernel.as_ref(), self.ramdisk.as_ref()].into_iter().flatten()
    }
}

/// An image by content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// SHA-256 of the bytes, lower-case hex; the name under which it is fetched and cached.
    pub sha256: String,
    /// Bytes.
    pub size: u64,
}

/// What the metadata service at 169.254.169.254 tells one server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceMetadata {
    /// Server id.
    pub uuid: ServerId,
    /// The server's display name.
    pub name: String,
    /// Host name: the display name made fit for DNS.
    pub hostname: String,
    /// Project id, 32 hex digits.
    pub project_id: String,
    /// Availability zone.
    pub availability_zone: String,
    /// Key name → OpenSSH public key.
    pub public_keys: BTreeMap<String, String>,
    /// The user's `metadata`.
    pub meta: BTreeMap<String, String>,
    /// User data, base64 as the client sent it.
    pub user_data: Option<String>,
    /// 0-based index among the servers of one create request.
    pub launch_index: u32,
    /// A cloud-config for cloud-init's first boot, beside the user's own data.
    #[serde(default)]
    pub vendor_data: Option<String>,
    /// EC2's names of its disks beside the root disk (`ephemeral0`, `swap`), and where the guest finds them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub block_devices: BTreeMap<String, String>,
}
