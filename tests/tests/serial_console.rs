//! A server's serial console over WebSocket, with an ordinary WebSocket client and the conformance guest in a real microVM.

mod common;

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use common::{guest_journey, need_servers, run};
use futures_util::{SinkExt as _, StreamExt as _};
use mote::client::Service;
use mote_tests::{cloud::Cloud, journey};
use serde_json::json;
use tokio_tungstenite::{connect_async, tungstenite::Message};

/// How long the guest may take to say something.
const LIMIT: Duration = Duration::from_secs(120);
/// What it says once it has an address.
const SERVING: &str = "mote-guest: serving on ";

#[test]
fn the_console_shows_what_the_guest_writes_and_ends_with_the_server() {
    need_servers!();
    run(async {
        let cloud = Cloud::start()?;
        let client = cloud.client().await?;
        let journey = guest_journey(&cloud, &client, "mote.serve").await?;
        let network = journey::network(&client, "serial", "10.77.0.0/24").await?;
        // On a port that is down the guest waits for an address until the console is open.
        let port = json!({"port": {"network_id": network, "admin_state_up": false}});
        let port = client.post(Service::Network, "/v2.0/ports", port).await?;
        let port = journey::id_of(&port["port"])?;
        let more = json!({"networks": [{"port": port}]});
        let server = journey.server(&client, "serial", &network, more).await?;
        let action = format!("/servers/{}/action", server.id);
        let wish = json!({"os-getSerialConsole": {"type": "serial"}});
        let made = client.post(Service::Compute, &action, wish).await?;
        let url = made["console"]["url"].as_str().context("a URL")?.to_owned();
        let (mut socket, _) = connect_async(url.as_str()).await?;
        // The guest reads nothing, but what is typed reaches its serial port and disturbs nobody.
        socket.send(Message::binary(b"is anybody there?\r".to_vec())).await?;
        // The first answer says from where on output is shown.
        ensure!(socket.next().await.context("an open console")??.is_ping(), "a ping comes first");
        let up = json!({"port": {"admin_state_up": true}});
        client.put(Service::Network, &format!("/v2.0/ports/{port}"), up).await?;
        let mut heard = String::new();
        let listen = async {
            while !heard.contains(SERVING) {
                match socket.next().await.context("the console ended")?? {
                    Message::Binary(bytes) => heard.push_str(&String::from_utf8_lossy(&bytes)),
                    Message::Close(_) => bail!("the console was closed"),
                    _ => {}
                }
            }
            Ok(())
        };
        let listened = tokio::time::timeout(LIMIT, listen).await;
        listened.with_context(|| format!("the guest was not heard, only {heard:?}"))??;
        journey.delete(&client, &server).await?;
        // With the server its console ends.
        let closed = tokio::time::timeout(LIMIT, async {
            while let Some(Ok(message)) = socket.next().await {
                if message.is_close() {
                    break;
                }
            }
        });
        closed.await.context("the console of a server that is gone stays open")?;
        ensure!(connect_async(url.as_str()).await.is_err(), "a URL is good as long as its server");
        Ok(())
    });
}
