//! `mote network`.

use clap::Subcommand;
use serde_json::{Value, json};

use crate::{
    Global,
    client::{Client, Service},
    output,
};

/// Networks with their subnets.
#[derive(Subcommand)]
pub enum NetworkCommand {
    /// List networks.
    List,
    /// Make a network with one subnet.
    Create {
        /// Name.
        name: String,
        /// Address range, such as 10.1.0.0/24.
        #[arg(long, value_name = "CIDR")]
        subnet: String,
    },
    /// Delete a network with its subnets.
    Delete {
        /// Name or id.
        network: String,
    },
}

/// `mote network …`.
pub async fn run(global: &Global, command: NetworkCommand) -> anyhow::Result<()> {
    let client = Client::connect(&global.state_dir).await?;
    match command {
        NetworkCommand::List => {
            let rows = client.list(Service::Network, "/v2.0/networks", "networks").await?;
            output::list(
                global.json,
                &rows,
                &[
                    ("ID", "id"),
                    ("NAME", "name"),
                    ("STATUS", "status"),
                    ("MTU", "mtu"),
                    ("SUBNETS", "subnets"),
                ],
            );
        }
        NetworkCommand::Create { name, subnet } => {
            let network = create(&client, &name, &subnet).await?;
            output::show(global.json, &network);
        }
        NetworkCommand::Delete { network } => {
            let network = client.resolve(Service::Network, "/v2.0/networks", "networks", &network).await?;
            let id = network["id"].as_str().unwrap_or_default();
            client.delete(Service::Network, &format!("/v2.0/networks/{id}")).await?;
        }
    }
    Ok(())
}

/// A network with one subnet; no network is left when the subnet can't be made.
async fn create(client: &Client, name: &str, cidr: &str) -> anyhow::Result<Value> {
    let mut network =
        client.post(Service::Network, "/v2.0/networks", json!({"network": {"name": name}})).await?["network"]
            .take();
    let subnet = json!({"subnet": {"network_id": network["id"], "ip_version": 4, "cidr": cidr}});
    match client.post(Service::Network, "/v2.0/subnets", subnet).await {
        Ok(answer) => {
            network["subnets"] = json!([answer["subnet"]["id"]]);
            Ok(network)
        }
        Err(e) => {
            let id = network["id"].as_str().unwrap_or_default();
            client.delete(Service::Network, &format!("/v2.0/networks/{id}")).await?;
            Err(e.context(format!("making the subnet {cidr}")))
        }
    }
}
