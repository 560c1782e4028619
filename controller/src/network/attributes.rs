//! The attributes of a request body, taken one by one: what is left at the end is not ours, and refused.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::http::error::ApiError;

/// Longest name, as in Neutron (`NAME_MAX_LEN`); also used for descriptions.
const MAX_NAME: usize = 255;

/// Longest description of a resource without Neutron's standard attributes (`LONG_DESCRIPTION_MAX_LEN`).
const MAX_DESCRIPTION: usize = 1024;

/// Resources that one request can make.
const MAX_BULK: usize = 1000;

/// What a create request brings.
#[derive(Debug)]
pub(super) enum New {
    /// One resource.
    One(Attributes),
    /// Several, all or none of which are made.
    Several(Vec<Attributes>),
}

/// `{"network": {…}}` without its envelope.
#[derive(Debug)]
pub(super) struct Attributes(Map<String, Value>);

impl Attributes {
    /// Opens the envelope.
    ///
    /// # Errors
    /// 400 if there is none.
    pub(super) fn open(body: Value, resource: &str) -> Result<Self, ApiError> {
        let Value::Object(mut envelope) = body else {
            return Err(ApiError::BadRequest("Resource body required".into()));
        };
        match envelope.remove(resource) {
            Some(Value::Object(map)) if envelope.is_empty() => Ok(Self(map)),
            _ => Err(ApiError::BadRequest(format!("Unable to find '{resource}' in request body"))),
        }
    }

    /// Opens the envelope of one new resource or, under the collection's name, of several.
    ///
    /// # Errors
    /// 400 if there is none, or more than [`MAX_BULK`].
    pub(super) fn open_new(body: Value, resource: &str, collection: &str) -> Result<New, ApiError> {
        let several = match &body {
            Value::Object(envelope) => envelope.get(collection).cloned(),
            _ => None,
        };
        let Some(Value::Array(list)) = several else { return Self::open(body, resource).map(New::One) };
        if list.is_empty() || list.len() > MAX_BULK {
            return Err(ApiError::BadRequest(format!("'{collection}' must have 1 to {MAX_BULK} members")));
        }
        let open = |value| match value {
            Value::Object(map) => Ok(Self(map)),
            _ => Err(ApiError::BadRequest(format!("a member of '{collection}' is not an object"))),
        };
        list.into_iter().map(open).collect::<Result<_, _>>().map(New::Several)
    }

    /// Attributes that are there, for resources within resources.
    ///
    /// # Errors
    /// 400 if the value is no object.
    pub(super) fn of(name: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self(map)),
            other => Err(invalid(name, format!("'{other}' is not a dictionary"))),
        }
    }

    /// Takes an attribute as it is.
    pub(super) fn value(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    /// Takes a text.
    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.text(name, MAX_NAME)
    }

    /// Takes `description` where it may be long.
    pub(super) fn long_description(&mut self) -> Result<Option<String>, ApiError> {
        self.text("description", MAX_DESCRIPTION)
    }

    fn text(&mut self, name: &str, max: usize) -> Result<Option<String>, ApiError> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) if text.chars().count() <= max => Ok(Some(text)),
            Some(Value::String(_)) => Err(invalid(name, format!("the text exceeds {max} characters"))),
            Some(other) => Err(invalid(name, format!("'{other}' is not a valid string"))),
        }
    }

    /// Takes a text that may be null: `Some(None)` if it is.
    pub(super) fn nullable(&mut self, name: &str) -> Result<Option<Option<String>>, ApiError> {
        if self.0.get(name).is_some_and(Value::is_null) {
            self.0.remove(name);
            return Ok(Some(None));
        }
        Ok(self.string(name)?.map(Some))
    }

    /// Takes an id that may be null: `Some(None)` if it is.
    pub(super) fn nullable_id(&mut self, name: &str) -> Result<Option<Option<String>>, ApiError> {
        match self.nullable(name)? {
            Some(Some(text)) => Ok(Some(Some(id(name, &text)?))),
            other => Ok(other),
        }
    }

    /// Takes a text without which the resource can't be made.
    pub(super) fn required(&mut self, name: &str) -> Result<String, ApiError> {
        self.string(name)?.ok_or_else(|| {
            ApiError::BadRequest(format!(
                "Failed to parse request. Required attribute '{name}' not specified"
            ))
        })
    }

    /// Takes one of several words.
    pub(super) fn word<'a>(&mut self, name: &str, words: &[&'a str]) -> Result<Option<&'a str>, ApiError> {
        let Some(text) = self.string(name)? else { return Ok(None) };
        let known = words.iter().find(|word| **word == text);
        known.map(|word| Some(*word)).ok_or_else(|| invalid(name, format!("'{text}' is not in {words:?}")))
    }

    /// Takes a list of ids.
    pub(super) fn ids(&mut self, name: &str) -> Result<Option<Vec<String>>, ApiError> {
        if self.0.get(name).is_some_and(Value::is_null) {
            self.0.remove(name);
            return Ok(Some(Vec::new()));
        }
        let Some(list) = self.list(name)? else { return Ok(None) };
        let mut ids: Vec<String> = Vec::with_capacity(list.len());
        for value in list {
            let parsed = id(name, value.as_str().unwrap_or_default())?;
            if ids.contains(&parsed) {
                return Err(invalid(name, format!("Duplicate items in the list: '{parsed}'")));
            }
            ids.push(parsed);
        }
        Ok(Some(ids))
    }

    /// Whether an attribute is there and null.
    pub(super) fn value_is_null(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(Value::is_null)
    }

    /// Whether an attribute is there.
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Takes a truth value, in the forms that Neutron knows.
    pub(super) fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        let Some(value) = self.0.remove(name) else { return Ok(None) };
        let known = match &value {
            Value::Bool(truth) => Some(*truth),
            Value::Number(number) if number.as_u64() == Some(0) => Some(false),
            Value::Number(number) if number.as_u64() == Some(1) => Some(true),
            Value::String(text) => parse_bool(text),
            _ => None,
        };
        known.map(Some).ok_or_else(|| invalid(name, format!("'{value}' cannot be converted to boolean")))
    }

    /// Takes a whole number.
    pub(super) fn integer(&mut self, name: &str) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.0.remove(name) else { return Ok(None) };
        let known = match &value {
            Value::Number(number) => number.as_i64(),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        known.map(Some).ok_or_else(|| invalid(name, format!("'{value}' is not an integer")))
    }

    /// Takes a list.
    pub(super) fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(invalid(name, format!("'{other}' is not a list"))),
        }
    }

    /// Takes attributes that can only have one value in Mote; null and absence mean the same.
    ///
    /// # Errors
    /// 400 that names the value that is possible.
    pub(super) fn only(&mut self, constants: &[(&str, Value)]) -> Result<(), ApiError> {
        for (name, only) in constants {
            match self.0.remove(*name) {
                None | Some(Value::Null) => {}
                Some(value) if value == *only => {}
                Some(value) => {
                    let reason = format!("'{value}' is not supported by this cloud, only '{only}'");
                    return Err(invalid(name, reason));
                }
            }
        }
        Ok(())
    }

    /// Refuses what was not taken.
    ///
    /// # Errors
    /// 400 with the names.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = self.0.keys().map(String::as_str).collect();
        Err(ApiError::BadRequest(format!("Unrecognized attribute(s) '{}'", names.join(", "))))
    }
}

/// Neutron's 400 for a value.
pub(super) fn invalid(name: &str, reason: impl std::fmt::Display) -> ApiError {
    ApiError::BadRequest(format!("Invalid input for {name}. Reason: {reason}."))
}

/// `true`, `True`, `1`, … as in `oslo_utils.strutils`.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "t" | "yes" | "on" => Some(true),
        "false" | "0" | "f" | "no" | "off" => Some(false),
        _ => None,
    }
}

/// An address in a JSON text.
pub(super) fn address(name: &str, value: &Value) -> Result<IpAddr, ApiError> {
    let text = value.as_str().unwrap_or_default();
    text.parse().map_err(|_| invalid(name, format!("'{value}' is not a valid IP address")))
}

/// A UUID.
pub(super) fn id(name: &str, text: &str) -> Result<String, ApiError> {
    let parsed = Uuid::parse_str(text).map_err(|_| invalid(name, format!("'{text}' is not a valid UUID")))?;
    Ok(parsed.hyphenated().to_string())
}

/// A range of addresses as it was written; an address alone is the range of itself.
pub(super) fn range(text: &str) -> Result<IpNet, ApiError> {
    let parsed = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    parsed.ok_or_else(|| {
        ApiError::BadRequest(format!("Invalid CIDR {text} given as IP prefix.")).named("InvalidCIDR")
    })
}

/// Neutron's `InvalidInput`.
pub(super) fn invalid_input(reason: impl std::fmt::Display) -> ApiError {
    ApiError::BadRequest(format!("Invalid input for operation: {reason}.")).named("InvalidInput")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn open(value: Value) -> Attributes {
        Attributes::open(json!({"network": value}), "network").unwrap()
    }

    #[test]
    fn what_is_not_taken_is_refused_by_name() {
        let mut attributes = open(json!({"name": "n", "colour": "red"}));
        assert_eq!(attributes.string("name").unwrap().as_deref(), Some("n"));
        let error = attributes.finish().unwrap_err().to_string();
        assert_eq!(error, "Unrecognized attribute(s) 'colour'");
    }

    #[test]
    fn wrong_types_name_the_attribute() {
        let mut attributes = open(json!({"name": 5, "shared": "maybe", "mtu": "x", "list": {}}));
        let text = attributes.string("name").unwrap_err().to_string();
        assert_eq!(text, "Invalid input for name. Reason: '5' is not a valid string.");
        assert!(attributes.boolean("shared").is_err());
        assert!(attributes.integer("mtu").is_err());
        assert!(attributes.list("list").is_err());
    }

    #[test]
    fn an_attribute_with_one_possible_value_may_be_given_with_that_value_only() {
        let mut attributes = open(json!({"ip_version": 4, "a": null, "b": 6}));
        assert!(attributes.only(&[("ip_version", json!(4)), ("a", json!(1)), ("absent", json!(2))]).is_ok());
        let error = attributes.only(&[("b", json!(4))]).unwrap_err().to_string();
        assert!(error.contains("'6' is not supported") && error.contains("only '4'"), "{error}");
    }

    #[test]
    fn a_body_without_envelope_is_refused() {
        for body in [json!([]), json!({}), json!({"network": 1}), json!({"networks": []})] {
            assert!(Attributes::open(body, "network").is_err());
        }
    }
}
