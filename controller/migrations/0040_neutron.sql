-- Neutron's security groups, address groups, routers, floating IPs, sharing, tags; port security; IPv6 addresses;
-- provider attributes.

CREATE TABLE security_groups (
    id          TEXT    PRIMARY KEY,
    project_id  TEXT    NOT NULL,
    name        TEXT    NOT NULL,
    description TEXT    NOT NULL,
    stateful    BOOLEAN NOT NULL,
    is_default  BOOLEAN NOT NULL,
    revision    BIGINT  NOT NULL DEFAULT 1,
    created_us  BIGINT  NOT NULL,
    updated_us  BIGINT  NOT NULL
);
CREATE INDEX security_groups_project ON security_groups (project_id);
-- A project has one default group, however many requests make it at the same time.
CREATE UNIQUE INDEX security_groups_default ON security_groups (project_id) WHERE is_default;

CREATE TABLE address_groups (
    id          TEXT    PRIMARY KEY,
    project_id  TEXT    NOT NULL,
    name        TEXT    NOT NULL,
    description TEXT    NOT NULL,
    revision    BIGINT  NOT NULL DEFAULT 1,
    created_us  BIGINT  NOT NULL,
    updated_us  BIGINT  NOT NULL
);
CREATE INDEX address_groups_project ON address_groups (project_id);

CREATE TABLE address_group_addresses (
    address_group_id TEXT NOT NULL REFERENCES address_groups (id) ON DELETE CASCADE,
    address          TEXT NOT NULL, -- a CIDR
    PRIMARY KEY (address_group_id, address)
);

CREATE TABLE security_group_rules (
    id                      TEXT   PRIMARY KEY,
    security_group_id       TEXT   NOT NULL REFERENCES security_groups (id) ON DELETE CASCADE,
    project_id              TEXT   NOT NULL,
    description             TEXT   NOT NULL,
    direction               TEXT   NOT NULL, -- ingress, egress
    ethertype               TEXT   NOT NULL, -- IPv4, IPv6
    protocol                TEXT,            -- a name or a number; NULL: any
    port_range_min          BIGINT,          -- or the ICMP type
    port_range_max          BIGINT,          -- or the ICMP code
    remote_ip_prefix        TEXT,
    remote_group_id         TEXT REFERENCES security_groups (id) ON DELETE CASCADE,
    remote_address_group_id TEXT REFERENCES address_groups (id),
    revision                BIGINT NOT NULL DEFAULT 1,
    created_us              BIGINT NOT NULL,
    updated_us              BIGINT NOT NULL
);
CREATE INDEX security_group_rules_group ON security_group_rules (security_group_id);
CREATE INDEX security_group_rules_remote ON security_group_rules (remote_group_id);
CREATE INDEX security_group_rules_remote_addresses ON security_group_rules (remote_address_group_id);
CREATE INDEX security_group_rules_project ON security_group_rules (project_id);

CREATE TABLE port_security_groups (
    port_id           TEXT NOT NULL REFERENCES ports (id) ON DELETE CASCADE,
    security_group_id TEXT NOT NULL REFERENCES security_groups (id),
    PRIMARY KEY (port_id, security_group_id)
);
CREATE INDEX port_security_groups_group ON port_security_groups (security_group_id);

-- Tags of any resource of Neutron; a tag goes with its resource.
CREATE TABLE network_tags (
    resource_id TEXT NOT NULL,
    collection  TEXT NOT NULL,
    tag         TEXT NOT NULL,
    PRIMARY KEY (resource_id, tag)
);
CREATE INDEX network_tags_collection ON network_tags (collection);

-- Who may use what belongs to another project (RBAC). What is shared with all is also `shared` or `external` in its row.
CREATE TABLE rbac_policies (
    id             TEXT   PRIMARY KEY,
    project_id     TEXT   NOT NULL,
    object_type    TEXT   NOT NULL, -- network, security_group, qos_policy, address_group, subnetpool
    object_id      TEXT   NOT NULL,
    action         TEXT   NOT NULL, -- access_as_shared, access_as_external
    target_project TEXT   NOT NULL, -- or *
    created_us     BIGINT NOT NULL,
    UNIQUE (object_id, action, target_project)
);

CREATE TABLE subnet_pools (
    id                TEXT    PRIMARY KEY,
    project_id        TEXT    NOT NULL,
    name              TEXT    NOT NULL,
    description       TEXT    NOT NULL,
    ip_version        BIGINT  NOT NULL,
    prefixes          TEXT    NOT NULL, -- JSON list of CIDRs
    default_prefixlen BIGINT  NOT NULL,
    min_prefixlen     BIGINT  NOT NULL,
    max_prefixlen     BIGINT  NOT NULL,
    default_quota     BIGINT, -- per project: addresses of IPv4, networks of 64 bits of IPv6
    is_default        BOOLEAN NOT NULL,
    shared            BOOLEAN NOT NULL,
    revision          BIGINT  NOT NULL DEFAULT 1,
    created_us        BIGINT  NOT NULL,
    updated_us        BIGINT  NOT NULL
);

CREATE TABLE qos_policies (
    id          TEXT    PRIMARY KEY,
    project_id  TEXT    NOT NULL,
    name        TEXT    NOT NULL,
    description TEXT    NOT NULL,
    is_default  BOOLEAN NOT NULL,
    revision    BIGINT  NOT NULL DEFAULT 1,
    created_us  BIGINT  NOT NULL,
    updated_us  BIGINT  NOT NULL
);
CREATE INDEX qos_policies_project ON qos_policies (project_id);

CREATE TABLE qos_rules (
    id             TEXT   PRIMARY KEY,
    policy_id      TEXT   NOT NULL REFERENCES qos_policies (id) ON DELETE CASCADE,
    kind           TEXT   NOT NULL, -- bandwidth_limit, dscp_marking
    direction      TEXT   NOT NULL, -- egress, ingress, as seen from the server
    max_kbps       BIGINT NOT NULL,
    max_burst_kbps BIGINT NOT NULL, -- 0: chosen by the host
    dscp_mark      BIGINT NOT NULL,
    created_us     BIGINT NOT NULL,
    UNIQUE (policy_id, kind, direction)
);

CREATE TABLE routers (
    id                  TEXT    PRIMARY KEY,
    project_id          TEXT    NOT NULL,
    name                TEXT    NOT NULL,
    description         TEXT    NOT NULL,
    admin_state_up      BOOLEAN NOT NULL,
    external_network_id TEXT    REFERENCES networks (id),
    enable_snat         BOOLEAN NOT NULL DEFAULT TRUE,
    gateway_host_id     TEXT    REFERENCES hosts (id) ON DELETE SET NULL, -- where the traffic to the outside goes
    routes              TEXT    NOT NULL DEFAULT '[]', -- JSON list of {destination, nexthop}
    revision            BIGINT  NOT NULL DEFAULT 1,
    created_us          BIGINT  NOT NULL,
    updated_us          BIGINT  NOT NULL
);
CREATE INDEX routers_project ON routers (project_id);

-- The router whose interface or gateway a port is (device_owner says which).
ALTER TABLE ports ADD COLUMN router_id TEXT REFERENCES routers (id);
CREATE INDEX ports_router ON ports (router_id);

CREATE TABLE floating_ips (
    id                  TEXT   PRIMARY KEY,
    project_id          TEXT   NOT NULL,
    description         TEXT   NOT NULL,
    floating_network_id TEXT   NOT NULL REFERENCES networks (id),
    floating_ip_address TEXT   NOT NULL,
    own_port_id         TEXT   NOT NULL REFERENCES ports (id), -- the port on the external network that has the address
    fixed_port_id       TEXT   REFERENCES ports (id),
    fixed_ip_address    TEXT,
    router_id           TEXT   REFERENCES routers (id),
    qos_policy_id       TEXT   REFERENCES qos_policies (id),
    revision            BIGINT NOT NULL DEFAULT 1,
    created_us          BIGINT NOT NULL,
    updated_us          BIGINT NOT NULL,
    UNIQUE (fixed_port_id, fixed_ip_address, floating_network_id)
);
CREATE INDEX floating_ips_project ON floating_ips (project_id);
CREATE INDEX floating_ips_router ON floating_ips (router_id);
CREATE INDEX floating_ips_own_port ON floating_ips (own_port_id);

CREATE TABLE port_forwardings (
    id                  TEXT   PRIMARY KEY,
    floatingip_id       TEXT   NOT NULL REFERENCES floating_ips (id) ON DELETE CASCADE,
    internal_port_id    TEXT   NOT NULL REFERENCES ports (id) ON DELETE CASCADE,
    internal_ip_address TEXT   NOT NULL,
    internal_port       BIGINT NOT NULL,
    external_port       BIGINT NOT NULL,
    protocol            TEXT   NOT NULL, -- tcp, udp
    description         TEXT   NOT NULL,
    created_us          BIGINT NOT NULL,
    UNIQUE (floatingip_id, external_port, protocol),
    UNIQUE (floatingip_id, internal_port_id, internal_ip_address, internal_port, protocol)
);
CREATE INDEX port_forwardings_port ON port_forwardings (internal_port_id);

ALTER TABLE ports ADD COLUMN qos_policy_id TEXT REFERENCES qos_policies (id);
ALTER TABLE networks ADD COLUMN qos_policy_id TEXT REFERENCES qos_policies (id);

ALTER TABLE ports ADD COLUMN admin_state_up BOOLEAN NOT NULL DEFAULT TRUE;
ALTER TABLE ports ADD COLUMN port_security_enabled BOOLEAN NOT NULL DEFAULT TRUE;
ALTER TABLE ports ADD COLUMN allowed_address_pairs TEXT NOT NULL DEFAULT '[]'; -- JSON list of {ip_address, mac_address}
-- Ports that were made before there were groups go on without a filter; the network's own ports never have one.
UPDATE ports SET port_security_enabled = FALSE;

ALTER TABLE networks ADD COLUMN admin_state_up BOOLEAN NOT NULL DEFAULT TRUE;
ALTER TABLE networks ADD COLUMN port_security_enabled BOOLEAN NOT NULL DEFAULT TRUE;
ALTER TABLE networks ADD COLUMN external BOOLEAN NOT NULL DEFAULT FALSE;
-- The segment: flat (segmentation_id 0), vlan, vxlan (physical_network '').
ALTER TABLE networks ADD COLUMN network_type TEXT NOT NULL DEFAULT 'vxlan';
ALTER TABLE networks ADD COLUMN physical_network TEXT NOT NULL DEFAULT '';
ALTER TABLE networks ADD COLUMN segmentation_id BIGINT NOT NULL DEFAULT 0;
UPDATE networks SET segmentation_id = (SELECT COUNT(*) FROM networks AS other WHERE other.id <= networks.id);
CREATE UNIQUE INDEX networks_segment ON networks (network_type, physical_network, segmentation_id);

ALTER TABLE subnets ADD COLUMN ip_version BIGINT NOT NULL DEFAULT 4;
ALTER TABLE subnets ADD COLUMN ipv6_address_mode TEXT;
ALTER TABLE subnets ADD COLUMN ipv6_ra_mode TEXT;
ALTER TABLE subnets ADD COLUMN subnetpool_id TEXT REFERENCES subnet_pools (id);
CREATE INDEX subnets_pool ON subnets (subnetpool_id);

-- `ip` orders and searches: an IPv4 address as it is, of an IPv6 address its last 64 bits with the first one flipped (see
-- src/network/ipam.rs). `address` is the address as text.
ALTER TABLE fixed_ips ADD COLUMN address TEXT NOT NULL DEFAULT '';
UPDATE fixed_ips SET address = CAST(ip / 16777216 AS TEXT) || '.' || CAST(ip / 65536 % 256 AS TEXT) || '.'
    || CAST(ip / 256 % 256 AS TEXT) || '.' || CAST(ip % 256 AS TEXT);

-- What a host says of its place in the overlay and of the physical networks that it is connected to.
ALTER TABLE hosts ADD COLUMN tunnel_ip TEXT;
ALTER TABLE hosts ADD COLUMN physical_networks TEXT NOT NULL DEFAULT '[]'; -- JSON list of names
