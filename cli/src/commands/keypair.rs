//! `mote keypair`.

use std::{fs, path::PathBuf};

use anyhow::Context as _;
use clap::Subcommand;
use serde_json::{Value, json};

use crate::{
    Global,
    client::{Client, Service},
    output,
};

/// Key pairs for SSH.
#[derive(Subcommand)]
pub enum KeypairCommand {
    /// List key pairs.
    List,
    /// Import a public key.
    Create {
        /// Name.
        name: String,
        /// OpenSSH public key, such as ~/.ssh/id_ed25519.pub.
        #[arg(long, value_name = "FILE")]
        public_key: PathBuf,
    },
    /// Delete a key pair.
    Delete {
        /// Name.
        name: String,
    },
}

/// `mote keypair …`.
pub async fn run(global: &Global, command: KeypairCommand) -> anyhow::Result<()> {
    let client = Client::connect(&global.state_dir).await?;
    match command {
        KeypairCommand::List => {
            let rows = client.list(Service::Compute, "/os-keypairs", "keypairs").await?;
            let rows: Vec<Value> = rows.into_iter().map(|mut row| row["keypair"].take()).collect();
            output::list(global.json, &rows, &[("NAME", "name"), ("FINGERPRINT", "fingerprint")]);
        }
        KeypairCommand::Create { name, public_key } => {
            let key = fs::read_to_string(&public_key)
                .with_context(|| format!("reading {}", public_key.display()))?;
            let body = json!({"keypair": {"name": name, "public_key": key.trim()}});
            let answer = client.post(Service::Compute, "/os-keypairs", body).await?;
            output::show(global.json, &answer["keypair"]);
        }
        KeypairCommand::Delete { name } => {
            client.delete(Service::Compute, &format!("/os-keypairs/{name}")).await?
        }
    }
    Ok(())
}
