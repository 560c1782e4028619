//! Types as JSON Schema (draft 2020-12, which OpenAPI 3.1 has).

use serde_json::{Map, Value, json};

use super::{Member, Type, is_there};

/// The newest minor version of compute, which the document describes.
pub(crate) const NEWEST: u16 = 90;

/// The schema of a type.
pub(crate) fn schema(of: &Type) -> Value {
    match *of {
        Type::Any => json!({}),
        Type::Null => json!({"type": "null"}),
        Type::Real => json!({"type": "number"}),
        Type::Flag => json!({"type": "boolean"}),
        Type::Yes => json!({"anyOf": [
            {"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 1},
            {"type": "string", "pattern": format!("^({})$", ["true", "1", "t", "yes", "on", "false", "0", "f", "no", "off"].map(any_case).join("|"))},
        ]}),
        Type::Text(least, most) => {
            let mut schema = json!({"type": "string"});
            if least > 0 {
                schema["minLength"] = json!(least);
            }
            if most < usize::MAX {
                schema["maxLength"] = json!(most);
            }
            schema
        }
        Type::Id => json!({
            "type": "string",
            "pattern": "^([0-9a-fA-F]{32}|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})$",
        }),
        Type::Word(words) => json!({ "enum": words }),
        Type::Number(least, most) => {
            let mut schema = json!({"type": "integer"});
            if least > i64::MIN {
                schema["minimum"] = json!(least);
            }
            if most < i64::MAX {
                schema["maximum"] = json!(most);
            }
            schema
        }
        Type::Digits(least, most) => {
            let pattern = if least < 0 { "^-?[0-9]{1,9}$" } else { "^[0-9]{1,9}$" };
            json!({"anyOf": [schema(&Type::Number(least, most)), {"type": "string", "pattern": pattern}]})
        }
        Type::Maybe(of) => match schema(of) {
            Value::Object(mut one) if one.get("type").is_some_and(Value::is_string) => {
                one["type"] = json!([one["type"], "null"]);
                Value::Object(one)
            }
            one => json!({"anyOf": [one, {"type": "null"}]}),
        },
        Type::List(of, least, most) => {
            let mut schema = json!({"type": "array", "items": schema(of)});
            if least > 0 {
                schema["minItems"] = json!(least);
            }
            if most < usize::MAX {
                schema["maxItems"] = json!(most);
            }
            schema
        }
        Type::Each(of) => json!({"type": "array", "items": schema(of)}),
        Type::Map(_) | Type::Object(_) | Type::Open(..) | Type::Shown(_) | Type::ShownWith(..) => {
            object(of, true)
        }
        Type::Partly(of) => object(of, false),
        Type::Either(of) => json!({"anyOf": of.iter().map(schema).collect::<Vec<_>>()}),
        Type::Need(of) | Type::New(of) | Type::Later(of) | Type::Until(_, of) | Type::Optional(of) => {
            schema(of)
        }
        Type::Since(since, of) => {
            let mut schema = schema(of);
            schema["description"] = json!(format!("Since 2.{since}."));
            schema
        }
        Type::Octets => json!({"type": "string", "format": "binary"}),
    }
}

fn any_case(word: &str) -> String {
    let both = |letter: char| match letter.is_ascii_alphabetic() {
        true => format!("[{}{letter}]", letter.to_ascii_uppercase()),
        false => letter.to_string(),
    };
    word.chars().map(both).collect()
}

fn object(of: &Type, whole: bool) -> Value {
    let (known, others) = of.members();
    let there = || known.iter().filter(|(_, of)| is_there(of, whole, NEWEST));
    let mut object = json!({"type": "object"});
    let properties: Map<String, Value> = there().map(|(name, of)| ((*name).to_owned(), schema(of))).collect();
    if !properties.is_empty() {
        object["properties"] = Value::Object(properties);
    }
    let is_needed = |member: &&Member| super::is_needed(&member.1, NEWEST);
    let needed: Vec<&str> = there().filter(is_needed).map(|(name, _)| *name).collect();
    if whole && !needed.is_empty() {
        object["required"] = json!(needed);
    }
    let gone: Vec<String> = known
        .iter()
        .filter_map(|(name, of)| match of {
            Type::Until(until, _) => Some(format!("{name} (before 2.{until})")),
            _ => None,
        })
        .collect();
    if !gone.is_empty() {
        object["description"] = json!(format!("Earlier versions also have {}.", gone.join(", ")));
    }
    match others {
        None => object["additionalProperties"] = json!(false),
        Some(Type::Any) => {}
        Some(others) => object["additionalProperties"] = schema(others),
    }
    object
}
