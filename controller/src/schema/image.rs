//! Bodies of image. What Glance decides itself and what else is not to be set is refused by the handlers with 403.

use super::{
    Row, TEXT,
    Type::{self, Any, Flag, List, Map, Maybe, Need, Number, Object, Octets, Open, Text, Word},
};
use crate::image::attributes::CONTAINER_FORMATS;

const TAG: Type = Text(1, 255);
const MINIMUM: Type = Number(0, i32::MAX as i64);

/// Other names are properties.
const NEW: Type = Open(
    &[
        ("id", Maybe(&TEXT)),
        ("name", Maybe(&Text(0, 255))),
        ("visibility", Word(&["public", "community", "shared", "private"])),
        ("protected", Flag),
        ("os_hidden", Flag),
        ("min_disk", MINIMUM),
        ("min_ram", MINIMUM),
        ("tags", List(&TAG, 0, usize::MAX)),
        ("owner", Text(0, 255)),
        // The handler says what to do with other formats.
        ("disk_format", Maybe(&Text(0, 255))),
        ("container_format", Maybe(&Word(&CONTAINER_FORMATS))),
    ],
    &Any,
);

/// A JSON patch of operations on one attribute each.
const PATCH: Type = List(
    &Object(&[("op", Need(&Word(&["add", "remove", "replace"]))), ("path", Need(&TEXT)), ("value", Any)]),
    0,
    1024,
);

const IMPORT: Type = Object(&[
    ("method", Need(&Object(&[("name", Need(&TEXT)), ("uri", Maybe(&Text(0, 2048)))]))),
    ("stores", Maybe(&List(&TEXT, 0, 16))),
    ("all_stores", Flag),
    ("all_stores_must_succeed", Maybe(&Flag)),
]);

/// Of definitions of metadata.
const DEFINED: Type = Text(1, 80);
const KIND: Type = Word(&["array", "boolean", "integer", "number", "object", "string"]);
const LENGTH: Type = Number(0, i64::MAX);
const BOUND: Type = Number(i64::MIN, i64::MAX);
const ENUM: Type = List(&Any, 0, 1000);

/// A definition of a property; what the name is as a member, and what the service says itself, is said where it is used.
macro_rules! property {
    ($($more:expr),+) => {
        Object(&[
            ("title", Need(&TEXT)),
            ("type", Need(&KIND)),
            ("description", TEXT),
            ("operators", List(&TEXT, 0, 100)),
            ("required", List(&TEXT, 0, 1000)),
            ("default", Any),
            ("readonly", Flag),
            ("confidential", Flag),
            ("enum", ENUM),
            ("pattern", TEXT),
            ("minimum", BOUND),
            ("maximum", BOUND),
            ("minLength", LENGTH),
            ("maxLength", LENGTH),
            ("items", Object(&[("type", KIND), ("enum", ENUM)])),
            ("minItems", LENGTH),
            ("maxItems", LENGTH),
            ("uniqueItems", Flag),
            ("additionalItems", Flag),
            $($more),+
        ])
    };
}

/// By name.
const PROPERTIES: Type = Map(&property!(("name", DEFINED)));
/// What the service says itself is 403 by the handlers.
const PROPERTY: Type = property!(("name", Need(&DEFINED)), ("created_at", Any), ("updated_at", Any));
const OBJECT: Type = Object(&[
    ("name", Need(&DEFINED)),
    ("description", TEXT),
    ("required", List(&TEXT, 0, 1000)),
    ("properties", PROPERTIES),
    ("self", Any),
    ("schema", Any),
    ("created_at", Any),
    ("updated_at", Any),
]);
const ASSOCIATION: Type = Object(&[
    ("name", Need(&DEFINED)),
    ("prefix", Text(0, 80)),
    ("properties_target", Text(0, 80)),
    ("created_at", Any),
    ("updated_at", Any),
]);
const DEFINED_TAG: Type = Object(&[("name", Need(&DEFINED)), ("created_at", Any), ("updated_at", Any)]);
/// A change leaves alone what is in it.
macro_rules! namespace {
    ($($more:expr),*) => {
        Object(&[
            ("namespace", Need(&DEFINED)),
            ("display_name", Text(0, 80)),
            ("description", Text(0, 500)),
            ("visibility", Word(&["public", "private"])),
            ("protected", Flag),
            ("owner", Text(1, 255)),
            ("self", Any),
            ("schema", Any),
            ("created_at", Any),
            ("updated_at", Any),
            $($more),*
        ])
    };
}
const NAMESPACE: Type = namespace!(
    ("objects", List(&OBJECT, 0, 1000)),
    ("properties", PROPERTIES),
    ("resource_type_associations", List(&ASSOCIATION, 0, 1000)),
    ("tags", List(&DEFINED_TAG, 0, 1000))
);

/// Below `/image`.
pub(super) const BODIES: &[Row] = &[
    ("POST", "/v2/images", NEW),
    ("PATCH", "/v2/images/{id}", PATCH),
    ("PUT", "/v2/images/{id}/file", Octets),
    ("PUT", "/v2/images/{id}/stage", Octets),
    ("POST", "/v2/images/{id}/import", IMPORT),
    ("POST", "/v2/images/{id}/members", Object(&[("member", Need(&TEXT))])),
    (
        "PUT",
        "/v2/images/{id}/members/{member}",
        Object(&[("status", Need(&Word(&["pending", "accepted", "rejected"])))]),
    ),
    ("POST", "/v2/metadefs/namespaces", NAMESPACE),
    ("PUT", "/v2/metadefs/namespaces/{namespace}", namespace!()),
    ("POST", "/v2/metadefs/namespaces/{namespace}/objects", OBJECT),
    ("PUT", "/v2/metadefs/namespaces/{namespace}/objects/{object}", OBJECT),
    ("POST", "/v2/metadefs/namespaces/{namespace}/properties", PROPERTY),
    ("PUT", "/v2/metadefs/namespaces/{namespace}/properties/{property}", PROPERTY),
    ("POST", "/v2/metadefs/namespaces/{namespace}/resource_types", ASSOCIATION),
    (
        "POST",
        "/v2/metadefs/namespaces/{namespace}/tags",
        Object(&[("tags", Need(&List(&Object(&[("name", Need(&DEFINED))]), 0, 1000)))]),
    ),
    ("PUT", "/v2/metadefs/namespaces/{namespace}/tags/{tag}", DEFINED_TAG),
];
