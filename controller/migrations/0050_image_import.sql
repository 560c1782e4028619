-- Import of images (stage, web-download), disks that are converted, and the tasks that tell of it.

-- Over 'queued': bytes are or were staged. Over 'saving': they are being imported.
ALTER TABLE images ADD COLUMN import_state TEXT CHECK (import_state IN ('uploading', 'importing'));
-- What hosts read, where that isn't the content itself: the raw disk made of it.
ALTER TABLE images ADD COLUMN raw_sha256 TEXT;
-- Bytes of the disk, where that isn't the size of the content.
ALTER TABLE images ADD COLUMN virtual_size BIGINT;
CREATE INDEX images_by_raw_digest ON images (raw_sha256);

CREATE TABLE image_tasks (
    id         TEXT PRIMARY KEY,
    image_id   TEXT NOT NULL,
    owner      TEXT NOT NULL,
    user_id    TEXT NOT NULL,
    request_id TEXT NOT NULL,
    -- the upload of the image (see images.upload_id) that it is
    upload_id  TEXT NOT NULL,
    status     TEXT NOT NULL CHECK (status IN ('pending', 'processing', 'success', 'failure')),
    -- what was asked for, as JSON
    input      TEXT NOT NULL,
    message    TEXT NOT NULL,
    created_us BIGINT NOT NULL,
    updated_us BIGINT NOT NULL,
    -- once it has ended
    expires_us BIGINT
);
CREATE INDEX image_tasks_by_time ON image_tasks (created_us, id);
CREATE INDEX image_tasks_by_image ON image_tasks (image_id);

-- The mark that a bucket of this cloud has, if images are in one.
CREATE TABLE image_store (
    cloud TEXT NOT NULL
);
