-- Nova's flavors, keypairs, quotas and servers. See src/db/mod.rs for the conventions.

CREATE TABLE flavors (
    id          TEXT    PRIMARY KEY,
    name        TEXT    NOT NULL UNIQUE,
    vcpus       BIGINT NOT NULL,
    memory_mib  BIGINT NOT NULL,
    disk_gib    BIGINT NOT NULL, -- 0: as large as the image
    created_us  BIGINT NOT NULL
);

CREATE TABLE flavor_extra_specs (
    flavor_id TEXT NOT NULL REFERENCES flavors (id) ON DELETE CASCADE,
    key       TEXT NOT NULL,
    value     TEXT NOT NULL,
    PRIMARY KEY (flavor_id, key)
);

CREATE TABLE keypairs (
    user_id     TEXT    NOT NULL,
    name        TEXT    NOT NULL,
    public_key  TEXT    NOT NULL,
    fingerprint TEXT    NOT NULL,
    created_us  BIGINT NOT NULL,
    PRIMARY KEY (user_id, name)
);

-- A limit that differs from the default, for one project.
CREATE TABLE quotas (
    project_id TEXT    NOT NULL,
    resource   TEXT    NOT NULL,
    hard_limit BIGINT NOT NULL, -- -1: none
    PRIMARY KEY (project_id, resource)
);

CREATE TABLE servers (
    id                 TEXT    PRIMARY KEY,
    project_id         TEXT    NOT NULL,
    user_id            TEXT    NOT NULL,
    name               TEXT    NOT NULL,
    hostname           TEXT    NOT NULL,
    -- The flavor as it was: flavors may be deleted.
    flavor_id          TEXT    NOT NULL,
    flavor_name        TEXT    NOT NULL,
    vcpus              BIGINT NOT NULL,
    memory_mib         BIGINT NOT NULL,
    disk_gib           BIGINT NOT NULL,
    disk_claim_gib     BIGINT NOT NULL, -- what the scheduler counts
    -- The image as it was: what a server boots is content, so deleting or changing the image doesn't matter to it.
    image_id           TEXT    NOT NULL,
    boot               TEXT    NOT NULL, -- JSON of BootSpec
    key_name           TEXT,
    public_key         TEXT,
    user_data          TEXT,             -- base64
    metadata           TEXT    NOT NULL, -- JSON object of strings
    restart_policy     TEXT    NOT NULL,
    launch_index       BIGINT NOT NULL,
    availability_zone  TEXT    NOT NULL, -- of its host; '' without host
    host_id            TEXT    REFERENCES hosts (id),
    desired_power      TEXT    NOT NULL, -- running, stopped
    run_generation     BIGINT NOT NULL,
    changed_generation BIGINT NOT NULL, -- the host's generation when this server's desired state last changed
    deleting           BOOLEAN NOT NULL DEFAULT FALSE,
    vm_state           TEXT    NOT NULL, -- building, active, stopped, error
    task_state         TEXT,
    fault_code         BIGINT,
    fault_message      TEXT,
    fault_us           BIGINT,
    created_us         BIGINT NOT NULL,
    updated_us         BIGINT NOT NULL,
    launched_us        BIGINT
);
CREATE INDEX servers_project ON servers (project_id);
CREATE INDEX servers_host ON servers (host_id);

-- What happened to servers by request (os-instance-actions); goes with the server.
CREATE TABLE server_actions (
    request_id TEXT    NOT NULL,
    server_id  TEXT    NOT NULL REFERENCES servers (id) ON DELETE CASCADE,
    action     TEXT    NOT NULL,
    project_id TEXT    NOT NULL,
    user_id    TEXT    NOT NULL,
    started_us BIGINT NOT NULL,
    PRIMARY KEY (server_id, request_id, action)
);

-- Usage of servers that are gone (those that exist are counted from their rows).
CREATE TABLE server_usage (
    server_id   TEXT    PRIMARY KEY,
    project_id  TEXT    NOT NULL,
    name        TEXT    NOT NULL,
    flavor_name TEXT    NOT NULL,
    vcpus       BIGINT NOT NULL,
    memory_mib  BIGINT NOT NULL,
    disk_gib    BIGINT NOT NULL,
    started_us  BIGINT NOT NULL,
    ended_us    BIGINT NOT NULL
);
CREATE INDEX server_usage_project ON server_usage (project_id, ended_us);
