//! What a server boots from an image: Nova's own properties `kernel_id`, `ramdisk_id`, `os_command_line`, `trait:…`.

use super::record::{self, Image, Status};
use crate::db::Conn;
use crate::http::{context::Ctx, error::ApiError};

/// Bytes of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageBytes {
    /// Image id.
    pub id: String,
    /// SHA-256, lower-case hex.
    pub sha256: String,
    /// Bytes.
    pub size: u64,
}

/// All that a server needs of its image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootImages {
    /// Root disk.
    pub disk: ImageBytes,
    /// Kernel (`kernel_id`). Without one the disk is a whole disk that brings its own.
    pub kernel: Option<ImageBytes>,
    /// Ramdisk (`ramdisk_id`).
    pub ramdisk: Option<ImageBytes>,
    /// `os_command_line`.
    pub command_line: Option<String>,
    /// Traits `T` that are `trait:T=required`.
    pub required_traits: Vec<String>,
    /// Traits `T` that are `trait:T=forbidden`.
    pub forbidden_traits: Vec<String>,
    /// GiB that the root disk must have.
    pub min_disk_gib: u64,
    /// MiB of memory that the server must have.
    pub min_ram_mib: u64,
}

/// What a server that boots from this image consists of. Ask inside the transaction that writes the server: then the
/// bytes stay as long as the server.
///
/// # Errors
/// 404 if the image isn't the asker's to see; 400 if it can't be booted (the text says why).
pub async fn image_for_boot(conn: &mut Conn, image_id: &str, ctx: &Ctx) -> Result<BootImages, ApiError> {
    let image = record::find(conn, image_id, ctx).await?;
    let disk = bytes_of(&image, &["raw", "qcow2", "iso"])?;
    let properties = &image.properties;
    let kernel = optional_part(conn, &image, "kernel_id", "aki", ctx).await?;
    let ramdisk = optional_part(conn, &image, "ramdisk_id", "ari", ctx).await?;
    if kernel.is_none() && (ramdisk.is_some() || image.disk_format.as_deref() == Some("iso")) {
        return Err(ApiError::BadRequest(format!(
            "Image {image_id} can't be booted: its property kernel_id, the id of a kernel image, is not set. Only a \
             whole disk (raw or qcow2, without ramdisk_id) brings its own kernel."
        )));
    }
    let (required_traits, forbidden_traits) = traits(&image)?;
    Ok(BootImages {
        disk,
        kernel,
        ramdisk,
        command_line: properties.get("os_command_line").cloned(),
        required_traits,
        forbidden_traits,
        min_disk_gib: u64::try_from(image.min_disk_gib).unwrap_or(0),
        min_ram_mib: u64::try_from(image.min_ram_mib).unwrap_or(0),
    })
}

/// The image that a property names, if it names one.
async fn optional_part(
    conn: &mut Conn,
    image: &Image,
    property: &str,
    disk_format: &str,
    ctx: &Ctx,
) -> Result<Option<ImageBytes>, ApiError> {
    let Some(id) = image.properties.get(property).filter(|id| !id.is_empty()) else { return Ok(None) };
    let explained = |error: ApiError| match error {
        ApiError::NotFound(text) | ApiError::BadRequest(text) => ApiError::BadRequest(format!(
            "The image can't be booted because of its property {property}: {text}"
        )),
        other => other,
    };
    let image = record::find(conn, id, ctx).await.map_err(explained)?;
    bytes_of(&image, &[disk_format]).map(Some).map_err(explained)
}

fn bytes_of(image: &Image, disk_formats: &[&str]) -> Result<ImageBytes, ApiError> {
    let refused = |text: String| Err(ApiError::BadRequest(text));
    let content = match (&image.content, image.status) {
        (Some(content), Status::Active) => content,
        (_, status) => {
            return refused(format!("Image {} is not active, but {}.", image.id, status.as_str()));
        }
    };
    let actual = image.disk_format.as_deref().unwrap_or_default();
    if !disk_formats.contains(&actual) {
        let wanted = disk_formats.join(" or ");
        return refused(format!("Image {} has the disk_format {actual}, not {wanted}.", image.id));
    }
    let (sha256, size) = content.boot.clone();
    Ok(ImageBytes { id: image.id.clone(), sha256, size })
}

/// (required, forbidden).
fn traits(image: &Image) -> Result<(Vec<String>, Vec<String>), ApiError> {
    let (mut required, mut forbidden) = (Vec::new(), Vec::new());
    for (name, value) in &image.properties {
        let Some(name) = name.strip_prefix("trait:") else { continue };
        match value.as_str() {
            "required" => required.push(name.to_owned()),
            "forbidden" => forbidden.push(name.to_owned()),
            _ => {
                let text =
                    format!("The property trait:{name} of image {} must be required or forbidden.", image.id);
                return Err(ApiError::BadRequest(text));
            }
        }
    }
    Ok((required, forbidden))
}
