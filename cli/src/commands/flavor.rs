//! `mote flavor`.

use clap::Subcommand;

use crate::{
    Global,
    client::{Client, Service},
    output,
};

/// Flavors: sizes of servers.
#[derive(Subcommand)]
pub enum FlavorCommand {
    /// List flavors.
    List,
}

/// `mote flavor …`.
pub async fn run(global: &Global, command: FlavorCommand) -> anyhow::Result<()> {
    let client = Client::connect(&global.state_dir).await?;
    match command {
        FlavorCommand::List => {
            let rows = client.list(Service::Compute, "/flavors/detail", "flavors").await?;
            let columns = [
                ("ID", "id"),
                ("NAME", "name"),
                ("VCPUS", "vcpus"),
                ("MEMORY MiB", "ram"),
                ("DISK GiB", "disk"),
            ];
            output::list(global.json, &rows, &columns);
        }
    }
    Ok(())
}
