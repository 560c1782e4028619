//! Who may do what with images.

use super::{
    Row,
    Rule::{self, Admin, Further, Member, Public, Reader, Token},
};

const IMAGES: Rule =
    Further("every valid token: images that are public, the project's, or shared with it; all: `admin`");

/// Below `/image`.
pub(super) const ROWS: &[Row] = &[
    ("GET", "/", Public),
    ("GET", "/v2/images", IMAGES),
    ("POST", "/v2/images", Member),
    ("GET", "/v2/images/{id}", IMAGES),
    ("PATCH", "/v2/images/{id}", Member),
    ("DELETE", "/v2/images/{id}", Member),
    ("POST", "/v2/images/{id}/actions/{action}", Member),
    ("GET", "/v2/images/{id}/file", IMAGES),
    ("PUT", "/v2/images/{id}/file", Member),
    ("POST", "/v2/images/{id}/import", Member),
    ("GET", "/v2/images/{id}/members", IMAGES),
    ("POST", "/v2/images/{id}/members", Member),
    ("GET", "/v2/images/{id}/members/{member}", IMAGES),
    (
        "PUT",
        "/v2/images/{id}/members/{member}",
        Further("`member` in the project that the image is shared with"),
    ),
    ("DELETE", "/v2/images/{id}/members/{member}", Member),
    ("PUT", "/v2/images/{id}/stage", Member),
    ("PUT", "/v2/images/{id}/tags/{tag}", Member),
    ("DELETE", "/v2/images/{id}/tags/{tag}", Member),
    ("GET", "/v2/images/{id}/tasks", IMAGES),
    ("GET", "/v2/info/import", Token),
    ("GET", "/v2/info/stores", Token),
    ("GET", "/v2/info/stores/detail", Admin),
    ("GET", "/v2/info/usage", Reader),
    ("GET", "/v2/schemas/{name}", Token),
    ("GET", "/v2/tasks", Reader),
    ("POST", "/v2/tasks", Further("nobody: images are imported")),
    ("GET", "/v2/tasks/{id}", Reader),
    ("GET", "/versions", Public),
];
