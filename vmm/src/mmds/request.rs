//! HTTP between guest and store: bytes of a connection to requests, requests to answers. Status codes and texts are
//! Firecracker's.

use std::time::Instant;

use mote_vmm_api::MmdsVersion;

use super::store::{Format, Mmds, MmdsError, single_slashes};
use crate::metrics;

/// Longest request with its headers and body. A connection's receive buffer has this size.
pub const MAX_REQUEST: usize = 4096;
/// Most headers of a request.
const MAX_HEADERS: usize = 32;
const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN_HEADERS: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const TTL_HEADERS: [&str; 2] = ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"];
const FORWARDED_FOR: &str = "X-Forwarded-For";

/// What the bytes at the start of a connection's stream are answered with.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// The answer as it goes out.
    pub bytes: Vec<u8>,
    /// How many bytes the request took.
    pub consumed: usize,
    /// The connection stays open.
    pub keep_alive: bool,
}

/// Answers the request at the start of `buffer`; nothing if it isn't there as a whole yet.
pub fn respond(mmds: &Mmds, buffer: &[u8], now: Instant) -> Option<Reply> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let end = |response: Response, http_1_1| Reply {
        bytes: response.encode(http_1_1, false),
        consumed: buffer.len(),
        keep_alive: false,
    };
    let head_length = match head.parse(buffer) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if buffer.len() < MAX_REQUEST => return None,
        Ok(httparse::Status::Partial) => {
            return Some(end(Response::text(413, "The request is too long."), true));
        }
        Err(error) => {
            metrics::MMDS.rx_accepted_err.add_one();
            return Some(end(Response::text(400, format!("Invalid request: {error}.")), true));
        }
    };
    let http_1_1 = head.version == Some(1);
    let request = Request::new(&head);
    let fits = |body: &usize| head_length.checked_add(*body).is_some_and(|end| end <= MAX_REQUEST);
    let Some(body_length) = request.body_length().filter(fits) else {
        return Some(end(Response::text(413, "The request is too long."), http_1_1));
    };
    let consumed = head_length + body_length;
    if buffer.len() < consumed {
        return None;
    }
    let keep_alive = request.keeps_alive(http_1_1);
    let response = request.answer(mmds, now);
    Some(Reply { bytes: response.encode(http_1_1, keep_alive), consumed, keep_alive })
}

struct Request<'a> {
    method: &'a str,
    /// As sent, without scheme and host.
    path: &'a str,
    headers: &'a [httparse::Header<'a>],
}

impl<'a> Request<'a> {
    fn new(head: &'a httparse::Request<'_, 'a>) -> Self {
        let target = head.path.unwrap_or("");
        // RFC 9112 §3.2.2: clients of proxies name the host here.
        let path = match target.split_once("://") {
            Some(("http", rest)) => rest.find('/').map_or("", |slash| &rest[slash..]),
            _ if target.starts_with('/') => target,
            _ => "",
        };
        Self { method: head.method.unwrap_or(""), path, headers: head.headers }
    }

    /// The first header with one of these names: its name as sent, and its value.
    fn header(&self, names: &[&str]) -> Option<(&'a str, &'a str)> {
        let header = self
            .headers
            .iter()
            .find(|header| names.iter().any(|name| header.name.eq_ignore_ascii_case(name)))?;
        Some((header.name, std::str::from_utf8(header.value).unwrap_or("").trim()))
    }

    /// Bytes of the body, which means nothing in any request. Absent if that is no number.
    fn body_length(&self) -> Option<usize> {
        if self.header(&["Transfer-Encoding"]).is_some() {
            return None;
        }
        self.header(&["Content-Length"]).map_or(Some(0), |(_, value)| value.parse().ok())
    }

    fn keeps_alive(&self, http_1_1: bool) -> bool {
        let connection = self.header(&["Connection"]).map_or("", |(_, value)| value);
        let has = |option: &str| connection.split(',').any(|part| part.trim().eq_ignore_ascii_case(option));
        !has("close") && (http_1_1 || has("keep-alive"))
    }

    fn format(&self) -> Format {
        let accept = self.header(&["Accept"]).map_or("", |(_, value)| value);
        let type_of = |range: &str| range.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
        if accept.split(',').any(|range| type_of(range) == "application/json") {
            Format::Json
        } else {
            Format::Imds
        }
    }

    fn answer(&self, mmds: &Mmds, now: Instant) -> Response {
        if self.path.is_empty() {
            return Response::text(400, "Invalid URI.");
        }
        match self.method {
            "GET" => self.get(mmds, now),
            "PUT" => self.put(mmds, now),
            _ => Response::text(405, "Not allowed HTTP method."),
        }
    }

    fn get(&self, mmds: &Mmds, now: Instant) -> Response {
        let token = self.header(&TOKEN_HEADERS).map(|(_, token)| token);
        let refusal = match token {
            None => {
                metrics::MMDS.rx_no_token.add_one();
                Some(
                    "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session token.",
                )
            }
            Some(token) if !mmds.is_valid_token(token, now) => {
                metrics::MMDS.rx_invalid_token.add_one();
                Some("MMDS token not valid.")
            }
            Some(_) => None,
        };
        // Version 1 counts those that version 2 would refuse.
        if let Some(refusal) = refusal.filter(|_| mmds.version() == MmdsVersion::V2) {
            return Response::text(401, refusal);
        }
        let format = self.format();
        match mmds.get(self.path, format) {
            Ok(body) => Response { status: 200, format: mmds.format(format), header: None, body },
            Err(MmdsError::NotFound) => self.not_found(),
            Err(error) => Response::text(501, error.to_string()),
        }
    }

    /// A token, whichever version it is.
    fn put(&self, mmds: &Mmds, now: Instant) -> Response {
        if let Some((name, _)) = self.header(&[FORWARDED_FOR]) {
            return Response::text(
                400,
                format!("Invalid header. Reason: Unsupported header name. Key: {name}"),
            );
        }
        if single_slashes(self.path) != TOKEN_PATH {
            return self.not_found();
        }
        let Some((name, value)) = self.header(&TTL_HEADERS) else {
            return Response::text(
                400,
                "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
            );
        };
        let Ok(ttl_seconds) = value.parse() else {
            return Response::text(
                400,
                format!("Invalid header. Reason: Invalid value. Key:{name}; Value:{value}"),
            );
        };
        match mmds.issue_token(ttl_seconds, now) {
            Ok(token) => {
                let header = Some(format!("{name}: {ttl_seconds}"));
                Response { status: 200, format: Format::Imds, header, body: token }
            }
            Err(error) => Response::text(400, error.to_string()),
        }
    }

    fn not_found(&self) -> Response {
        Response::text(404, format!("Resource not found: {}.", self.path))
    }
}

struct Response {
    status: u16,
    format: Format,
    /// A line of the head beside the usual ones.
    header: Option<String>,
    body: String,
}

impl Response {
    fn text(status: u16, body: impl Into<String>) -> Self {
        Self { status, format: Format::Imds, header: None, body: body.into() }
    }

    fn encode(&self, http_1_1: bool, keep_alive: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            401 => "Unauthorized",
            404 => "Not Found",
            405 => "Method Not Allowed",
            413 => "Payload Too Large",
            _ => "Not Implemented",
        };
        let content_type = match self.format {
            Format::Json => "application/json",
            Format::Imds => "text/plain",
        };
        let mut text = format!(
            "HTTP/1.{} {} {reason}\r\nServer: mote-vmm\r\nConnection: {}\r\nContent-Type: {content_type}\r\n",
            u8::from(http_1_1),
            self.status,
            if keep_alive { "keep-alive" } else { "close" },
        );
        if self.status == 405 {
            text.push_str("Allow: GET, PUT\r\n");
        }
        if let Some(header) = &self.header {
            text.push_str(header);
            text.push_str("\r\n");
        }
        text.push_str(&format!("Content-Length: {}\r\n\r\n{}", self.body.len(), self.body));
        text.into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mote_vmm_api::MmdsConfig;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn mmds(version: MmdsVersion) -> Mmds {
        let mut mmds = Mmds::new("test", 1000).unwrap();
        mmds.configure(&MmdsConfig { version, ..MmdsConfig::default() });
        mmds.put(json!({"latest": {"meta-data": {"ami-id": "ami-1", "count": 3}}})).unwrap();
        mmds
    }

    /// Status and body of the answer.
    fn ask(mmds: &Mmds, request: &str) -> (u16, String) {
        let reply = respond(mmds, request.as_bytes(), Instant::now()).unwrap();
        let text = String::from_utf8(reply.bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    fn get(path: &str, headers: &str) -> String {
        format!("GET {path} HTTP/1.1\r\n{headers}\r\n")
    }

    fn put(headers: &str) -> String {
        format!("PUT /latest/api/token HTTP/1.1\r\n{headers}\r\n")
    }

    #[test]
    fn version_1_needs_no_token_and_gives_both_formats() {
        let mmds = mmds(MmdsVersion::V1);
        assert_eq!(ask(&mmds, &get("/latest/meta-data", "")), (200, "ami-id\ncount".into()));
        let json = get("/latest/meta-data", "Accept: application/json\r\n");
        assert_eq!(ask(&mmds, &json), (200, r#"{"ami-id":"ami-1","count":3}"#.into()));
        assert_eq!(ask(&mmds, &get("http://169.254.169.254/latest", "")), (200, "meta-data/".into()));
        assert_eq!(ask(&mmds, &get("/latest", "X-metadata-token: nonsense\r\n")).0, 200);
        assert_eq!(ask(&mmds, &get("/no", "")), (404, "Resource not found: /no.".into()));
        let unsupported = ask(&mmds, &get("/latest/meta-data/count", ""));
        assert_eq!(unsupported, (501, "Cannot retrieve value. The value has an unsupported type.".into()));
    }

    #[test]
    fn version_2_needs_a_token_under_either_name() {
        let mmds = mmds(MmdsVersion::V2);
        let (status, text) = ask(&mmds, &get("/latest", ""));
        assert!(status == 401 && text.starts_with("No MMDS token provided."), "{status} {text}");
        for (ttl, token_name) in TTL_HEADERS.iter().zip(TOKEN_HEADERS) {
            let (status, token) = ask(&mmds, &put(&format!("{}: 60\r\n", ttl.to_uppercase())));
            assert_eq!(status, 200, "{token}");
            let with = |token: &str| get("/latest", &format!("{token_name}: {token}\r\n"));
            assert_eq!(ask(&mmds, &with(&token)), (200, "meta-data/".into()));
            assert_eq!(ask(&mmds, &with("x")), (401, "MMDS token not valid.".into()));
            let later = Instant::now() + Duration::from_secs(61);
            let reply = respond(&mmds, with(&token).as_bytes(), later).unwrap();
            assert!(reply.bytes.starts_with(b"HTTP/1.1 401 "));
        }
    }

    #[test]
    fn requests_for_tokens_follow_firecrackers_rules() {
        let mmds = mmds(MmdsVersion::V2);
        let reply = respond(&mmds, put("X-Metadata-Token-Ttl-Seconds: 7\r\n").as_bytes(), Instant::now());
        let text = String::from_utf8(reply.unwrap().bytes).unwrap();
        assert!(text.contains("\r\nX-Metadata-Token-Ttl-Seconds: 7\r\n"), "{text}");
        assert!(ask(&mmds, &put("")).1.starts_with("Token time to live value not found."));
        assert_eq!(
            ask(&mmds, &put("X-metadata-token-ttl-seconds: a\r\n")).1,
            "Invalid header. Reason: Invalid value. Key:X-metadata-token-ttl-seconds; Value:a"
        );
        assert!(
            ask(&mmds, &put("X-metadata-token-ttl-seconds: 21601\r\n")).1.contains("between 1 and 21600")
        );
        let forwarded = put("x-forwarded-for: 1.2.3.4\r\nX-metadata-token-ttl-seconds: 7\r\n");
        assert_eq!(
            ask(&mmds, &forwarded),
            (400, "Invalid header. Reason: Unsupported header name. Key: x-forwarded-for".into())
        );
        assert_eq!(ask(&mmds, "PUT /latest HTTP/1.1\r\n\r\n").0, 404);
        assert_eq!(ask(&mmds, "POST /latest HTTP/1.1\r\n\r\n"), (405, "Not allowed HTTP method.".into()));
        assert_eq!(ask(&mmds, "GET http://x HTTP/1.1\r\n\r\n"), (400, "Invalid URI.".into()));
        for length in [MAX_REQUEST, usize::MAX] {
            let long = get("/latest", &format!("Content-Length: {length}\r\n"));
            assert_eq!(ask(&mmds, &long), (413, "The request is too long.".into()));
        }
    }

    #[test]
    fn requests_that_follow_each_other_are_told_apart_and_connections_end_as_asked() {
        let mmds = mmds(MmdsVersion::V1);
        let first = "GET /latest HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc";
        let both = format!("{first}GET / HTTP/1.0\r\n\r\n");
        let reply = respond(&mmds, both.as_bytes(), Instant::now()).unwrap();
        assert_eq!((reply.consumed, reply.keep_alive), (first.len(), true));
        let second = respond(&mmds, &both.as_bytes()[reply.consumed..], Instant::now()).unwrap();
        assert!(second.bytes.starts_with(b"HTTP/1.0 200 ") && !second.keep_alive);
        assert_eq!(respond(&mmds, &first.as_bytes()[..first.len() - 1], Instant::now()), None);
    }

    #[test]
    fn what_is_too_long_or_nonsense_ends_the_connection() {
        let mmds = mmds(MmdsVersion::V1);
        for (request, status) in [
            (format!("GET /{} HTTP/1.1\r\n", "a".repeat(MAX_REQUEST)), 413),
            ("GET / HTTP/1.1\r\nContent-Length: 5000\r\n\r\n".to_owned(), 413),
            ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(), 413),
            ("\u{1}\r\n\r\n".to_owned(), 400),
        ] {
            let reply = respond(&mmds, request.as_bytes(), Instant::now()).unwrap();
            assert!(!reply.keep_alive, "{request}");
            assert!(reply.bytes.starts_with(format!("HTTP/1.1 {status} ").as_bytes()), "{request}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Some(reply) = respond(&mmds(MmdsVersion::V2), &bytes, Instant::now()) {
                prop_assert!(reply.consumed <= bytes.len());
            }
        }
    }
}
