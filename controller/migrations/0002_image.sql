-- Images (Glance v2). See src/db/mod.rs for the conventions.

CREATE TABLE images (
    id               TEXT PRIMARY KEY,
    owner            TEXT NOT NULL,
    name             TEXT,
    status           TEXT NOT NULL CHECK (status IN ('queued', 'saving', 'active', 'deactivated')),
    visibility       TEXT NOT NULL CHECK (visibility IN ('public', 'community', 'shared', 'private')),
    protected        BOOLEAN NOT NULL,
    hidden           BOOLEAN NOT NULL,
    disk_format      TEXT,
    container_format TEXT,
    min_disk_gib     BIGINT NOT NULL,
    min_ram_mib      BIGINT NOT NULL,
    -- the upload under way, while 'saving'
    upload_id        TEXT,
    -- known once the bytes are there
    size             BIGINT,
    sha256           TEXT,
    sha512           TEXT,
    md5              TEXT,
    created_us       BIGINT NOT NULL,
    updated_us       BIGINT NOT NULL
);
CREATE INDEX images_by_time ON images (created_us, id);
CREATE INDEX images_by_digest ON images (sha256);

-- The owner's own properties.
CREATE TABLE image_properties (
    image_id TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    name     TEXT NOT NULL,
    value    TEXT NOT NULL,
    PRIMARY KEY (image_id, name)
);

CREATE TABLE image_tags (
    image_id TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    tag      TEXT NOT NULL,
    PRIMARY KEY (image_id, tag)
);

-- Projects that a shared image is shared with.
CREATE TABLE image_members (
    image_id   TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    member_id  TEXT NOT NULL,
    status     TEXT NOT NULL CHECK (status IN ('pending', 'accepted', 'rejected')),
    created_us BIGINT NOT NULL,
    updated_us BIGINT NOT NULL,
    PRIMARY KEY (image_id, member_id)
);
CREATE INDEX image_members_by_member ON image_members (member_id);
