-- What clients keep with these beside the fields that they have, as a JSON object; users and projects have it already.
ALTER TABLE domains ADD COLUMN extra TEXT NOT NULL DEFAULT '{}';
ALTER TABLE groups ADD COLUMN extra TEXT NOT NULL DEFAULT '{}';
ALTER TABLE roles ADD COLUMN extra TEXT NOT NULL DEFAULT '{}';
ALTER TABLE regions ADD COLUMN extra TEXT NOT NULL DEFAULT '{}';
ALTER TABLE services ADD COLUMN extra TEXT NOT NULL DEFAULT '{}';
ALTER TABLE endpoints ADD COLUMN extra TEXT NOT NULL DEFAULT '{}';
ALTER TABLE credentials ADD COLUMN extra TEXT NOT NULL DEFAULT '{}';

-- Of type ec2: the digest of the access key, by which signatures find their secret. The id is that of the first key and
-- stays when the key is changed.
ALTER TABLE credentials ADD COLUMN access_hash TEXT;
UPDATE credentials SET access_hash = id WHERE type = 'ec2';
CREATE UNIQUE INDEX credentials_by_access ON credentials (access_hash);
