//! JSON request bodies.

use axum::{
    body::Bytes,
    extract::{FromRequest, Request, rejection::BytesRejection},
    response::{IntoResponse, Response},
};
use http::header;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::error::ApiError;
use crate::schema::Expected;

/// Largest JSON body, 1 MiB.
pub const MAX_JSON_BYTES: usize = 1 << 20;

/// A JSON body as its route has it in [`crate::schema`]. What is wrong with it is a 400 of the service that says what and where.
#[derive(Debug, Clone, Copy)]
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let content_type =
            request.headers().get(header::CONTENT_TYPE).map(|v| v.as_bytes().to_ascii_lowercase());
        if content_type.is_some_and(|t| !t.starts_with(b"application/json")) {
            return Err(ApiError::UnsupportedMedia("The body must be of type application/json.".into()));
        }
        let expected = Expected::of(request.method(), request.extensions())?;
        let bytes = Bytes::from_request(request, state).await.map_err(body_error)?;
        parse_as(&bytes, &expected).map(Self)
    }
}

/// Parses a body that has to be as its route has it.
///
/// # Errors
/// 400.
pub fn parse_as<T: DeserializeOwned>(bytes: &[u8], expected: &Expected) -> Result<T, ApiError> {
    if expected.is_any() {
        return parse(bytes);
    }
    let value: Value = parse(bytes)?;
    expected.check(&value)?;
    serde_json::from_value(value)
        .map_err(|error| ApiError::BadRequest(format!("Invalid input in the JSON body: {error}")))
}

/// Parses a body.
///
/// # Errors
/// 400 with the place and the expectation.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    if bytes.is_empty() {
        return Err(ApiError::BadRequest("A JSON body is required.".into()));
    }
    serde_json::from_slice(bytes).map_err(|error| {
        let what = match error.is_data() {
            true => "Invalid input in the JSON body",
            false => "Malformed JSON in the body",
        };
        ApiError::BadRequest(format!("{what}: {error}"))
    })
}

/// 200 with a JSON body that may borrow from what the handler has: it is serialized at once.
///
/// # Errors
/// 500 if it has no form in JSON.
pub fn answer<T: Serialize>(body: &T) -> Result<Response, ApiError> {
    let body = serde_json::to_vec(body).map_err(ApiError::internal)?;
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// Why a body could not be read.
pub fn body_error(rejection: BytesRejection) -> ApiError {
    match rejection.status() {
        http::StatusCode::PAYLOAD_TOO_LARGE => {
            ApiError::TooLarge(format!("The body is larger than {MAX_JSON_BYTES} bytes."))
        }
        _ => ApiError::BadRequest("The body could not be read.".into()),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Thing {
        #[expect(dead_code, reason = "only its absence is tested")]
        name: String,
    }

    #[test]
    fn messages_say_what_is_wrong() {
        let missing = parse::<Thing>(b"{}").unwrap_err().to_string();
        assert!(missing.contains("Invalid input") && missing.contains("missing field `name`"), "{missing}");
        let broken = parse::<Thing>(b"{\"name\": ").unwrap_err().to_string();
        assert!(broken.contains("Malformed JSON") && broken.contains("line 1"), "{broken}");
        assert!(parse::<Thing>(b"").unwrap_err().to_string().contains("required"));
    }
}
