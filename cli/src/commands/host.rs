//! `mote host`: for administrators.

use clap::Subcommand;
use serde_json::json;

use crate::{
    Global,
    client::{Client, Service},
    output,
};

/// Hosts of the cloud (administrators).
#[derive(Subcommand)]
pub enum HostCommand {
    /// List hosts with what they have and what is used of it.
    List,
    /// Make a token with which a further host joins: `mote-hostd join URL --token TOKEN`.
    JoinToken,
    /// Show how servers are placed, or choose another way.
    Scheduler {
        /// `least-loaded`, `random` or `by-zone`.
        #[arg(long)]
        policy: Option<String>,
    },
}

/// `mote host …`.
pub async fn run(global: &Global, command: HostCommand) -> anyhow::Result<()> {
    let client = Client::connect(&global.state_dir).await?;
    match command {
        HostCommand::List => {
            let rows = client.list(Service::Mote, "/v1/hosts", "hosts").await?;
            let columns = [
                ("ID", "id"),
                ("NAME", "name"),
                ("ZONE", "availability_zone"),
                ("STATE", "state"),
                ("SERVERS", "usage/servers"),
                ("VCPUS", "inventory/vcpus"),
                ("MEMORY MiB", "inventory/memory_mib"),
                ("TRAITS", "inventory/traits"),
            ];
            output::list(global.json, &rows, &columns);
        }
        HostCommand::JoinToken => {
            let answer = client.post(Service::Mote, "/v1/join-tokens", json!({})).await?;
            output::show(global.json, &answer);
        }
        HostCommand::Scheduler { policy } => {
            let answer = match policy {
                Some(policy) => client.put(Service::Mote, "/v1/scheduler", json!({"policy": policy})).await?,
                None => client.get(Service::Mote, "/v1/scheduler").await?,
            };
            output::show(global.json, &answer);
        }
    }
    Ok(())
}
