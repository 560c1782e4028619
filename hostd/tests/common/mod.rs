//! A tiny controller on loopback that says what it was told to say.
#![expect(clippy::unwrap_used, reason = "tests: what goes wrong shall stop them")]
#![allow(dead_code, reason = "not every test program uses all of it")]

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use mote_host_api::DesiredState;
use tokio::{net::TcpListener, sync::watch};

/// Longest real time that anything may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// One call as the controller saw it.
#[derive(Debug, Clone)]
pub struct Call {
    /// Method and path.
    pub line: String,
    /// `Authorization`.
    pub token: String,
    /// Body.
    pub body: Vec<u8>,
}

/// What it says, and how.
pub type Answer = (u16, Vec<u8>);

/// A controller that gives the answers that it was told, per kind of call, and then none for ever.
#[derive(Default)]
pub struct Script {
    calls: Mutex<Vec<Call>>,
    answers: Mutex<Vec<(&'static str, VecDeque<Answer>)>>,
    /// Answers to `/desired` where no other is queued: as a real controller does, by generation.
    desired: Mutex<Option<DesiredState>>,
    changed: watch::Sender<u64>,
}

impl Script {
    /// Starts it and gives its address.
    pub async fn start() -> (Arc<Self>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let script = Arc::new(Self::default());
        let this = script.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let this = this.clone();
                tokio::spawn(async move {
                    let service = service_fn(|request| this.clone().serve(request));
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        (script, format!("http://{address}"))
    }

    /// Puts an answer in the queue of the calls whose line contains `part`.
    pub fn say(&self, part: &'static str, status: u16, body: impl Into<Vec<u8>>) {
        let mut answers = self.answers.lock().unwrap();
        let answer = (status, body.into());
        match answers.iter_mut().find(|(of, _)| *of == part) {
            Some((_, queue)) => queue.push_back(answer),
            None => answers.push((part, [answer].into())),
        }
        self.changed.send_modify(|n| *n += 1);
    }

    /// Sets what `/desired` says.
    pub fn want(&self, desired: &DesiredState) {
        *self.desired.lock().unwrap() = Some(desired.clone());
        self.changed.send_modify(|n| *n += 1);
    }

    fn newer_desired(&self, line: &str) -> Option<Answer> {
        let after: u64 = line.split_once("/desired?after=")?.1.split_once('&')?.0.parse().unwrap();
        let desired = self.desired.lock().unwrap();
        let newer = desired.as_ref().filter(|desired| desired.generation > after)?;
        Some((200, serde_json::to_vec(newer).unwrap()))
    }

    async fn serve(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        let line = format!("{} {}", request.method(), request.uri());
        let token = request.headers().get("authorization").map_or("", |v| v.to_str().unwrap()).to_owned();
        let body = request.into_body().collect().await.unwrap().to_bytes().to_vec();
        self.calls.lock().unwrap().push(Call { line: line.clone(), token, body });
        self.changed.send_modify(|n| *n += 1);
        let mut changes = self.changed.subscribe();
        loop {
            let next = {
                let mut answers = self.answers.lock().unwrap();
                let queue = answers.iter_mut().find(|(part, _)| line.contains(part));
                queue.and_then(|(_, queue)| queue.pop_front())
            };
            if let Some((status, body)) = next.or_else(|| self.newer_desired(&line)) {
                let response = Response::builder().status(status).body(Full::new(Bytes::from(body)));
                return Ok(response.unwrap());
            }
            let _ = changes.changed().await;
        }
    }

    /// Waits for the n-th call (from 0) whose line contains `part`.
    pub async fn call(&self, part: &str, n: usize) -> Call {
        let mut changes = self.changed.subscribe();
        let find = async {
            loop {
                let found =
                    self.calls.lock().unwrap().iter().filter(|c| c.line.contains(part)).nth(n).cloned();
                if let Some(call) = found {
                    return call;
                }
                let _ = changes.changed().await;
            }
        };
        tokio::time::timeout(PATIENCE, find)
            .await
            .unwrap_or_else(|_| panic!("no call {n} of {part}: {:?}", self.calls.lock().unwrap()))
    }
}
