-- What happened, in the order of its commits: rows are only ever added.

CREATE TABLE events (
    sequence    BIGINT PRIMARY KEY,
    at_us       BIGINT NOT NULL,
    type        TEXT   NOT NULL, -- server.action, server.state, server.deleted
    project_id  TEXT   NOT NULL,
    user_id     TEXT,            -- who asked; none: the cloud itself
    request_id  TEXT,
    resource_id TEXT   NOT NULL,
    payload     TEXT   NOT NULL  -- JSON object
);
CREATE INDEX events_project ON events (project_id, sequence);
