-- An action that a host could not carry out: why, and when that was known.
ALTER TABLE server_actions ADD COLUMN error TEXT;
ALTER TABLE server_actions ADD COLUMN finished_us BIGINT;
