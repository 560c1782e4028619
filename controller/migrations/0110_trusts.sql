-- Trusts: what a user (the trustor) lets another (the trustee) do in a project, with some of the trustor's roles there.
CREATE TABLE trusts (
    id                   TEXT PRIMARY KEY,
    trustor_user_id      TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    trustee_user_id      TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    project_id           TEXT NOT NULL REFERENCES projects (id) ON DELETE CASCADE,
    impersonation        BOOLEAN NOT NULL,
    expires_us           BIGINT,
    -- NULL: without limit
    remaining_uses       BIGINT,
    -- the trust that this one hands on: ends with it
    redelegated_trust_id TEXT REFERENCES trusts (id) ON DELETE CASCADE,
    redelegation_count   BIGINT NOT NULL,
    UNIQUE (trustor_user_id, trustee_user_id, project_id, impersonation, expires_us)
);
CREATE INDEX trusts_by_trustee ON trusts (trustee_user_id);
CREATE INDEX trusts_by_project ON trusts (project_id);
CREATE INDEX trusts_by_redelegated ON trusts (redelegated_trust_id);

-- A role that is deleted stays here: a trust gives all of its roles or nothing.
CREATE TABLE trust_roles (
    trust_id TEXT NOT NULL REFERENCES trusts (id) ON DELETE CASCADE,
    role_id  TEXT NOT NULL,
    PRIMARY KEY (trust_id, role_id)
);
