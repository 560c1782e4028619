-- A port on its way into a VMM that runs ('plugging') or out of it ('unplugging'; 'deleting' where the port itself goes, too),
-- and the host's generation that says so first. NULL: as the server's state says.
ALTER TABLE ports ADD COLUMN plug_state TEXT;
ALTER TABLE ports ADD COLUMN plug_generation BIGINT NOT NULL DEFAULT 0;
CREATE INDEX ports_plug_state ON ports (server_id) WHERE plug_state IS NOT NULL;
