//! Servers' serial consoles as WebSockets: `GET /mote/v1/serial-console?token=…`, with a URL that Nova's
//! `remote-consoles` gave.
//!
//! Bytes go both ways as they are: what the guest writes from now on comes as binary messages, what the client sends (binary
//! or text) is typed. The host is asked in both directions as for any other question ([`super::console`]), so that any
//! controller can serve any console, and a reader that is slow slows nobody but itself.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use axum::{
    extract::{
        FromRequestParts, State,
        ws::{Message, WebSocket, WebSocketUpgrade},
    },
    response::Response,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use http::request::Parts;
use mote_host_api::{HostReply, HostRequestKind, ServerId};
use sqlx::FromRow;
use tokio::sync::Semaphore;

use super::{console, secrets};
use crate::{
    app::App,
    db::{Conn, now_us},
    http::{context::Ctx, error::ApiError, query::Params},
};

/// How long a URL is good for, as Nova's (`[consoleauth] token_ttl`).
const TOKEN_LIFETIME: Duration = Duration::from_secs(600);
/// Most URLs of one server that are good at a time; an older one ends early.
const MAX_TOKENS: i64 = 16;
/// Most consoles that one controller serves at a time.
const MAX_CONSOLES: usize = 256;
/// Largest message of a client.
const MAX_MESSAGE: usize = 64 << 10;
/// How long the host waits for output before it answers without any.
const WAIT: Duration = Duration::from_secs(10);
/// Pause after a host did not answer: it may be restarting.
const PAUSE: Duration = Duration::from_secs(1);
/// Answers in a row that may fail before the console ends.
const MAX_FAILURES: u32 = 5;
/// Beyond any console's end: from there on means from now on.
const FROM_NOW: u64 = 1 << 62;
/// What Nova's clients ask for.
const PROTOCOL: &str = "binary";

static PLACES: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(MAX_CONSOLES)));

/// Gives the URL of a server's console, for a while. The asker must be allowed to use it.
///
/// # Errors
/// Of the database.
pub(crate) async fn make_url(app: &App, ctx: &Ctx, server_id: &str) -> Result<String, ApiError> {
    let token = secrets::random()?;
    let now = now_us();
    let mut tx = app.begin().await?;
    sqlx::query("DELETE FROM console_tokens WHERE expires_us <= $1").bind(now).execute(&mut *tx).await?;
    sqlx::query(
        "DELETE FROM console_tokens WHERE server_id = $1 AND token_hash NOT IN
             (SELECT token_hash FROM console_tokens WHERE server_id = $1 ORDER BY expires_us DESC LIMIT $2)",
    )
    .bind(server_id)
    .bind(MAX_TOKENS - 1)
    .execute(&mut *tx)
    .await?;
    let lifetime = i64::try_from(TOKEN_LIFETIME.as_micros()).map_err(ApiError::internal)?;
    sqlx::query(
        "INSERT INTO console_tokens (token_hash, server_id, user_id, expires_us) VALUES ($1, $2, $3, $4)",
    )
    .bind(secrets::hash(&token))
    .bind(server_id)
    .bind(&ctx.user_id)
    .bind(now + lifetime)
    .execute(&mut *tx)
    .await?;
    tx.commit().await?;
    // http becomes ws, and https wss.
    let base = app.config.public_url.strip_prefix("http").unwrap_or(&app.config.public_url);
    Ok(format!("ws{base}/mote/v1/serial-console?token={token}"))
}

/// What a token is for, as [`find`] has it.
#[derive(Debug, FromRow)]
pub(crate) struct Authorized {
    /// Server.
    pub(crate) server_id: String,
    /// Its host, if it is on one.
    pub(crate) host_name: Option<String>,
}

/// What a console's token is for; `None` if it isn't valid (any more).
///
/// # Errors
/// Of the database.
pub(crate) async fn find(conn: &mut Conn, token: &str) -> Result<Option<Authorized>, ApiError> {
    let found = sqlx::query_as(
        "SELECT t.server_id, h.name AS host_name FROM console_tokens t JOIN servers s ON s.id = t.server_id
             LEFT JOIN hosts h ON h.id = s.host_id
         WHERE t.token_hash = $1 AND t.expires_us > $2 AND NOT s.deleting",
    )
    .bind(secrets::hash(token))
    .bind(now_us())
    .fetch_optional(conn)
    .await?;
    Ok(found)
}

/// The server of a request's `token`: who has it needs no other.
pub(super) struct Console(ServerId);

impl FromRequestParts<App> for Console {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let params = Params::from_request_parts(parts, app).await?;
        let token = params.get("token").ok_or(ApiError::Unauthorized)?;
        let found = find(&mut *app.db.acquire().await?, token).await?.ok_or(ApiError::Unauthorized)?;
        found.server_id.parse().map(Self).map_err(ApiError::internal)
    }
}

/// The handler.
pub(super) async fn open(
    State(app): State<App>,
    Console(server): Console,
    upgrade: WebSocketUpgrade,
) -> Result<Response, ApiError> {
    let place = Arc::clone(&PLACES).try_acquire_owned();
    let place = place.map_err(|_| ApiError::Unavailable("Too many consoles are open.".into()))?;
    let upgrade = upgrade.protocols([PROTOCOL]).max_message_size(MAX_MESSAGE).max_frame_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let (sender, receiver) = socket.split();
        // Whichever ends first ends the other.
        tokio::select! {
            () = shown(&app, server, sender) => {}
            () = typed(&app, server, receiver) => {}
        }
        drop(place);
    }))
}

/// What the guest writes, until the client or the server goes.
async fn shown(app: &App, server_id: ServerId, mut sender: SplitSink<WebSocket, Message>) {
    let (mut offset, mut failures) = (FROM_NOW, 0);
    while failures < MAX_FAILURES {
        let first = offset == FROM_NOW;
        let wait = if first { Duration::ZERO } else { WAIT };
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(0);
        let kind = HostRequestKind::ConsoleRead { server_id, offset, wait_ms };
        let answer = console::ask_of(app, &server_id.to_string(), kind, wait).await;
        let Ok(HostReply::ConsoleRead { next_offset, data }) = answer else {
            if matches!(answer, Err(ApiError::NotFound(_))) {
                break;
            }
            failures += 1;
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        failures = 0;
        if next_offset < offset && !first {
            // The machine was started anew, and with it its output.
            offset = 0;
            continue;
        }
        offset = next_offset;
        let Ok(bytes) = STANDARD.decode(data) else { break };
        // Without output a ping shows whether the client is still there.
        let message =
            if bytes.is_empty() { Message::Ping(Vec::new().into()) } else { Message::Binary(bytes.into()) };
        if sender.send(message).await.is_err() {
            return;
        }
    }
    let _ = sender.send(Message::Close(None)).await;
}

/// What the client types, until it or the server goes.
async fn typed(app: &App, server_id: ServerId, mut receiver: SplitStream<WebSocket>) {
    while let Some(Ok(message)) = receiver.next().await {
        let bytes = match message {
            Message::Binary(bytes) => bytes,
            Message::Text(text) => text.into(),
            Message::Ping(_) | Message::Pong(_) => continue,
            Message::Close(_) => return,
        };
        if bytes.is_empty() {
            continue;
        }
        let kind = HostRequestKind::ConsoleWrite { server_id, data: STANDARD.encode(&bytes) };
        let written = console::ask_of(app, &server_id.to_string(), kind, Duration::ZERO).await;
        if let Err(error) = written {
            tracing::debug!(%error, server = %server_id, "console input was lost");
            return;
        }
    }
}
