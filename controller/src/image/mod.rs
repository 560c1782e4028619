//! Images (Glance v2).

use axum::Router;

use crate::{
    app::App,
    http::{context::Ctx, error::ApiError},
};

/// Routes below `/image`.
pub fn router() -> Router<App> {
    Router::new()
}

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
    /// Kernel (`kernel_id`).
    pub kernel: ImageBytes,
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

/// What a server that boots from this image consists of.
///
/// # Errors
/// 404 if the image isn't the asker's to see; 400 if it can't be booted (the text says why).
pub async fn image_for_boot(
    _db: &mut sqlx::SqliteConnection,
    image_id: &str,
    _ctx: &Ctx,
) -> Result<BootImages, ApiError> {
    Err(ApiError::NotFound(format!("Image {image_id} could not be found.")))
}
