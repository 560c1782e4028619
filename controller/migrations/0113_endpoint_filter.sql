-- Which endpoints a project's catalog has: those that it is associated with, or all if it isn't with any.

CREATE TABLE project_endpoints (
    project_id  TEXT NOT NULL REFERENCES projects (id) ON DELETE CASCADE,
    endpoint_id TEXT NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
    PRIMARY KEY (project_id, endpoint_id)
);
CREATE INDEX project_endpoints_of ON project_endpoints (endpoint_id);

CREATE TABLE endpoint_groups (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL,
    description TEXT,
    filters     TEXT NOT NULL -- a JSON object
);

CREATE TABLE project_endpoint_groups (
    project_id TEXT NOT NULL REFERENCES projects (id) ON DELETE CASCADE,
    group_id   TEXT NOT NULL REFERENCES endpoint_groups (id) ON DELETE CASCADE,
    PRIMARY KEY (project_id, group_id)
);
CREATE INDEX project_endpoint_groups_of ON project_endpoint_groups (group_id);
