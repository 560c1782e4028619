//! Several controllers on one PostgreSQL: a wake at one of them reaches the long polls at the others.
//!
//! `NOTIFY` is a hint and may be lost (a broken connection, a full queue): long polls look into the database by themselves
//! every few seconds as well.

use mote_host_api::HostId;
use sqlx::{
    Connection, PgConnection,
    postgres::{PgConnectOptions, PgListener, PgPoolOptions},
};
use tokio::sync::mpsc;

use super::Hub;

/// PostgreSQL's channel; what is sent there is a host's id.
const CHANNEL: &str = "mote_hosts";
/// Wakes that wait to be told to the others. More are dropped.
const QUEUE: usize = 1024;

/// Joins the hubs of all controllers of a database. The tasks end with the runtime.
///
/// # Errors
/// If the database can't be reached.
pub async fn share(hub: &Hub, options: &PgConnectOptions) -> Result<(), sqlx::Error> {
    let pool = PgPoolOptions::new().max_connections(1).connect_with(options.clone()).await?;
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.listen(CHANNEL).await?;
    let (sender, mut wakes) = mpsc::channel::<HostId>(QUEUE);
    hub.tell(sender);
    let hearer = hub.clone();
    tokio::spawn(async move {
        // The listener connects again by itself; an error here means that it couldn't.
        loop {
            match listener.recv().await {
                Ok(heard) => {
                    if let Ok(host) = heard.payload().parse() {
                        hearer.wake_here(host);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "no news from other controllers; hosts hear of changes a little later");
                    tokio::time::sleep(super::hub::LOOK_AGAIN).await;
                }
            }
        }
    });
    let options = options.clone();
    tokio::spawn(async move {
        let mut connection: Option<PgConnection> = None;
        while let Some(host) = wakes.recv().await {
            if connection.is_none() {
                connection = PgConnection::connect_with(&options).await.ok();
            }
            let Some(open) = &mut connection else { continue };
            let told = sqlx::query("SELECT pg_notify($1, $2)").bind(CHANNEL).bind(host.to_string());
            if told.execute(open).await.is_err() {
                connection = None;
            }
        }
    });
    Ok(())
}
