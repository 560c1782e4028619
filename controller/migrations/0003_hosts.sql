-- Hosts that have joined. See src/db/mod.rs for the conventions. (The installation's id and the scheduler's policy are in
-- `settings`: cloud_id, scheduler_policy.)

CREATE TABLE join_tokens (
    id          TEXT    PRIMARY KEY,
    token_hash  TEXT    NOT NULL UNIQUE, -- SHA-256, hex
    description TEXT    NOT NULL,
    uses_left   BIGINT,                 -- NULL: until it expires
    created_us  BIGINT NOT NULL,
    expires_us  BIGINT NOT NULL
);

CREATE TABLE hosts (
    id                 TEXT    PRIMARY KEY,
    number             BIGINT NOT NULL UNIQUE, -- Nova's integer id of hypervisor and service (until 2.53)
    name               TEXT    NOT NULL UNIQUE,
    availability_zone  TEXT    NOT NULL,
    secret_hash        TEXT    NOT NULL, -- SHA-256, hex
    enabled            BOOLEAN NOT NULL DEFAULT TRUE,
    disabled_reason    TEXT,
    vcpus              BIGINT NOT NULL,
    memory_mib         BIGINT NOT NULL,
    disk_gib           BIGINT NOT NULL,
    kernel             TEXT    NOT NULL,
    version            TEXT    NOT NULL,
    traits             TEXT    NOT NULL, -- JSON list
    generation         BIGINT NOT NULL DEFAULT 1, -- of the desired state; bumped in the transaction that changes it
    applied_generation BIGINT NOT NULL DEFAULT 0, -- as the host last reported
    last_seen_us       BIGINT NOT NULL,
    created_us         BIGINT NOT NULL
);
