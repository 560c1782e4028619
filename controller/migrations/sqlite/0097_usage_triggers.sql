-- Counting, see 0096. The same as postgres/0097_usage_triggers.sql.
CREATE TRIGGER servers_come AFTER INSERT ON servers BEGIN
    INSERT INTO project_usage (project_id, instances, cores, ram_mib, ports)
        VALUES (NEW.project_id, 1, NEW.vcpus + NEW.held_vcpus, NEW.memory_mib + NEW.held_memory_mib, 0)
        ON CONFLICT (project_id) DO UPDATE SET instances = instances + 1, cores = cores + excluded.cores,
            ram_mib = ram_mib + excluded.ram_mib;
    UPDATE hosts SET promised_servers = promised_servers + 1,
        promised_vcpus = promised_vcpus + NEW.vcpus + NEW.held_vcpus,
        promised_memory_mib = promised_memory_mib + NEW.memory_mib + NEW.held_memory_mib,
        promised_disk_gib = promised_disk_gib + NEW.disk_claim_gib WHERE id = NEW.host_id;
END;
CREATE TRIGGER servers_go AFTER DELETE ON servers BEGIN
    UPDATE project_usage SET instances = instances - 1, cores = cores - OLD.vcpus - OLD.held_vcpus,
        ram_mib = ram_mib - OLD.memory_mib - OLD.held_memory_mib WHERE project_id = OLD.project_id;
    DELETE FROM project_usage WHERE project_id = OLD.project_id AND instances = 0 AND ports = 0;
    UPDATE hosts SET promised_servers = promised_servers - 1,
        promised_vcpus = promised_vcpus - OLD.vcpus - OLD.held_vcpus,
        promised_memory_mib = promised_memory_mib - OLD.memory_mib - OLD.held_memory_mib,
        promised_disk_gib = promised_disk_gib - OLD.disk_claim_gib WHERE id = OLD.host_id;
END;
CREATE TRIGGER servers_change
AFTER UPDATE OF host_id, vcpus, held_vcpus, memory_mib, held_memory_mib, disk_claim_gib ON servers BEGIN
    UPDATE project_usage SET
        cores = cores - OLD.vcpus - OLD.held_vcpus + NEW.vcpus + NEW.held_vcpus,
        ram_mib = ram_mib - OLD.memory_mib - OLD.held_memory_mib + NEW.memory_mib + NEW.held_memory_mib
        WHERE project_id = NEW.project_id;
    UPDATE hosts SET promised_servers = promised_servers - 1,
        promised_vcpus = promised_vcpus - OLD.vcpus - OLD.held_vcpus,
        promised_memory_mib = promised_memory_mib - OLD.memory_mib - OLD.held_memory_mib,
        promised_disk_gib = promised_disk_gib - OLD.disk_claim_gib WHERE id = OLD.host_id;
    UPDATE hosts SET promised_servers = promised_servers + 1,
        promised_vcpus = promised_vcpus + NEW.vcpus + NEW.held_vcpus,
        promised_memory_mib = promised_memory_mib + NEW.memory_mib + NEW.held_memory_mib,
        promised_disk_gib = promised_disk_gib + NEW.disk_claim_gib WHERE id = NEW.host_id;
END;
CREATE TRIGGER ports_come AFTER INSERT ON ports WHEN NEW.device_owner != 'network:distributed' BEGIN
    INSERT INTO project_usage (project_id, instances, cores, ram_mib, ports) VALUES (NEW.project_id, 0, 0, 0, 1)
        ON CONFLICT (project_id) DO UPDATE SET ports = ports + 1;
END;
CREATE TRIGGER ports_go AFTER DELETE ON ports WHEN OLD.device_owner != 'network:distributed' BEGIN
    UPDATE project_usage SET ports = ports - 1 WHERE project_id = OLD.project_id;
    DELETE FROM project_usage WHERE project_id = OLD.project_id AND instances = 0 AND ports = 0;
END;
-- A server and a port never change their project.
CREATE TRIGGER ports_change AFTER UPDATE OF device_owner ON ports
WHEN (OLD.device_owner = 'network:distributed') != (NEW.device_owner = 'network:distributed') BEGIN
    INSERT INTO project_usage (project_id, instances, cores, ram_mib, ports)
        VALUES (NEW.project_id, 0, 0, 0, CASE NEW.device_owner WHEN 'network:distributed' THEN -1 ELSE 1 END)
        ON CONFLICT (project_id) DO UPDATE SET ports = ports + excluded.ports;
END;
