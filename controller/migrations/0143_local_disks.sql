-- Disks beside the root disk.
ALTER TABLE flavors ADD COLUMN ephemeral_gib BIGINT NOT NULL DEFAULT 0;
ALTER TABLE flavors ADD COLUMN swap_mib BIGINT NOT NULL DEFAULT 0;
-- The flavor as it was.
ALTER TABLE servers ADD COLUMN ephemeral_gib BIGINT NOT NULL DEFAULT 0;
ALTER TABLE servers ADD COLUMN swap_mib BIGINT NOT NULL DEFAULT 0;
-- JSON: list of LocalDiskSpec; and the numbers of those that are kept until a resize is confirmed or taken back.
ALTER TABLE servers ADD COLUMN local_disks TEXT NOT NULL DEFAULT '[]';
ALTER TABLE servers ADD COLUMN local_disks_kept TEXT NOT NULL DEFAULT '[]';
ALTER TABLE deleted_servers ADD COLUMN ephemeral_gib BIGINT NOT NULL DEFAULT 0;
ALTER TABLE deleted_servers ADD COLUMN swap_mib BIGINT NOT NULL DEFAULT 0;

DROP VIEW all_servers;
CREATE VIEW all_servers AS
SELECT id, project_id, user_id, name, flavor_id, image_id, key_name, metadata, description, hostname, launch_index, locked_by,
    locked_reason, flavor_name, vcpus, memory_mib, disk_gib, disk_claim_gib, flavor_extra_specs, disk_number, disk_last,
    config_drive, desired_power, availability_zone, host_id, fault_code, fault_message, fault_us, created_us, launched_us,
    access_ipv4, access_ipv6, disk_config, reservation_id, ephemeral_gib, swap_mib,
    resized_from, shelved_image_id, deleting, vm_state, task_state, updated_us, boot, rescue, user_data, local_disks,
    CAST(NULL AS BIGINT) AS deleted_us
FROM servers
UNION ALL
SELECT id, project_id, user_id, name, flavor_id, image_id, key_name, metadata, description, hostname, launch_index, locked_by,
    locked_reason, flavor_name, vcpus, memory_mib, disk_gib, disk_claim_gib, flavor_extra_specs, disk_number, disk_last,
    config_drive, desired_power, availability_zone, host_id, fault_code, fault_message, fault_us, created_us, launched_us,
    access_ipv4, access_ipv6, disk_config, reservation_id, ephemeral_gib, swap_mib,
    NULL, NULL, FALSE, 'deleted', NULL, deleted_us, '', NULL, NULL, '[]', deleted_us
FROM deleted_servers;
