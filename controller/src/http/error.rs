//! Errors: the few public kinds that a handler can return, and the one place where they become status and body.
//!
//! A handler knows only the kind. Its `IntoResponse` puts the error into the response's extensions; the outermost
//! middleware, which knows the [`Service`] by the path, renders it:
//!
//! | Service | Body |
//! |---|---|
//! | identity, image, mote | `{"error": {"code": 404, "title": "Not Found", "message": "…"}}` |
//! | compute | `{"itemNotFound": {"code": 404, "message": "…"}}` |
//! | network | `{"NeutronError": {"type": "NetworkNotFound", "message": "…", "detail": ""}}` |
//!
//! (Glance itself answers HTML; its clients parse nested JSON as well and show the message alone.)

use std::{error::Error, sync::Arc};

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

/// What a handler can answer instead of success. Texts are shown to the client, except that of `Internal`.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// 400: the request makes no sense; the text says what is wrong with it.
    #[error("{0}")]
    BadRequest(String),
    /// 401: no token, or not a valid one. Never says why.
    #[error("The request you have made requires authentication.")]
    Unauthorized,
    /// 403: known, but not allowed.
    #[error("{0}")]
    Forbidden(String),
    /// 404: does not exist, or is not the asker's to see.
    #[error("{0}")]
    NotFound(String),
    /// 405.
    #[error("{0}")]
    MethodNotAllowed(String),
    /// 406: no representation that the client accepts.
    #[error("{0}")]
    NotAcceptable(String),
    /// 408: the request's body did not arrive in time.
    #[error("{0}")]
    Timeout(String),
    /// 409: not in the present state.
    #[error("{0}")]
    Conflict(String),
    /// 410: was there once.
    #[error("{0}")]
    Gone(String),
    /// 412: not as the request's own condition (`If-Match`) has it.
    #[error("{0}")]
    PreconditionFailed(String),
    /// 413: body larger than the limit.
    #[error("{0}")]
    TooLarge(String),
    /// 415: body of a type that is not understood.
    #[error("{0}")]
    UnsupportedMedia(String),
    /// 416: range outside of the content.
    #[error("{0}")]
    RangeNotSatisfiable(String),
    /// 403 in compute and 413 in image, 409 in network: a quota is used up.
    #[error("{0}")]
    OverQuota(String),
    /// 429: too often.
    #[error("{0}")]
    RateLimited(String),
    /// 501: a part of the API that Mote does not have.
    #[error("{0}")]
    NotImplemented(String),
    /// 503: can't be served now; trying again is right.
    #[error("{0}")]
    Unavailable(String),
    /// 500: logged with the request id, never shown.
    #[error("An unexpected error prevented the server from fulfilling your request.")]
    Internal(#[source] Box<dyn Error + Send + Sync>),
    /// One of the others with the service's own name for it (Neutron's `type`), see [`ApiError::named`].
    #[error("{1}")]
    Named(&'static str, Box<ApiError>),
}

impl ApiError {
    /// Wraps an error that is not the client's business.
    pub fn internal(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Internal(source.into())
    }

    /// Names the error, as Neutron does: `ApiError::NotFound(…).named("NetworkNotFound")`.
    #[must_use]
    pub fn named(self, name: &'static str) -> Self {
        Self::Named(name, Box::new(self))
    }

    /// Its HTTP status in a service.
    pub fn status(&self, service: Service) -> StatusCode {
        match self {
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::NotAcceptable(_) => StatusCode::NOT_ACCEPTABLE,
            Self::Timeout(_) => StatusCode::REQUEST_TIMEOUT,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::Gone(_) => StatusCode::GONE,
            Self::PreconditionFailed(_) => StatusCode::PRECONDITION_FAILED,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnsupportedMedia(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::RangeNotSatisfiable(_) => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::OverQuota(_) => match service {
                Service::Network => StatusCode::CONFLICT,
                Service::Image => StatusCode::PAYLOAD_TOO_LARGE,
                Service::Identity | Service::Compute | Service::Mote => StatusCode::FORBIDDEN,
            },
            Self::RateLimited(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::NotImplemented(_) => StatusCode::NOT_IMPLEMENTED,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Named(_, inner) => inner.status(service),
        }
    }

    fn is_internal(&self) -> bool {
        match self {
            Self::Internal(_) => true,
            Self::Named(_, inner) => inner.is_internal(),
            _ => false,
        }
    }
}

impl From<sqlx::Error> for ApiError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::PoolTimedOut => Self::Unavailable("The database is busy. Please try again.".into()),
            sqlx::Error::Io(source) => {
                tracing::error!(error = %source, "the database can't be reached");
                Self::Unavailable("The database can't be reached. Please try again.".into())
            }
            // PostgreSQL: lock_not_available, query_canceled (by its time limit), admin_shutdown, character_not_in_repertoire.
            sqlx::Error::Database(error) => match error.code().as_deref() {
                Some("55P03" | "57014" | "57P01") => {
                    Self::Unavailable("The database is busy. Please try again.".into())
                }
                Some("22021") => Self::BadRequest("Texts must not have the character U+0000 in them.".into()),
                _ => Self::internal(sqlx::Error::Database(error)),
            },
            other => Self::internal(other),
        }
    }
}

impl IntoResponse for ApiError {
    /// Without a body: [`render`] makes it.
    fn into_response(self) -> Response {
        let mut response = StatusCode::INTERNAL_SERVER_ERROR.into_response();
        response.extensions_mut().insert(Arc::new(self));
        response
    }
}

/// The API that a path belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// Keystone v3.
    Identity,
    /// Glance v2.
    Image,
    /// Nova v2.1.
    Compute,
    /// Neutron v2.0.
    Network,
    /// Mote's own.
    Mote,
}

impl Service {
    /// By the first segment of a path.
    pub fn of_path(path: &str) -> Self {
        match path.trim_start_matches('/').split('/').next().unwrap_or_default() {
            "identity" => Self::Identity,
            "image" => Self::Image,
            "compute" => Self::Compute,
            "network" => Self::Network,
            _ => Self::Mote,
        }
    }
}

/// What [`render`] needs to know of the request.
#[derive(Debug)]
pub struct Asked<'a> {
    /// Service.
    pub service: Service,
    /// `req-…`.
    pub request_id: &'a str,
    /// Base of the catalog.
    pub public_url: &'a str,
}

/// Gives a response that carries an [`ApiError`] its status and body; logs what is internal.
pub fn render(response: Response, asked: &Asked<'_>) -> Response {
    let Some(error) = error_of(&response) else { return response };
    let status = error.status(asked.service);
    if error.is_internal() {
        tracing::error!(request_id = asked.request_id, error = %chain(error.as_ref()), "internal error");
    }
    let message = match error.is_internal() {
        true => format!("{error} (Request-ID: {})", asked.request_id),
        false => error.to_string(),
    };
    let body = match asked.service {
        Service::Compute => json!({ nova_fault(status): { "code": status.as_u16(), "message": message } }),
        Service::Network => {
            json!({ "NeutronError": { "type": neutron_type(&error), "message": message, "detail": "" } })
        }
        Service::Identity | Service::Image | Service::Mote => keystone_body(status, &message),
    };
    let mut answer = (status, Json(body)).into_response();
    // Headers that a handler added to the error (Content-Range of a 416) stay.
    for (name, value) in response.headers() {
        if name != header::CONTENT_LENGTH && name != header::CONTENT_TYPE {
            answer.headers_mut().insert(name.clone(), value.clone());
        }
    }
    if status == StatusCode::TOO_MANY_REQUESTS {
        answer.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    if status == StatusCode::UNAUTHORIZED {
        let challenge = format!("Keystone uri=\"{}/identity\"", asked.public_url);
        if let Ok(value) = HeaderValue::from_str(&challenge) {
            answer.headers_mut().insert(header::WWW_AUTHENTICATE, value);
        }
    }
    answer
}

/// The error that a handler returned, or one made of what axum's own extractors refuse with a plain text.
fn error_of(response: &Response) -> Option<Arc<ApiError>> {
    if let Some(error) = response.extensions().get::<Arc<ApiError>>() {
        return Some(error.clone());
    }
    let plain =
        response.headers().get(header::CONTENT_TYPE).is_some_and(|t| t.as_bytes().starts_with(b"text/plain"));
    if !plain {
        return None;
    }
    let error = match response.status() {
        StatusCode::BAD_REQUEST => {
            ApiError::BadRequest("The request's path, query or headers are malformed.".into())
        }
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::TooLarge("The body is too large.".into()),
        StatusCode::UNSUPPORTED_MEDIA_TYPE => {
            ApiError::UnsupportedMedia("The body's type is not supported.".into())
        }
        StatusCode::UNPROCESSABLE_ENTITY => {
            ApiError::BadRequest("The body is not what is expected here.".into())
        }
        status if status.is_server_error() => ApiError::internal(format!("an extractor answered {status}")),
        _ => return None,
    };
    Some(Arc::new(error))
}

fn keystone_body(status: StatusCode, message: &str) -> Value {
    json!({"error": {
        "code": status.as_u16(),
        "title": status.canonical_reason().unwrap_or("Error"),
        "message": message,
    }})
}

/// Nova's names of faults (`nova/api/openstack/wsgi.py`, class `Fault`).
fn nova_fault(status: StatusCode) -> &'static str {
    match status.as_u16() {
        400 => "badRequest",
        401 => "unauthorized",
        403 => "forbidden",
        404 => "itemNotFound",
        405 => "badMethod",
        409 => "conflictingRequest",
        413 | 429 => "overLimit",
        415 => "badMediaType",
        501 => "notImplemented",
        503 => "serviceUnavailable",
        _ => "computeFault",
    }
}

fn neutron_type(error: &ApiError) -> &'static str {
    match error {
        ApiError::Named(name, _) => name,
        ApiError::BadRequest(_) => "HTTPBadRequest",
        ApiError::Unauthorized => "HTTPUnauthorized",
        ApiError::Forbidden(_) => "PolicyNotAuthorized",
        ApiError::NotFound(_) => "HTTPNotFound",
        ApiError::MethodNotAllowed(_) => "HTTPMethodNotAllowed",
        ApiError::Conflict(_) => "HTTPConflict",
        ApiError::OverQuota(_) => "OverQuota",
        ApiError::PreconditionFailed(_) => "HTTPPreconditionFailed",
        ApiError::TooLarge(_) => "HTTPRequestEntityTooLarge",
        ApiError::UnsupportedMedia(_) => "HTTPUnsupportedMediaType",
        ApiError::Unavailable(_) => "HTTPServiceUnavailable",
        ApiError::NotImplemented(_) => "HTTPNotImplemented",
        _ => "HTTPInternalServerError",
    }
}

/// An error with all its causes, one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn shown(error: ApiError, service: Service) -> (u16, Value, Response<()>) {
        let asked = Asked { service, request_id: "req-1", public_url: "http://h" };
        let (head, body) = render(error.into_response(), &asked).into_parts();
        let bytes = axum::body::to_bytes(body, 4096).await.unwrap();
        (head.status.as_u16(), serde_json::from_slice(&bytes).unwrap(), Response::from_parts(head, ()))
    }

    #[tokio::test]
    async fn each_service_has_its_own_shape() {
        let (code, body, _) = shown(ApiError::NotFound("no".into()), Service::Compute).await;
        assert_eq!((code, body), (404, json!({"itemNotFound": {"code": 404, "message": "no"}})));
        let (code, body, _) =
            shown(ApiError::NotFound("no".into()).named("NetworkNotFound"), Service::Network).await;
        let expected = json!({"NeutronError": {"type": "NetworkNotFound", "message": "no", "detail": ""}});
        assert_eq!((code, body), (404, expected));
        let (_, body, _) = shown(ApiError::Conflict("twice".into()), Service::Identity).await;
        assert_eq!(body, json!({"error": {"code": 409, "title": "Conflict", "message": "twice"}}));
    }

    #[tokio::test]
    async fn a_used_up_quota_has_the_status_of_its_service() {
        for (service, status) in [(Service::Compute, 403), (Service::Network, 409), (Service::Image, 413)] {
            assert_eq!(shown(ApiError::OverQuota("full".into()), service).await.0, status);
        }
    }

    #[tokio::test]
    async fn internal_errors_show_the_request_id_and_nothing_else() {
        let (code, body, _) = shown(ApiError::internal("secret path"), Service::Compute).await;
        let text = body.to_string();
        assert_eq!(code, 500);
        assert!(
            text.contains("req-1") && text.contains("computeFault") && !text.contains("secret"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn unauthorized_says_where_tokens_are_had() {
        let (code, _, head) = shown(ApiError::Unauthorized, Service::Image).await;
        assert_eq!(code, 401);
        assert_eq!(head.headers()["www-authenticate"], "Keystone uri=\"http://h/identity\"");
    }
}
