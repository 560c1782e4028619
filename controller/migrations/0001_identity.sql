-- Identity (Keystone v3). See src/db/mod.rs for the conventions.

CREATE TABLE settings (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE domains (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    description TEXT NOT NULL DEFAULT '',
    enabled     BOOLEAN NOT NULL DEFAULT TRUE
);

CREATE TABLE projects (
    id          TEXT PRIMARY KEY,
    domain_id   TEXT NOT NULL REFERENCES domains (id),
    name        TEXT NOT NULL,
    description TEXT NOT NULL DEFAULT '',
    enabled     BOOLEAN NOT NULL DEFAULT TRUE,
    -- JSON array of strings
    tags        TEXT NOT NULL DEFAULT '[]',
    -- JSON object: what the client gave beyond the above
    extra       TEXT NOT NULL DEFAULT '{}',
    UNIQUE (domain_id, name)
);

CREATE TABLE users (
    id                  TEXT PRIMARY KEY,
    domain_id           TEXT NOT NULL REFERENCES domains (id),
    name                TEXT NOT NULL,
    enabled             BOOLEAN NOT NULL DEFAULT TRUE,
    default_project_id  TEXT,
    -- argon2id in PHC form; NULL: can't log in by password
    password_hash       TEXT,
    password_changed_us BIGINT,
    -- tokens issued before are invalid: set by a change of password, disabling, and so on
    tokens_valid_from_us BIGINT NOT NULL DEFAULT 0,
    -- JSON object: description, email and what else the client gave
    extra               TEXT NOT NULL DEFAULT '{}',
    UNIQUE (domain_id, name)
);

CREATE TABLE roles (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    description TEXT NOT NULL DEFAULT ''
);

-- Who has the first has the second as well (all pairs, not only neighbours).
CREATE TABLE role_implications (
    prior_role_id   TEXT NOT NULL REFERENCES roles (id) ON DELETE CASCADE,
    implied_role_id TEXT NOT NULL REFERENCES roles (id) ON DELETE CASCADE,
    PRIMARY KEY (prior_role_id, implied_role_id)
);

-- Role of a user on a project or on a domain.
CREATE TABLE role_assignments (
    user_id     TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    role_id     TEXT NOT NULL REFERENCES roles (id) ON DELETE CASCADE,
    -- 'project' or 'domain'
    target_kind TEXT NOT NULL CHECK (target_kind IN ('project', 'domain')),
    target_id   TEXT NOT NULL,
    PRIMARY KEY (user_id, target_kind, target_id, role_id)
);
CREATE INDEX role_assignments_by_target ON role_assignments (target_kind, target_id);

-- Tokens that were revoked before their end, by audit id; rows whose time is over are removed.
CREATE TABLE revoked_tokens (
    audit_id   TEXT PRIMARY KEY,
    expires_us BIGINT NOT NULL
);
CREATE INDEX revoked_tokens_by_end ON revoked_tokens (expires_us);
