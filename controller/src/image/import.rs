//! `POST /v2/images/{id}/import`: an image's content from its stage, or from a web server.
//!
//! ```text
//!   queued ── PUT stage ──▶ uploading ── glance-direct ──▶ importing ── all well ──▶ active
//!     │                                                     ▲   │
//!     └───────────────────── web-download ──────────────────┘   └─ else: queued, and the task says why
//! ```
//!
//! The answer (202) comes before the work, which a task ([`super::tasks`]) tells of. It is done by the controller that was
//! asked; if that ends meanwhile, the next start of a controller gives the image back.

use axum::{
    Json,
    body::Body,
    extract::{Path, State},
};
use http::{HeaderName, StatusCode};
use mote_images::Digest;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use url::Url;

use super::{
    content::{self, Bytes},
    data::{self, Upload},
    record::{self, Status},
    require_owner, tasks,
};
use crate::{
    app::App,
    http::{client, context::Ctx, error::ApiError, json::JsonBody},
};

/// Tells clients the methods.
pub const METHODS_HEADER: HeaderName = HeaderName::from_static("openstack-image-import-methods");
/// Imports that are worked on at the same time; others wait as pending tasks.
static IMPORTS: Semaphore = Semaphore::const_new(8);
/// Longest address of a download.
const MAX_URI_BYTES: usize = 2048;

/// Body of the request.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Import {
    method: Method,
    /// Where to: the one store there is, if named.
    #[serde(default)]
    stores: Option<Vec<String>>,
    #[serde(default)]
    all_stores: bool,
    /// With one store there is no half of a success.
    #[serde(default)]
    all_stores_must_succeed: Option<bool>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Method {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    uri: Option<String>,
}

/// A method that can be carried out.
enum Source {
    Stage(Digest),
    Web(Url),
}

/// Names of the methods that this controller has.
pub fn methods(app: &App) -> Vec<&'static str> {
    let mut methods = vec!["glance-direct"];
    methods.extend((!app.config.image_download_hosts.is_empty()).then_some("web-download"));
    methods
}

/// Refuses a list of stores (comma-separated) that names others than there are.
///
/// # Errors
/// 400.
pub fn check_stores(app: &App, stores: Option<&str>) -> Result<(), ApiError> {
    let store = app.image_store.names().0;
    let other = stores.into_iter().flat_map(|list| list.split(',')).find(|name| name.trim() != store);
    other.map_or(Ok(()), |name| {
        let name: String = name.chars().take(64).collect();
        Err(ApiError::BadRequest(format!("There is no store {name:?}, only {store:?}.")))
    })
}

/// `POST /v2/images/{id}/import`.
///
/// # Errors
/// 400 for a method that isn't there, 403 for a host that isn't allowed, 409 if the image isn't in the right state.
pub async fn import(
    State(app): State<App>,
    ctx: Ctx,
    Path(id): Path<String>,
    JsonBody(body): JsonBody<Import>,
) -> Result<StatusCode, ApiError> {
    let web = web_source(&app, &body.method)?;
    check_stores(&app, body.stores.map(|stores| stores.join(",")).as_deref())?;
    let mut tx = app.begin().await?;
    let image = record::find(&mut tx, &id, &ctx).await?;
    require_owner(&image, &ctx)?;
    let source = match web {
        Some(url) if image.status == Status::Queued => Source::Web(url),
        None if image.staged.is_some() && image.status == Status::Uploading => {
            Source::Stage(record::staged(&mut tx, &image.id).await?)
        }
        _ => {
            let text = format!(
                "Image {} can't be imported by {} in status '{}': {}.",
                image.id,
                body.method.name,
                image.status.as_str(),
                match image.status {
                    Status::Queued => "stage its bytes first",
                    Status::Uploading => "bytes are staged, or being staged, for glance-direct",
                    _ => "it has its bytes or is getting them",
                }
            );
            return Err(ApiError::Conflict(text));
        }
    };
    let (Some(disk_format), Some(_)) = (&image.disk_format, &image.container_format) else {
        let text = "The image needs a disk_format and a container_format before it is imported.";
        return Err(ApiError::Conflict(text.into()));
    };
    let upload_id = data::claim(&app, &mut tx, &image.id, Some(Status::Importing)).await?;
    let input = json!({
        "image_id": image.id,
        "import_req": {
            "method": body.method,
            "stores": [app.image_store.names().0],
            "all_stores": body.all_stores,
            "all_stores_must_succeed": body.all_stores_must_succeed.unwrap_or(true),
        },
    });
    tasks::insert(&mut tx, &ctx, &image, &upload_id, &input).await?;
    tx.commit().await?;
    let upload =
        Upload { image_id: image.id, upload_id, disk_format: disk_format.clone(), replaced: image.staged };
    drop(tokio::spawn(run(app, upload, source)));
    Ok(StatusCode::ACCEPTED)
}

/// The address of a web-download; none for glance-direct.
fn web_source(app: &App, method: &Method) -> Result<Option<Url>, ApiError> {
    let refused = |text: String| Err(ApiError::BadRequest(text));
    match (method.name.as_str(), &method.uri) {
        ("glance-direct", None) => Ok(None),
        ("glance-direct", Some(_)) => refused("The method glance-direct takes no uri.".into()),
        ("web-download", _) if app.config.image_download_hosts.is_empty() => {
            let text =
                "The method web-download is off: the administrator allows no host by --image-download-host.";
            refused(text.into())
        }
        ("web-download", None) => refused("The method web-download needs a uri.".into()),
        ("web-download", Some(uri)) => match uri.len() <= MAX_URI_BYTES {
            true => client::allowed(uri, &app.config.image_download_hosts).map(Some),
            false => refused(format!("The uri may have at most {MAX_URI_BYTES} bytes.")),
        },
        ("copy-image", _) => refused(
            "The method copy-image copies from one store to another, and there is only one store.".into(),
        ),
        _ => refused(format!("The method must be one of: {}.", methods(app).join(", "))),
    }
}

async fn run(app: App, upload: Upload, source: Source) {
    let outcome = work(&app, &upload, source).await;
    let failure = outcome.err().map(|error| match &error {
        ApiError::Internal(_) => {
            tracing::error!(image = upload.image_id, error = %crate::http::error::chain(&error), "import failed");
            "An unexpected error; the controller's log says more.".to_owned()
        }
        error => error.to_string(),
    });
    let ended = async {
        if failure.is_some() {
            data::abandon(&app, &upload).await?;
        }
        tasks::end(&app, &upload, failure.as_deref()).await
    };
    if let Err(error) = ended.await {
        tracing::error!(image = upload.image_id, %error, "the image stays in state importing until the next start");
    }
}

async fn work(app: &App, upload: &Upload, source: Source) -> Result<(), ApiError> {
    let _permit = IMPORTS.acquire().await.map_err(ApiError::internal)?;
    tasks::begin(app, upload).await?;
    let bytes = match source {
        Source::Stage(digest) => Bytes::Stored(digest),
        Source::Web(url) => {
            let body: Body = client::get(url, &app.config.image_download_hosts).await?;
            Bytes::New(Box::new(data::receive(app, Some(&upload.disk_format), body).await?))
        }
    };
    content::finish(app, upload, bytes).await
}

/// `GET /v2/info/import`.
pub async fn info(State(app): State<App>, _ctx: Ctx) -> Json<Value> {
    let methods =
        json!({"description": "Import methods available.", "type": "array", "value": methods(&app)});
    Json(json!({"import-methods": methods}))
}
