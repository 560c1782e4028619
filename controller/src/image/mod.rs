//! Images: Glance v2.
//!
//! A record ([`record`]) is made first ([`attributes`]), then its bytes are sent ([`data`]):
//!
//! ```text
//!            PUT file                all bytes stored, content is what disk_format says
//!   queued ───────────▶ saving ──────────────────────────────────────────────▶ active ◀──▶ deactivated
//!      ▲                   │ upload broke off, content refused, controller restarted     (administrator)
//!      └───────────────────┘
//! ```
//!
//! Bytes are in a content-addressed store; images with the same bytes share them, and they go with the last image or
//! server that needs them ([`blobs`]). What a server boots from an image is resolved in [`boot`].
//!
//! Mote takes disks (`raw`, `qcow2`, `iso`), kernels (`aki`) and initial RAM disks (`ari`), and looks whether the content
//! is that ([`content`]). Hosts read raw disks only: of a qcow2 disk one is made once, here, and kept beside it. Bytes can
//! also be staged, or downloaded by the controller, and then imported ([`import`]). What metadata means is defined in [`metadefs`].

pub(crate) mod attributes;
pub mod blobs;
pub mod boot;
mod content;
pub(crate) mod data;
mod import;
#[cfg(test)]
mod import_tests;
pub(crate) mod index;
mod info;
mod members;
mod metadefs;
pub(crate) mod patch;
pub(crate) mod record;
pub(crate) mod routes;
pub(crate) mod snapshot;
pub mod store;
mod tasks;
#[cfg(test)]
mod tests;

pub use boot::{BootImages, ImageBytes, image_for_boot};

use axum::{
    Router,
    routing::{get, post, put},
};

use crate::{
    app::App,
    http::{context::Ctx, error::ApiError},
};
use record::Image;

/// Routes below `/image`.
pub fn router() -> Router<App> {
    Router::new()
        .route("/", get(info::versions))
        .route("/versions", get(info::versions))
        .route("/v2/schemas/{name}", get(info::schema))
        .route("/v2/info/import", get(import::info))
        .route("/v2/info/stores", get(info::stores))
        .route("/v2/info/stores/detail", get(info::stores_detail))
        .route("/v2/info/usage", get(info::usage))
        .route("/v2/tasks", get(tasks::index).post(tasks::refuse))
        .route("/v2/tasks/{id}", get(tasks::show))
        .route("/v2/images", get(index::index).post(routes::create))
        .route("/v2/images/{id}", get(routes::show).patch(routes::update).delete(routes::delete))
        .route("/v2/images/{id}/file", get(data::download).put(data::upload))
        .route("/v2/images/{id}/stage", put(data::stage))
        .route("/v2/images/{id}/import", post(import::import))
        .route("/v2/images/{id}/tasks", get(tasks::of_image))
        .route("/v2/images/{id}/actions/{action}", post(routes::act))
        .route("/v2/images/{id}/tags/{tag}", put(routes::add_tag).delete(routes::remove_tag))
        .route("/v2/images/{id}/members", get(members::index).post(members::add))
        .route(
            "/v2/images/{id}/members/{member}",
            get(members::show).put(members::answer).delete(members::remove),
        )
        .merge(metadefs::router())
}

fn not_found(id: &str) -> ApiError {
    let id: String = id.chars().take(64).collect();
    ApiError::NotFound(format!("No image found with ID {id}"))
}

/// Who may change an image: its owner's members, and administrators. To others it is unknown, or (if they see it)
/// forbidden.
fn require_owner(image: &Image, ctx: &Ctx) -> Result<(), ApiError> {
    if ctx.is_admin {
        return Ok(());
    }
    match ctx.project_id.as_deref() == Some(image.owner.as_str()) {
        true => ctx.require_writer(),
        false => Err(ApiError::Forbidden(format!("You are not permitted to change image {}.", image.id))),
    }
}
