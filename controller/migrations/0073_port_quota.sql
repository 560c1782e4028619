-- Each new port asks how many its project has, without those of the cloud itself: read from an index alone.
DROP INDEX ports_project;
CREATE INDEX ports_project ON ports (project_id, device_owner);
