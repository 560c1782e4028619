-- The gateways of routers, of which there may be several: each is a port. The first one (by position) is the router's
-- `external_gateway_info`.
CREATE TABLE router_gateways (
    port_id     TEXT    PRIMARY KEY REFERENCES ports (id) ON DELETE CASCADE,
    router_id   TEXT    NOT NULL REFERENCES routers (id),
    position    BIGINT  NOT NULL,
    enable_snat BOOLEAN NOT NULL
);
CREATE INDEX router_gateways_router ON router_gateways (router_id);

INSERT INTO router_gateways (port_id, router_id, position, enable_snat)
    SELECT ports.id, routers.id, 0, routers.enable_snat FROM routers JOIN ports ON ports.router_id = routers.id
    WHERE ports.device_owner = 'network:router_gateway';

ALTER TABLE routers DROP COLUMN external_network_id;
ALTER TABLE routers DROP COLUMN enable_snat;
-- Whether default routes lead to all gateways.
ALTER TABLE routers ADD COLUMN enable_default_route_ecmp BOOLEAN NOT NULL DEFAULT FALSE;
