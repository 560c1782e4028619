//! A bucket of an S3-compatible service: the few calls that a content-addressed store needs.
//!
//! Objects are `PREFIX/sha256/<digest>`, addressed by path (`https://endpoint/bucket/…`), which every such service knows.
//! Bodies are signed with their digest, so that what arrives is what was sent. Content larger than a part is sent in parts;
//! an upload that fails is aborted (one that a crash broke off is left to the bucket's lifecycle rule for incomplete uploads).

use std::{fs::File, os::unix::fs::FileExt as _, sync::Arc};

use axum::body::Body;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use url::Url;

use super::{
    super::blobs::blocking,
    sign::{Signed, Signer, sha256_hex},
};
use crate::http::{client, error::ApiError, query::escaped};

/// Smallest part of an upload in parts; what is shorter is sent whole.
const PART_BYTES: u64 = 16 << 20;
/// Most parts that S3 takes.
const MAX_PARTS: u64 = 10_000;
/// Largest answer that is read as a text.
const MAX_TEXT_BYTES: usize = 4 << 20;
/// What the prefix holds besides the content: whose it is.
const MARK: &str = "mote-cloud";

/// Where the objects are.
#[derive(Debug)]
pub struct Bucket {
    endpoint: Url,
    name: String,
    /// Empty, or with a slash at the end.
    prefix: String,
    signer: Signer,
}

/// An address that names no bucket.
#[derive(Debug, thiserror::Error)]
pub enum BucketError {
    /// Not an address of a bucket.
    #[error("{0:?} is not of the form s3://BUCKET[/PREFIX]?endpoint=https://HOST[:PORT][&region=REGION]")]
    Address(String),
    /// No keys.
    #[error("the variables AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must have the keys of the bucket")]
    Keys,
}

impl Bucket {
    /// A bucket by its address, with these keys (access key id, secret).
    ///
    /// # Errors
    /// See [`BucketError`].
    pub fn parse(address: &str, keys: Option<(String, String)>) -> Result<Self, BucketError> {
        let wrong = || BucketError::Address(address.to_owned());
        let url: Url = address.parse().map_err(|_| wrong())?;
        let name = url.host_str().filter(|_| url.scheme() == "s3").ok_or_else(wrong)?.to_owned();
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        let prefix = url.path().trim_matches('/');
        if !prefix.chars().all(plain) || prefix.contains("//") {
            return Err(wrong());
        }
        let (mut endpoint, mut region) = (None, "us-east-1".to_owned());
        for (key, value) in url.query_pairs() {
            match &*key {
                "endpoint" => endpoint = value.parse::<Url>().ok(),
                "region" => region = value.into_owned(),
                _ => return Err(wrong()),
            }
        }
        let endpoint = endpoint.filter(|url| ["http", "https"].contains(&url.scheme()) && url.has_host());
        let (access_key, secret_key) = keys.ok_or(BucketError::Keys)?;
        Ok(Self {
            endpoint: endpoint.filter(|url| url.path() == "/").ok_or_else(wrong)?,
            name,
            prefix: if prefix.is_empty() { String::new() } else { format!("{prefix}/") },
            signer: Signer { access_key, secret_key, region },
        })
    }

    /// For people: where it is.
    pub fn place(&self) -> String {
        format!("{} of bucket {} at {}", self.prefix, self.name, self.endpoint)
    }

    fn object(&self, sha256: &str) -> String {
        format!("/{}/{}sha256/{sha256}", self.name, self.prefix)
    }

    /// Makes sure that the prefix is this cloud's: what a cloud doesn't know it removes, so two may not share one.
    ///
    /// # Errors
    /// Another cloud's, or the bucket can't be used.
    pub async fn claim(&self, cloud: &str) -> Result<(), ApiError> {
        let mark = format!("/{}/{}{MARK}", self.name, self.prefix);
        let found = self.call(Method::GET, &mark, &[], None, Bytes::new()).await?;
        match found.status() {
            StatusCode::OK => match text(found).await?.trim() == cloud {
                true => Ok(()),
                false => {
                    Err(ApiError::internal(format!("{} belongs to another cloud ({MARK})", self.place())))
                }
            },
            StatusCode::NOT_FOUND => {
                let made = self.call(Method::PUT, &mark, &[], None, Bytes::from(cloud.to_owned())).await?;
                expect(made, StatusCode::OK).await.map(drop)
            }
            _ => expect(found, StatusCode::OK).await.map(drop),
        }
    }

    /// Whether this content is there.
    ///
    /// # Errors
    /// If the service can't be asked.
    pub async fn has(&self, sha256: &str) -> Result<bool, ApiError> {
        let answer = self.call(Method::HEAD, &self.object(sha256), &[], None, Bytes::new()).await?;
        match answer.status() {
            StatusCode::OK => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => expect(answer, StatusCode::OK).await.map(|_| true),
        }
    }

    /// Bytes `first..=last` of this content.
    ///
    /// # Errors
    /// 404 if it isn't there.
    pub async fn get(&self, sha256: &str, first: u64, last: u64) -> Result<Body, ApiError> {
        let range = format!("bytes={first}-{last}");
        let answer = self.call(Method::GET, &self.object(sha256), &[], Some(&range), Bytes::new()).await?;
        match answer.status() {
            StatusCode::OK if first == 0 => Ok(Body::new(answer.into_body())),
            StatusCode::PARTIAL_CONTENT => Ok(Body::new(answer.into_body())),
            StatusCode::NOT_FOUND => Err(ApiError::NotFound("The image has no data.".into())),
            _ => Err(refused(answer).await),
        }
    }

    /// Stores content.
    ///
    /// # Errors
    /// If the service doesn't take it; nothing is stored then.
    pub async fn put(&self, sha256: &str, file: Arc<File>, size: u64) -> Result<(), ApiError> {
        let path = self.object(sha256);
        if size <= PART_BYTES {
            let sent = self.call(Method::PUT, &path, &[], None, piece(file, 0, size).await?).await?;
            return expect(sent, StatusCode::OK).await.map(drop);
        }
        let begun = self.call(Method::POST, &path, &[("uploads", "")], None, Bytes::new()).await?;
        let begun = text(expect(begun, StatusCode::OK).await?).await?;
        let upload = elements(&begun, "UploadId").next().ok_or_else(|| ApiError::internal("no UploadId"))?;
        let sent = self.put_parts(&path, upload, file, size).await;
        if sent.is_err() {
            let aborted = self.call(Method::DELETE, &path, &[("uploadId", upload)], None, Bytes::new()).await;
            if let Err(error) = aborted {
                tracing::warn!(%error, path, "an upload in parts could not be aborted");
            }
        }
        sent
    }

    async fn put_parts(&self, path: &str, upload: &str, file: Arc<File>, size: u64) -> Result<(), ApiError> {
        let part = PART_BYTES.max(size.div_ceil(MAX_PARTS));
        let mut list = String::from("<CompleteMultipartUpload>");
        for number in 0..size.div_ceil(part) {
            let start = number * part;
            let bytes = piece(file.clone(), start, part.min(size - start)).await?;
            let number = (number + 1).to_string();
            let query = [("partNumber", number.as_str()), ("uploadId", upload)];
            let sent = self.call(Method::PUT, path, &query, None, bytes).await?;
            let sent = expect(sent, StatusCode::OK).await?;
            let tag = sent.headers().get(http::header::ETAG).and_then(|tag| tag.to_str().ok());
            let tag = tag.ok_or_else(|| ApiError::internal("a part has no ETag"))?;
            list += &format!("<Part><PartNumber>{number}</PartNumber><ETag>{tag}</ETag></Part>");
        }
        list += "</CompleteMultipartUpload>";
        let query = [("uploadId", upload)];
        let done = self.call(Method::POST, path, &query, None, Bytes::from(list)).await?;
        // This call can fail although its status, which is sent first, is 200.
        let done = text(expect(done, StatusCode::OK).await?).await?;
        match done.contains("<Error>") {
            true => Err(ApiError::internal(format!("completing an upload in parts: {done}"))),
            false => Ok(()),
        }
    }

    /// Removes content; it is no error if it isn't there.
    ///
    /// # Errors
    /// If the service doesn't.
    pub async fn remove(&self, sha256: &str) -> Result<(), ApiError> {
        let answer = self.call(Method::DELETE, &self.object(sha256), &[], None, Bytes::new()).await?;
        match answer.status() {
            StatusCode::NOT_FOUND => Ok(()),
            _ => expect(answer, StatusCode::NO_CONTENT).await.map(drop),
        }
    }

    /// Digests of all content.
    ///
    /// # Errors
    /// If the service can't be asked.
    pub async fn list(&self) -> Result<Vec<String>, ApiError> {
        let (path, start) = (format!("/{}", self.name), format!("{}sha256/", self.prefix));
        let (mut digests, mut token) = (Vec::new(), String::new());
        loop {
            let mut query = vec![("list-type", "2"), ("prefix", start.as_str())];
            if !token.is_empty() {
                query.insert(0, ("continuation-token", token.as_str()));
            }
            let page = self.call(Method::GET, &path, &query, None, Bytes::new()).await?;
            let page = text(expect(page, StatusCode::OK).await?).await?;
            let names = elements(&page, "Key").filter_map(|key| key.strip_prefix(start.as_str()));
            digests.extend(names.filter(|name| mote_images::digest::is_sha256_hex(name)).map(str::to_owned));
            match elements(&page, "NextContinuationToken").next() {
                Some(next) => token = next.to_owned(),
                None => return Ok(digests),
            }
        }
    }

    /// Makes the bucket itself.
    #[cfg(test)]
    pub async fn make(&self) -> Result<(), ApiError> {
        let path = format!("/{}", self.name);
        expect(self.call(Method::PUT, &path, &[], None, Bytes::new()).await?, StatusCode::OK).await.map(drop)
    }

    /// Stores bytes under their digest.
    #[cfg(test)]
    pub async fn put_bytes(&self, bytes: &'static [u8]) {
        let path = self.object(&sha256_hex(bytes));
        let sent = self.call(Method::PUT, &path, &[], None, Bytes::from_static(bytes)).await.unwrap();
        expect(sent, StatusCode::OK).await.unwrap();
    }

    /// Signs and sends a request. The query's parameters must be in order.
    async fn call(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        range: Option<&str>,
        body: Bytes,
    ) -> Result<Response<Incoming>, ApiError> {
        let query: Vec<String> =
            query.iter().map(|(name, value)| format!("{}={}", escaped(name), escaped(value))).collect();
        let query = query.join("&");
        let host = self.endpoint.host_str().unwrap_or_default();
        let host = self.endpoint.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
        let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
        let payload = sha256_hex(&body);
        let mut headers = vec![("host", host.as_str())];
        headers.extend(range.map(|range| ("range", range)));
        headers.extend([("x-amz-content-sha256", payload.as_str()), ("x-amz-date", time.as_str())]);
        let signed = Signed {
            method: &method,
            path,
            query: &query,
            headers: &headers,
            payload: &payload,
            time: &time,
        };
        let authorization = self.signer.authorization(&signed);
        let target = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
        let mut request = Request::builder().method(&method).uri(target);
        for (name, value) in &headers {
            request = request.header(*name, *value);
        }
        // Some servers want to be told the length of nothing as well.
        if method == Method::PUT || method == Method::POST {
            request = request.header(http::header::CONTENT_LENGTH, body.len());
        }
        let request = request.header(http::header::AUTHORIZATION, authorization).body(Body::from(body));
        client::send(&self.endpoint, request.map_err(ApiError::internal)?).await.map_err(|error| {
            tracing::error!(%error, place = self.place(), "the image store can't be reached");
            ApiError::Unavailable("The image store can't be reached. Please try again.".into())
        })
    }
}

async fn piece(file: Arc<File>, start: u64, bytes: u64) -> Result<Bytes, ApiError> {
    let length = usize::try_from(bytes).map_err(ApiError::internal)?;
    let read = blocking(move || {
        let mut buffer = vec![0; length];
        file.read_exact_at(&mut buffer, start).map(|()| buffer)
    });
    Ok(Bytes::from(read.await?.map_err(ApiError::internal)?))
}

async fn text(answer: Response<Incoming>) -> Result<String, ApiError> {
    let body = Limited::new(answer.into_body(), MAX_TEXT_BYTES).collect().await;
    let bytes = body.map_err(ApiError::internal)?.to_bytes();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

async fn expect(answer: Response<Incoming>, status: StatusCode) -> Result<Response<Incoming>, ApiError> {
    match answer.status() == status {
        true => Ok(answer),
        false => Err(refused(answer).await),
    }
}

async fn refused(answer: Response<Incoming>) -> ApiError {
    let status = answer.status();
    let said: String = text(answer).await.unwrap_or_default().chars().take(500).collect();
    ApiError::internal(format!("the image store answered {status}: {said}"))
}

/// Texts of all elements of a name, in the flat answers of S3.
fn elements<'a>(xml: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let mut rest = xml;
    std::iter::from_fn(move || {
        let inside = rest.split_once(&open)?.1;
        let (text, after) = inside.split_once(&close)?;
        rest = after;
        Some(text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_name_bucket_prefix_endpoint_and_region() {
        let keys = Some(("id".to_owned(), "secret".to_owned()));
        let bucket =
            Bucket::parse("s3://images/my/cloud?endpoint=http://[::1]:9000&region=eu-1", keys.clone())
                .unwrap();
        assert_eq!(bucket.object("ab"), "/images/my/cloud/sha256/ab");
        assert_eq!((bucket.endpoint.as_str(), bucket.signer.region.as_str()), ("http://[::1]:9000/", "eu-1"));
        assert!(!format!("{bucket:?}").contains("secret"));
        for wrong in [
            "images",
            "s3://images",
            "http://images?endpoint=http://h",
            "s3://images/a b?endpoint=http://h",
            "s3://images?endpoint=ftp://h",
            "s3://images?endpoint=http://h/path",
            "s3://images?endpoint=http://h&color=red",
        ] {
            assert!(matches!(Bucket::parse(wrong, keys.clone()), Err(BucketError::Address(_))), "{wrong}");
        }
        assert!(matches!(Bucket::parse("s3://i?endpoint=http://h", None), Err(BucketError::Keys)));
    }

    #[test]
    fn elements_are_found_one_after_the_other() {
        let xml = "<List><Key>a/1</Key><Size>1</Size><Key>a/2</Key><Key>open";
        assert_eq!(elements(xml, "Key").collect::<Vec<_>>(), ["a/1", "a/2"]);
    }
}
