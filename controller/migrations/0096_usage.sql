-- What is promised of each host and what each project uses, counted as rows come and go: a new server need not add up all
-- others. The triggers that count are each database's own (0097), since theirs is not one language.
ALTER TABLE hosts ADD COLUMN promised_servers BIGINT NOT NULL DEFAULT 0;
ALTER TABLE hosts ADD COLUMN promised_vcpus BIGINT NOT NULL DEFAULT 0;
ALTER TABLE hosts ADD COLUMN promised_memory_mib BIGINT NOT NULL DEFAULT 0;
ALTER TABLE hosts ADD COLUMN promised_disk_gib BIGINT NOT NULL DEFAULT 0;
UPDATE hosts SET
    promised_servers = (SELECT COUNT(*) FROM servers WHERE host_id = hosts.id),
    promised_vcpus = (SELECT CAST(COALESCE(SUM(vcpus + held_vcpus), 0) AS BIGINT) FROM servers
        WHERE host_id = hosts.id),
    promised_memory_mib = (SELECT CAST(COALESCE(SUM(memory_mib + held_memory_mib), 0) AS BIGINT) FROM servers
        WHERE host_id = hosts.id),
    promised_disk_gib = (SELECT CAST(COALESCE(SUM(disk_claim_gib), 0) AS BIGINT) FROM servers
        WHERE host_id = hosts.id);

CREATE TABLE project_usage (
    project_id TEXT   PRIMARY KEY,
    instances  BIGINT NOT NULL,
    cores      BIGINT NOT NULL,
    ram_mib    BIGINT NOT NULL,
    ports      BIGINT NOT NULL -- without those of the cloud itself
);
INSERT INTO project_usage (project_id, instances, cores, ram_mib, ports)
    SELECT project_id, CAST(SUM(servers) AS BIGINT), CAST(SUM(vcpus) AS BIGINT), CAST(SUM(memory_mib) AS BIGINT),
        CAST(SUM(ports) AS BIGINT)
    FROM (
        SELECT project_id, 1 AS servers, vcpus + held_vcpus AS vcpus, memory_mib + held_memory_mib AS memory_mib,
            0 AS ports FROM servers
        UNION ALL
        SELECT project_id, 0, 0, 0, 1 FROM ports WHERE device_owner != 'network:distributed'
    ) AS owned GROUP BY project_id;

-- The indexes need no sums any more.
DROP INDEX servers_usage;
DROP INDEX servers_host;
CREATE INDEX servers_host ON servers (host_id);
DROP INDEX ports_project;
CREATE INDEX ports_project ON ports (project_id);
