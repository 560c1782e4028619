//! Routes of `compute`.

use axum::Router;

use crate::app::App;

pub(crate) mod state;

/// The routes.
pub fn router() -> Router<App> {
    Router::new()
}
