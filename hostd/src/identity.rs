//! Who this host is, and how it becomes that.

use std::path::Path;

use mote_host_api::{CloudId, DesiredState, HostId, JoinRequest, JoinResponse};
use serde::{Deserialize, Serialize};

use crate::{
    controller::{self, ControllerError},
    files::{self, Durability, FileError},
    inventory::{self, InventoryError},
    lock::{self, LockError},
    paths::StateDir,
};

/// What `join` brought, in `identity.json`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The installation.
    pub cloud_id: CloudId,
    /// This host in it.
    pub host_id: HostId,
    /// Its name there.
    pub name: String,
    /// Its availability zone.
    pub availability_zone: String,
    /// Where the controller is.
    pub url: String,
    /// Bearer token.
    pub secret: String,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the secret.
        write!(f, "host {} ({}) of cloud {} at {}", self.name, self.host_id, self.cloud_id, self.url)
    }
}

/// Why this host is nobody, or somebody else.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Not joined.
    #[error("this host has not joined a cloud: run `mote-hostd join URL --token TOKEN --state-dir {}` first", .0.display())]
    NotJoined(std::path::PathBuf),
    /// File.
    #[error(transparent)]
    File(#[from] FileError),
    /// The machine.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// No name.
    #[error("this machine has no host name: give one with --name")]
    NoName,
    /// The controller.
    #[error("cannot join")]
    Join(#[from] ControllerError),
    /// Servers of another cloud are here.
    #[error(
        "this host belongs to cloud {old} and still has servers of it; {url} is cloud {new}: remove the servers there first, or \
         use another --state-dir"
    )]
    OtherCloud {
        /// Cloud that it belongs to.
        old: CloudId,
        /// Cloud that was asked.
        new: CloudId,
        /// Its address.
        url: String,
    },
    /// A running agent works for another cloud.
    #[error("mote-hostd runs here for cloud {old}: stop it before joining cloud {new}")]
    Running {
        /// Cloud that it belongs to.
        old: CloudId,
        /// Cloud that was asked.
        new: CloudId,
        /// Cause.
        source: LockError,
    },
}

/// What to join, and as whom.
#[derive(Debug, Clone)]
pub struct Join<'a> {
    /// The controller.
    pub url: &'a str,
    /// Join token.
    pub token: &'a str,
    /// Name; without, that of the identity that is there already, else the machine's.
    pub name: Option<String>,
    /// Availability zone.
    pub zone: &'a str,
    /// State directory.
    pub state: &'a StateDir,
}

/// Reads who this host is.
///
/// # Errors
/// [`IdentityError::NotJoined`], [`IdentityError::File`].
pub fn load(state: &StateDir) -> Result<Identity, IdentityError> {
    files::read_json(&state.identity())?.ok_or_else(|| IdentityError::NotJoined(state.path().to_owned()))
}

/// Joins a cloud. Doing it again gives the same host a new secret; a running agent takes it up by itself.
///
/// # Errors
/// [`IdentityError`]; nothing has changed on this host then.
pub async fn join(join: Join<'_>) -> Result<Identity, IdentityError> {
    let state = join.state;
    files::create_private_dir(state.path())?;
    let before = files::read_json::<Identity>(&state.identity())?;
    let name = join
        .name
        .or_else(|| before.as_ref().map(|identity| identity.name.clone()))
        .or_else(inventory::host_name)
        .ok_or(IdentityError::NoName)?;
    let request = JoinRequest {
        token: join.token.to_owned(),
        name: name.clone(),
        availability_zone: join.zone.to_owned(),
        inventory: inventory::inventory(state.path())?,
    };
    let url = controller::base_url(join.url)?;
    let JoinResponse { cloud_id, host_id, secret } = controller::join(&url, &request).await?;
    let identity = Identity {
        cloud_id,
        host_id,
        name,
        availability_zone: join.zone.to_owned(),
        url: url.to_string(),
        secret,
    };
    if let Some(before) = before.filter(|before| (before.cloud_id, before.host_id) != (cloud_id, host_id)) {
        leave(&before, &identity, state)?;
    }
    files::replace_json(&state.identity(), &identity, Durability::Host)?;
    Ok(identity)
}

/// Another identity: what the old one was told must not be carried out for the new one.
fn leave(before: &Identity, now: &Identity, state: &StateDir) -> Result<(), IdentityError> {
    let (old, new) = (before.cloud_id, now.cloud_id);
    let _lock = lock::acquire(state).map_err(|source| IdentityError::Running { old, new, source })?;
    if old != new && has_entries(&state.servers()) {
        return Err(IdentityError::OtherCloud { old, new, url: now.url.clone() });
    }
    files::remove_file(&state.desired())?;
    Ok(())
}

fn has_entries(dir: &Path) -> bool {
    std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}

/// Why an answer is not acted upon.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// Another installation.
    #[error("the desired state is one of cloud {0}, this host belongs to {1}")]
    Cloud(CloudId, CloudId),
    /// Another host.
    #[error("the desired state is one of host {0}, this is {1}")]
    Host(HostId, HostId),
    /// Something is named twice.
    #[error("the desired state names {0} twice")]
    Twice(String),
}

/// Whether a desired state is for this host and consistent in itself.
///
/// # Errors
/// [`Refusal`].
pub fn check_desired(desired: &DesiredState, identity: &Identity) -> Result<(), Refusal> {
    if desired.cloud_id != identity.cloud_id {
        return Err(Refusal::Cloud(desired.cloud_id, identity.cloud_id));
    }
    if desired.host_id != identity.host_id {
        return Err(Refusal::Host(desired.host_id, identity.host_id));
    }
    let mut seen = std::collections::BTreeSet::new();
    let servers = desired.servers.iter().map(|server| server.id.0);
    let networks = desired.networks.iter().map(|network| network.id.0);
    let ports = desired.networks.iter().flat_map(|network| &network.ports).map(|port| port.id.0);
    for (what, id) in servers
        .map(|id| ("server", id))
        .chain(networks.map(|id| ("network", id)))
        .chain(ports.map(|id| ("port", id)))
    {
        if !seen.insert((what, id)) {
            return Err(Refusal::Twice(format!("{what} {id}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn desired_state_of_another_cloud_or_host_and_doubled_ids_are_refused() {
        let identity = Identity {
            cloud_id: CloudId::new(),
            host_id: HostId::new(),
            name: "h".into(),
            availability_zone: "nova".into(),
            url: "http://x".into(),
            secret: "hidden".into(),
        };
        assert!(!format!("{identity:?}").contains("hidden"));
        let good = DesiredState {
            cloud_id: identity.cloud_id,
            host_id: identity.host_id,
            generation: 1,
            networks: vec![],
            servers: vec![],
            ..DesiredState::default()
        };
        assert_eq!(check_desired(&good, &identity), Ok(()));
        let other = DesiredState { cloud_id: CloudId::new(), ..good.clone() };
        assert!(matches!(check_desired(&other, &identity), Err(Refusal::Cloud(..))));
        let other = DesiredState { host_id: HostId::new(), ..good.clone() };
        assert!(matches!(check_desired(&other, &identity), Err(Refusal::Host(..))));
        let server = crate::sim::server_spec(&[]);
        let twice = DesiredState { servers: vec![server.clone(), server], ..good };
        assert!(matches!(check_desired(&twice, &identity), Err(Refusal::Twice(_))));
    }
}
