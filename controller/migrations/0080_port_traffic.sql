-- What ports have carried, as their hosts tell. A port has a row for each VMM that ran with it (its series), and the series ''
-- for those that were added up. Rows outlive ports, as the usage of servers outlives servers.
CREATE TABLE port_traffic (
    port_id    TEXT   NOT NULL,
    series     TEXT   NOT NULL,
    server_id  TEXT   NOT NULL,
    project_id TEXT   NOT NULL,
    network_id TEXT   NOT NULL,
    rx_bytes   BIGINT NOT NULL, -- as the guest sees it
    rx_packets BIGINT NOT NULL,
    rx_dropped BIGINT NOT NULL,
    tx_bytes   BIGINT NOT NULL,
    tx_packets BIGINT NOT NULL,
    tx_dropped BIGINT NOT NULL,
    since_us   BIGINT NOT NULL,
    updated_us BIGINT NOT NULL,
    PRIMARY KEY (port_id, series)
);
CREATE INDEX port_traffic_project ON port_traffic (project_id, port_id);
CREATE INDEX port_traffic_server ON port_traffic (server_id, port_id);
