-- Addresses by which its owner reaches a server, whether its guest grows the root file system, and the crypt(3) hash of the
-- password that its first boot sets.
ALTER TABLE servers ADD COLUMN access_ipv4 TEXT NOT NULL DEFAULT '';
ALTER TABLE servers ADD COLUMN access_ipv6 TEXT NOT NULL DEFAULT '';
ALTER TABLE servers ADD COLUMN disk_config TEXT NOT NULL DEFAULT 'AUTO';
ALTER TABLE servers ADD COLUMN admin_password_hash TEXT;
-- Of all servers that one request made.
ALTER TABLE servers ADD COLUMN reservation_id TEXT;
