//! Who may do what by Mote's own API, and with what belongs to no service.

use super::{
    Row,
    Rule::{Admin, Console, Further, Host, Member, Public, Reader},
};

/// Whole paths.
pub(super) const ROWS: &[Row] = &[
    ("GET", "/", Public),
    ("GET", "/healthz", Public),
    ("GET", "/metrics", Further("everybody on the machine itself, `admin` from elsewhere")),
    ("GET", "/mote/v1/events", Reader),
    ("GET", "/mote/v1/hosts", Admin),
    ("POST", "/mote/v1/hosts", Host),
    ("GET", "/mote/v1/hosts/{id}", Admin),
    ("PUT", "/mote/v1/hosts/{id}", Admin),
    ("DELETE", "/mote/v1/hosts/{id}", Admin),
    ("PUT", "/mote/v1/hosts/{id}/captures/{image_id}", Host),
    ("GET", "/mote/v1/hosts/{id}/desired", Host),
    ("GET", "/mote/v1/hosts/{id}/images/{sha256}", Host),
    ("PUT", "/mote/v1/hosts/{id}/observed", Host),
    ("GET", "/mote/v1/hosts/{id}/requests", Host),
    ("POST", "/mote/v1/hosts/{id}/requests/{request_id}", Host),
    ("POST", "/mote/v1/join-tokens", Admin),
    ("GET", "/mote/v1/metering/ports", Admin),
    ("GET", "/mote/v1/scheduler", Admin),
    ("PUT", "/mote/v1/scheduler", Admin),
    ("GET", "/mote/v1/serial-console", Console),
    ("GET", "/mote/v1/servers/{id}/console", Member),
    ("POST", "/mote/v1/servers/{id}/console", Member),
    ("GET", "/openapi.json", Public),
    ("GET", "/readyz", Public),
];
