-- Number of a server's config drive; NULL: it has none.
ALTER TABLE servers ADD COLUMN config_drive BIGINT;
