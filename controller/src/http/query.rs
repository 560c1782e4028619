//! The query of a request.

use axum::extract::{FromRequestParts, Query};
use http::request::Parts;

use super::error::ApiError;
#[cfg(test)]
use crate::schema;

/// Most parameters in a query.
const MAX_PARAMS: usize = 128;

/// Parameters in their order; names may repeat.
#[derive(Debug, Clone, Default)]
pub struct Params {
    pairs: Vec<(String, String)>,
    /// What the route's documentation has.
    #[cfg(test)]
    known: Option<&'static [schema::Member]>,
}

/// Tests check that a handler asks for what the documentation has, and as it has it.
macro_rules! documented {
    ($self:ident, $name:ident, $way:ident) => {
        #[cfg(test)]
        if let Some(known) = $self.known {
            let way = schema::queries::Way::$way;
            assert!(schema::queries::allows(known, $name, way), "{} is not documented as {way:?}", $name);
        }
    };
}

impl Params {
    /// The first value of a parameter.
    pub fn get(&self, name: &str) -> Option<&str> {
        documented!(self, name, Text);
        self.pairs.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// All values of a parameter.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        documented!(self, name, Text);
        self.pairs.iter().filter(move |(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// All parameters.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Keystone's way: there without a value, or anything but `0` and `false`, is yes.
    pub fn flag(&self, name: &str) -> bool {
        documented!(self, name, Flag);
        self.get(name)
            .is_some_and(|value| !matches!(value.to_ascii_lowercase().as_str(), "0" | "false" | "no"))
    }

    /// A truth value, `None` if absent.
    ///
    /// # Errors
    /// 400 if it is none.
    pub fn boolean(&self, name: &str) -> Result<Option<bool>, ApiError> {
        documented!(self, name, Boolean);
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" | "t" | "y" => Ok(Some(true)),
            "false" | "0" | "no" | "off" | "f" | "n" => Ok(Some(false)),
            _ => Err(ApiError::BadRequest(format!("The parameter {name} must be true or false."))),
        }
    }

    /// A number, `None` if absent.
    ///
    /// # Errors
    /// 400 if it is none.
    pub fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        documented!(self, name, Number);
        let Some(value) = self.get(name) else { return Ok(None) };
        let refused =
            |_| ApiError::BadRequest(format!("The parameter {name} must be a whole number, at least 0."));
        value.parse().map(Some).map_err(refused)
    }

    /// A link to the same list at `path`, from its start or after an item.
    pub fn link(&self, path: &str, marker: Option<&str>) -> String {
        let mut query = String::new();
        let others = self.iter().filter(|(name, _)| *name != "marker");
        for (name, value) in others.chain(marker.map(|id| ("marker", id))) {
            query.push(if query.is_empty() { '?' } else { '&' });
            query.push_str(&escaped(name));
            query.push('=');
            query.push_str(&escaped(value));
        }
        format!("{path}{query}")
    }
}

impl FromIterator<(String, String)> for Params {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(params: I) -> Self {
        Self {
            pairs: params.into_iter().collect(),
            #[cfg(test)]
            known: None,
        }
    }
}

/// Percent-encoding of all but RFC 3986's unreserved characters.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

impl<const N: usize> From<[(&str, &str); N]> for Params {
    fn from(pairs: [(&str, &str); N]) -> Self {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        pairs.iter().map(owned).collect()
    }
}

impl<S: Sync> FromRequestParts<S> for Params {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri)
            .map_err(|_| ApiError::BadRequest("The query of the URL is malformed.".into()))?;
        match pairs.len() > MAX_PARAMS {
            true => Err(ApiError::BadRequest(format!("More than {MAX_PARAMS} parameters in the URL."))),
            false => Ok(Self {
                pairs,
                #[cfg(test)]
                known: schema::queries::of_request(parts),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_in_each_way() {
        let params = Params::from([("a", "1"), ("a", "2"), ("b", ""), ("c", "False"), ("d", "x")]);
        assert_eq!(params.get("a"), Some("1"));
        assert_eq!(params.all("a").collect::<Vec<_>>(), ["1", "2"]);
        assert!(params.flag("b") && !params.flag("c") && !params.flag("z"));
        assert_eq!(params.number("a").unwrap(), Some(1));
        assert!(params.number("d").is_err() && params.boolean("d").is_err());
        assert_eq!(params.boolean("c").unwrap(), Some(false));
    }
}
