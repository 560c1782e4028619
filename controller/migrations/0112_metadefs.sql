-- Definitions of metadata: what properties of images, flavors and so on mean and may be, for programs that offer them.

CREATE TABLE metadef_namespaces (
    id           TEXT PRIMARY KEY,
    namespace    TEXT NOT NULL UNIQUE,
    display_name TEXT,
    description  TEXT,
    visibility   TEXT NOT NULL CHECK (visibility IN ('public', 'private')),
    protected    BOOLEAN NOT NULL,
    owner        TEXT NOT NULL,
    created_us   BIGINT NOT NULL,
    updated_us   BIGINT NOT NULL
);

-- What is in a namespace under its own name: objects, properties and tags.
CREATE TABLE metadef_parts (
    namespace_id TEXT NOT NULL REFERENCES metadef_namespaces (id) ON DELETE CASCADE,
    kind         TEXT NOT NULL CHECK (kind IN ('object', 'property', 'tag')),
    name         TEXT NOT NULL,
    document     TEXT NOT NULL, -- a JSON object: all but the name
    created_us   BIGINT NOT NULL,
    updated_us   BIGINT NOT NULL,
    PRIMARY KEY (namespace_id, kind, name)
);

-- Kinds of things that metadata is for, by the names that Heat gives them.
CREATE TABLE metadef_resource_types (
    name       TEXT PRIMARY KEY,
    created_us BIGINT NOT NULL,
    updated_us BIGINT NOT NULL
);

CREATE TABLE metadef_associations (
    namespace_id      TEXT NOT NULL REFERENCES metadef_namespaces (id) ON DELETE CASCADE,
    resource_type     TEXT NOT NULL REFERENCES metadef_resource_types (name),
    prefix            TEXT,
    properties_target TEXT,
    created_us        BIGINT NOT NULL,
    updated_us        BIGINT NOT NULL,
    PRIMARY KEY (namespace_id, resource_type)
);
CREATE INDEX metadef_associations_of ON metadef_associations (resource_type);

-- What has metadata here.
INSERT INTO metadef_resource_types (name, created_us, updated_us) VALUES
    ('OS::Glance::Image', 0, 0), ('OS::Nova::Aggregate', 0, 0), ('OS::Nova::Flavor', 0, 0), ('OS::Nova::Server', 0, 0);
