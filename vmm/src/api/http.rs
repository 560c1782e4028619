//! HTTP/1.0 and 1.1 over a local socket, as much of it as the API needs: bounded requests with a Content-Length,
//! keep-alive, `Expect: 100-continue` (RFC 9112, RFC 9110 §10.1.1).

use mote_vmm_api::Fault;

/// Largest body of a request if nothing else is said, as Firecracker's default `--http-api-max-payload-size`.
pub const MAX_BODY: usize = 51_200;
/// Largest request line with headers.
pub const MAX_HEAD: usize = 8_192;
/// Most headers of a request.
const MAX_HEADERS: usize = 32;

/// A whole request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Method, as sent.
    pub method: String,
    /// Path without query.
    pub path: String,
    /// Body; empty if there is none.
    pub body: Vec<u8>,
    /// The connection stays open after the answer.
    pub keep_alive: bool,
}

/// What a buffer of received bytes holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parse {
    /// Not yet a whole request. `wants_continue`: the client waits for "100 Continue" before it sends the body.
    Incomplete {
        /// See above.
        wants_continue: bool,
    },
    /// A request, and how many bytes it took.
    Complete(Request, usize),
    /// No request: answer this and close.
    Invalid(Response),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// 200, 204, 400, 413, 503…
    pub status: u16,
    /// JSON, or nothing.
    pub body: String,
}

impl Response {
    /// 204: done, nothing to tell.
    pub const fn empty() -> Self {
        Self { status: 204, body: String::new() }
    }

    /// 200 with JSON.
    pub fn json(body: &impl serde::Serialize) -> Self {
        let body =
            serde_json::to_string(body).expect("the API's types have string keys and no failing serializers");
        Self { status: 200, body }
    }

    /// An error in Firecracker's shape.
    pub fn fault(status: u16, fault_message: impl Into<String>) -> Self {
        Self { status, ..Self::json(&Fault { fault_message: fault_message.into() }) }
    }

    /// The bytes to send.
    pub fn encode(&self, keep_alive: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            204 => "No Content",
            400 => "Bad Request",
            413 => "Payload Too Large",
            431 => "Request Header Fields Too Large",
            501 => "Not Implemented",
            _ => "Error",
        };
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut head =
            format!("HTTP/1.1 {} {reason}\r\nServer: mote-vmm\r\nConnection: {connection}\r\n", self.status);
        // RFC 9110 §8.6: no Content-Length in a 204.
        if self.status != 204 {
            head.push_str(&format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                self.body.len()
            ));
        }
        head.push_str("\r\n");
        head.push_str(&self.body);
        head.into_bytes()
    }
}

/// Looks for a request with a body of at most `max_body` bytes at the start of `buffer`.
pub fn parse(buffer: &[u8], max_body: usize) -> Parse {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let head_length = match head.parse(buffer) {
        Ok(httparse::Status::Complete(length)) if length <= MAX_HEAD => length,
        Ok(httparse::Status::Partial) if buffer.len() < MAX_HEAD => {
            return Parse::Incomplete { wants_continue: false };
        }
        Ok(_) => {
            return invalid(431, format!("The request line and headers are longer than {MAX_HEAD} bytes."));
        }
        Err(httparse::Error::TooManyHeaders) => {
            return invalid(431, format!("The request has more than {MAX_HEADERS} headers."));
        }
        Err(error) => return invalid(400, format!("Invalid HTTP request: {error}.")),
    };
    let fields = match Fields::read(&head, max_body) {
        Ok(fields) => fields,
        Err(response) => return Parse::Invalid(response),
    };
    let end = head_length + fields.body_length;
    let Some(body) = buffer.get(head_length..end) else {
        return Parse::Incomplete { wants_continue: fields.expects_continue && buffer.len() == head_length };
    };
    let target = head.path.unwrap_or("/");
    let request = Request {
        method: head.method.unwrap_or("").to_owned(),
        path: target.split('?').next().unwrap_or("").to_owned(),
        body: body.to_vec(),
        keep_alive: fields.keep_alive,
    };
    Parse::Complete(request, end)
}

fn invalid(status: u16, message: impl Into<String>) -> Parse {
    Parse::Invalid(Response::fault(status, message))
}

/// The headers that matter.
struct Fields {
    body_length: usize,
    keep_alive: bool,
    expects_continue: bool,
}

impl Fields {
    fn read(head: &httparse::Request<'_, '_>, max_body: usize) -> Result<Self, Response> {
        let is_1_1 = head.version == Some(1);
        let mut fields = Self { body_length: 0, keep_alive: is_1_1, expects_continue: false };
        let mut length = None;
        for header in head.headers.iter() {
            let value = std::str::from_utf8(header.value).unwrap_or("").trim();
            match header.name.to_ascii_lowercase().as_str() {
                "content-length" => {
                    let number = content_length(value, max_body)?;
                    // RFC 9112 §6.3: differing lengths are an attack.
                    if length.replace(number).is_some_and(|other| other != number) {
                        return Err(Response::fault(
                            400,
                            "The request has two different Content-Length headers.",
                        ));
                    }
                    fields.body_length = number;
                }
                "transfer-encoding" => {
                    return Err(Response::fault(
                        501,
                        "Transfer-Encoding is not supported; send a Content-Length.",
                    ));
                }
                "connection" => {
                    let has =
                        |option: &str| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(option));
                    fields.keep_alive = !has("close") && (is_1_1 || has("keep-alive"));
                }
                "expect" => fields.expects_continue = is_1_1 && value.eq_ignore_ascii_case("100-continue"),
                _ => {}
            }
        }
        Ok(fields)
    }
}

fn content_length(value: &str, max_body: usize) -> Result<usize, Response> {
    if value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Response::fault(400, "Content-Length is no number."));
    }
    // A number too large for `usize` is also too large a body.
    match value.parse::<usize>() {
        Ok(length) if length <= max_body => Ok(length),
        _ => Err(Response::fault(
            413,
            format!(
                "Request payload with size {value} is larger than the limit of {max_body} allowed by server."
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn complete(text: &str) -> (Request, usize) {
        match parse(text.as_bytes(), MAX_BODY) {
            Parse::Complete(request, length) => (request, length),
            other => panic!("{other:?}"),
        }
    }

    fn status_of_invalid(text: &str) -> u16 {
        match parse(text.as_bytes(), MAX_BODY) {
            Parse::Invalid(response) => response.status,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_that_follow_each_other_are_told_apart() {
        let text = "PUT /a HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}GET /b?c HTTP/1.1\r\n\r\n";
        let (first, length) = complete(text);
        assert_eq!(
            (first.method.as_str(), first.path.as_str(), first.body.as_slice()),
            ("PUT", "/a", &b"{}"[..])
        );
        let (second, _) = complete(&text[length..]);
        assert_eq!((second.path.as_str(), second.body.len()), ("/b", 0));
    }

    #[test]
    fn keep_alive_is_the_default_of_1_1_only() {
        assert!(complete("GET / HTTP/1.1\r\n\r\n").0.keep_alive);
        assert!(!complete("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n").0.keep_alive);
        assert!(!complete("GET / HTTP/1.0\r\n\r\n").0.keep_alive);
        assert!(complete("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").0.keep_alive);
    }

    #[test]
    fn a_client_that_waits_for_100_is_seen_once_its_headers_are_there() {
        let head = "PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n";
        assert_eq!(parse(head.as_bytes(), MAX_BODY), Parse::Incomplete { wants_continue: true });
        assert_eq!(
            parse(format!("{head}{{").as_bytes(), MAX_BODY),
            Parse::Incomplete { wants_continue: false }
        );
    }

    #[test]
    fn bodies_and_heads_beyond_the_limits_are_refused() {
        let head = |length: &str| format!("PUT / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
        assert_eq!(status_of_invalid(&head("51201")), 413);
        assert_eq!(status_of_invalid(&head("99999999999999999999999999")), 413);
        let longer = parse(head("51201").as_bytes(), 60_000);
        assert_eq!(longer, Parse::Incomplete { wants_continue: false });
        assert_eq!(status_of_invalid(&head("-1")), 400);
        assert_eq!(status_of_invalid(&head("+1")), 400);
        assert_eq!(status_of_invalid(&format!("GET /{}", "a".repeat(MAX_HEAD))), 431);
        assert_eq!(status_of_invalid("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), 501);
        assert_eq!(
            status_of_invalid("PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n12"),
            400
        );
        assert_eq!(status_of_invalid("\0\0\0\0"), 400);
    }

    #[test]
    fn a_204_has_no_body_and_no_length() {
        let text = String::from_utf8(Response::empty().encode(true)).unwrap();
        assert!(text.starts_with("HTTP/1.1 204 No Content\r\n"), "{text}");
        assert!(!text.contains("Content-"), "{text}");
        assert!(text.ends_with("\r\n\r\n"));
    }

    #[test]
    fn a_fault_has_firecrackers_shape() {
        let text = String::from_utf8(Response::fault(400, "no").encode(false)).unwrap();
        assert!(text.contains("Content-Type: application/json\r\nContent-Length: 22\r\n"), "{text}");
        assert!(text.ends_with("\r\n\r\n{\"fault_message\":\"no\"}"), "{text}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Parse::Complete(_, length) = parse(&bytes, MAX_BODY) {
                prop_assert!(length <= bytes.len());
            }
        }

        #[test]
        fn a_request_cut_anywhere_is_incomplete(body in "[a-z]{0,40}", cut in 0usize..60) {
            let text = format!("PUT /x HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            let cut = cut.min(text.len() - 1);
            let is_incomplete = matches!(parse(&text.as_bytes()[..cut], MAX_BODY), Parse::Incomplete { .. });
            prop_assert!(is_incomplete);
        }
    }
}
