//! The networks' part of a host's desired state: rows of one snapshot of the database ([`load`]), and what follows from them
//! for one host ([`plan`], pure).
//!
//! Only what the host needs is read: the networks of its servers and those that routers lead to from there, all ports of
//! these, the groups of its own ports, and the addresses of the groups that their rules name.

use mote_host_api::{AddressSetSpec, NetworkSpec, RouterSpec, SecurityGroupSpec, TunnelSpec};

use crate::{db::Conn, http::error::ApiError};

mod load;
mod plan;
pub mod rehearsal;
mod rows;
#[cfg(test)]
mod tests;

/// The networks' part of [`mote_host_api::DesiredState`].
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct HostNetworks {
    /// Networks.
    pub(crate) networks: Vec<NetworkSpec>,
    /// The host's end of the overlay.
    pub(crate) tunnel: Option<TunnelSpec>,
    /// Groups of the host's ports.
    pub(crate) security_groups: Vec<SecurityGroupSpec>,
    /// The sets that their rules name.
    pub(crate) address_sets: Vec<AddressSetSpec>,
    /// Routers.
    pub(crate) routers: Vec<RouterSpec>,
}

/// What shall be on a host that has these servers.
///
/// # Errors
/// Of the database, or for a row that can't be understood.
pub(crate) async fn read(db: &mut Conn, host: &str, server_ids: &[String]) -> Result<HostNetworks, ApiError> {
    let rows = load::load(db, host, server_ids).await?;
    plan::plan(&rows::Index::new(&rows)?, host)
}
