-- Keystone's unified limits: defaults by service and resource, and what differs for a project or a domain.

CREATE TABLE registered_limits (
    id            TEXT   PRIMARY KEY,
    service_id    TEXT   NOT NULL REFERENCES services (id) ON DELETE CASCADE,
    region_id     TEXT   REFERENCES regions (id) ON DELETE CASCADE,
    resource_name TEXT   NOT NULL,
    default_limit BIGINT NOT NULL, -- -1: none
    description   TEXT
);
CREATE UNIQUE INDEX registered_limits_of
    ON registered_limits (service_id, COALESCE(region_id, ''), resource_name);

CREATE TABLE limits (
    id                  TEXT   PRIMARY KEY,
    registered_limit_id TEXT   NOT NULL REFERENCES registered_limits (id) ON DELETE CASCADE,
    project_id          TEXT   REFERENCES projects (id) ON DELETE CASCADE,
    domain_id           TEXT   REFERENCES domains (id) ON DELETE CASCADE,
    resource_limit      BIGINT NOT NULL, -- -1: none
    description         TEXT
);
CREATE UNIQUE INDEX limits_of ON limits (registered_limit_id, COALESCE(project_id, ''), COALESCE(domain_id, ''));
