//! The attributes of a request body, taken one by one: what is left at the end is not ours, and refused.

use std::net::Ipv4Addr;

use serde_json::{Map, Value};

use crate::http::error::ApiError;

/// Longest name, as in Neutron (`NAME_MAX_LEN`); also used for descriptions.
const MAX_NAME: usize = 255;

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
        if envelope.contains_key(&format!("{resource}s")) {
            return Err(ApiError::BadRequest(format!(
                "Bulk creation of {resource}s is not supported; create them one by one."
            )));
        }
        match envelope.remove(resource) {
            Some(Value::Object(map)) if envelope.is_empty() => Ok(Self(map)),
            _ => Err(ApiError::BadRequest(format!("Unable to find '{resource}' in request body"))),
        }
    }

    /// Takes an attribute as it is.
    pub(super) fn value(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    /// Takes a text.
    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) if text.chars().count() <= MAX_NAME => Ok(Some(text)),
            Some(Value::String(_)) => Err(invalid(name, format!("the text exceeds {MAX_NAME} characters"))),
            Some(other) => Err(invalid(name, format!("'{other}' is not a valid string"))),
        }
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

/// An IPv4 address in a JSON text.
pub(super) fn address(name: &str, value: &Value) -> Result<Ipv4Addr, ApiError> {
    let text = value.as_str().unwrap_or_default();
    text.parse().map_err(|_| invalid(name, format!("'{value}' is not a valid IPv4 address")))
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
