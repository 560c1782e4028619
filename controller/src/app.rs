//! What every handler shares, and the tree of routes.

use crate::db::{Pool, Tx};
use std::sync::Arc;

use axum::{Router, routing::get};

use crate::{
    compute,
    config::Config,
    db::{self, DbError},
    hosts,
    http::{self, error::ApiError, limits::Limiter},
    identity, image, network,
};

/// State of the running controller. Each layer around a route clones it for each request, so it is one pointer.
#[derive(Clone)]
pub struct App(Arc<Shared>);

impl std::ops::Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

/// What [`App`] points to.
pub struct Shared {
    /// Connections for reading. Write through [`App::begin`].
    pub db: Pool,
    /// The one connection that writes: a queue in this process instead of retries on a busy database.
    writer: Pool,
    /// Configuration.
    pub config: Arc<Config>,
    /// Counters of requests.
    pub metrics: Arc<http::metrics::Metrics>,
    /// How often a project may ask.
    pub project_limit: Arc<Limiter<String>>,
    /// How often an address may try to log in.
    pub login_limit: Arc<Limiter<std::net::IpAddr>>,
    /// Keys and password hashing.
    pub identity: Arc<identity::Identity>,
    /// Directory of images' bytes (blocking: use it in `spawn_blocking`).
    pub images: mote_images::store::Store,
    /// Where they are: there, or in a bucket.
    pub image_store: image::store::ImageStore,
    /// Held while bytes and the record that names them are made or removed together, see [`App::blob_turn`].
    blobs: Arc<tokio::sync::Mutex<()>>,
    /// This controller among the others of the same database.
    pub presence: Arc<db::Presence>,
    /// Hosts that wait, and questions to them.
    pub hub: hosts::Hub,
}

/// Why the controller's state could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Database.
    #[error("can't open the database")]
    Db(#[from] DbError),
    /// Keys.
    #[error("can't read or make the keys of identity")]
    Keys(#[source] ApiError),
    /// Image store.
    #[error("can't open the image store")]
    Images(#[from] mote_images::store::StoreError),
    /// Address of a bucket.
    #[error("the image store can't be used")]
    Bucket(#[from] image::store::BucketError),
    /// The bucket itself.
    #[error("the image store's bucket can't be used")]
    ImageStore(#[source] ApiError),
    /// What an earlier version has left can't be brought up to date.
    #[error("can't bring what an earlier version has made up to date")]
    Upgrade(#[source] ApiError),
}

impl App {
    /// Opens (creates, migrates) everything below `config.state_dir`.
    ///
    /// # Errors
    /// If the directory, the database, the keys or the image store can't be opened.
    pub async fn open(config: Config) -> Result<Self, OpenError> {
        let pools = db::open(&config.state_dir, config.database.as_deref()).await?;
        let place = || "the database".to_owned();
        let presence = db::Presence::announce(pools.postgres.as_ref()).await;
        let presence = presence.map_err(|source| DbError::Connect { place: place(), source })?;
        let presence = Arc::new(presence);
        let hub = hosts::Hub::default();
        if let Some(options) = &pools.postgres {
            hosts::share(&hub, options)
                .await
                .map_err(|source| DbError::Connect { place: place(), source })?;
        }
        let identity = Arc::new(identity::Identity::open(&pools).await.map_err(OpenError::Keys)?);
        let lifetime = std::time::Duration::from_secs(config.token_lifetime_s);
        tokio::spawn(identity.clone().rotate_keys(pools.clone(), lifetime));
        // The store's own directories are open to all (hosts share theirs); the one around them is not.
        let images = config.state_dir.join("images");
        db::create_private_dir(&images)?;
        let images = mote_images::store::Store::open(images)?;
        let bucket = config.image_store.as_ref().map(|(address, keys)| {
            image::store::Bucket::parse(address, keys.as_ref().map(|keys| keys.0.clone()))
        });
        let image_store = image::store::ImageStore::new(images.clone(), bucket.transpose()?);
        image_store.claim(&pools.write).await.map_err(OpenError::ImageStore)?;
        let app = Self(Arc::new(Shared {
            db: pools.read,
            writer: pools.write,
            metrics: Arc::default(),
            project_limit: Arc::new(Limiter::new(config.project_rate)),
            login_limit: Arc::new(Limiter::new(config.login_rate)),
            config: Arc::new(config),
            identity,
            images,
            image_store,
            blobs: Arc::default(),
            presence,
            hub,
        }));
        network::upgrade::run(&app).await.map_err(OpenError::Upgrade)?;
        Ok(app)
    }

    /// Begins a write transaction: waits for its turn, sees the newest state, and nobody else writes until it ends.
    /// Dropping it without `commit` undoes it. Never begin a second one while holding one.
    ///
    /// # Errors
    /// If the turn does not come in time or the database fails.
    pub async fn begin(&self) -> Result<Tx, ApiError> {
        Ok(db::begin_immediate(&self.writer).await?)
    }

    /// The counters, for Prometheus.
    pub(crate) fn metrics_text(&self) -> String {
        self.metrics.text(&self.db, &self.writer)
    }

    /// A turn to make or remove images' bytes together with the record that names them, among all controllers of this
    /// database. [`App::begin`] comes after it, never before.
    ///
    /// # Errors
    /// If the turn does not come in time or the database fails.
    pub(crate) async fn blob_turn(&self) -> Result<BlobTurn, ApiError> {
        let here = self.blobs.clone().lock_owned().await;
        Ok(BlobTurn { _everywhere: db::blobs_turn(&self.db).await?, _here: here })
    }
}

/// The turn of [`App::blob_turn`]; it ends when this is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct BlobTurn {
    _everywhere: Option<Tx>,
    _here: tokio::sync::OwnedMutexGuard<()>,
}

/// All routes with everything around them.
pub fn router(app: App) -> Router {
    http::middleware::wrap(api().with_state(app.clone()), app)
}

/// All routes alone.
pub(crate) fn api() -> Router<App> {
    let api = Router::new()
        .route("/", get(http::root))
        .route("/healthz", get(http::healthz))
        .route("/readyz", get(http::readyz))
        .route("/metrics", get(http::metrics))
        .route("/openapi.json", get(http::openapi::document))
        .nest("/identity", service(identity::router()))
        .nest("/image", service(image::router()))
        .nest("/compute", service(compute::router()))
        .nest("/network", service(network::router()))
        .nest("/mote/v1", service(hosts::router()));
    service(api)
}

/// A path that a service does not have, or not with that method, is its own kind of error.
fn service(router: Router<App>) -> Router<App> {
    router.fallback(http::not_found).method_not_allowed_fallback(http::method_not_allowed)
}
