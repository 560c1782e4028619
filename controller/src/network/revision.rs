//! `If-Match: revision_number=N`: a change of what the client saw, not of what came after it (gophercloud's
//! `RevisionNumber`, openstacksdk's `if_revision`).

use axum::extract::FromRequestParts;
use http::{header, request::Parts};

use super::resource::{Change, Resource, document};
use crate::{http::error::ApiError, network::listing::Query};

/// What begins the only criterion that there is.
const REVISION: &str = "revision_number=";
/// How much of a wrong header a message shows, in characters.
const MAX_SHOWN: usize = 64;

/// The revision that a resource must have for a request to change it, if the request names one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct IfMatch(Option<i64>);

impl IfMatch {
    /// Compares within the change's transaction, which is the only one that writes.
    ///
    /// # Errors
    /// 412 if the resource has another revision; 404 if it is not there.
    pub(super) async fn check<R: Resource>(self, change: &mut Change, id: &str) -> Result<(), ApiError> {
        let Some(wanted) = self.0 else { return Ok(()) };
        let found = document::<R>(&mut change.tx, &change.scope, id, &Query::default()).await?;
        match found["revision_number"].as_i64() {
            Some(current) if current == wanted => Ok(()),
            Some(current) => Err(ApiError::PreconditionFailed(format!(
                "Constrained to {wanted}, but current revision is {current}"
            ))
            .named("RevisionNumberConstraintFailed")),
            None => Err(ApiError::BadRequest(format!("If-Match: a {} has no revision number.", R::NAME))),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for IfMatch {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let mut wanted = None;
        for value in parts.headers.get_all(header::IF_MATCH) {
            let number =
                value.to_str().ok().and_then(|text| text.trim().strip_prefix(REVISION)?.parse().ok());
            match number {
                Some(number) if wanted.is_none_or(|other| other == number) => wanted = Some(number),
                _ => {
                    let text: String =
                        String::from_utf8_lossy(value.as_bytes()).chars().take(MAX_SHOWN).collect();
                    return Err(ApiError::BadRequest(format!(
                        "If-Match must be one {REVISION}N, not '{text}'."
                    )));
                }
            }
        }
        Ok(Self(wanted))
    }
}
