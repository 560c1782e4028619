//! Bodies of network. Attributes that have one value here may be given with that value only.

use super::{
    Row,
    Type::{
        self, Any, Digits, Either, Flag, Id, Later, List, Maybe, Need, New, Object, Partly, Text, Word, Yes,
    },
};

const TEXT: Type = Text(0, 255);
/// The description of what has not Neutron's standard attributes.
const LONG_TEXT: Type = Text(0, 1024);
/// What a tag may be is said by an error of its own.
const TAGS: Type = List(&Type::Text(0, usize::MAX), 0, usize::MAX);
const NONE: Type = Maybe(&List(&Any, 0, 0));
/// Whether it is so is the handler's to say, in Neutron's words.
const ONE_FLAG: Type = Maybe(&Flag);
const EMPTY: Type = Maybe(&Word(&[""]));
const INTEGER: Type = Digits(i64::MIN, i64::MAX);
const PREFIX: Type = Digits(0, 128);

/// One new resource, or several, all or none of which are made.
macro_rules! new {
    ($one:literal, $several:literal, $of:expr) => {
        Either(&[Object(&[($one, Need(&$of))]), Object(&[($several, Need(&List(&$of, 1, 1000)))])])
    };
}

/// A change: nothing is needed.
macro_rules! change {
    ($one:literal, $of:expr) => {
        Object(&[($one, Need(&Partly(&$of)))])
    };
}

const NETWORK: Type = Object(&[
    ("project_id", New(&TEXT)),
    ("tenant_id", New(&TEXT)),
    ("name", TEXT),
    ("description", TEXT),
    ("shared", Yes),
    ("router:external", Yes),
    ("mtu", INTEGER),
    ("admin_state_up", Yes),
    ("port_security_enabled", Yes),
    ("qos_policy_id", Maybe(&Id)),
    ("provider:network_type", Any),
    ("provider:physical_network", Maybe(&TEXT)),
    ("provider:segmentation_id", Maybe(&INTEGER)),
    ("availability_zone_hints", NONE),
    ("vlan_transparent", ONE_FLAG),
    ("is_default", ONE_FLAG),
    ("dns_domain", EMPTY),
    ("segments", NONE),
    ("tags", New(&TAGS)),
]);

const ROUTE: Type = Object(&[("destination", Need(&TEXT)), ("nexthop", Need(&TEXT))]);
const POOL: Type = Object(&[("start", Need(&TEXT)), ("end", Need(&TEXT))]);
const MODE: Type = Maybe(&Word(&["slaac", "dhcpv6-stateful", "dhcpv6-stateless"]));
const SUBNET: Type = Object(&[
    ("project_id", New(&TEXT)),
    ("tenant_id", New(&TEXT)),
    ("network_id", New(&Need(&TEXT))),
    ("name", TEXT),
    ("description", TEXT),
    ("ip_version", New(&INTEGER)),
    ("ip_version", Later(&Maybe(&INTEGER))),
    ("cidr", New(&TEXT)),
    ("cidr", Later(&Maybe(&TEXT))),
    ("prefixlen", New(&INTEGER)),
    ("subnetpool_id", New(&Maybe(&Id))),
    ("use_default_subnetpool", New(&Yes)),
    ("gateway_ip", Maybe(&TEXT)),
    ("enable_dhcp", Yes),
    ("dns_nameservers", List(&TEXT, 0, 5)),
    ("host_routes", List(&ROUTE, 0, 20)),
    ("allocation_pools", List(&POOL, 0, 64)),
    ("ipv6_address_mode", MODE),
    ("ipv6_ra_mode", MODE),
    ("segment_id", EMPTY),
    ("service_types", NONE),
    ("dns_publish_fixed_ip", ONE_FLAG),
    ("tags", New(&TAGS)),
]);

const FIXED_IP: Type = Object(&[("subnet_id", Maybe(&Id)), ("ip_address", Maybe(&TEXT))]);
const PAIR: Type = Object(&[("ip_address", TEXT), ("mac_address", Maybe(&TEXT))]);
const PAIRS: Type = Maybe(&List(&PAIR, 0, usize::MAX));
const GROUPS: Type = Maybe(&List(&Id, 0, usize::MAX));
const PORT: Type = Object(&[
    ("project_id", New(&TEXT)),
    ("tenant_id", New(&TEXT)),
    ("network_id", New(&Need(&TEXT))),
    ("name", TEXT),
    ("description", TEXT),
    ("mac_address", TEXT),
    ("device_id", TEXT),
    ("device_owner", TEXT),
    ("fixed_ips", List(&FIXED_IP, 0, 5)),
    ("admin_state_up", Yes),
    ("port_security_enabled", Yes),
    ("security_groups", GROUPS),
    ("allowed_address_pairs", PAIRS),
    ("qos_policy_id", Maybe(&Id)),
    ("extra_dhcp_opts", NONE),
    ("binding:vnic_type", Maybe(&Word(&["normal"]))),
    ("binding:profile", Maybe(&Object(&[]))),
    ("binding:host_id", EMPTY),
    ("propagate_uplink_status", ONE_FLAG),
    ("tags", New(&TAGS)),
]);

const GATEWAY: Type = Maybe(&Either(&[
    Object(&[
        ("network_id", Need(&TEXT)),
        ("enable_snat", Yes),
        ("external_fixed_ips", List(&FIXED_IP, 0, 5)),
        ("qos_policy_id", EMPTY),
    ]),
    Object(&[]),
]));
const ROUTER: Type = Object(&[
    ("project_id", New(&TEXT)),
    ("tenant_id", New(&TEXT)),
    ("name", TEXT),
    ("description", TEXT),
    ("admin_state_up", Yes),
    ("external_gateway_info", GATEWAY),
    ("enable_default_route_ecmp", Maybe(&Yes)),
    ("enable_default_route_bfd", ONE_FLAG),
    ("distributed", ONE_FLAG),
    ("ha", ONE_FLAG),
    ("availability_zone_hints", NONE),
    ("flavor_id", EMPTY),
    ("tags", New(&TAGS)),
    ("routes", Later(&Any)),
]);
const GATEWAYS: Type =
    // A client that removes all says so with an empty object.
    Object(&[(
        "router",
        Need(&Object(&[("external_gateways", Either(&[List(&Any, 0, usize::MAX), Object(&[])]))])),
    )]);
const INTERFACE: Type = Object(&[("subnet_id", Maybe(&Id)), ("port_id", Maybe(&Id))]);
const EXTRA_ROUTES: Type = Object(&[("router", Need(&Object(&[("routes", Any)])))]);

const FLOATING_IP: Type = Object(&[
    ("project_id", New(&TEXT)),
    ("tenant_id", New(&TEXT)),
    ("floating_network_id", New(&Need(&TEXT))),
    ("description", TEXT),
    ("port_id", Maybe(&Id)),
    ("fixed_ip_address", Maybe(&TEXT)),
    ("floating_ip_address", New(&Maybe(&TEXT))),
    ("subnet_id", New(&Maybe(&Id))),
    ("qos_policy_id", Maybe(&Id)),
    ("tags", New(&TAGS)),
]);
const FORWARDING: Type = Object(&[
    ("protocol", Need(&Word(&["tcp", "udp"]))),
    ("external_port", Need(&Digits(1, 65_535))),
    ("internal_port", Need(&Digits(1, 65_535))),
    ("internal_port_id", Need(&Id)),
    ("internal_ip_address", Need(&TEXT)),
    ("description", LONG_TEXT),
]);

const GROUP: Type = Object(&[
    ("project_id", New(&TEXT)),
    ("tenant_id", New(&TEXT)),
    ("name", TEXT),
    ("description", TEXT),
    ("stateful", Yes),
    ("tags", New(&TAGS)),
]);
/// What protocols, ports and types of Ethernet frames there are is said by errors of their own.
const NEW_RULE: Type = Object(&[
    ("project_id", TEXT),
    ("tenant_id", TEXT),
    ("security_group_id", Need(&TEXT)),
    ("direction", Need(&Word(&["ingress", "egress"]))),
    ("ethertype", Any),
    ("protocol", Any),
    ("port_range_min", Any),
    ("port_range_max", Any),
    ("remote_ip_prefix", Maybe(&TEXT)),
    ("remote_group_id", Maybe(&TEXT)),
    ("remote_address_group_id", Maybe(&Id)),
    ("description", TEXT),
]);

const ADDRESSES: Type = List(&TEXT, 0, 1000);
const ADDRESS_GROUP: Type = Object(&[
    ("project_id", New(&TEXT)),
    ("tenant_id", New(&TEXT)),
    ("name", TEXT),
    ("description", LONG_TEXT),
    ("addresses", New(&ADDRESSES)),
    ("tags", New(&TAGS)),
]);
const OF_GROUP: Type = Object(&[("addresses", Need(&ADDRESSES))]);
const EDIT: Type = Either(&[OF_GROUP, Object(&[("address_group", Need(&Partly(&OF_GROUP)))])]);

const SUBNET_POOL: Type = Object(&[
    ("project_id", New(&TEXT)),
    ("tenant_id", New(&TEXT)),
    ("name", Need(&TEXT)),
    ("description", TEXT),
    ("prefixes", Need(&List(&TEXT, 1, 64))),
    ("default_prefixlen", PREFIX),
    ("min_prefixlen", PREFIX),
    ("max_prefixlen", PREFIX),
    ("default_quota", Maybe(&Type::Number(0, i64::MAX))),
    ("is_default", Yes),
    ("shared", New(&Yes)),
    ("shared", Later(&ONE_FLAG)),
    ("address_scope_id", EMPTY),
    ("tags", New(&TAGS)),
]);

const POLICY: Type = Object(&[
    ("project_id", New(&TEXT)),
    ("tenant_id", New(&TEXT)),
    ("name", Need(&TEXT)),
    ("description", TEXT),
    ("shared", Yes),
    ("is_default", Yes),
    ("tags", New(&TAGS)),
]);
const RATE: Type = Digits(0, i32::MAX as i64);
const BANDWIDTH: Type =
    Object(&[("max_kbps", RATE), ("max_burst_kbps", RATE), ("direction", Word(&["egress", "ingress"]))]);
const DSCP: Type = Object(&[("dscp_mark", Need(&Digits(0, 56)))]);

const SHARE: Type = Object(&[
    ("project_id", New(&TEXT)),
    ("tenant_id", New(&TEXT)),
    (
        "object_type",
        New(&Need(&Word(&["network", "security_group", "qos_policy", "address_group", "subnetpool"]))),
    ),
    ("object_id", New(&Need(&TEXT))),
    ("action", New(&Need(&Word(&["access_as_shared", "access_as_external"])))),
    ("target_tenant", TEXT),
    ("target_project", TEXT),
]);

const QUOTA: Type = Digits(-1, i32::MAX as i64);
const QUOTAS: Type = Object(&[
    ("network", QUOTA),
    ("subnet", QUOTA),
    ("port", QUOTA),
    ("subnetpool", QUOTA),
    ("router", QUOTA),
    ("floatingip", QUOTA),
    ("security_group", QUOTA),
    ("security_group_rule", QUOTA),
    ("address_group", QUOTA),
    ("rbac_policy", QUOTA),
    ("check_limit", Yes),
    ("force", Yes),
]);

const TAG_LIST: Type = Object(&[("tags", Need(&TAGS))]);

/// Below `/network`.
pub(super) const BODIES: &[Row] = &[
    ("POST", "/v2.0/networks", new!("network", "networks", NETWORK)),
    ("PUT", "/v2.0/networks/{id}", change!("network", NETWORK)),
    ("PUT", "/v2.0/networks/{id}/tags", TAG_LIST),
    ("POST", "/v2.0/subnets", new!("subnet", "subnets", SUBNET)),
    ("PUT", "/v2.0/subnets/{id}", change!("subnet", SUBNET)),
    ("PUT", "/v2.0/subnets/{id}/tags", TAG_LIST),
    ("POST", "/v2.0/ports", new!("port", "ports", PORT)),
    ("PUT", "/v2.0/ports/{id}", change!("port", PORT)),
    ("PUT", "/v2.0/ports/{id}/tags", TAG_LIST),
    ("POST", "/v2.0/routers", new!("router", "routers", ROUTER)),
    ("PUT", "/v2.0/routers/{id}", change!("router", ROUTER)),
    ("PUT", "/v2.0/routers/{id}/tags", TAG_LIST),
    ("PUT", "/v2.0/routers/{id}/add_router_interface", INTERFACE),
    ("PUT", "/v2.0/routers/{id}/remove_router_interface", INTERFACE),
    ("PUT", "/v2.0/routers/{id}/add_external_gateways", GATEWAYS),
    ("PUT", "/v2.0/routers/{id}/update_external_gateways", GATEWAYS),
    ("PUT", "/v2.0/routers/{id}/remove_external_gateways", GATEWAYS),
    ("PUT", "/v2.0/routers/{id}/add_extraroutes", EXTRA_ROUTES),
    ("PUT", "/v2.0/routers/{id}/remove_extraroutes", EXTRA_ROUTES),
    ("POST", "/v2.0/floatingips", new!("floatingip", "floatingips", FLOATING_IP)),
    ("PUT", "/v2.0/floatingips/{id}", change!("floatingip", FLOATING_IP)),
    ("PUT", "/v2.0/floatingips/{id}/tags", TAG_LIST),
    (
        "POST",
        "/v2.0/floatingips/{parent}/port_forwardings",
        new!("port_forwarding", "port_forwardings", FORWARDING),
    ),
    ("PUT", "/v2.0/floatingips/{parent}/port_forwardings/{id}", change!("port_forwarding", FORWARDING)),
    ("POST", "/v2.0/security-groups", new!("security_group", "security_groups", GROUP)),
    ("PUT", "/v2.0/security-groups/{id}", change!("security_group", GROUP)),
    ("PUT", "/v2.0/security-groups/{id}/tags", TAG_LIST),
    ("POST", "/v2.0/security-group-rules", new!("security_group_rule", "security_group_rules", NEW_RULE)),
    ("PUT", "/v2.0/security-group-rules/{id}", Any),
    ("POST", "/v2.0/address-groups", new!("address_group", "address_groups", ADDRESS_GROUP)),
    ("PUT", "/v2.0/address-groups/{id}", change!("address_group", ADDRESS_GROUP)),
    ("PUT", "/v2.0/address-groups/{id}/tags", TAG_LIST),
    ("PUT", "/v2.0/address-groups/{id}/add_addresses", EDIT),
    ("PUT", "/v2.0/address-groups/{id}/remove_addresses", EDIT),
    ("POST", "/v2.0/subnetpools", new!("subnetpool", "subnetpools", SUBNET_POOL)),
    ("PUT", "/v2.0/subnetpools/{id}", change!("subnetpool", SUBNET_POOL)),
    ("PUT", "/v2.0/subnetpools/{id}/tags", TAG_LIST),
    ("POST", "/v2.0/qos/policies", new!("policy", "policies", POLICY)),
    ("PUT", "/v2.0/qos/policies/{id}", change!("policy", POLICY)),
    ("PUT", "/v2.0/qos/policies/{id}/tags", TAG_LIST),
    (
        "POST",
        "/v2.0/qos/policies/{parent}/bandwidth_limit_rules",
        new!("bandwidth_limit_rule", "bandwidth_limit_rules", BANDWIDTH),
    ),
    (
        "PUT",
        "/v2.0/qos/policies/{parent}/bandwidth_limit_rules/{id}",
        change!("bandwidth_limit_rule", BANDWIDTH),
    ),
    (
        "POST",
        "/v2.0/qos/policies/{parent}/dscp_marking_rules",
        new!("dscp_marking_rule", "dscp_marking_rules", DSCP),
    ),
    ("PUT", "/v2.0/qos/policies/{parent}/dscp_marking_rules/{id}", change!("dscp_marking_rule", DSCP)),
    ("PUT", "/v2.0/quotas/{project}", Object(&[("quota", Need(&QUOTAS))])),
    ("POST", "/v2.0/rbac-policies", new!("rbac_policy", "rbac_policies", SHARE)),
    ("PUT", "/v2.0/rbac-policies/{id}", change!("rbac_policy", SHARE)),
];
