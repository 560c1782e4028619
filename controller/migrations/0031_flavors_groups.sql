-- Flavors: descriptions, access of projects. Groups of servers.

ALTER TABLE flavors ADD COLUMN description TEXT;
ALTER TABLE flavors ADD COLUMN is_public BOOLEAN NOT NULL DEFAULT TRUE;

-- Projects that may use a flavor that isn't public.
CREATE TABLE flavor_access (
    flavor_id  TEXT NOT NULL REFERENCES flavors (id) ON DELETE CASCADE,
    project_id TEXT NOT NULL,
    PRIMARY KEY (flavor_id, project_id)
);

CREATE TABLE server_groups (
    id         TEXT   PRIMARY KEY,
    project_id TEXT   NOT NULL,
    user_id    TEXT   NOT NULL,
    name       TEXT   NOT NULL,
    policy     TEXT   NOT NULL, -- affinity, anti-affinity, soft-affinity, soft-anti-affinity
    max_server_per_host BIGINT NOT NULL, -- of anti-affinity
    created_us BIGINT NOT NULL
);
CREATE INDEX server_groups_project ON server_groups (project_id);

CREATE TABLE server_group_members (
    group_id  TEXT NOT NULL REFERENCES server_groups (id) ON DELETE CASCADE,
    server_id TEXT NOT NULL REFERENCES servers (id) ON DELETE CASCADE,
    PRIMARY KEY (group_id, server_id)
);
CREATE INDEX server_group_members_server ON server_group_members (server_id);
