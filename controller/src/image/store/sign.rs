//! AWS Signature Version 4, as S3 and what speaks its protocol want requests to be signed.

use http::Method;
use sha2::{Digest, Sha256};

/// Bytes of a block of SHA-256, by which HMAC (RFC 2104) pads its key.
const BLOCK_BYTES: usize = 64;

/// Who signs.
#[derive(Clone)]
pub struct Signer {
    /// Access key id.
    pub access_key: String,
    /// Secret access key.
    pub secret_key: String,
    /// Region, `us-east-1` where a service has none.
    pub region: String,
}

/// What is signed of a request.
#[derive(Debug)]
pub struct Signed<'a> {
    /// Method.
    pub method: &'a Method,
    /// Path, percent-encoded.
    pub path: &'a str,
    /// Query, percent-encoded, its parameters in order.
    pub query: &'a str,
    /// Headers with names in lower case, in order; `host`, `x-amz-date` and `x-amz-content-sha256` among them.
    pub headers: &'a [(&'a str, &'a str)],
    /// SHA-256 (hex) of the body.
    pub payload: &'a str,
    /// `20130524T000000Z`, as in `x-amz-date`.
    pub time: &'a str,
}

impl Signer {
    /// The value of `Authorization`.
    pub fn authorization(&self, request: &Signed<'_>) -> String {
        let Signed { method, path, query, headers, payload, time } = request;
        let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
        let names = names.join(";");
        let lines: String =
            headers.iter().map(|(name, value)| format!("{name}:{}\n", value.trim())).collect();
        let canonical = format!("{method}\n{path}\n{query}\n{lines}\n{names}\n{payload}");
        let day = time.get(..8).unwrap_or_default();
        let scope = format!("{day}/{}/s3/aws4_request", self.region);
        let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{}", sha256_hex(canonical.as_bytes()));
        let mut key = hmac(format!("AWS4{}", self.secret_key).as_bytes(), day.as_bytes());
        for part in [self.region.as_str(), "s3", "aws4_request"] {
            key = hmac(&key, part.as_bytes());
        }
        let signature = hex::encode(hmac(&key, text.as_bytes()));
        format!(
            "AWS4-HMAC-SHA256 Credential={}/{scope},SignedHeaders={names},Signature={signature}",
            self.access_key
        )
    }
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").field("access_key", &self.access_key).finish_non_exhaustive()
    }
}

/// SHA-256 in hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// HMAC-SHA256 (RFC 2104).
pub(crate) fn hmac(key: &[u8], text: &[u8]) -> [u8; 32] {
    let mut block = [0_u8; BLOCK_BYTES];
    match key.len() > BLOCK_BYTES {
        true => block[..32].copy_from_slice(&Sha256::digest(key)),
        false => block[..key.len()].copy_from_slice(key),
    }
    let padded = |with: u8| block.map(|byte| byte ^ with);
    let inner = Sha256::new().chain_update(padded(0x36)).chain_update(text).finalize();
    Sha256::new().chain_update(padded(0x5c)).chain_update(inner).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4231, test cases 2 and 6.
    #[test]
    fn hmac_is_that_of_the_rfc() {
        let of = |key: &[u8], text: &[u8]| hex::encode(hmac(key, text));
        assert_eq!(
            of(b"Jefe", b"what do ya want for nothing?"),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
        assert_eq!(
            of(&[0xaa; 131], b"Test Using Larger Than Block-Size Key - Hash Key First"),
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"
        );
    }

    /// The example "GET Object" of Amazon's "Authenticating Requests (AWS Signature Version 4)".
    #[test]
    fn the_signature_is_that_of_amazons_example() {
        let signer = Signer {
            access_key: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".into(),
            region: "us-east-1".into(),
        };
        let payload = sha256_hex(b"");
        let headers = [
            ("host", "examplebucket.s3.amazonaws.com"),
            ("range", "bytes=0-9"),
            ("x-amz-content-sha256", &payload),
            ("x-amz-date", "20130524T000000Z"),
        ];
        let request = Signed {
            method: &Method::GET,
            path: "/test.txt",
            query: "",
            headers: &headers,
            payload: &payload,
            time: "20130524T000000Z",
        };
        let said = signer.authorization(&request);
        assert!(
            said.ends_with("Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"),
            "{said}"
        );
    }
}
