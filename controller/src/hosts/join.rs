//! How a host becomes one of the cloud's.

use crate::db::Conn;
use axum::{Json, extract::State};
use http::StatusCode;
use mote_host_api::{CloudId, HostId, Inventory, JoinRequest, JoinResponse};
use sqlx::FromRow;

use super::secrets;
use crate::{
    app::App,
    db::now_us,
    http::{error::ApiError, json::JsonBody},
};

/// The installation's id in `settings`.
const CLOUD_ID_SETTING: &str = "cloud_id";
/// Longest name of a host or zone, kernel, version, trait.
const MAX_TEXT: usize = 255;
/// Most traits of a host.
const MAX_TRAITS: usize = 256;
/// Largest amount that an inventory may name: a petabyte in MiB, far above any machine, far below any overflow.
const MAX_AMOUNT: u64 = 1 << 30;

#[derive(FromRow)]
struct Known {
    id: String,
    own_zone: String,
    servers: i64,
}

/// `POST /hosts`: the same name again is the same host with a new secret.
pub(super) async fn join(
    State(app): State<App>,
    JsonBody(request): JsonBody<JoinRequest>,
) -> Result<(StatusCode, Json<JoinResponse>), ApiError> {
    let secret = secrets::random()?;
    let mut tx = app.begin().await?;
    secrets::use_join_token(&mut tx, &request.token).await?;
    check_name("name", &request.name)?;
    check_name("availability_zone", &request.availability_zone)?;
    let cloud_id = make_cloud_id(&mut tx).await?;
    let known: Option<Known> = sqlx::query_as(
        "SELECT id, own_zone, (SELECT COUNT(*) FROM servers WHERE host_id = hosts.id) AS servers
         FROM hosts WHERE name = $1",
    )
    .bind(&request.name)
    .fetch_optional(&mut *tx)
    .await?;
    let host_id: HostId = match known {
        None => insert(&mut tx, &request, &secret).await?,
        Some(known) if known.servers > 0 && known.own_zone != request.availability_zone => {
            return Err(ApiError::Conflict(format!(
                "Host {} has servers and so can't leave its availability zone {}.",
                request.name, known.own_zone
            )));
        }
        Some(known) => {
            // What it had applied it may have forgotten: until it reports, nothing counts as applied.
            sqlx::query(
                "UPDATE hosts SET own_zone = $2, secret_hash = $3, applied_generation = 0 WHERE id = $1",
            )
            .bind(&known.id)
            .bind(&request.availability_zone)
            .bind(secrets::hash(&secret))
            .execute(&mut *tx)
            .await?;
            super::settle_zones(&mut tx).await?;
            known.id.parse().map_err(ApiError::internal)?
        }
    };
    store_inventory(&mut tx, &host_id.to_string(), &request.inventory).await?;
    tx.commit().await?;
    tracing::info!(host = %host_id, name = request.name, "a host has joined");
    Ok((StatusCode::CREATED, Json(JoinResponse { cloud_id, host_id, secret })))
}

async fn insert(tx: &mut Conn, request: &JoinRequest, secret: &str) -> Result<HostId, ApiError> {
    let id = HostId::new();
    sqlx::query(
        "INSERT INTO hosts (id, number, name, availability_zone, own_zone, secret_hash, vcpus, memory_mib, disk_gib, kernel,
             version, traits, last_seen_us, created_us)
         VALUES ($1, (SELECT COALESCE(MAX(number), 0) + 1 FROM hosts), $2, $3, $3, $4, 0, 0, 0, '', '', '[]', $5, $5)",
    )
    .bind(id.to_string())
    .bind(&request.name)
    .bind(&request.availability_zone)
    .bind(secrets::hash(secret))
    .bind(now_us())
    .execute(tx)
    .await?;
    Ok(id)
}

/// Writes what a host has, and that it was seen now.
pub(super) async fn store_inventory(
    tx: &mut Conn,
    host: &str,
    inventory: &Inventory,
) -> Result<(), ApiError> {
    let amount = |name: &str, amount: u64| match i64::try_from(amount) {
        Ok(stored) if amount <= MAX_AMOUNT => Ok(stored),
        _ => Err(ApiError::BadRequest(format!("inventory: {name} is impossibly large."))),
    };
    if inventory.traits.len() > MAX_TRAITS || inventory.traits.iter().any(|name| name.len() > MAX_TEXT) {
        return Err(ApiError::BadRequest("inventory: too many traits, or one is too long.".into()));
    }
    if inventory.kernel.len() > MAX_TEXT || inventory.version.len() > MAX_TEXT {
        return Err(ApiError::BadRequest(format!(
            "inventory: kernel and version may have {MAX_TEXT} bytes at most."
        )));
    }
    let physical = &inventory.physical_networks;
    if physical.len() > MAX_TRAITS || physical.iter().any(|name| name.len() > MAX_TEXT) {
        return Err(ApiError::BadRequest(
            "inventory: too many physical networks, or a name is too long.".into(),
        ));
    }
    sqlx::query(
        "UPDATE hosts SET vcpus = $2, memory_mib = $3, disk_gib = $4, kernel = $5, version = $6, traits = $7,
             last_seen_us = $8, tunnel_ip = $9, physical_networks = $10 WHERE id = $1",
    )
    .bind(host)
    .bind(amount("vcpus", u64::from(inventory.vcpus))?)
    .bind(amount("memory_mib", inventory.memory_mib)?)
    .bind(amount("disk_gib", inventory.disk_gib)?)
    .bind(&inventory.kernel)
    .bind(&inventory.version)
    .bind(serde_json::to_string(&inventory.traits).map_err(ApiError::internal)?)
    .bind(now_us())
    .bind(inventory.tunnel_ip.map(|ip| ip.to_string()))
    .bind(serde_json::to_string(physical).map_err(ApiError::internal)?)
    .execute(tx)
    .await?;
    Ok(())
}

/// Names go into URLs, `zone:host` and people's shells.
fn check_name(field: &str, name: &str) -> Result<(), ApiError> {
    let fits = (1..=MAX_TEXT).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    match fits {
        true => Ok(()),
        false => Err(ApiError::BadRequest(format!(
            "{field}: 1 to {MAX_TEXT} letters, digits, '.', '_' and '-' are needed."
        ))),
    }
}

/// The installation's id; made when it is asked for first.
async fn make_cloud_id(tx: &mut Conn) -> Result<CloudId, ApiError> {
    sqlx::query("INSERT INTO settings (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING")
        .bind(CLOUD_ID_SETTING)
        .bind(CloudId::new().to_string())
        .execute(&mut *tx)
        .await?;
    cloud_id(tx).await
}

/// The installation's id; it is there since the first host joined.
pub(super) async fn cloud_id(conn: &mut Conn) -> Result<CloudId, ApiError> {
    let text: String = sqlx::query_scalar("SELECT value FROM settings WHERE name = $1")
        .bind(CLOUD_ID_SETTING)
        .fetch_one(conn)
        .await?;
    text.parse().map_err(ApiError::internal)
}
