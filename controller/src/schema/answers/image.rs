//! Answers of image.

use super::{
    INTEGER, LINKS, NONE, Row, TEXT,
    Type::{self, Any, Each, Either, Flag, Map, Maybe, Null, Octets, Shown, ShownWith},
};

/// Other members are properties.
const IMAGE: Type = ShownWith(
    &[
        ("checksum", Maybe(&TEXT)),
        ("container_format", Maybe(&TEXT)),
        ("created_at", TEXT),
        ("disk_format", Maybe(&TEXT)),
        ("file", TEXT),
        ("id", TEXT),
        ("min_disk", INTEGER),
        ("min_ram", INTEGER),
        ("name", Maybe(&TEXT)),
        ("os_hash_algo", Maybe(&TEXT)),
        ("os_hash_value", Maybe(&TEXT)),
        ("os_hidden", Flag),
        ("owner", TEXT),
        ("protected", Flag),
        ("schema", TEXT),
        ("self", TEXT),
        ("size", Maybe(&INTEGER)),
        ("status", TEXT),
        ("tags", Each(&TEXT)),
        ("updated_at", TEXT),
        ("virtual_size", Maybe(&INTEGER)),
        ("visibility", TEXT),
    ],
    &TEXT,
);

/// Below `/image`.
pub(super) const ANSWERS: &[Row] = &[
    (
        "GET",
        "",
        &[(300, Shown(&[("versions", Each(&Shown(&[("id", TEXT), ("links", LINKS), ("status", TEXT)])))]))],
    ),
    (
        "GET",
        "/v2/images",
        &[(200, Shown(&[("first", TEXT), ("images", Each(&IMAGE)), ("next", TEXT), ("schema", TEXT)]))],
    ),
    ("POST", "/v2/images", &[(201, IMAGE)]),
    ("DELETE", "/v2/images/{id}", NONE),
    ("GET", "/v2/images/{id}", &[(200, IMAGE)]),
    ("PATCH", "/v2/images/{id}", &[(200, IMAGE)]),
    ("POST", "/v2/images/{id}/actions/{action}", NONE),
    ("GET", "/v2/images/{id}/file", &[(200, Octets), (204, Null), (206, Octets)]),
    ("PUT", "/v2/images/{id}/file", NONE),
    ("POST", "/v2/images/{id}/import", &[(202, Null)]),
    (
        "GET",
        "/v2/images/{id}/members",
        &[(
            200,
            Shown(&[
                (
                    "members",
                    Each(&Shown(&[
                        ("created_at", TEXT),
                        ("image_id", TEXT),
                        ("member_id", TEXT),
                        ("schema", TEXT),
                        ("status", TEXT),
                        ("updated_at", TEXT),
                    ])),
                ),
                ("schema", TEXT),
            ]),
        )],
    ),
    (
        "POST",
        "/v2/images/{id}/members",
        &[(
            200,
            Shown(&[
                ("created_at", TEXT),
                ("image_id", TEXT),
                ("member_id", TEXT),
                ("schema", TEXT),
                ("status", TEXT),
                ("updated_at", TEXT),
            ]),
        )],
    ),
    ("DELETE", "/v2/images/{id}/members/{member}", NONE),
    (
        "GET",
        "/v2/images/{id}/members/{member}",
        &[(
            200,
            Shown(&[
                ("created_at", TEXT),
                ("image_id", TEXT),
                ("member_id", TEXT),
                ("schema", TEXT),
                ("status", TEXT),
                ("updated_at", TEXT),
            ]),
        )],
    ),
    (
        "PUT",
        "/v2/images/{id}/members/{member}",
        &[(
            200,
            Shown(&[
                ("created_at", TEXT),
                ("image_id", TEXT),
                ("member_id", TEXT),
                ("schema", TEXT),
                ("status", TEXT),
                ("updated_at", TEXT),
            ]),
        )],
    ),
    ("PUT", "/v2/images/{id}/stage", NONE),
    ("DELETE", "/v2/images/{id}/tags/{tag}", NONE),
    ("PUT", "/v2/images/{id}/tags/{tag}", NONE),
    (
        "GET",
        "/v2/images/{id}/tasks",
        &[(
            200,
            Shown(&[(
                "tasks",
                Each(&Shown(&[
                    ("created_at", TEXT),
                    ("expires_at", Maybe(&TEXT)),
                    ("id", TEXT),
                    ("image_id", TEXT),
                    ("input", Map(&Any)),
                    ("message", TEXT),
                    ("owner", TEXT),
                    ("request_id", TEXT),
                    ("result", Maybe(&Shown(&[("image_id", TEXT)]))),
                    ("schema", TEXT),
                    ("self", TEXT),
                    ("status", TEXT),
                    ("type", TEXT),
                    ("updated_at", TEXT),
                    ("user_id", TEXT),
                ])),
            )]),
        )],
    ),
    (
        "GET",
        "/v2/info/import",
        &[(
            200,
            Shown(&[(
                "import-methods",
                Shown(&[("description", TEXT), ("type", TEXT), ("value", Each(&TEXT))]),
            )]),
        )],
    ),
    (
        "GET",
        "/v2/info/stores",
        &[(
            200,
            Shown(&[("stores", Each(&Shown(&[("default", TEXT), ("description", TEXT), ("id", TEXT)])))]),
        )],
    ),
    (
        "GET",
        "/v2/info/stores/detail",
        &[(
            200,
            Shown(&[(
                "stores",
                Each(&Shown(&[
                    ("default", TEXT),
                    ("description", TEXT),
                    ("id", TEXT),
                    ("properties", Map(&Either(&[TEXT, INTEGER]))),
                    ("type", TEXT),
                ])),
            )]),
        )],
    ),
    (
        "GET",
        "/v2/info/usage",
        &[(
            200,
            Shown(&[(
                "usage",
                Shown(&[
                    ("image_count_total", Shown(&[("limit", INTEGER), ("usage", INTEGER)])),
                    ("image_count_uploading", Shown(&[("limit", INTEGER), ("usage", INTEGER)])),
                    ("image_size_total", Shown(&[("limit", INTEGER), ("usage", INTEGER)])),
                    ("image_stage_total", Shown(&[("limit", INTEGER), ("usage", INTEGER)])),
                ]),
            )]),
        )],
    ),
    ("GET", "/v2/schemas/{name}", &[(200, Any)]),
    (
        "GET",
        "/v2/tasks",
        &[(
            200,
            Shown(&[
                ("first", TEXT),
                ("next", TEXT),
                ("schema", TEXT),
                (
                    "tasks",
                    Each(&Shown(&[
                        ("created_at", TEXT),
                        ("expires_at", Maybe(&TEXT)),
                        ("id", TEXT),
                        ("image_id", TEXT),
                        ("owner", TEXT),
                        ("request_id", TEXT),
                        ("schema", TEXT),
                        ("self", TEXT),
                        ("status", TEXT),
                        ("type", TEXT),
                        ("updated_at", TEXT),
                        ("user_id", TEXT),
                    ])),
                ),
            ]),
        )],
    ),
    ("POST", "/v2/tasks", &[]),
    (
        "GET",
        "/v2/tasks/{id}",
        &[(
            200,
            Shown(&[
                ("created_at", TEXT),
                ("expires_at", TEXT),
                ("id", TEXT),
                ("image_id", TEXT),
                ("input", Map(&Any)),
                ("message", TEXT),
                ("owner", TEXT),
                ("request_id", TEXT),
                ("result", Shown(&[("image_id", TEXT)])),
                ("schema", TEXT),
                ("self", TEXT),
                ("status", TEXT),
                ("type", TEXT),
                ("updated_at", TEXT),
                ("user_id", TEXT),
            ]),
        )],
    ),
    (
        "GET",
        "/versions",
        &[(200, Shown(&[("versions", Each(&Shown(&[("id", TEXT), ("links", LINKS), ("status", TEXT)])))]))],
    ),
];
