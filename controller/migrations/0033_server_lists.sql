-- Lists of servers are read by pages, newest first, of one project or of all.
DROP INDEX servers_project;
CREATE INDEX servers_project ON servers (project_id, created_us, id);
CREATE INDEX servers_created ON servers (created_us, id);

-- Each new server asks what its project uses and what is promised of the hosts: sums that are read from an index alone.
CREATE INDEX servers_usage ON servers (project_id, vcpus, held_vcpus, memory_mib, held_memory_mib);
DROP INDEX servers_host;
CREATE INDEX servers_host
    ON servers (host_id, vcpus, held_vcpus, memory_mib, held_memory_mib, disk_claim_gib);
