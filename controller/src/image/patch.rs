//! `application/openstack-images-v2.1-json-patch`: the operations add, replace and remove on one attribute each; and the
//! older `v2.0`, whose operations are `{"replace": "/name", "value": …}`.

use serde::Deserialize;
use serde_json::Value;

use super::{attributes, record::Image};
use crate::http::{context::Ctx, error::ApiError};

/// The media type.
pub const MEDIA_TYPE: &str = "application/openstack-images-v2.1-json-patch";
/// The older one.
pub const OLD_MEDIA_TYPE: &str = "application/openstack-images-v2.0-json-patch";
/// Most operations in a request.
const MAX_OPERATIONS: usize = 1024;

/// One operation.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Operation {
    op: Op,
    path: String,
    #[serde(default, deserialize_with = "present")]
    value: Option<Value>,
}

/// An operation as the older media type writes it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OldOperation {
    add: Option<String>,
    replace: Option<String>,
    remove: Option<String>,
    #[serde(default, deserialize_with = "present")]
    value: Option<Value>,
}

impl TryFrom<OldOperation> for Operation {
    type Error = ApiError;

    fn try_from(old: OldOperation) -> Result<Self, ApiError> {
        let (op, path) = match (old.add, old.replace, old.remove) {
            (Some(path), None, None) => (Op::Add, path),
            (None, Some(path), None) => (Op::Replace, path),
            (None, None, Some(path)) => (Op::Remove, path),
            _ => {
                let text = "Operations must contain exactly one of: \"add\", \"replace\", \"remove\".";
                return Err(ApiError::BadRequest(text.into()));
            }
        };
        Ok(Self { op, path, value: old.value })
    }
}

/// Tells `"value": null` from no value.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Op {
    Add,
    Replace,
    Remove,
}

/// Applies all operations in their order, or none.
///
/// # Errors
/// 400, 403, 409 as each operation deserves.
pub fn apply(image: &mut Image, operations: &[Operation], ctx: &Ctx) -> Result<(), ApiError> {
    if operations.len() > MAX_OPERATIONS {
        return Err(ApiError::BadRequest(format!("More than {MAX_OPERATIONS} operations.")));
    }
    let mut changed = image.clone();
    for operation in operations {
        let name = attribute(&operation.path)?;
        let value = operation.value.as_ref().ok_or_else(|| {
            ApiError::BadRequest(format!("The operation on {:?} has no value.", operation.path))
        });
        match operation.op {
            Op::Remove => attributes::remove(&mut changed, &name)?,
            Op::Add => attributes::set(&mut changed, &name, value?, ctx)?,
            Op::Replace => {
                if !attributes::is_base(&name) && !changed.properties.contains_key(&name) {
                    return Err(ApiError::Conflict(format!("Property {name} does not exist.")));
                }
                attributes::set(&mut changed, &name, value?, ctx)?;
            }
        }
    }
    attributes::check(&changed)?;
    *image = changed;
    Ok(())
}

/// JSON pointer (RFC 6901) of one level → name.
fn attribute(pointer: &str) -> Result<String, ApiError> {
    let refused = || {
        let pointer: String = pointer.chars().take(64).collect();
        ApiError::BadRequest(format!("The path {pointer:?} is not of the form \"/attribute\"."))
    };
    let name = pointer
        .strip_prefix('/')
        .filter(|name| !name.is_empty() && !name.contains('/'))
        .ok_or_else(refused)?;
    // "~1" first: "~01" is "~1" (RFC 6901 §4).
    Ok(name.replace("~1", "/").replace("~0", "~"))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde_json::json;

    use super::*;
    use crate::image::record::Status;

    fn image() -> Image {
        Image {
            id: "i".into(),
            owner: "p".into(),
            name: Some("n".into()),
            status: Status::Active,
            visibility: "shared".into(),
            protected: false,
            hidden: false,
            disk_format: Some("raw".into()),
            container_format: Some("bare".into()),
            min_disk_gib: 0,
            min_ram_mib: 0,
            content: None,
            staged: None,
            properties: BTreeMap::from([("a".into(), "1".into())]),
            tags: BTreeSet::new(),
            created_us: 0,
            updated_us: 0,
        }
    }

    fn ctx() -> Ctx {
        Ctx {
            user_id: "u".into(),
            user_name: "u".into(),
            user_domain_id: "default".into(),
            project_id: Some("p".into()),
            project_name: Some("p".into()),
            project_domain_id: Some("default".into()),
            domain_id: None,
            roles: vec!["member".into()],
            is_admin: false,
            audit_ids: Vec::new(),
            expires_at_us: 0,
            request_id: String::new(),
            system: false,
            delegation: None,
        }
    }

    fn patched(operations: Value) -> Result<Image, ApiError> {
        let operations: Vec<Operation> = serde_json::from_value(operations).unwrap();
        let mut image = image();
        apply(&mut image, &operations, &ctx()).map(|()| image)
    }

    #[test]
    fn operations_apply_in_order_and_all_or_none() {
        let image = patched(json!([
            {"op": "add", "path": "/b~1c", "value": "2"},
            {"op": "replace", "path": "/a", "value": "3"},
            {"op": "remove", "path": "/b~1c"},
            {"op": "replace", "path": "/name", "value": null},
            {"op": "replace", "path": "/tags", "value": ["x", "x", "y"]},
        ]))
        .unwrap();
        assert_eq!(image.properties, BTreeMap::from([("a".into(), "3".into())]));
        assert_eq!((image.name, image.tags.len()), (None, 2));
    }

    #[test]
    fn what_may_not_be_changed_is_refused() {
        for (operation, status) in [
            (json!({"op": "replace", "path": "/status", "value": "active"}), 403),
            (json!({"op": "add", "path": "/locations", "value": []}), 403),
            (json!({"op": "remove", "path": "/name"}), 403),
            (json!({"op": "replace", "path": "/visibility", "value": "public"}), 403),
            (json!({"op": "replace", "path": "/owner", "value": "q"}), 403),
            (json!({"op": "replace", "path": "/disk_format", "value": "aki"}), 403),
            (json!({"op": "replace", "path": "/missing", "value": "x"}), 409),
            (json!({"op": "remove", "path": "/missing"}), 409),
            (json!({"op": "add", "path": "/a/b", "value": "x"}), 400),
            (json!({"op": "add", "path": "/b", "value": 7}), 400),
            (json!({"op": "add", "path": "/b"}), 400),
            (json!({"op": "replace", "path": "/min_ram", "value": -1}), 400),
            (json!({"op": "add", "path": "/b", "value": "x".repeat(70_000)}), 413),
        ] {
            let error = patched(json!([operation])).unwrap_err();
            assert_eq!(error.status(crate::http::error::Service::Image), status, "{operation} {error}");
        }
    }

    #[test]
    fn the_older_media_type_names_its_operation_by_a_key() {
        let of = |value: Value| serde_json::from_value::<OldOperation>(value).map(Operation::try_from);
        let operation = of(json!({"replace": "/name", "value": null})).unwrap().unwrap();
        assert_eq!(operation, Operation { op: Op::Replace, path: "/name".into(), value: Some(Value::Null) });
        assert!(of(json!({"remove": "/a"})).unwrap().is_ok());
        assert!(of(json!({"add": "/a", "remove": "/a", "value": 1})).unwrap().is_err());
        assert!(of(json!({"value": 1})).unwrap().is_err());
        assert!(of(json!({"op": "add", "path": "/a", "value": 1})).is_err());
    }
}
