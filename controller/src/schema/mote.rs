//! Bodies of Mote's own API. What hosts send is read by the host protocol's own types (crate `mote-host-api`).

use super::{
    Row,
    Type::{Any, Flag, Maybe, Need, Number, Object, Octets, Optional, Text, Word},
};

/// Whole paths.
pub(super) const BODIES: &[Row] = &[
    ("POST", "/mote/v1/hosts", Any),
    (
        "PUT",
        "/mote/v1/hosts/{id}",
        Object(&[("enabled", Need(&Flag)), ("disabled_reason", Maybe(&Text(0, 255)))]),
    ),
    ("PUT", "/mote/v1/hosts/{id}/captures/{image_id}", Octets),
    ("PUT", "/mote/v1/hosts/{id}/observed", Any),
    ("POST", "/mote/v1/hosts/{id}/requests/{request_id}", Any),
    (
        "POST",
        "/mote/v1/join-tokens",
        Optional(&Object(&[
            ("description", Text(0, 255)),
            ("uses", Maybe(&Number(1, u32::MAX as i64))),
            ("lifetime_s", Maybe(&Number(1, i64::MAX))),
        ])),
    ),
    ("PUT", "/mote/v1/scheduler", Object(&[("policy", Need(&Word(&["least-loaded", "random", "by-zone"])))])),
    ("POST", "/mote/v1/servers/{id}/console", Object(&[("data", Need(&Text(0, (64 << 10) / 3 * 4 + 4)))])),
];
