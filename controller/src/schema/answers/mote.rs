//! Answers of Mote's own API.

use super::{
    INTEGER, NONE, Row, TEXT,
    Type::{self, Any, Each, Flag, Map, Maybe, Null, Octets, Shown},
};

const EVENT: Type = Shown(&[
    ("payload", Map(&Any)),
    ("project_id", TEXT),
    ("request_id", Maybe(&TEXT)),
    ("resource_id", TEXT),
    ("sequence", INTEGER),
    ("time", TEXT),
    ("type", TEXT),
    ("user_id", Maybe(&TEXT)),
]);
const HOST: Type = Shown(&[
    ("availability_zone", TEXT),
    ("enabled", Flag),
    ("id", TEXT),
    (
        "inventory",
        Shown(&[
            ("disk_gib", INTEGER),
            ("kernel", TEXT),
            ("memory_mib", INTEGER),
            ("traits", Each(&TEXT)),
            ("vcpus", INTEGER),
            ("version", TEXT),
        ]),
    ),
    ("name", TEXT),
    ("state", TEXT),
    (
        "usage",
        Shown(&[("disk_gib", INTEGER), ("memory_mib", INTEGER), ("servers", INTEGER), ("vcpus", INTEGER)]),
    ),
]);
const PORT: Type = Shown(&[
    ("network_id", TEXT),
    ("port_id", TEXT),
    ("project_id", TEXT),
    ("rx_bytes", INTEGER),
    ("rx_dropped", INTEGER),
    ("rx_packets", INTEGER),
    ("server_id", TEXT),
    ("since", TEXT),
    ("tx_bytes", INTEGER),
    ("tx_dropped", INTEGER),
    ("tx_packets", INTEGER),
    ("updated_at", TEXT),
]);

/// Whole paths.
pub(super) const ANSWERS: &[Row] = &[
    (
        "GET",
        "/",
        &[(
            200,
            Shown(&[
                ("name", TEXT),
                (
                    "services",
                    Shown(&[
                        ("compute", TEXT),
                        ("identity", TEXT),
                        ("image", TEXT),
                        ("mote", TEXT),
                        ("network", TEXT),
                    ]),
                ),
                ("version", TEXT),
            ]),
        )],
    ),
    ("GET", "/healthz", &[(200, Shown(&[("status", TEXT)]))]),
    ("GET", "/metrics", &[(200, Octets)]),
    ("GET", "/mote/v1/events", &[(200, Maybe(&Shown(&[("events", Each(&EVENT)), ("next", INTEGER)])))]),
    ("GET", "/mote/v1/hosts", &[(200, Shown(&[("hosts", Each(&HOST))]))]),
    ("POST", "/mote/v1/hosts", &[(201, Shown(&[("cloud_id", TEXT), ("host_id", TEXT), ("secret", TEXT)]))]),
    ("DELETE", "/mote/v1/hosts/{id}", NONE),
    ("GET", "/mote/v1/hosts/{id}", &[(200, Shown(&[("host", HOST)]))]),
    ("PUT", "/mote/v1/hosts/{id}", &[(200, Shown(&[("host", HOST)]))]),
    ("PUT", "/mote/v1/hosts/{id}/captures/{image_id}", NONE),
    ("GET", "/mote/v1/hosts/{id}/desired", &[(200, Any), (204, Null)]),
    ("GET", "/mote/v1/hosts/{id}/images/{sha256}", &[(200, Octets)]),
    ("PUT", "/mote/v1/hosts/{id}/observed", NONE),
    ("GET", "/mote/v1/hosts/{id}/requests", &[(200, Any), (204, Null)]),
    ("POST", "/mote/v1/hosts/{id}/requests/{request_id}", NONE),
    ("POST", "/mote/v1/join-tokens", &[(201, Shown(&[("expires_at", TEXT), ("token", TEXT)]))]),
    ("GET", "/mote/v1/metering/ports", &[(200, Shown(&[("ports", Each(&PORT))]))]),
    ("GET", "/mote/v1/scheduler", &[(200, Shown(&[("policy", TEXT)]))]),
    ("PUT", "/mote/v1/scheduler", &[(200, Shown(&[("policy", TEXT)]))]),
    ("GET", "/mote/v1/serial-console", &[(101, Null)]),
    ("GET", "/mote/v1/servers/{id}/console", &[(200, Shown(&[("data", TEXT), ("next_offset", INTEGER)]))]),
    ("POST", "/mote/v1/servers/{id}/console", NONE),
    ("GET", "/openapi.json", &[(200, Any)]),
    ("GET", "/readyz", &[(200, Shown(&[("status", TEXT)]))]),
];
