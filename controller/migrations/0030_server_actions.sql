-- What the actions of servers need: locks, disks by number, flavors to go back to, rescue, images made of disks.

ALTER TABLE servers ADD COLUMN description TEXT;
-- 'owner' or 'admin', and why.
ALTER TABLE servers ADD COLUMN locked_by TEXT;
ALTER TABLE servers ADD COLUMN locked_reason TEXT;
-- The root disk is number disk_number; a new one begins as a copy of disk_copy_of, or of the image. disk_kept is that of
-- before a resize, disk_last the largest number that was ever used.
ALTER TABLE servers ADD COLUMN disk_number BIGINT NOT NULL DEFAULT 1;
ALTER TABLE servers ADD COLUMN disk_copy_of BIGINT;
ALTER TABLE servers ADD COLUMN disk_kept BIGINT;
ALTER TABLE servers ADD COLUMN disk_last BIGINT NOT NULL DEFAULT 1;
-- JSON: the flavor of before a resize, until that is confirmed or taken back.
ALTER TABLE servers ADD COLUMN resized_from TEXT;
-- What a host must keep free beside what the server has, so that a resize can be taken back.
ALTER TABLE servers ADD COLUMN held_vcpus BIGINT NOT NULL DEFAULT 0;
ALTER TABLE servers ADD COLUMN held_memory_mib BIGINT NOT NULL DEFAULT 0;
-- JSON of RescueSpec.
ALTER TABLE servers ADD COLUMN rescue TEXT;
-- The flavor's extra specs as they were, JSON.
ALTER TABLE servers ADD COLUMN flavor_extra_specs TEXT NOT NULL DEFAULT '{}';
-- Its host shall remove it, then it is on no host (shelve).
ALTER TABLE servers ADD COLUMN offloading BOOLEAN NOT NULL DEFAULT FALSE;
-- The image that a shelved server will be made of again.
ALTER TABLE servers ADD COLUMN shelved_image_id TEXT;

-- Root disks that become images: the host sends a copy.
CREATE TABLE server_captures (
    image_id   TEXT   PRIMARY KEY,
    server_id  TEXT   NOT NULL REFERENCES servers (id) ON DELETE CASCADE,
    shelving   BOOLEAN NOT NULL,
    created_us BIGINT NOT NULL
);
CREATE INDEX server_captures_server ON server_captures (server_id);

CREATE TABLE server_tags (
    server_id TEXT NOT NULL REFERENCES servers (id) ON DELETE CASCADE,
    tag       TEXT NOT NULL,
    PRIMARY KEY (server_id, tag)
);
