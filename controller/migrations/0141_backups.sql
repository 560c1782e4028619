-- Copies that are backups: of which kind, and how many of that kind are kept.
ALTER TABLE server_captures ADD COLUMN backup_type TEXT;
ALTER TABLE server_captures ADD COLUMN backup_rotation BIGINT;
