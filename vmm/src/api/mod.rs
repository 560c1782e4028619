//! Firecracker's REST API on a Unix socket: [`http`] (bytes ↔ requests), [`requests`] (requests ↔ actions),
//! [`server`] (the socket and its connections).

pub mod http;
mod receive;
pub mod requests;
pub mod server;
