//! Images that are made of servers' disks.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use uuid::Uuid;

use super::{
    attributes,
    record::{self, Image, Status},
};
use crate::{
    db::{Conn, now_us},
    http::{context::Ctx, error::ApiError},
};

/// What an image is made of.
#[derive(Debug)]
pub(crate) struct Origin<'a> {
    /// The server.
    pub(crate) server_id: &'a str,
    /// Its project, which will own the image.
    pub(crate) project_id: &'a str,
    /// The image that the server was made of; it may be gone.
    pub(crate) image_id: &'a str,
    /// Digests of the kernel and the initial ramdisk that it boots.
    pub(crate) kernel: Option<&'a str>,
    /// See above.
    pub(crate) ramdisk: Option<&'a str>,
    /// Its command line.
    pub(crate) command_line: Option<&'a str>,
    /// GiB that its disk has.
    pub(crate) min_disk_gib: i64,
}

/// Makes the record of an image whose bytes will be sent by the server's host. It boots as the server does.
///
/// # Errors
/// 400 for a name or properties that an image can't have.
pub(crate) async fn create(
    tx: &mut Conn,
    ctx: &Ctx,
    name: &str,
    metadata: &BTreeMap<String, String>,
    origin: &Origin<'_>,
) -> Result<String, ApiError> {
    let mut properties: BTreeMap<String, String> = match record::find(tx, origin.image_id, ctx).await {
        Ok(image) => image.properties.into_iter().filter(|(name, _)| name.starts_with("trait:")).collect(),
        Err(ApiError::NotFound(_)) => BTreeMap::new(),
        Err(other) => return Err(other),
    };
    for (property, digest) in [("kernel_id", origin.kernel), ("ramdisk_id", origin.ramdisk)] {
        if let Some(id) = image_of(tx, origin, property, digest).await? {
            properties.insert(property.into(), id);
        }
    }
    properties.extend(origin.command_line.map(|line| ("os_command_line".into(), line.to_owned())));
    let now = now_us();
    let mut image = Image {
        id: Uuid::new_v4().to_string(),
        owner: origin.project_id.to_owned(),
        name: None,
        status: Status::Queued,
        visibility: "private".into(),
        protected: false,
        hidden: false,
        disk_format: Some("raw".into()),
        container_format: Some("bare".into()),
        min_disk_gib: origin.min_disk_gib,
        min_ram_mib: 0,
        content: None,
        staged: None,
        properties,
        tags: BTreeSet::new(),
        created_us: now,
        updated_us: now,
    };
    // Its user may call it something else.
    let kind = [("image_type", "snapshot")];
    let own =
        [("base_image_ref", origin.image_id), ("instance_uuid", origin.server_id), ("user_id", &ctx.user_id)];
    let asked = metadata.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    for (property, value) in kind.into_iter().chain(asked).chain(own) {
        if attributes::is_base(property) {
            return Err(ApiError::BadRequest(format!(
                "metadata: an image can't be given a property {property}."
            )));
        }
        attributes::set(&mut image, property, &Value::String(value.to_owned()), ctx)?;
    }
    attributes::set(&mut image, "name", &Value::String(name.to_owned()), ctx)?;
    attributes::check(&image)?;
    record::insert(tx, &image).await?;
    Ok(image.id)
}

/// Removes the images that were to be made of a server's disk and have no bytes: now that nobody will send any, they would
/// stay `queued` for ever. Ask before the server's row goes.
///
/// # Errors
/// Of the database.
pub(crate) async fn abandon_of_server(tx: &mut Conn, server_id: &str) -> Result<(), ApiError> {
    sqlx::query(
        "DELETE FROM images WHERE status IN ('queued', 'saving')
             AND id IN (SELECT image_id FROM server_captures WHERE server_id = $1)",
    )
    .bind(server_id)
    .execute(tx)
    .await?;
    Ok(())
}

/// Removes the one image of that kind whose bytes were refused.
///
/// # Errors
/// Of the database.
pub(crate) async fn abandon(tx: &mut Conn, image_id: &str) -> Result<(), ApiError> {
    let sql = "DELETE FROM images WHERE id = $1 AND status IN ('queued', 'saving')";
    sqlx::query(sql).bind(image_id).execute(tx).await?;
    Ok(())
}

/// An image with these bytes that the project may use: that of the original image, else any.
async fn image_of(
    tx: &mut Conn,
    origin: &Origin<'_>,
    property: &str,
    digest: Option<&str>,
) -> Result<Option<String>, ApiError> {
    let Some(digest) = digest else { return Ok(None) };
    Ok(sqlx::query_scalar(
        "SELECT i.id FROM images i
         WHERE i.sha256 = $1 AND i.status = 'active'
             AND (i.owner = $2 OR i.visibility IN ('public', 'community')
                  OR (i.visibility = 'shared' AND EXISTS (
                      SELECT 1 FROM image_members m WHERE m.image_id = i.id AND m.member_id = $2)))
         ORDER BY (SELECT COUNT(*) FROM image_properties p
                   WHERE p.image_id = $3 AND p.name = $4 AND p.value = i.id) DESC, i.created_us, i.id
         LIMIT 1",
    )
    .bind(digest)
    .bind(origin.project_id)
    .bind(origin.image_id)
    .bind(property)
    .fetch_optional(tx)
    .await?)
}
