//! Bodies of image. What Glance decides itself and what else is not to be set is refused by the handlers with 403.

use super::{
    Row, TEXT,
    Type::{self, Any, Flag, List, Maybe, Need, Number, Object, Octets, Open, Text, Word},
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
];
