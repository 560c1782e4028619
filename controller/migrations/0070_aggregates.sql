-- Host aggregates, and what became of servers' changes of flavor. See src/db/mod.rs for the conventions.

CREATE TABLE aggregates (
    id         BIGINT PRIMARY KEY, -- Nova's integer id
    uuid       TEXT   NOT NULL UNIQUE,
    name       TEXT   NOT NULL UNIQUE,
    created_us BIGINT NOT NULL,
    updated_us BIGINT              -- NULL: never
);

CREATE TABLE aggregate_hosts (
    aggregate_id BIGINT NOT NULL REFERENCES aggregates (id) ON DELETE CASCADE,
    host_id      TEXT   NOT NULL REFERENCES hosts (id) ON DELETE CASCADE,
    PRIMARY KEY (aggregate_id, host_id)
);
CREATE INDEX aggregate_hosts_of_host ON aggregate_hosts (host_id);

-- The key 'availability_zone' makes the zone of the aggregate's hosts.
CREATE TABLE aggregate_metadata (
    aggregate_id BIGINT NOT NULL REFERENCES aggregates (id) ON DELETE CASCADE,
    key          TEXT   NOT NULL,
    value        TEXT   NOT NULL,
    PRIMARY KEY (aggregate_id, key)
);

-- The zone that a host said when it joined; availability_zone is the one that counts: of an aggregate, else this.
ALTER TABLE hosts ADD COLUMN own_zone TEXT NOT NULL DEFAULT '';
UPDATE hosts SET own_zone = availability_zone;

-- Changes of flavor; go with the server.
CREATE TABLE migrations (
    id            BIGINT PRIMARY KEY, -- Nova's integer id
    uuid          TEXT   NOT NULL UNIQUE,
    server_id     TEXT   NOT NULL REFERENCES servers (id) ON DELETE CASCADE,
    project_id    TEXT   NOT NULL,
    user_id       TEXT   NOT NULL,
    host          TEXT   NOT NULL,    -- name
    old_flavor_id TEXT   NOT NULL,
    new_flavor_id TEXT   NOT NULL,
    status        TEXT   NOT NULL,    -- migrating, finished, confirmed, reverting, reverted, error
    created_us    BIGINT NOT NULL,
    updated_us    BIGINT NOT NULL
);
CREATE INDEX migrations_server ON migrations (server_id);
CREATE INDEX migrations_created ON migrations (created_us, id);
