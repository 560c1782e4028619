//! Reading the object of a request, which [`crate::schema`] has checked; where that lets others in, unknown fields are the
//! user's own (Keystone's "extra").

use serde_json::{Map, Value};

use crate::{db, http::error::ApiError};

/// Longest name, as Keystone's columns.
pub const MAX_NAME_CHARS: usize = 255;
/// Longest name of a project or domain.
const MAX_SHORT_NAME_CHARS: usize = 64;
/// Longest free text.
const MAX_TEXT_BYTES: usize = 64 << 10;

/// Fields that were not taken yet.
#[derive(Debug)]
pub struct Fields(Map<String, Value>);

impl Fields {
    /// The object under `key` of a body.
    ///
    /// # Errors
    /// 400 if there is none.
    pub fn of(mut body: Value, key: &str) -> Result<Self, ApiError> {
        match body.get_mut(key).map(Value::take) {
            Some(Value::Object(fields)) => Ok(Self(fields)),
            _ => Err(ApiError::BadRequest(format!("The body must have an object {key:?}."))),
        }
    }

    /// Takes a text; `null` is as if absent.
    ///
    /// # Errors
    /// 400 if it is of another type or too long.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.len() <= MAX_TEXT_BYTES => Ok(Some(text)),
            Some(Value::String(_)) => Err(invalid(name, "is too long")),
            Some(_) => Err(invalid(name, "is not of type string")),
        }
    }

    /// Takes a text and tells `null` (to be cleared) from absent.
    ///
    /// # Errors
    /// As [`Self::text`].
    pub fn nullable_text(&mut self, name: &str) -> Result<Option<Option<String>>, ApiError> {
        let present = self.0.contains_key(name);
        Ok(self.text(name)?.map_or_else(|| present.then_some(None), |text| Some(Some(text))))
    }

    /// Takes a name: 1 to 255 characters, not only blanks.
    ///
    /// # Errors
    /// 400 otherwise.
    pub fn name(&mut self) -> Result<Option<String>, ApiError> {
        self.name_up_to(MAX_NAME_CHARS)
    }

    /// Takes the name of a project or domain, which has at most 64 characters.
    ///
    /// # Errors
    /// 400 otherwise.
    pub fn short_name(&mut self) -> Result<Option<String>, ApiError> {
        self.name_up_to(MAX_SHORT_NAME_CHARS)
    }

    fn name_up_to(&mut self, most: usize) -> Result<Option<String>, ApiError> {
        let name = self.text("name")?;
        match &name {
            Some(text) if text.trim().is_empty() || text.chars().count() > most => {
                Err(invalid("name", &format!("must have 1 to {most} characters")))
            }
            _ => Ok(name),
        }
    }

    /// Takes a truth value.
    ///
    /// # Errors
    /// 400 if it is of another type.
    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(invalid(name, "is not of type boolean")),
        }
    }

    /// Takes a whole number.
    ///
    /// # Errors
    /// 400 if it is of another type.
    pub fn integer(&mut self, name: &str) -> Result<Option<i64>, ApiError> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_i64().map(Some).ok_or_else(|| invalid(name, "is not of type integer")),
        }
    }

    /// Takes a time to come, as µs since 1970; without a zone it is UTC, as Keystone's clients mean it.
    ///
    /// # Errors
    /// 400 if it is none, or has been.
    pub fn later_time(&mut self, name: &str) -> Result<Option<i64>, ApiError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let zoned = if text.ends_with('Z') || text.contains('+') { text } else { format!("{text}Z") };
        let time: jiff::Timestamp =
            zoned.parse().map_err(|_| invalid(name, "is not a time like 2026-12-31T23:59:59Z"))?;
        match time.as_microsecond() > db::now_us() {
            true => Ok(Some(time.as_microsecond())),
            false => Err(invalid(name, "is in the past")),
        }
    }

    /// Takes a list of texts.
    ///
    /// # Errors
    /// 400 if it is of another type.
    pub fn texts(&mut self, name: &str) -> Result<Option<Vec<String>>, ApiError> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                serde_json::from_value(value).map(Some).map_err(|_| invalid(name, "is not a list of strings"))
            }
        }
    }

    /// Takes an object.
    ///
    /// # Errors
    /// 400 if it is of another type.
    pub fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(_) => Err(invalid(name, "is not an object")),
        }
    }

    /// Takes a list of anything.
    ///
    /// # Errors
    /// 400 if it is of another type.
    pub fn values(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.0.remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(_) => Err(invalid(name, "is not a list")),
        }
    }

    /// Refuses a change of what can't be changed.
    ///
    /// # Errors
    /// 400 if the field is given and is not `current`.
    pub fn unchanged(&mut self, name: &str, current: &str) -> Result<(), ApiError> {
        match self.text(name)? {
            Some(value) if value != current => Err(invalid(name, "can't be changed")),
            _ => Ok(()),
        }
    }

    /// What is left, of something that has this id and may be new.
    ///
    /// # Errors
    /// 400 if it names another id, or is too much to keep.
    pub fn rest_of(mut self, id: &str) -> Result<Map<String, Value>, ApiError> {
        self.unchanged("id", id)?;
        self.rest()
    }

    /// What is left.
    ///
    /// # Errors
    /// 400 if it is too much to keep.
    pub fn rest(mut self) -> Result<Map<String, Value>, ApiError> {
        for name in ["id", "links", "options"] {
            self.0.remove(name);
        }
        match Value::Object(self.0.clone()).to_string().len() > MAX_TEXT_BYTES {
            true => Err(ApiError::BadRequest(format!(
                "The further fields have more than {MAX_TEXT_BYTES} bytes."
            ))),
            false => Ok(self.0),
        }
    }
}

/// A thing's own fields, and the stored extra ones as far as they have other names.
pub fn with_extra(stored: &str, own: Value) -> Value {
    let mut shown: Map<String, Value> = serde_json::from_str(stored).unwrap_or_default();
    if let Value::Object(own) = own {
        shown.extend(own);
    }
    Value::Object(shown)
}

/// Adds `new` to the stored extra fields; `null` removes one.
pub fn merge_extra(stored: &str, new: Map<String, Value>) -> String {
    let mut extra: Map<String, Value> = serde_json::from_str(stored).unwrap_or_default();
    for (name, value) in new {
        match value {
            Value::Null => drop(extra.remove(&name)),
            value => drop(extra.insert(name, value)),
        }
    }
    Value::Object(extra).to_string()
}

/// 400 for a field.
pub fn invalid(name: &str, what: &str) -> ApiError {
    ApiError::BadRequest(format!("Invalid input for field '{name}': it {what}."))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Fields {
        Fields::of(json!({ "thing": value }), "thing").unwrap()
    }

    #[test]
    fn wrong_types_are_named() {
        assert!(Fields::of(json!([]), "thing").is_err());
        let text = fields(json!({"name": 5})).name().unwrap_err().to_string();
        assert!(text.contains("'name'") && text.contains("string"), "{text}");
        assert!(fields(json!({"name": "  "})).name().is_err());
        assert!(fields(json!({"enabled": "yes"})).boolean("enabled").is_err());
    }

    #[test]
    fn null_is_told_from_absent_and_removes_extra() {
        assert_eq!(fields(json!({"a": null})).nullable_text("a").unwrap(), Some(None));
        assert_eq!(fields(json!({})).nullable_text("a").unwrap(), None);
        let new = json!({"a": null, "c": 3}).as_object().cloned().unwrap();
        assert_eq!(merge_extra("{\"a\":1,\"b\":2}", new), "{\"b\":2,\"c\":3}");
    }
}
