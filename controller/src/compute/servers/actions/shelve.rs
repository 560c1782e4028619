//! createImage, createBackup, shelve, shelveOffload, unshelve: root disks that become images.

use std::collections::BTreeMap;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};
use mote_host_api::{DesiredPower, ImageSpec};
use serde_json::{Value, json};

use super::{
    super::{
        super::state::power_word,
        create,
        input::{self, Fields},
        local,
    },
    Act, ApiError, Asked, Rule, TaskState, VmState, check_lock, invalid, note, now_us, row,
};
use crate::{
    db::Conn,
    hosts,
    image::{blobs, snapshot},
    network::ports::server,
    scheduler::{self, Resources, Rng, Rules},
};

/// States in which a server's disk can be copied.
const AT_HAND: &[VmState] = &[VmState::Active, VmState::Stopped, VmState::Paused, VmState::Suspended];
const CREATE_IMAGE: Rule = Rule::new("createImage", AT_HAND);
const CREATE_BACKUP: Rule = Rule::new("createBackup", AT_HAND);
const SHELVE: Rule = Rule::new("shelve", AT_HAND);
const OFFLOAD: Rule = Rule::new("shelveOffload", &[]);
const UNSHELVE: Rule = Rule::new("unshelve", &[VmState::ShelvedOffloaded]);

/// What a copy of a disk is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose<'a> {
    /// An image like any other.
    Image,
    /// One of the newest so many of a kind, which its user has named.
    Backup(&'a str, i64),
    /// The server's disk, while it is shelved.
    Shelf,
}

/// The image is there at once, its bytes come when the host has copied the disk.
pub(super) async fn create_image(asked: &Asked<'_>) -> Result<Response, ApiError> {
    let mut fields = Fields::open(json!({ "createImage": asked.argument }), "createImage", &[])?;
    let name = input::server_name(&mut fields)?;
    let metadata = input::metadata(fields.take("metadata"))?;
    fields.finish()?;
    let mut act = Act::begin(asked.app, asked.ctx, asked.id, &CREATE_IMAGE).await?;
    let image_id = capture(&mut act, asked, &name, &metadata, Purpose::Image).await?;
    act.finish(asked.app, asked.ctx, &CREATE_IMAGE, Some(TaskState::ImageUploading)).await?;
    Ok(copied(asked, Some(&image_id)))
}

/// The same; when the bytes are there, the oldest backups of that kind go.
pub(super) async fn create_backup(asked: &Asked<'_>) -> Result<Response, ApiError> {
    let mut fields = Fields::open(json!({ "createBackup": asked.argument }), "createBackup", &[])?;
    let name = input::server_name(&mut fields)?;
    let mut metadata = input::metadata(fields.take("metadata"))?;
    let kind = fields.string("backup_type")?.ok_or_else(|| input::required("backup_type"))?;
    let rotation = fields.take("rotation").ok_or_else(|| input::required("rotation"))?;
    let rotation = input::number(&rotation).and_then(|number| i64::try_from(number).ok());
    let rotation = rotation.ok_or_else(|| invalid("rotation", asked.argument, "has no number of images"))?;
    fields.finish()?;
    metadata.insert("image_type".into(), "backup".into());
    metadata.insert("backup_type".into(), kind.clone());
    let mut act = Act::begin(asked.app, asked.ctx, asked.id, &CREATE_BACKUP).await?;
    let image_id = capture(&mut act, asked, &name, &metadata, Purpose::Backup(&kind, rotation)).await?;
    act.finish(asked.app, asked.ctx, &CREATE_BACKUP, Some(TaskState::ImageUploading)).await?;
    // With nothing kept there is no image to be looked at.
    Ok(copied(asked, Some(image_id.as_str()).filter(|_| rotation > 0 || asked.version.has(45))))
}

/// Tells the image's id: since 2.45 in the body, before as its address.
fn copied(asked: &Asked<'_>, image_id: Option<&str>) -> Response {
    if asked.version.has(45) {
        return (StatusCode::ACCEPTED, Json(json!({ "image_id": image_id }))).into_response();
    }
    let mut response = StatusCode::ACCEPTED.into_response();
    let location = image_id.map(|id| format!("{}/image/v2/images/{id}", asked.app.config.public_url));
    if let Some(location) = location.and_then(|location| HeaderValue::from_str(&location).ok()) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// Makes the image's record and asks the host for a copy of the disk.
async fn capture(
    act: &mut Act,
    asked: &Asked<'_>,
    name: &str,
    metadata: &BTreeMap<String, String>,
    purpose: Purpose<'_>,
) -> Result<String, ApiError> {
    let boot = act.row.boot()?;
    let origin = snapshot::Origin {
        server_id: &act.row.id,
        project_id: &act.row.project_id,
        image_id: &act.row.image_id,
        kernel: boot.kernel.as_ref().map(|kernel| kernel.sha256.as_str()),
        ramdisk: boot.ramdisk.as_ref().map(|ramdisk| ramdisk.sha256.as_str()),
        command_line: boot.command_line.as_deref(),
        // Without a size of its own the disk is as large as the image.
        min_disk_gib: act.row.disk_gib,
    };
    let image_id = snapshot::create(&mut act.tx, asked.ctx, name, metadata, &origin).await?;
    let (kind, rotation) = match purpose {
        Purpose::Backup(kind, rotation) => (Some(kind), Some(rotation)),
        Purpose::Image | Purpose::Shelf => (None, None),
    };
    sqlx::query(
        "INSERT INTO server_captures (image_id, server_id, shelving, created_us, backup_type, backup_rotation)
         VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(&image_id)
    .bind(&act.row.id)
    .bind(purpose == Purpose::Shelf)
    .bind(now_us())
    .bind(kind)
    .bind(rotation)
    .execute(&mut *act.tx)
    .await?;
    Ok(image_id)
}

/// The server is stopped, its disk becomes an image, and it leaves its host; addresses and ids stay its own.
pub(super) async fn shelve(asked: &Asked<'_>) -> Result<Response, ApiError> {
    asked.nothing()?;
    let mut act = Act::begin(asked.app, asked.ctx, asked.id, &SHELVE).await?;
    let name = format!("{}-shelved", act.row.name.chars().take(240).collect::<String>());
    let image_id = capture(&mut act, asked, &name, &BTreeMap::new(), Purpose::Shelf).await?;
    sqlx::query("UPDATE servers SET desired_power = $2, shelved_image_id = $3 WHERE id = $1")
        .bind(&act.row.id)
        .bind(power_word(DesiredPower::Stopped))
        .bind(&image_id)
        .execute(&mut *act.tx)
        .await?;
    act.finish(asked.app, asked.ctx, &SHELVE, Some(TaskState::ShelvingImageUploading)).await?;
    Ok(StatusCode::ACCEPTED.into_response())
}

/// Shelved servers leave their host at once, so none is ever shelved and on a host.
pub(super) async fn offload(asked: &Asked<'_>) -> Result<Response, ApiError> {
    asked.nothing()?;
    Act::begin(asked.app, asked.ctx, asked.id, &OFFLOAD).await?;
    Err(ApiError::internal("an action passed that no state allows"))
}

fn zone(asked: &Asked<'_>) -> Result<Option<String>, ApiError> {
    if !asked.version.has(77) || asked.argument.is_null() {
        return asked.nothing().map(|()| None);
    }
    let alone = asked.argument.as_object().is_some_and(|fields| fields.len() == 1);
    match asked.argument.get("availability_zone").and_then(Value::as_str).filter(|_| alone) {
        Some(zone) => Ok(Some(zone.to_owned())),
        None => Err(invalid("unshelve", asked.argument, "is not null or {\"availability_zone\": \"…\"}")),
    }
}

/// A new place for a shelved server, with a disk made of its image and empty ones beside it. The image has then done its duty.
pub(super) async fn unshelve(asked: &Asked<'_>) -> Result<Response, ApiError> {
    let zone = zone(asked)?;
    let mut tx = asked.app.begin().await?;
    let row = row::visible(&mut tx, asked.ctx, asked.id).await?;
    check_lock(asked.ctx, &row)?;
    UNSHELVE.check(&row)?;
    let mut boot = row.boot()?;
    let released = row.digests()?;
    boot.disk = shelved_disk(&mut tx, &row).await?;
    let amount = |stored: i64| u64::try_from(stored).unwrap_or(0);
    let claim = row.disk_gib.max(create::gib(boot.disk.size)?) + row.flavor().local_gib();
    let number = row.disk_last + 1;
    let local_disks = local::anew(number, &row.local_disks()?)?;
    let request = scheduler::Request {
        resources: Resources {
            vcpus: amount(row.vcpus),
            memory_mib: amount(row.memory_mib),
            disk_gib: amount(claim),
        },
        zone,
        ..create::needs(&row.extra_specs()?)?
    };
    let views = hosts::views(&mut tx).await?;
    let rules = Rules { policy: hosts::policy(&mut tx).await?, ..Rules::default() };
    let mut rng = Rng::seeded(u64::from_le_bytes(create::random()?));
    let chosen = scheduler::schedule(&request, &views, &rules, &mut rng)
        .map_err(|refused| ApiError::Conflict(refused.to_string()))?;
    let host = chosen.to_string();
    let zone = views.into_iter().find(|view| view.id == chosen).map(|view| view.zone).unwrap_or_default();
    sqlx::query(
        "UPDATE servers SET host_id = $2, availability_zone = $3, boot = $4, disk_claim_gib = $5,
             disk_number = $7, local_disks = $8, disk_last = $9, disk_copy_of = NULL, desired_power = $6,
             run_generation = run_generation + 1, shelved_image_id = NULL WHERE id = $1",
    )
    .bind(&row.id)
    .bind(&host)
    .bind(zone)
    .bind(serde_json::to_string(&boot).map_err(ApiError::internal)?)
    .bind(claim)
    .bind(power_word(DesiredPower::Running))
    .bind(number)
    .bind(serde_json::to_string(&local_disks).map_err(ApiError::internal)?)
    .bind(local::last(number, &local_disks))
    .execute(&mut *tx)
    .await?;
    let touched = note(&mut tx, asked.ctx, &row, &host, &UNSHELVE, Some(TaskState::Spawning)).await?;
    remove_image(&mut tx, &row).await?;
    let others = server::touch_others(&mut tx, &row.id).await?;
    tx.commit().await?;
    asked.app.hub.wake(touched);
    asked.app.hub.wake_all(others);
    blobs::release(asked.app, &released).await?;
    Ok(StatusCode::ACCEPTED.into_response())
}

/// The bytes of a shelved server's disk.
async fn shelved_disk(tx: &mut Conn, row: &row::ServerRow) -> Result<ImageSpec, ApiError> {
    let found: Option<(String, i64)> = sqlx::query_as(
        "SELECT sha256, size FROM images WHERE id = $1 AND status = 'active' AND sha256 IS NOT NULL",
    )
    .bind(&row.shelved_image_id)
    .fetch_optional(tx)
    .await?;
    let (sha256, size) = found.ok_or_else(|| {
        ApiError::Conflict(format!("The image of the shelved instance {} is not there any more.", row.id))
    })?;
    Ok(ImageSpec { sha256, size: u64::try_from(size).map_err(ApiError::internal)? })
}

/// Removes the image of a server that is no longer shelved; its bytes go when nothing names them.
pub(in super::super) async fn remove_image(tx: &mut Conn, row: &row::ServerRow) -> Result<(), ApiError> {
    sqlx::query("DELETE FROM images WHERE id = $1").bind(&row.shelved_image_id).execute(tx).await?;
    Ok(())
}
