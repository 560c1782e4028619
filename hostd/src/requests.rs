//! Questions of the controller: consoles.

use std::{sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use mote_host_api::{HostReply, HostRequestKind, ServerId};
use tokio::{io::AsyncWriteExt, time::Instant};

use crate::{
    console::{self, Chunk},
    diagnostics,
    errors::one_line,
    files::FileError,
    jail,
    meter::Meter,
    paths::{ServerDir, StateDir},
};

/// Longest wait of one [`HostRequestKind::ConsoleRead`].
const READ_WAIT_MAX: Duration = Duration::from_secs(10);
/// Pause between two looks at a console that someone waits for.
const READ_PAUSE: Duration = Duration::from_millis(20);
/// Most bytes of console input at once.
const WRITE_MAX: usize = 64 << 10;
/// Longest time for handing input to the VMM.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// Answers questions about the servers of these directories.
#[derive(Clone)]
pub struct Requests {
    /// State directory.
    pub state: StateDir,
    /// What ports have carried.
    pub meter: Arc<Meter>,
}

#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("server {0} is not on this host")]
    NoServer(ServerId),
    #[error("its console cannot be read")]
    Read(#[from] FileError),
    #[error("the input is not base64")]
    Base64(#[from] base64::DecodeError),
    #[error("at most {WRITE_MAX} bytes of input are taken at once")]
    TooMuch,
    #[error("its console takes no input (is it running?)")]
    Write(#[source] std::io::Error),
    #[error("its console takes no input at the moment")]
    WriteTimeout,
    #[error("internal error")]
    Internal(#[from] tokio::task::JoinError),
}

impl Requests {
    /// Answers one question.
    pub async fn answer(&self, kind: HostRequestKind) -> HostReply {
        let answer = match kind {
            HostRequestKind::ConsoleOutput { server_id, lines } => self.output(server_id, lines).await,
            HostRequestKind::ConsoleRead { server_id, offset, wait_ms } => {
                self.read(server_id, offset, Duration::from_millis(wait_ms).min(READ_WAIT_MAX)).await
            }
            HostRequestKind::ConsoleWrite { server_id, data } => self.write(server_id, &data).await,
            HostRequestKind::Diagnostics { server_id } => self.diagnostics(server_id).await,
        };
        answer.unwrap_or_else(|e| HostReply::Error { message: one_line(&e) })
    }

    fn dir(&self, id: ServerId) -> Result<ServerDir, RequestError> {
        let dir = self.state.server(id);
        if dir.path().is_dir() { Ok(dir) } else { Err(RequestError::NoServer(id)) }
    }

    async fn output(&self, id: ServerId, lines: Option<u32>) -> Result<HostReply, RequestError> {
        let dir = self.dir(id)?;
        let output = tokio::task::spawn_blocking(move || console::tail(&dir, lines)).await??;
        Ok(HostReply::ConsoleOutput { output })
    }

    async fn read(&self, id: ServerId, offset: u64, wait: Duration) -> Result<HostReply, RequestError> {
        let dir = self.dir(id)?;
        let until = Instant::now() + wait;
        loop {
            let place = dir.clone();
            let Chunk { next_offset, data } =
                tokio::task::spawn_blocking(move || console::read(&place, offset)).await??;
            // An offset that was brought back is news, too.
            if !data.is_empty() || next_offset != offset || Instant::now() >= until {
                return Ok(HostReply::ConsoleRead { next_offset, data: BASE64.encode(data) });
            }
            tokio::time::sleep(READ_PAUSE).await;
        }
    }

    async fn diagnostics(&self, id: ServerId) -> Result<HostReply, RequestError> {
        let (dir, state) = (self.dir(id)?, self.state.clone());
        let counters = self.meter.counters().await;
        let look = move || diagnostics::of_server(id, &dir, &state, &counters);
        let found = tokio::task::spawn_blocking(look).await?;
        Ok(HostReply::Diagnostics(found))
    }

    async fn write(&self, id: ServerId, data: &str) -> Result<HostReply, RequestError> {
        let dir = self.dir(id)?;
        if data.len() > WRITE_MAX.div_ceil(3) * 4 {
            return Err(RequestError::TooMuch);
        }
        let bytes = BASE64.decode(data)?;
        let write = async {
            let mut stream = jail::connect(&dir.console_socket()).await?;
            stream.write_all(&bytes).await?;
            stream.shutdown().await
        };
        tokio::time::timeout(WRITE_TIMEOUT, write)
            .await
            .map_err(|_| RequestError::WriteTimeout)?
            .map_err(RequestError::Write)?;
        Ok(HostReply::Done)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt, net::UnixListener};

    use super::*;

    fn requests() -> (tempfile::TempDir, Requests, ServerId) {
        let dir = tempfile::tempdir().unwrap();
        let requests = Requests {
            state: StateDir::new(dir.path().join("s")),
            meter: crate::sim::World::new(dir.path()).unwrap().meter(),
        };
        let id = ServerId::new();
        std::fs::create_dir_all(requests.state.server(id).vm_run()).unwrap();
        (dir, requests, id)
    }

    #[tokio::test]
    async fn output_that_comes_while_someone_waits_is_the_answer() {
        let (_guard, requests, server_id) = requests();
        let asked = requests.answer(HostRequestKind::ConsoleRead { server_id, offset: 0, wait_ms: 60_000 });
        let log = requests.state.server(server_id).console_log();
        let (reply, ()) = tokio::join!(asked, async {
            tokio::task::yield_now().await;
            std::fs::write(log, b"login: ").unwrap();
        });
        assert_eq!(reply, HostReply::ConsoleRead { next_offset: 7, data: BASE64.encode("login: ") });
        let tail = requests.answer(HostRequestKind::ConsoleOutput { server_id, lines: Some(1) }).await;
        assert_eq!(tail, HostReply::ConsoleOutput { output: "login: ".into() });
        let again = requests.answer(HostRequestKind::ConsoleRead { server_id, offset: 7, wait_ms: 0 }).await;
        assert_eq!(again, HostReply::ConsoleRead { next_offset: 7, data: String::new() });
    }

    #[tokio::test]
    async fn input_reaches_the_console_socket() {
        let (_guard, requests, server_id) = requests();
        let listener = UnixListener::bind(requests.state.server(server_id).console_socket()).unwrap();
        let write = requests.answer(HostRequestKind::ConsoleWrite { server_id, data: BASE64.encode("ls\n") });
        let (reply, text) = tokio::join!(write, async {
            let mut text = String::new();
            listener.accept().await.unwrap().0.read_to_string(&mut text).await.unwrap();
            text
        });
        assert_eq!((reply, text.as_str()), (HostReply::Done, "ls\n"));
    }

    #[tokio::test]
    async fn what_cannot_be_answered_is_an_error_for_a_person() {
        let (_guard, requests, server_id) = requests();
        let unknown = HostRequestKind::ConsoleOutput { server_id: ServerId::new(), lines: None };
        let not_base64 = HostRequestKind::ConsoleWrite { server_id, data: "!".into() };
        let not_running = HostRequestKind::ConsoleWrite { server_id, data: String::new() };
        let too_much = HostRequestKind::ConsoleWrite { server_id, data: "A".repeat(WRITE_MAX * 2) };
        for (kind, expected) in [
            (unknown, "not on this host"),
            (not_base64, "base64"),
            (not_running, "is it running"),
            (too_much, "at most"),
        ] {
            let reply = requests.answer(kind).await;
            assert!(
                matches!(&reply, HostReply::Error { message } if message.contains(expected)),
                "{reply:?}"
            );
        }
    }
}
