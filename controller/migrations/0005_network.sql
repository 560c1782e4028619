-- Neutron's networks, subnets, ports and their addresses. IPv4 addresses are integers, so that ranges can be
-- searched. A port's status and host are those of its server. See src/db/mod.rs for the conventions.

CREATE TABLE networks (
    id             TEXT    PRIMARY KEY,
    project_id     TEXT    NOT NULL,
    name           TEXT    NOT NULL,
    description    TEXT    NOT NULL,
    shared         BOOLEAN NOT NULL,
    mtu            BIGINT NOT NULL,
    revision       BIGINT NOT NULL DEFAULT 1,
    created_us     BIGINT NOT NULL,
    updated_us     BIGINT NOT NULL
);
CREATE INDEX networks_project ON networks (project_id);

CREATE TABLE subnets (
    id              TEXT    PRIMARY KEY,
    network_id      TEXT    NOT NULL REFERENCES networks (id),
    project_id      TEXT    NOT NULL,
    name            TEXT    NOT NULL,
    description     TEXT    NOT NULL,
    cidr            TEXT    NOT NULL,
    gateway_ip      TEXT,
    enable_dhcp     BOOLEAN NOT NULL,
    dns_nameservers TEXT    NOT NULL, -- JSON list of addresses
    host_routes     TEXT    NOT NULL, -- JSON list of {destination, nexthop}
    allocation_pools TEXT   NOT NULL, -- JSON list of {start, end}
    next_ip         BIGINT NOT NULL, -- where the search for a free address starts: a freed address rests for a round
    revision        BIGINT NOT NULL DEFAULT 1,
    created_us      BIGINT NOT NULL,
    updated_us      BIGINT NOT NULL
);
CREATE INDEX subnets_network ON subnets (network_id);

CREATE TABLE ports (
    id             TEXT    PRIMARY KEY,
    network_id     TEXT    NOT NULL REFERENCES networks (id),
    project_id     TEXT    NOT NULL,
    name           TEXT    NOT NULL,
    description    TEXT    NOT NULL,
    mac_address    TEXT    NOT NULL,
    device_id      TEXT    NOT NULL,
    device_owner   TEXT    NOT NULL,
    server_id      TEXT    REFERENCES servers (id), -- whose NIC it is; device_id and device_owner follow
    device_index   BIGINT NOT NULL DEFAULT 0, -- order among the NICs of the server
    made_by_server BOOLEAN NOT NULL DEFAULT FALSE, -- goes with its server
    revision       BIGINT NOT NULL DEFAULT 1,
    created_us     BIGINT NOT NULL,
    updated_us     BIGINT NOT NULL,
    UNIQUE (network_id, mac_address)
);
CREATE INDEX ports_project ON ports (project_id);
CREATE INDEX ports_device ON ports (device_id);
CREATE INDEX ports_server ON ports (server_id);

-- The primary key is what makes it impossible that two ports share an address.
CREATE TABLE fixed_ips (
    subnet_id TEXT    NOT NULL REFERENCES subnets (id),
    ip        BIGINT NOT NULL,
    port_id   TEXT    NOT NULL REFERENCES ports (id) ON DELETE CASCADE,
    position  BIGINT NOT NULL,
    PRIMARY KEY (subnet_id, ip)
);
CREATE INDEX fixed_ips_port ON fixed_ips (port_id);
