//! DHCP and metadata for the guests of each network, served by tasks of this process on sockets inside the network's
//! namespace.

use std::collections::HashMap;

use mote_host_api::{InstanceMetadata, NetworkId, NetworkSpec, ServerId};

use crate::Config;

/// State after [`Services::update`].
#[derive(Debug, Default)]
pub struct UpdateOutcome {
    /// Networks that are being served.
    pub serving: Vec<NetworkId>,
    /// Networks whose namespace, bridge or addresses aren't there yet.
    pub waiting: Vec<NetworkId>,
    /// Networks whose services can't be started.
    pub failed: Vec<(NetworkId, ServiceError)>,
}

/// A service can't be started.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Description.
    #[error(transparent)]
    Spec(#[from] crate::SpecError),
}

/// The services of all networks on this host. Dropping it stops them.
#[derive(Debug)]
pub struct Services {
    config: Config,
}

impl Services {
    /// No services yet.
    pub fn new(config: Config) -> Self {
        Self { config }
    }

    /// Makes the running services those of `desired`: stops the others (their sockets are closed when this returns),
    /// starts what is missing or has lost its namespace or bridge, and gives the rest its new data. Idempotent.
    pub async fn update(
        &mut self,
        desired: &[NetworkSpec],
        metadata: &HashMap<ServerId, InstanceMetadata>,
    ) -> UpdateOutcome {
        let _ = (&self.config, metadata);
        UpdateOutcome { waiting: desired.iter().map(|spec| spec.id).collect(), ..UpdateOutcome::default() }
    }
}
