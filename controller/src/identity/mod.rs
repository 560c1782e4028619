//! Identity (Keystone v3).

use std::path::Path;

use axum::Router;

use crate::{
    app::App,
    http::{context::Ctx, error::ApiError},
};

/// Keys and password hashing.
#[derive(Debug)]
pub struct Identity {}

/// Why the keys can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {}

impl Identity {
    /// Opens or creates the keys.
    ///
    /// # Errors
    /// If they can't be read or written.
    pub fn open(_state_dir: &Path) -> Result<Self, KeyError> {
        Ok(Self {})
    }
}

/// Who a token speaks for.
///
/// # Errors
/// 401 if it is not valid.
pub async fn validate(_app: &App, _token: &str) -> Result<Ctx, ApiError> {
    Err(ApiError::Unauthorized)
}

/// Routes below `/identity`.
pub fn router() -> Router<App> {
    Router::new()
}
