-- Identity, the whole of Keystone v3: project trees, groups, inherited and system roles, application credentials,
-- credentials, the catalog as data, lock-out. See src/db/mod.rs for the conventions.

-- Grows with each change that can make a cached token wrong: whoever remembers a validated token compares it.
CREATE TABLE identity_version (
    only_row BIGINT PRIMARY KEY,
    version  BIGINT NOT NULL
);
INSERT INTO identity_version (only_row, version) VALUES (1, 1);

-- NULL: the domain is the parent.
ALTER TABLE projects ADD COLUMN parent_id TEXT;

-- All projects above a project. A project never moves, so that these rows never change.
CREATE TABLE project_ancestors (
    project_id  TEXT NOT NULL REFERENCES projects (id) ON DELETE CASCADE,
    ancestor_id TEXT NOT NULL REFERENCES projects (id) ON DELETE CASCADE,
    PRIMARY KEY (project_id, ancestor_id)
);
CREATE INDEX project_ancestors_down ON project_ancestors (ancestor_id);

ALTER TABLE users ADD COLUMN failed_logins BIGINT NOT NULL DEFAULT 0;
ALTER TABLE users ADD COLUMN failed_us BIGINT NOT NULL DEFAULT 0;

CREATE TABLE groups (
    id          TEXT PRIMARY KEY,
    domain_id   TEXT NOT NULL REFERENCES domains (id),
    name        TEXT NOT NULL,
    description TEXT NOT NULL,
    UNIQUE (domain_id, name)
);

CREATE TABLE group_members (
    group_id TEXT NOT NULL REFERENCES groups (id) ON DELETE CASCADE,
    user_id  TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    PRIMARY KEY (user_id, group_id)
);
CREATE INDEX group_members_of_group ON group_members (group_id);

-- Role of a user or a group on a project, a domain, or the system (whose id is 'all'). An inherited one holds not there but
-- on all projects below.
CREATE TABLE grants (
    actor_kind  TEXT NOT NULL CHECK (actor_kind IN ('user', 'group')),
    actor_id    TEXT NOT NULL,
    role_id     TEXT NOT NULL REFERENCES roles (id) ON DELETE CASCADE,
    target_kind TEXT NOT NULL CHECK (target_kind IN ('project', 'domain', 'system')),
    target_id   TEXT NOT NULL,
    inherited   BOOLEAN NOT NULL,
    PRIMARY KEY (actor_kind, actor_id, target_kind, target_id, role_id, inherited)
);
CREATE INDEX grants_by_target ON grants (target_kind, target_id);
INSERT INTO grants (actor_kind, actor_id, role_id, target_kind, target_id, inherited)
    SELECT 'user', user_id, role_id, target_kind, target_id, FALSE FROM role_assignments;
DROP TABLE role_assignments;

-- What an administrator said; role_implications is what follows from it.
CREATE TABLE role_inferences (
    prior_role_id   TEXT NOT NULL REFERENCES roles (id) ON DELETE CASCADE,
    implied_role_id TEXT NOT NULL REFERENCES roles (id) ON DELETE CASCADE,
    PRIMARY KEY (prior_role_id, implied_role_id)
);
INSERT INTO role_inferences (prior_role_id, implied_role_id)
    SELECT i.prior_role_id, i.implied_role_id FROM role_implications i
    JOIN roles p ON p.id = i.prior_role_id JOIN roles r ON r.id = i.implied_role_id
    WHERE (p.name = 'admin' AND r.name = 'manager') OR (p.name = 'manager' AND r.name = 'member')
       OR (p.name = 'member' AND r.name = 'reader');

-- Grants with groups taken apart into their members.
CREATE VIEW user_grants AS
    SELECT actor_id AS user_id, role_id, target_kind, target_id, inherited FROM grants WHERE actor_kind = 'user'
    UNION ALL
    SELECT m.user_id, g.role_id, g.target_kind, g.target_id, g.inherited
    FROM group_members m JOIN grants g ON g.actor_kind = 'group' AND g.actor_id = m.group_id;

-- Which role a user has where, with what is inherited, without what is implied.
CREATE VIEW held_roles AS
    SELECT user_id, role_id, target_kind, target_id FROM user_grants WHERE NOT inherited
    UNION ALL
    SELECT u.user_id, u.role_id, 'project' AS target_kind, p.id AS target_id
    FROM user_grants u JOIN projects p ON p.domain_id = u.target_id WHERE u.inherited AND u.target_kind = 'domain'
    UNION ALL
    SELECT u.user_id, u.role_id, 'project' AS target_kind, a.project_id AS target_id
    FROM user_grants u JOIN project_ancestors a ON a.ancestor_id = u.target_id
    WHERE u.inherited AND u.target_kind = 'project';

-- With what is implied. May have a row twice.
CREATE VIEW effective_roles AS
    SELECT user_id, role_id, target_kind, target_id FROM held_roles
    UNION ALL
    SELECT h.user_id, i.implied_role_id AS role_id, h.target_kind, h.target_id
    FROM held_roles h JOIN role_implications i ON i.prior_role_id = h.role_id;

CREATE TABLE application_credentials (
    id           TEXT PRIMARY KEY,
    user_id      TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    project_id   TEXT NOT NULL REFERENCES projects (id) ON DELETE CASCADE,
    name         TEXT NOT NULL,
    description  TEXT NOT NULL,
    secret_hash  TEXT NOT NULL, -- argon2id in PHC form
    unrestricted BOOLEAN NOT NULL,
    expires_us   BIGINT,
    UNIQUE (user_id, name)
);

CREATE TABLE application_credential_roles (
    credential_id TEXT NOT NULL REFERENCES application_credentials (id) ON DELETE CASCADE,
    role_id       TEXT NOT NULL REFERENCES roles (id) ON DELETE CASCADE,
    PRIMARY KEY (credential_id, role_id)
);

-- What an application credential may be used for, if not for everything.
CREATE TABLE access_rules (
    id      TEXT PRIMARY KEY,
    user_id TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    service TEXT NOT NULL,
    method  TEXT NOT NULL,
    path    TEXT NOT NULL,
    UNIQUE (user_id, service, method, path)
);

CREATE TABLE application_credential_rules (
    credential_id TEXT NOT NULL REFERENCES application_credentials (id) ON DELETE CASCADE,
    rule_id       TEXT NOT NULL REFERENCES access_rules (id),
    PRIMARY KEY (credential_id, rule_id)
);

-- Keys, as a sealed box: 'token' rotates, 'credential' seals the blobs below.
CREATE TABLE identity_keys (
    id         TEXT PRIMARY KEY,
    purpose    TEXT NOT NULL CHECK (purpose IN ('token', 'credential')),
    key_hex    TEXT NOT NULL,
    created_us BIGINT NOT NULL
);

CREATE TABLE credentials (
    id         TEXT PRIMARY KEY,
    user_id    TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    project_id TEXT,
    type       TEXT NOT NULL,
    blob       TEXT NOT NULL -- sealed
);
CREATE INDEX credentials_user ON credentials (user_id, type);

CREATE TABLE regions (
    id               TEXT PRIMARY KEY,
    description      TEXT NOT NULL,
    parent_region_id TEXT REFERENCES regions (id)
);

CREATE TABLE services (
    id          TEXT PRIMARY KEY,
    type        TEXT NOT NULL,
    name        TEXT NOT NULL,
    description TEXT NOT NULL,
    enabled     BOOLEAN NOT NULL
);

CREATE TABLE endpoints (
    id         TEXT PRIMARY KEY,
    service_id TEXT NOT NULL REFERENCES services (id) ON DELETE CASCADE,
    region_id  TEXT REFERENCES regions (id),
    interface  TEXT NOT NULL CHECK (interface IN ('public', 'internal', 'admin')),
    url        TEXT NOT NULL, -- $(public_url)s: the controller's; $(project_id)s: the token's
    enabled    BOOLEAN NOT NULL
);
CREATE INDEX endpoints_service ON endpoints (service_id);

INSERT INTO regions (id, description, parent_region_id) VALUES ('RegionOne', '', NULL);
INSERT INTO services (id, type, name, description, enabled) VALUES
    ('10000000000000000000000000000001', 'compute', 'nova', '', TRUE),
    ('10000000000000000000000000000002', 'identity', 'keystone', '', TRUE),
    ('10000000000000000000000000000003', 'image', 'glance', '', TRUE),
    ('10000000000000000000000000000004', 'network', 'neutron', '', TRUE);
INSERT INTO endpoints (id, service_id, region_id, interface, url, enabled)
    SELECT i.digit || SUBSTR(s.id, 2, 31), s.id, 'RegionOne', i.interface,
           '$(public_url)s' || CASE s.type WHEN 'compute' THEN '/compute/v2.1' WHEN 'identity' THEN '/identity/v3'
                               WHEN 'image' THEN '/image' ELSE '/network' END, TRUE
    FROM services s CROSS JOIN (SELECT 'public' AS interface, 'a' AS digit UNION ALL SELECT 'internal', 'b'
                                UNION ALL SELECT 'admin', 'c') i;
