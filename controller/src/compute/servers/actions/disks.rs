//! rebuild, rescue, unrescue: another disk to boot from.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use mote_host_api::{BootSpec, DesiredPower, RescueSpec};
use serde_json::{Value, json};

use super::{
    super::{
        super::state::power_word,
        Whole, create,
        details::Details,
        guest::{DiskConfig, password_hash},
        input::{self, Access, Fields},
        local,
        view::{self, Form},
    },
    Act, ApiError, Asked, Rule, TaskState, VmState, invalid, row,
};
use crate::{
    http::json::answer,
    image::{self, blobs},
};

const REBUILD: Rule = Rule::new("rebuild", &[VmState::Active, VmState::Stopped, VmState::Error]);
const RESCUE: Rule = Rule::new("rescue", &[VmState::Active, VmState::Stopped, VmState::Error]);
const UNRESCUE: Rule = Rule::new("unrescue", &[VmState::Rescued]);

/// The root disk is made anew of an image, other disks anew and empty; addresses and ids stay.
pub(super) async fn rebuild(asked: &Asked<'_>) -> Result<Response, ApiError> {
    let version = asked.version;
    let mut fields = Fields::open(json!({ "rebuild": asked.argument }), "rebuild", &[])?;
    let image_id = fields.uuid("imageRef")?;
    let image_id = image_id.ok_or_else(|| input::required("imageRef"))?;
    let name = fields.has("name").then(|| input::server_name(&mut fields)).transpose()?;
    let metadata = fields.take("metadata").map(|items| input::metadata(Some(items))).transpose()?;
    let description = if version.has(19) { input::description(&mut fields)? } else { None };
    // `null` takes the key away.
    let key_name = match version.has(54) && fields.contains("key_name") {
        true => Some(fields.string("key_name")?),
        false => None,
    };
    let user_data = if version.has(57) { input::user_data(&mut fields)? } else { None };
    let hostname = if version.has(90) { input::hostname(&mut fields)? } else { None };
    fields.only("preserve_ephemeral", &[false.into()])?;
    let (access, disk_config) = (Access::take(&mut fields)?, DiskConfig::take(&mut fields)?);
    let password_hash = password_hash(&mut fields)?;
    fields.finish()?;
    let mut act = Act::begin(asked.app, asked.ctx, asked.id, &REBUILD).await?;
    let images = match image::image_for_boot(&mut act.tx, &image_id, asked.ctx).await {
        Err(ApiError::NotFound(text)) => return Err(ApiError::BadRequest(format!("imageRef: {text}."))),
        other => other?,
    };
    let claim = create::fits(&act.row.flavor(), &images)?;
    let public_key = match key_name.iter().flatten().next() {
        Some(name) => Some(create::public_key(&mut act.tx, asked.ctx, name).await?),
        None => None,
    };
    let boot = serde_json::to_string(&create::boot_spec(images)).map_err(ApiError::internal)?;
    let released = act.row.digests()?;
    let number = act.row.disk_last + 1;
    let local_disks = local::anew(number, &act.row.local_disks()?)?;
    let runs = act.row.desired_power() != DesiredPower::Stopped;
    let old = act.row.metadata()?;
    let items = metadata.unwrap_or(old);
    sqlx::query(
        "UPDATE servers SET image_id = $2, boot = $3, disk_claim_gib = $4, disk_number = $5, local_disks = $20, disk_last = $21,
             disk_copy_of = NULL, run_generation = run_generation + $6, name = COALESCE($7, name), metadata = $8,
             restart_policy = $9, description = COALESCE($10, description), user_data = COALESCE($11, user_data),
             hostname = COALESCE($12, hostname),
             config_drive = CASE WHEN config_drive IS NULL THEN NULL ELSE $5 END, fault_code = NULL, fault_message = NULL, fault_us = NULL,
             access_ipv4 = COALESCE($13, access_ipv4), access_ipv6 = COALESCE($14, access_ipv6),
             disk_config = COALESCE($15, disk_config), admin_password_hash = COALESCE($16, admin_password_hash),
             key_name = CASE WHEN $17 THEN $18 ELSE key_name END,
             public_key = CASE WHEN $17 THEN $19 ELSE public_key END
         WHERE id = $1",
    )
    .bind(&act.row.id)
    .bind(&image_id)
    .bind(boot)
    .bind(claim)
    .bind(number)
    .bind(i64::from(runs))
    .bind(name)
    .bind(serde_json::to_string(&items).map_err(ApiError::internal)?)
    .bind(input::restart_policy(&items)?)
    .bind(description)
    .bind(user_data)
    .bind(hostname)
    .bind(access.ipv4)
    .bind(access.ipv6)
    .bind(disk_config.map(DiskConfig::word))
    .bind(password_hash)
    .bind(key_name.is_some())
    .bind(key_name.flatten())
    .bind(public_key)
    .bind(serde_json::to_string(&local_disks).map_err(ApiError::internal)?)
    .bind(local::last(number, &local_disks))
    .execute(&mut *act.tx)
    .await?;
    let id = act.row.id.clone();
    act.finish(asked.app, asked.ctx, &REBUILD, Some(TaskState::Rebuilding)).await?;
    blobs::release(asked.app, &released).await?;
    let mut db = asked.app.db.acquire().await?;
    let row = row::visible(&mut db, asked.ctx, &id).await?;
    let details = Details::of(&mut db, &id).await?;
    let server = view::document(asked.app, asked.ctx, (version, Form::Rebuilt), &row, &details)?;
    let document = answer(&Whole { server })?;
    Ok((StatusCode::ACCEPTED, document).into_response())
}

/// The server boots from an image of its own choice, with its root disk as second drive.
pub(super) async fn rescue(asked: &Asked<'_>) -> Result<Response, ApiError> {
    let (image_id, password_hash) = match asked.argument {
        Value::Null => (None, None),
        argument => {
            let mut fields = Fields::open(json!({ "rescue": argument }), "rescue", &[])?;
            let found = (fields.uuid("rescue_image_ref")?, password_hash(&mut fields)?);
            fields.finish()?;
            found
        }
    };
    let mut act = Act::begin(asked.app, asked.ctx, asked.id, &RESCUE).await?;
    let boot: BootSpec = match &image_id {
        None => act.row.boot()?,
        Some(id) => match image::image_for_boot(&mut act.tx, id, asked.ctx).await {
            Err(ApiError::NotFound(_)) => {
                return Err(invalid("rescue_image_ref", &id.as_str().into(), "is not an image here"));
            }
            other => create::boot_spec(other?),
        },
    };
    let number = act.row.disk_last + 1;
    let claim = create::gib(boot.disk.size)?;
    let disk = u32::try_from(number).map_err(ApiError::internal)?;
    let spec = serde_json::to_string(&RescueSpec { disk, boot }).map_err(ApiError::internal)?;
    sqlx::query(
        "UPDATE servers SET rescue = $2, disk_last = $3, disk_claim_gib = disk_claim_gib + $4,
             desired_power = $5, run_generation = run_generation + 1,
             admin_password_hash = COALESCE($6, admin_password_hash) WHERE id = $1",
    )
    .bind(&act.row.id)
    .bind(spec)
    .bind(number)
    .bind(claim)
    .bind(power_word(DesiredPower::Running))
    .bind(password_hash)
    .execute(&mut *act.tx)
    .await?;
    act.finish(asked.app, asked.ctx, &RESCUE, Some(TaskState::Rescuing)).await?;
    Ok(Json(json!({})).into_response())
}

/// Back to the root disk.
pub(super) async fn unrescue(asked: &Asked<'_>) -> Result<Response, ApiError> {
    asked.nothing()?;
    let mut act = Act::begin(asked.app, asked.ctx, asked.id, &UNRESCUE).await?;
    let claim = match act.row.rescue()? {
        Some(rescue) => create::gib(rescue.boot.disk.size)?,
        None => 0,
    };
    let released = act.row.digests()?;
    sqlx::query(
        "UPDATE servers SET rescue = NULL, disk_claim_gib = disk_claim_gib - $2, desired_power = $3,
             run_generation = run_generation + 1 WHERE id = $1",
    )
    .bind(&act.row.id)
    .bind(claim)
    .bind(power_word(DesiredPower::Running))
    .execute(&mut *act.tx)
    .await?;
    act.finish(asked.app, asked.ctx, &UNRESCUE, Some(TaskState::Unrescuing)).await?;
    blobs::release(asked.app, &released).await?;
    Ok(StatusCode::ACCEPTED.into_response())
}
