//! What the controller and a host say to each other: plain data, JSON over HTTP, always asked by the host.
//!
//! | Call (host → controller) | Body → answer |
//! |---|---|
//! | `POST /mote/v1/hosts` | [`JoinRequest`] → 201 [`JoinResponse`]; 401 for a wrong join token |
//! | `GET /mote/v1/hosts/{id}/desired?after=G&wait=S` | → 200 [`DesiredState`] as soon as its generation is greater than G; 204 after S seconds (at most [`MAX_WAIT_S`]) without |
//! | `PUT /mote/v1/hosts/{id}/observed` | [`ObservedState`] → 204 |
//! | `GET /mote/v1/hosts/{id}/images/{sha256}` | → 200 the bytes of the image, `Content-Length` set |
//! | `PUT /mote/v1/hosts/{id}/captures/{image_id}` | the bytes of a root disk, see [`CaptureSpec`] → 204; 404 when nobody wants them any more |
//! | `GET /mote/v1/hosts/{id}/requests?wait=S` | → 200 list of [`HostRequest`]; 204 after S seconds without |
//! | `POST /mote/v1/hosts/{id}/requests/{request_id}` | [`HostReply`] → 204; 404 when nobody waits any more |
//!
//! All but the first carry `Authorization: Bearer <JoinResponse::secret>`. Errors are `{"error": {"code", "message"}}`.
//!
//! Level, not edge: [`DesiredState`] is always the whole of what shall exist on that host. What it does not name must not
//! exist. Repeating any message is harmless.
#![forbid(unsafe_code)]

mod desired;
mod ids;
mod networking;
mod observed;
mod requests;

pub use desired::*;
pub use ids::*;
pub use networking::*;
pub use observed::*;
pub use requests::*;

/// Longest long poll, in seconds.
pub const MAX_WAIT_S: u64 = 30;
/// A host that has not reported for this long is shown as down, in seconds.
pub const HOST_DOWN_AFTER_S: u64 = 30;
/// A host reports at least this often, in seconds (and at once after each change).
pub const REPORT_EVERY_S: u64 = 5;
