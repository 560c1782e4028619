//! What requests may say: one table of every route that takes a body. The extractor of bodies ([`crate::http::json::JsonBody`])
//! asks it before a handler sees anything, as [`crate::policy`] is asked who may; docs/openapi.json is rendered from the
//! same rows. So what is documented and what is let in are the same by construction: a field that isn't here doesn't reach
//! a handler, and a body of a route that isn't here is refused.
//!
//! What a type can't say (that an address is within its subnet) remains the handler's.

use axum::extract::{FromRequestParts, MatchedPath};
use http::{Extensions, Method, request::Parts};
use serde_json::Value;
use uuid::Uuid;

use crate::{
    compute::versions::Version,
    http::error::{ApiError, Service},
};

#[cfg(test)]
pub(crate) mod answers;
mod compute;
mod identity;
mod image;
mod mote;
mod network;
#[cfg(test)]
pub(crate) mod queries;
#[cfg(test)]
pub(crate) mod render;

/// How much of a wrong name or value a message shows, in characters.
const MAX_SHOWN: usize = 128;

/// What a JSON value may be.
#[derive(Debug, Clone, Copy)]
pub enum Type {
    /// Anything that is JSON.
    Any,
    /// Nothing: no body, or null.
    #[cfg(test)]
    Null,
    /// Any number.
    #[cfg(test)]
    Real,
    /// Of an answer: what these members are if they are there (that depends on the version, the asker and `fields=`).
    #[cfg(test)]
    Shown(&'static [Member]),
    /// The same, where all others are of this.
    #[cfg(test)]
    ShownWith(&'static [Member], &'static Type),
    /// A list of these.
    #[cfg(test)]
    Each(&'static Type),
    /// `true` or `false`.
    Flag,
    /// A truth value in the forms that OpenStack's clients use: also 0, 1, and words for yes and no.
    Yes,
    /// A text of so many characters.
    Text(usize, usize),
    /// A UUID, with hyphens or without.
    Id,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A whole number from, to.
    Number(i64, i64),
    /// The same, as a number or as a text of digits.
    Digits(i64, i64),
    /// This, or null.
    Maybe(&'static Type),
    /// A list of so many of these.
    List(&'static Type, usize, usize),
    /// Any names with values of this.
    Map(&'static Type),
    /// These members and no others.
    Object(&'static [Member]),
    /// These members, and any others with values of this.
    Open(&'static [Member], &'static Type),
    /// A change of an object of this type: no member is needed.
    Partly(&'static Type),
    /// One of these.
    Either(&'static [Type]),
    /// As a member: must be there.
    Need(&'static Type),
    /// As a member: of what is made, not of a change of it.
    New(&'static Type),
    /// As a member: of a change, not of what is made.
    Later(&'static Type),
    /// As a member: since this minor version of compute's API.
    Since(u16, &'static Type),
    /// As a member: until before this minor version of compute's API.
    Until(u16, &'static Type),
    /// As a body: may be missing.
    Optional(&'static Type),
    /// As a body: bytes.
    Octets,
}

/// Name and value.
pub type Member = (&'static str, Type);

/// Method, path below the service's, body.
pub type Row = (&'static str, &'static str, Type);

/// Any text.
pub const TEXT: Type = Type::Text(0, usize::MAX);

/// The services' paths and rows; what belongs to none comes last.
pub const TABLES: &[(&str, &[Row])] = &[
    ("/identity", identity::BODIES),
    ("/image", image::BODIES),
    ("/compute", compute::BODIES),
    ("/network", network::BODIES),
    ("", mote::BODIES),
];

/// The body of a route, by its whole pattern.
pub fn body_of(method: &str, matched: &str) -> Option<&'static Type> {
    let in_table = |(service, rows): &(&str, &'static [Row])| {
        let below = matched.strip_prefix(service)?;
        rows.iter().find(|(m, path, _)| m.eq_ignore_ascii_case(method) && *path == below).map(|row| &row.2)
    };
    TABLES.iter().find_map(in_table)
}

/// What the body of a request has to be. As an argument of a handler it is for those that read the body themselves.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    of: &'static Type,
    /// Compute's minor version.
    version: u16,
    service: Service,
}

impl Expected {
    /// By the request's route.
    ///
    /// # Errors
    /// 500 if its route isn't in the table: a handler that takes a body has to be.
    pub fn of(method: &Method, extensions: &Extensions) -> Result<Self, ApiError> {
        let matched = extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str);
        let unknown = || ApiError::internal(format!("the table of bodies has no {method} {matched}"));
        let version = extensions.get::<Version>().map_or(0, |version| version.0);
        let of = body_of(method.as_str(), matched).ok_or_else(unknown)?;
        Ok(Self { of, version, service: Service::of_path(matched) })
    }

    /// Whether there is nothing to check: the handler's own types say all.
    pub fn is_any(&self) -> bool {
        matches!(self.of, Type::Any)
    }

    /// Refuses a body that isn't so.
    ///
    /// # Errors
    /// 400 in the service's words.
    pub fn check(&self, value: &Value) -> Result<(), ApiError> {
        fits(self.of, "body", value, self.version).map_err(|wrong| wrong.in_words_of(self.service))
    }
}

impl<S: Sync> FromRequestParts<S> for Expected {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        Self::of(&parts.method, &parts.extensions)
    }
}

impl Type {
    /// What an object has, and what others may be.
    fn members(&self) -> (&'static [Member], Option<&'static Type>) {
        match *self {
            Self::Object(known) => (known, None),
            Self::Open(known, others) => (known, Some(others)),
            Self::Map(others) => (&[], Some(others)),
            #[cfg(test)]
            Self::Shown(known) => (known, Some(&Type::Any)),
            #[cfg(test)]
            Self::ShownWith(known, others) => (known, Some(others)),
            _ => (&[], None),
        }
    }

    /// Whether a value has this form, be it right or wrong within.
    fn resembles(&self, value: &Value) -> bool {
        let members = self.members().0;
        match value {
            Value::Object(given) => members.iter().any(|(name, _)| given.contains_key(*name)),
            Value::Array(_) => matches!(self, Self::List(..)),
            _ => members.is_empty() && !matches!(self, Self::List(..)),
        }
    }

    /// Without what it is as a member.
    #[cfg(test)]
    fn within(self) -> Self {
        match self {
            Self::Need(of) | Self::New(of) | Self::Later(of) | Self::Since(_, of) | Self::Until(_, of) => {
                of.within()
            }
            other => other,
        }
    }

    /// Digits as the number that they are.
    fn in_digits(&self) -> Self {
        match *self {
            Self::Digits(least, most) => Self::Number(least, most),
            other => other,
        }
    }
}

/// What is wrong with a value.
#[derive(Debug, PartialEq, Eq)]
pub enum Wrong {
    /// A member is not what it may be.
    Value(String, String, String),
    /// A member is not known.
    Unknown(String),
    /// A member is missing.
    Missing(String),
}

impl Wrong {
    fn value(name: &str, value: &Value, why: impl Into<String>) -> Self {
        Self::Value(shown(name), shown(&value.to_string()), why.into())
    }

    /// As the service itself says it.
    fn in_words_of(self, service: Service) -> ApiError {
        ApiError::BadRequest(match (self, service) {
            (Self::Value(name, value, why), Service::Compute) => {
                format!("Invalid input for field/attribute {name}. Value: {value}. {value} {why}.")
            }
            (Self::Value(name, value, why), Service::Network) => {
                format!("Invalid input for {name}. Reason: '{value}' {why}.")
            }
            (Self::Value(name, _, why), _) => format!("Invalid input for field '{name}': it {why}."),
            (Self::Unknown(name), Service::Network) => format!("Unrecognized attribute(s) '{name}'"),
            (Self::Unknown(name), _) => {
                format!("Invalid input: Additional properties are not allowed ('{name}' was unexpected).")
            }
            (Self::Missing(name), Service::Network) => {
                format!("Failed to parse request. Required attribute '{name}' not specified")
            }
            (Self::Missing(name), _) => format!("Invalid input: '{name}' is a required property."),
        })
    }
}

fn shown(text: &str) -> String {
    text.chars().take(MAX_SHOWN).collect()
}

/// Whether a value is of a type.
///
/// # Errors
/// What is wrong, and where.
pub fn fits(of: &Type, name: &str, value: &Value, version: u16) -> Result<(), Wrong> {
    let wrong = |why: &str| Err(Wrong::value(name, value, why));
    match *of {
        Type::Any | Type::Octets => Ok(()),
        #[cfg(test)]
        Type::Null if value.is_null() => Ok(()),
        #[cfg(test)]
        Type::Real if value.is_number() => Ok(()),
        #[cfg(test)]
        Type::Shown(_) | Type::ShownWith(..) => members(of, true, name, value, version),
        #[cfg(test)]
        Type::Each(of) => fits(&Type::List(of, 0, usize::MAX), name, value, version),
        #[cfg(test)]
        Type::Null | Type::Real => wrong("is not what it is documented to be"),
        Type::Flag if value.is_boolean() => Ok(()),
        Type::Flag => wrong("is not of type boolean"),
        Type::Yes if truth(value).is_some() => Ok(()),
        Type::Yes => wrong("cannot be converted to boolean"),
        Type::Text(least, most) => match value.as_str().map(|text| text.chars().count()) {
            Some(length) if (least..=most).contains(&length) => Ok(()),
            Some(_) => wrong(&format!("does not have {least} to {most} characters")),
            None => wrong("is not of type string"),
        },
        Type::Id => match value.as_str().is_some_and(is_uuid) {
            true => Ok(()),
            false => wrong("is not a valid UUID ('uuid')"),
        },
        Type::Word(&[word]) if value.as_str() != Some(word) => {
            wrong(&format!("is not supported here, only '{word}'"))
        }
        Type::Word(words) => match value.as_str().is_some_and(|word| words.contains(&word)) {
            true => Ok(()),
            false => wrong(&format!("is not one of {}", words.join(", "))),
        },
        Type::Number(least, most) => {
            match value.as_i64().is_some_and(|number| (least..=most).contains(&number)) {
                true => Ok(()),
                false => wrong(&format!("is not a whole number from {least} to {most}")),
            }
        }
        Type::Digits(..) if value.is_string() => {
            let number = value.as_str().and_then(|text| text.parse::<i64>().ok());
            fits(&of.in_digits(), name, &number.map_or(Value::Null, Value::from), version)
        }
        Type::Digits(..) => fits(&of.in_digits(), name, value, version),
        Type::Maybe(_) if value.is_null() => Ok(()),
        Type::Maybe(of)
        | Type::Need(of)
        | Type::New(of)
        | Type::Later(of)
        | Type::Since(_, of)
        | Type::Until(_, of)
        | Type::Optional(of) => fits(of, name, value, version),
        Type::List(of, least, most) => match value {
            Value::Array(list) if most == 0 && !list.is_empty() => wrong("is not supported here, only '[]'"),
            Value::Array(list) if !(least..=most).contains(&list.len()) => {
                wrong(&format!("is not a list of {least} to {most} members"))
            }
            Value::Array(list) => list.iter().try_for_each(|one| fits(of, name, one, version)),
            _ => wrong("is not a list"),
        },
        Type::Map(_) | Type::Object(_) | Type::Open(..) => members(of, true, name, value, version),
        Type::Partly(of) => members(of, false, name, value, version),
        Type::Either(of) => {
            // The best to say is what is wrong with the form that the value has.
            let mut best: Option<(bool, Wrong)> = None;
            for one in of {
                let Err(wrong) = fits(one, name, value, version) else { return Ok(()) };
                let is_meant = one.resembles(value);
                if best.as_ref().is_none_or(|(meant, _)| is_meant && !meant) {
                    best = Some((is_meant, wrong));
                }
            }
            best.map_or(Ok(()), |(_, wrong)| Err(wrong))
        }
    }
}

/// The members of an object; `whole` if what is needed must be there.
fn members(of: &Type, whole: bool, name: &str, value: &Value, version: u16) -> Result<(), Wrong> {
    let (known, others) = of.members();
    let Value::Object(given) = value else {
        return Err(Wrong::value(name, value, "is not an object"));
    };
    for (name, value) in given {
        let mut there = known.iter().filter(|(known, _)| known == name).map(|(_, of)| of);
        match there.find(|of| is_there(of, whole, version)).or(others) {
            Some(of) => fits(of, name, value, version)?,
            None => return Err(Wrong::Unknown(shown(name))),
        }
    }
    let missing = |(name, of): &&Member| whole && is_needed(of, version) && !given.contains_key(*name);
    match known.iter().find(missing) {
        Some((name, _)) => Err(Wrong::Missing((*name).into())),
        None => Ok(()),
    }
}

/// Whether a version has a member, of what is made (`whole`) or of a change.
fn is_there(of: &Type, whole: bool, version: u16) -> bool {
    match *of {
        Type::Since(since, of) => version >= since && is_there(of, whole, version),
        Type::Until(until, of) => version < until && is_there(of, whole, version),
        Type::New(of) => whole && is_there(of, whole, version),
        Type::Later(_) => !whole,
        _ => true,
    }
}

fn is_needed(of: &Type, version: u16) -> bool {
    match *of {
        Type::Need(_) => true,
        Type::New(of) => is_needed(of, version),
        Type::Since(_, inner) | Type::Until(_, inner) => {
            is_there(of, true, version) && is_needed(inner, version)
        }
        _ => false,
    }
}

fn is_uuid(text: &str) -> bool {
    matches!(text.len(), 32 | 36) && Uuid::parse_str(text).is_ok()
}

/// A truth value in the forms of `oslo_utils.strutils`.
fn truth(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(truth) => Some(*truth),
        Value::Number(number) => match number.as_u64() {
            Some(0) => Some(false),
            Some(1) => Some(true),
            _ => None,
        },
        Value::String(text) => match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "t" | "yes" | "on" => Some(true),
            "false" | "0" | "f" | "no" | "off" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const THING: Type = Type::Object(&[
        ("name", Type::Need(&Type::Text(1, 4))),
        ("parent", Type::New(&Type::Need(&Type::Id))),
        ("note", Type::Since(5, &Type::Maybe(&TEXT))),
        ("old", Type::Until(5, &Type::Flag)),
        ("size", Type::Digits(1, 9)),
        ("kind", Type::Either(&[Type::Word(&["a", "b"]), Type::List(&Type::Number(0, 3), 0, 2)])),
        ("moved", Type::Later(&Type::Yes)),
    ]);
    const ID: &str = "6dbd8f5b-0000-4000-8000-000000000001";

    fn says(of: &Type, value: Value, version: u16) -> String {
        match fits(of, "body", &value, version) {
            Ok(()) => String::new(),
            Err(wrong) => wrong.in_words_of(Service::Compute).to_string(),
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let whole = |more: Value| {
            let mut value = json!({"name": "n", "parent": ID});
            value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            value
        };
        assert_eq!(says(&THING, whole(json!({"size": "7", "kind": [1, 2], "note": null})), 5), "");
        for (more, wanted) in [
            (json!({"name": ""}), "name"),
            (json!({"name": "fünfe"}), "1 to 4 characters"),
            (json!({"parent": "x"}), "UUID"),
            (json!({"size": 0}), "from 1 to 9"),
            (json!({"size": "x"}), "size"),
            (json!({"kind": "c"}), "not one of a, b"),
            (json!({"kind": [4]}), "from 0 to 3"),
            (json!({"kind": [1, 2, 3]}), "0 to 2 members"),
            (json!({"old": true}), "'old' was unexpected"),
            (json!({"moved": true}), "'moved' was unexpected"),
        ] {
            let text = says(&THING, whole(more.clone()), 5);
            assert!(text.contains(wanted), "{more}: {text}");
        }
        assert_eq!(says(&THING, json!({"name": "n"}), 5), "Invalid input: 'parent' is a required property.");
        assert!(says(&THING, json!([]), 5).contains("is not an object"));
    }

    #[test]
    fn members_are_those_of_the_version_and_of_the_request() {
        assert_eq!(says(&THING, json!({"name": "n", "parent": ID, "old": true}), 4), "");
        assert!(says(&THING, json!({"name": "n", "parent": ID, "note": "x"}), 4).contains("note"));
        let change = Type::Partly(&THING);
        assert_eq!(says(&change, json!({"moved": "off"}), 5), "");
        assert!(says(&change, json!({"parent": ID}), 5).contains("'parent' was unexpected"));
        assert!(says(&change, json!({"moved": "perhaps"}), 5).contains("boolean"));
    }

    #[test]
    fn each_service_says_it_in_its_own_words() {
        let wrong = || fits(&THING, "body", &json!({"name": 5}), 5).unwrap_err();
        let words = |service| wrong().in_words_of(service).to_string();
        assert_eq!(words(Service::Network), "Invalid input for name. Reason: '5' is not of type string.");
        assert_eq!(words(Service::Identity), "Invalid input for field 'name': it is not of type string.");
        assert!(words(Service::Compute).starts_with("Invalid input for field/attribute name. Value: 5."));
    }

    #[test]
    fn schemas_say_the_same() {
        let schema = render::schema(&THING);
        assert_eq!(schema["required"], json!(["name", "parent"]));
        assert_eq!(schema["additionalProperties"], false);
        assert_eq!(schema["properties"]["name"], json!({"type": "string", "minLength": 1, "maxLength": 4}));
        assert!(schema["properties"].get("old").is_none() && schema["properties"].get("moved").is_none());
        let change = render::schema(&Type::Partly(&THING));
        assert!(change.get("required").is_none() && change["properties"].get("parent").is_none());
    }
}
