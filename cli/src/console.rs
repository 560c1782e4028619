//! The attached serial console: output by long polling, input from a terminal in raw mode.

use std::{
    io::{self, IsTerminal as _, Read as _, Write as _},
    time::Duration,
};

use anyhow::Context as _;
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use nix::sys::termios::{self, SetArg, Termios};
use serde_json::json;
use tokio::sync::mpsc;

use crate::client::{Client, Service};

/// Ctrl-] leaves, as in telnet.
const LEAVE: u8 = 0x1d;
/// How long one read waits for output.
const WAIT_MS: u64 = 5_000;
/// Pause between looks at whether a silent guest still runs.
const RETRY: Duration = Duration::from_millis(300);

/// Shows the console until Ctrl-], the end of the guest, or Ctrl-C where stdin is no terminal.
pub async fn attach(client: &Client, server_id: &str) -> anyhow::Result<()> {
    let _raw = RawTerminal::enter();
    let mut input = read_input();
    let mut reader = Box::pin(follow(client, server_id));
    loop {
        tokio::select! {
            ended = &mut reader => return ended,
            _ = tokio::signal::ctrl_c() => return Ok(()),
            bytes = input.recv() => match bytes {
                None => {
                    // End of input is no reason to leave: `mote run IMAGE </dev/null` follows the output.
                    return reader.await;
                }
                Some(mut bytes) => {
                    let leave = bytes.iter().position(|b| *b == LEAVE);
                    bytes.truncate(leave.unwrap_or(bytes.len()));
                    if !bytes.is_empty() {
                        let body = json!({"data": BASE64.encode(&bytes)});
                        client.post(Service::Mote, &format!("/v1/servers/{server_id}/console"), body).await?;
                    }
                    if leave.is_some() {
                        return Ok(());
                    }
                }
            }
        }
    }
}

/// Copies the console to stdout until the server no longer runs and all is read.
async fn follow(client: &Client, server_id: &str) -> anyhow::Result<()> {
    let mut offset = 0u64;
    loop {
        let path = format!("/v1/servers/{server_id}/console?offset={offset}&wait_ms={WAIT_MS}");
        let Some(answer) = client.find(Service::Mote, &path).await? else { return Ok(()) };
        let data =
            BASE64.decode(answer["data"].as_str().unwrap_or_default()).context("reading the console")?;
        let next = answer["next_offset"].as_u64().context("the console's answer has no next_offset")?;
        let mut stdout = io::stdout().lock();
        stdout.write_all(&data).and_then(|()| stdout.flush()).context("writing to stdout")?;
        if data.is_empty() && next == offset {
            let status = client.find(Service::Compute, &format!("/servers/{server_id}")).await?;
            match status.as_ref().map(|s| s["server"]["status"].as_str().unwrap_or_default()) {
                Some("ACTIVE" | "BUILD" | "REBOOT" | "HARD_REBOOT") => tokio::time::sleep(RETRY).await,
                _ => return Ok(()),
            }
        }
        offset = next;
    }
}

/// Reads stdin on a thread of its own, which ends with the process.
fn read_input() -> mpsc::Receiver<Vec<u8>> {
    let (tx, rx) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut buffer = [0u8; 1024];
        while let Ok(n @ 1..) = io::stdin().read(&mut buffer) {
            if tx.blocking_send(buffer[..n].to_vec()).is_err() {
                return;
            }
        }
    });
    rx
}

/// The terminal in raw mode; restored when dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    /// `None` where stdin is no terminal.
    fn enter() -> Option<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = termios::tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(&stdin, SetArg::TCSANOW, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing better can be done where the terminal is gone.
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
