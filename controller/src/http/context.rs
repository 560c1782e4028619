//! Who asks.

use std::time::Instant;

use axum::extract::{FromRequestParts, MatchedPath, OriginalUri};
use http::request::Parts;

use super::{error::ApiError, middleware::RequestId};
use crate::{
    app::App,
    identity::{self, principal::AccessRule},
    policy,
};

/// The version of identity that a request's token was checked at: an extension of each request with a token.
#[derive(Debug, Clone, Copy)]
pub struct SeenVersion(pub i64);

/// The authenticated asker of a request, from `X-Auth-Token`. As an argument of a handler it makes the route require a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ctx {
    /// User.
    pub user_id: String,
    /// User's name.
    pub user_name: String,
    /// User's domain.
    pub user_domain_id: String,
    /// Project the token is scoped to.
    pub project_id: Option<String>,
    /// Its name.
    pub project_name: Option<String>,
    /// Its domain.
    pub project_domain_id: Option<String>,
    /// Domain the token is scoped to (never together with a project).
    pub domain_id: Option<String>,
    /// Names of the roles that the user has there now.
    pub roles: Vec<String>,
    /// Has the role `admin`.
    pub is_admin: bool,
    /// The token's audit id, then that of the first token of its chain.
    pub audit_ids: Vec<String>,
    /// End of the token, µs since 1970.
    pub expires_at_us: i64,
    /// `req-…`.
    pub request_id: String,
    /// The token is scoped to the system as a whole.
    pub system: bool,
    /// What the token was had with, if it doesn't give all that its user may do.
    pub delegation: Option<Delegation>,
}

/// What lets a token speak for a user in one project only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delegation {
    /// An application credential.
    ApplicationCredential {
        /// Its id.
        id: String,
        /// May be used to make and delete credentials.
        unrestricted: bool,
    },
    /// The trust with this id.
    Trust(String),
}

impl Ctx {
    /// Had with an application credential that may not make further credentials.
    pub fn is_restricted(&self) -> bool {
        matches!(self.delegation, Some(Delegation::ApplicationCredential { unrestricted: false, .. }))
    }

    /// The trust that the token was had with.
    pub fn trust(&self) -> Option<&str> {
        match &self.delegation {
            Some(Delegation::Trust(id)) => Some(id),
            _ => None,
        }
    }

    /// The project that the request is about.
    ///
    /// # Errors
    /// 403 when the token has no project.
    pub fn require_project(&self) -> Result<&str, ApiError> {
        self.project_id
            .as_deref()
            .ok_or_else(|| ApiError::Forbidden("This needs a token that is scoped to a project.".into()))
    }

    /// Only administrators go on.
    ///
    /// # Errors
    /// 403 for everybody else.
    pub fn require_admin(&self) -> Result<(), ApiError> {
        match self.is_admin {
            true => Ok(()),
            false => Err(ApiError::Forbidden("Policy does not allow this: the role admin is needed.".into())),
        }
    }

    /// Whether the asker has one of these roles.
    pub fn has_role(&self, names: &[&str]) -> bool {
        self.roles.iter().any(|role| names.contains(&role.as_str()))
    }

    /// Whether the asker may change things in its project: role `member`, `manager` or `admin` (a `reader` may not).
    ///
    /// # Errors
    /// 403 for readers.
    pub fn require_writer(&self) -> Result<(), ApiError> {
        match self.is_admin || self.has_role(&["member", "manager", "service"]) {
            true => Ok(()),
            false => {
                Err(ApiError::Forbidden("Policy does not allow this: the role member is needed.".into()))
            }
        }
    }
}

impl FromRequestParts<App> for Ctx {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let token = token_of(parts).ok_or(ApiError::Unauthorized)?;
        let principal = identity::principal_of(app, token).await?;
        let path = parts.extensions.get::<OriginalUri>().map_or(parts.uri.path(), |uri| uri.0.path());
        let rules = principal.restriction.as_ref().and_then(|restriction| restriction.rules.as_ref());
        if rules.is_some_and(|rules| !covered(rules, &parts.method, path)) {
            tracing::info!("an application credential's access rules do not cover this request");
            return Err(ApiError::Unauthorized);
        }
        let project = principal.claims.scope.project().unwrap_or_default();
        if !app.project_limit.take(project.to_owned(), Instant::now()) {
            return Err(ApiError::RateLimited("Too many requests of this project. Please try later.".into()));
        }
        let mut ctx = principal.as_ref().clone().into_ctx();
        ctx.request_id = request_id_of(parts);
        if let Some(matched) = parts.extensions.get::<MatchedPath>() {
            policy::check(&ctx, &parts.method, matched.as_str(), path)?;
        }
        parts.extensions.insert(SeenVersion(principal.version));
        Ok(ctx)
    }
}

/// Whether one of an application credential's rules allows a request: the first segment of the path is the service.
fn covered(rules: &[AccessRule], method: &http::Method, path: &str) -> bool {
    let (service, path) = path.trim_start_matches('/').split_once('/').unwrap_or_default();
    rules.iter().any(|rule| rule.covers(service, method.as_str(), path))
}

/// `X-Auth-Token`, if it is one.
pub fn token_of(parts: &Parts) -> Option<&str> {
    parts.headers.get("x-auth-token")?.to_str().ok()
}

/// The request's id.
pub fn request_id_of(parts: &Parts) -> String {
    parts.extensions.get::<RequestId>().map(|id| id.0.to_string()).unwrap_or_default()
}
