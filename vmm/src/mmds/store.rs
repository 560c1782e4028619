//! The document and its formats.

use std::time::Instant;

use mote_vmm_api::{MmdsConfig, MmdsVersion};
use serde_json::{Map, Value};

use super::token::{Authority, TTL_SECONDS};

/// What is wrong with a request to the store, from the API or the guest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MmdsError {
    /// Too much.
    #[error("The MMDS patch request doesn't fit.")]
    DataStoreLimitExceeded,
    /// Nothing there.
    #[error("The MMDS resource does not exist.")]
    NotFound,
    /// A patch of nothing.
    #[error("The MMDS data store is not initialized.")]
    NotInitialized,
    /// Text of something that is neither object nor string.
    #[error("Cannot retrieve value. The value has an unsupported type.")]
    UnsupportedValueType,
    /// A token's life.
    #[error(
        "Invalid time to live value provided for token: {0}. Please provide a value between {start} and {end}.",
        start = TTL_SECONDS.start(), end = TTL_SECONDS.end()
    )]
    InvalidTtl(u32),
    /// The host's generator.
    #[error("Failed to generate a token.")]
    Random,
}

/// How the guest wants a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// As JSON.
    Json,
    /// As EC2's instance metadata service: names of an object's members, one a line, with a slash behind those that are
    /// objects; a string without quotes.
    Imds,
}

/// The machine's metadata.
#[derive(Debug)]
pub struct Mmds {
    version: MmdsVersion,
    imds_compat: bool,
    data: Option<Value>,
    /// Most bytes that the document has as JSON.
    limit: usize,
    tokens: Authority,
}

impl Mmds {
    /// An empty store for the machine `id`.
    ///
    /// # Errors
    /// The host has no random numbers for the key of the tokens.
    pub fn new(id: &str, limit: usize) -> Result<Self, getrandom::Error> {
        let tokens = Authority::new(id)?;
        Ok(Self { version: MmdsVersion::V1, imds_compat: false, data: None, limit, tokens })
    }

    /// Takes over version and format.
    pub fn configure(&mut self, config: &MmdsConfig) {
        self.version = config.version;
        self.imds_compat = config.imds_compat;
    }

    /// Whether tokens are needed.
    pub const fn version(&self) -> MmdsVersion {
        self.version
    }

    /// Most bytes of the document.
    pub const fn limit(&self) -> usize {
        self.limit
    }

    /// The whole document; null before there is one.
    pub fn document(&self) -> Value {
        self.data.clone().unwrap_or(Value::Null)
    }

    /// Replaces the document.
    ///
    /// # Errors
    /// It is too large.
    pub fn put(&mut self, document: Value) -> Result<(), MmdsError> {
        self.data = Some(self.fitting(document)?);
        Ok(())
    }

    /// Changes parts of the document (RFC 7396).
    ///
    /// # Errors
    /// There is none, or the result is too large; nothing has changed then.
    pub fn patch(&mut self, patch: Value) -> Result<(), MmdsError> {
        let mut document = self.data.clone().ok_or(MmdsError::NotInitialized)?;
        merge(&mut document, patch);
        self.put(document)
    }

    fn fitting(&self, document: Value) -> Result<Value, MmdsError> {
        if document.to_string().len() > self.limit {
            return Err(MmdsError::DataStoreLimitExceeded);
        }
        Ok(document)
    }

    /// The format of the answer to a request that wants `format`.
    pub const fn format(&self, format: Format) -> Format {
        if self.imds_compat { Format::Imds } else { format }
    }

    /// The value at `path`, a JSON pointer (RFC 6901) in which slashes may be doubled and one may be at the end.
    ///
    /// # Errors
    /// There is nothing, or it has no text.
    pub fn get(&self, path: &str, format: Format) -> Result<String, MmdsError> {
        let pointer = single_slashes(path);
        let pointer = pointer.strip_suffix('/').unwrap_or(&pointer);
        // The document may be null: that, too, is a value.
        let document = self.data.as_ref().unwrap_or(&Value::Null);
        let value = document.pointer(pointer).ok_or(MmdsError::NotFound)?;
        match self.format(format) {
            Format::Json => Ok(value.to_string()),
            Format::Imds => imds(value),
        }
    }

    /// A token that is good for `ttl_seconds` from `now`.
    ///
    /// # Errors
    /// It would be good for too long or not at all.
    pub fn issue_token(&self, ttl_seconds: u32, now: Instant) -> Result<String, MmdsError> {
        if !TTL_SECONDS.contains(&ttl_seconds) {
            return Err(MmdsError::InvalidTtl(ttl_seconds));
        }
        self.tokens.issue(ttl_seconds, now).ok_or(MmdsError::Random)
    }

    /// Whether the token is good at `now`.
    pub fn is_valid_token(&self, token: &str, now: Instant) -> bool {
        self.tokens.is_valid(token, now)
    }
}

/// The path with one slash where there are several in a row.
pub fn single_slashes(path: &str) -> String {
    let mut single = String::with_capacity(path.len());
    for character in path.chars() {
        if character != '/' || !single.ends_with('/') {
            single.push(character);
        }
    }
    single
}

/// RFC 7396 §2. The depth is that of the patch, which the JSON parser has bounded.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(object) = target else { return };
    for (name, value) in patch {
        if value.is_null() {
            object.remove(&name);
        } else {
            merge(object.entry(name).or_insert(Value::Null), value);
        }
    }
}

fn imds(value: &Value) -> Result<String, MmdsError> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Object(object) => {
            let line = |(name, value): (&String, &Value)| {
                if value.is_object() { format!("{name}/") } else { name.clone() }
            };
            Ok(object.iter().map(line).collect::<Vec<_>>().join("\n"))
        }
        _ => Err(MmdsError::UnsupportedValueType),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn store(limit: usize) -> Mmds {
        Mmds::new("test", limit).unwrap()
    }

    fn john() -> Mmds {
        let mut mmds = store(1000);
        mmds.put(json!({
            "name": {"first": "John", "second": "Doe"}, "age": 43, "a/b": {"~": "x"},
            "phones": {"home": {"RO": "+401234567"}, "mobile": "+442345678"}, "": {"": "empty"},
        }))
        .unwrap();
        mmds
    }

    #[test]
    fn values_are_found_by_pointer_in_both_formats() {
        let mmds = john();
        let get = |path, format| mmds.get(path, format).unwrap();
        assert_eq!(get("/", Format::Imds), "/\na/b/\nage\nname/\nphones/");
        assert_eq!(get("/name", Format::Imds), "first\nsecond");
        assert_eq!(get("//name///", Format::Json), r#"{"first":"John","second":"Doe"}"#);
        assert_eq!(get("/name/first", Format::Imds), "John");
        assert_eq!(get("/name/first/", Format::Json), r#""John""#);
        assert_eq!(get("/age", Format::Json), "43");
        assert_eq!(get("/a~1b/~0", Format::Imds), "x");
        assert_eq!(mmds.get("/age", Format::Imds), Err(MmdsError::UnsupportedValueType));
        for missing in ["/no", "/name/first/x", "/age/0", "name"] {
            assert_eq!(mmds.get(missing, Format::Json), Err(MmdsError::NotFound), "{missing}");
        }
    }

    #[test]
    fn compatibility_overrides_the_wish_for_json() {
        let mut mmds = john();
        mmds.configure(&MmdsConfig { imds_compat: true, ..MmdsConfig::default() });
        assert_eq!(mmds.get("/name/first", Format::Json).unwrap(), "John");
    }

    #[test]
    fn a_patch_merges_removes_and_replaces() {
        let mut mmds = john();
        mmds.patch(
            json!({"age": null, "name": {"first": "Jane"}, "phones": 1, "new": {"deep": {"x": null}}}),
        )
        .unwrap();
        let document = mmds.document();
        assert_eq!(document["name"], json!({"first": "Jane", "second": "Doe"}));
        assert_eq!((&document["phones"], &document["new"]), (&json!(1), &json!({"deep": {}})));
        assert!(document.get("age").is_none());
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let mut mmds = store(20);
        assert_eq!(mmds.patch(json!({"a": 1})), Err(MmdsError::NotInitialized));
        assert_eq!(mmds.document(), Value::Null);
        mmds.put(json!({"a": 1})).unwrap();
        let long = json!({"b": "0123456789"});
        assert_eq!(mmds.patch(long.clone()), Err(MmdsError::DataStoreLimitExceeded));
        assert_eq!(mmds.document(), json!({"a": 1}));
        mmds.put(long).unwrap();
    }

    #[test]
    fn a_token_lives_at_least_a_second_and_at_most_six_hours() {
        let mmds = store(0);
        let now = Instant::now();
        for ttl in [0, 21_601] {
            let error = mmds.issue_token(ttl, now).unwrap_err().to_string();
            assert_eq!(
                error,
                format!(
                    "Invalid time to live value provided for token: {ttl}. Please provide a value between 1 and 21600."
                )
            );
        }
        assert!(mmds.is_valid_token(&mmds.issue_token(21_600, now).unwrap(), now));
    }

    proptest! {
        #[test]
        fn any_path_is_looked_up_without_panic(path in "[/~01a\\PC]{0,30}") {
            let _ = john().get(&path, Format::Imds);
        }

        #[test]
        fn no_slashes_stay_doubled(path in "[/ab]{0,30}") {
            let single = single_slashes(&path);
            prop_assert!(!single.contains("//"));
            prop_assert_eq!(single.replace('/', ""), path.replace('/', ""));
        }
    }
}
