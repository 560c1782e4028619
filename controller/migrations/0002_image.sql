-- Images (Glance v2).

CREATE TABLE images (
    id               TEXT PRIMARY KEY,
    owner            TEXT NOT NULL,
    name             TEXT,
    status           TEXT NOT NULL CHECK (status IN ('queued', 'saving', 'active', 'deactivated')),
    visibility       TEXT NOT NULL CHECK (visibility IN ('public', 'private', 'shared', 'community')),
    protected        BOOLEAN NOT NULL DEFAULT FALSE,
    hidden           BOOLEAN NOT NULL DEFAULT FALSE,
    disk_format      TEXT,
    container_format TEXT,
    min_disk_gib     BIGINT NOT NULL DEFAULT 0,
    min_ram_mib      BIGINT NOT NULL DEFAULT 0,
    -- known once the bytes are there
    size             BIGINT,
    sha256           TEXT,
    sha512           TEXT,
    md5              TEXT,
    -- JSON object of strings: the user's own properties
    properties       TEXT NOT NULL DEFAULT '{}',
    created_us       BIGINT NOT NULL,
    updated_us       BIGINT NOT NULL
);
CREATE INDEX images_by_time ON images (created_us, id);
CREATE INDEX images_by_digest ON images (sha256);

CREATE TABLE image_tags (
    image_id TEXT NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    tag      TEXT NOT NULL,
    PRIMARY KEY (image_id, tag)
);
