-- Servers that are gone, as far as they are shown for a while: not among the servers, so that nothing has to look past them.
CREATE TABLE deleted_servers (
    id                 TEXT    PRIMARY KEY,
    project_id         TEXT    NOT NULL,
    user_id            TEXT    NOT NULL,
    name               TEXT    NOT NULL,
    flavor_id          TEXT    NOT NULL,
    image_id           TEXT    NOT NULL,
    key_name           TEXT,
    metadata           TEXT    NOT NULL,
    description        TEXT,
    hostname           TEXT    NOT NULL,
    launch_index       BIGINT  NOT NULL,
    locked_by          TEXT,
    locked_reason      TEXT,
    flavor_name        TEXT    NOT NULL,
    vcpus              BIGINT  NOT NULL,
    memory_mib         BIGINT  NOT NULL,
    disk_gib           BIGINT  NOT NULL,
    disk_claim_gib     BIGINT  NOT NULL,
    flavor_extra_specs TEXT    NOT NULL,
    disk_number        BIGINT  NOT NULL,
    disk_last          BIGINT  NOT NULL,
    config_drive       BIGINT,
    desired_power      TEXT    NOT NULL,
    availability_zone  TEXT    NOT NULL,
    host_id            TEXT,             -- it may be gone, too
    fault_code         BIGINT,
    fault_message      TEXT,
    fault_us           BIGINT,
    created_us         BIGINT  NOT NULL,
    launched_us        BIGINT,
    access_ipv4        TEXT    NOT NULL,
    access_ipv6        TEXT    NOT NULL,
    disk_config        TEXT    NOT NULL,
    reservation_id     TEXT,
    deleted_us         BIGINT  NOT NULL
);
CREATE INDEX deleted_servers_project ON deleted_servers (project_id, deleted_us);
CREATE INDEX deleted_servers_deleted ON deleted_servers (deleted_us);

-- What was done to them.
CREATE TABLE deleted_server_actions (
    request_id  TEXT   NOT NULL,
    server_id   TEXT   NOT NULL REFERENCES deleted_servers (id) ON DELETE CASCADE,
    action      TEXT   NOT NULL,
    project_id  TEXT   NOT NULL,
    user_id     TEXT   NOT NULL,
    started_us  BIGINT NOT NULL,
    error       TEXT,
    finished_us BIGINT,
    PRIMARY KEY (server_id, request_id, action)
);

-- Both kinds, as lists and documents of servers need them.
CREATE VIEW all_servers AS
SELECT id, project_id, user_id, name, flavor_id, image_id, key_name, metadata, description, hostname, launch_index, locked_by,
    locked_reason, flavor_name, vcpus, memory_mib, disk_gib, disk_claim_gib, flavor_extra_specs, disk_number, disk_last,
    config_drive, desired_power, availability_zone, host_id, fault_code, fault_message, fault_us, created_us, launched_us,
    access_ipv4, access_ipv6, disk_config, reservation_id,
    resized_from, shelved_image_id, deleting, vm_state, task_state, updated_us, boot, rescue, user_data,
    CAST(NULL AS BIGINT) AS deleted_us
FROM servers
UNION ALL
SELECT id, project_id, user_id, name, flavor_id, image_id, key_name, metadata, description, hostname, launch_index, locked_by,
    locked_reason, flavor_name, vcpus, memory_mib, disk_gib, disk_claim_gib, flavor_extra_specs, disk_number, disk_last,
    config_drive, desired_power, availability_zone, host_id, fault_code, fault_message, fault_us, created_us, launched_us,
    access_ipv4, access_ipv6, disk_config, reservation_id,
    NULL, NULL, FALSE, 'deleted', NULL, deleted_us, '', NULL, NULL, deleted_us
FROM deleted_servers;
