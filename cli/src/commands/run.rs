//! `mote run`: a VM from nothing but an image name.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;

use crate::{
    Global,
    client::Client,
    commands::server::{self, CreateOptions},
    console, output,
};

/// Boot a server from an image and attach its console (leave with Ctrl-]).
#[derive(Args)]
pub struct RunArgs {
    /// Image, by name or id.
    image: String,
    /// Name of the server; default: the image's name with a number.
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    options: CreateOptions,
    /// Only start it; print its id.
    #[arg(long, conflicts_with = "rm")]
    detach: bool,
    /// Delete the server when the console is left or the guest ends.
    #[arg(long)]
    rm: bool,
}

/// `mote run …`.
pub async fn run(global: &Global, args: RunArgs) -> anyhow::Result<()> {
    let client = Client::connect(&global.state_dir).await?;
    let name = args.name.unwrap_or_else(|| {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        format!("{}-{}", args.image, seconds % 100_000)
    });
    let id = server::create(&client, &name, &args.image, &args.options).await?;
    let outcome = async {
        let active = server::wait_active(&client, &id, args.options.timeout).await?;
        if args.detach {
            output::show(global.json, &active);
            return Ok(());
        }
        eprintln!("mote: {name} ({id}) runs; this is its console, leave with Ctrl-]");
        console::attach(&client, &id).await
    }
    .await;
    if args.rm {
        server::delete(&client, &id).await?;
    } else if outcome.is_ok() && !args.detach {
        eprintln!(
            "\nmote: {name} goes on; attach again with `mote server console {id}`, end it with `mote server delete {id}`"
        );
    }
    outcome
}
