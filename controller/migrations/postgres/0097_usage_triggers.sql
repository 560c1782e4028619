-- Counting, see 0096. The same as sqlite/0097_usage_triggers.sql.
CREATE FUNCTION count_server() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        UPDATE project_usage SET instances = instances - 1, cores = cores - OLD.vcpus - OLD.held_vcpus,
            ram_mib = ram_mib - OLD.memory_mib - OLD.held_memory_mib WHERE project_id = OLD.project_id;
        UPDATE hosts SET promised_servers = promised_servers - 1,
            promised_vcpus = promised_vcpus - OLD.vcpus - OLD.held_vcpus,
            promised_memory_mib = promised_memory_mib - OLD.memory_mib - OLD.held_memory_mib,
            promised_disk_gib = promised_disk_gib - OLD.disk_claim_gib WHERE id = OLD.host_id;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO project_usage (project_id, instances, cores, ram_mib, ports)
            VALUES (NEW.project_id, 1, NEW.vcpus + NEW.held_vcpus, NEW.memory_mib + NEW.held_memory_mib, 0)
            ON CONFLICT (project_id) DO UPDATE SET instances = project_usage.instances + 1,
                cores = project_usage.cores + excluded.cores, ram_mib = project_usage.ram_mib + excluded.ram_mib;
        UPDATE hosts SET promised_servers = promised_servers + 1,
            promised_vcpus = promised_vcpus + NEW.vcpus + NEW.held_vcpus,
            promised_memory_mib = promised_memory_mib + NEW.memory_mib + NEW.held_memory_mib,
            promised_disk_gib = promised_disk_gib + NEW.disk_claim_gib WHERE id = NEW.host_id;
    ELSE
        DELETE FROM project_usage WHERE project_id = OLD.project_id AND instances = 0 AND ports = 0;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER servers_counted
    AFTER INSERT OR DELETE OR UPDATE OF host_id, vcpus, held_vcpus, memory_mib, held_memory_mib, disk_claim_gib
    ON servers FOR EACH ROW EXECUTE FUNCTION count_server();

CREATE FUNCTION count_port() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'INSERT' AND OLD.device_owner <> 'network:distributed' THEN
        UPDATE project_usage SET ports = ports - 1 WHERE project_id = OLD.project_id;
    END IF;
    IF TG_OP <> 'DELETE' AND NEW.device_owner <> 'network:distributed' THEN
        INSERT INTO project_usage (project_id, instances, cores, ram_mib, ports)
            VALUES (NEW.project_id, 0, 0, 0, 1)
            ON CONFLICT (project_id) DO UPDATE SET ports = project_usage.ports + 1;
    END IF;
    IF TG_OP = 'DELETE' THEN
        DELETE FROM project_usage WHERE project_id = OLD.project_id AND instances = 0 AND ports = 0;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER ports_counted AFTER INSERT OR DELETE OR UPDATE OF device_owner ON ports
    FOR EACH ROW EXECUTE FUNCTION count_port();
