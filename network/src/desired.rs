//! All that shall exist of networks on this host.

use mote_host_api::{AddressSetSpec, DesiredState, NetworkSpec, RouterSpec, SecurityGroupSpec, TunnelSpec};

/// The part of a host's desired state that is about networks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// Networks.
    pub networks: Vec<NetworkSpec>,
    /// The security groups of their ports.
    pub security_groups: Vec<SecurityGroupSpec>,
    /// The address sets that the groups' rules name.
    pub address_sets: Vec<AddressSetSpec>,
    /// Routers.
    pub routers: Vec<RouterSpec>,
    /// This host's end of the overlay.
    pub tunnel: Option<TunnelSpec>,
}

impl From<&DesiredState> for Desired {
    fn from(state: &DesiredState) -> Self {
        Self {
            networks: state.networks.clone(),
            security_groups: state.security_groups.clone(),
            address_sets: state.address_sets.clone(),
            routers: state.routers.clone(),
            tunnel: state.tunnel,
        }
    }
}

impl From<&[NetworkSpec]> for Desired {
    fn from(networks: &[NetworkSpec]) -> Self {
        Self { networks: networks.to_vec(), ..Self::default() }
    }
}
