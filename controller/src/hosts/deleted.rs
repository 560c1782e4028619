//! Servers that are gone are shown for a while: in lists of changes, to admins, and with what was done to them.

use std::sync::LazyLock;

use crate::{
    config::Config,
    db::{Conn, now_us},
    http::error::ApiError,
};

/// Most that are forgotten when another is deleted. More than one, so that their number shrinks when the time is shortened.
const MAX_FORGOTTEN: i64 = 100;

/// What is kept of a server.
const COLUMNS: &str = "id, project_id, user_id, name, flavor_id, image_id, key_name, metadata, description, hostname,
    launch_index, locked_by, locked_reason, flavor_name, vcpus, memory_mib, disk_gib, disk_claim_gib, flavor_extra_specs,
    disk_number, disk_last, config_drive, desired_power, availability_zone, host_id, fault_code, fault_message, fault_us,
    created_us, launched_us, access_ipv4, access_ipv6, disk_config, reservation_id, ephemeral_gib, swap_mib";
/// What is kept of what was done to it.
const ACTION_COLUMNS: &str =
    "request_id, server_id, action, project_id, user_id, started_us, error, finished_us";

static KEEP: LazyLock<String> = LazyLock::new(|| {
    format!(
        "INSERT INTO deleted_servers ({COLUMNS}, deleted_us) SELECT {COLUMNS}, $2 FROM servers WHERE id = $1"
    )
});
static KEEP_ACTIONS: LazyLock<String> = LazyLock::new(|| {
    format!(
        "INSERT INTO deleted_server_actions ({ACTION_COLUMNS})
         SELECT {ACTION_COLUMNS} FROM server_actions WHERE server_id = $1"
    )
});

/// Servers that were deleted before this are not shown any more, µs since 1970.
pub(crate) fn kept_since(config: &Config) -> i64 {
    now_us().saturating_sub(i64::try_from(config.keep_deleted.as_micros()).unwrap_or(i64::MAX))
}

/// Keeps what is shown of a server that is about to go, and forgets others whose time is over.
pub(super) async fn keep(tx: &mut Conn, config: &Config, id: &str) -> Result<(), ApiError> {
    sqlx::query(
        "DELETE FROM deleted_servers
         WHERE id IN (SELECT id FROM deleted_servers WHERE deleted_us < $1 ORDER BY deleted_us LIMIT $2)",
    )
    .bind(kept_since(config))
    .bind(MAX_FORGOTTEN)
    .execute(&mut *tx)
    .await?;
    if config.keep_deleted.is_zero() {
        return Ok(());
    }
    sqlx::query(KEEP.as_str()).bind(id).bind(now_us()).execute(&mut *tx).await?;
    sqlx::query(KEEP_ACTIONS.as_str()).bind(id).execute(tx).await?;
    Ok(())
}
