//! Loads rulesets and reads back which one is loaded.

use std::{
    collections::HashMap,
    io,
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::ExecutorError;
use crate::{
    filter::{Conntrack, Digest, Family, Ruleset, TABLE},
    namespace::{self, NamespaceError, NamespaceIdentity},
    nftables::{Batch, LanguageError, Socket},
};

/// There when br_netfilter is.
const BRIDGE_NETFILTER: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";

/// A socket for each namespace in which a filter was loaded or looked for. Closing one would wait for the kernel to take
/// down what the last transaction has removed (tens of milliseconds), and so would the next transaction.
#[derive(Debug, Clone, Default)]
pub(super) struct Sockets(Arc<Mutex<HashMap<String, Kept>>>);

#[derive(Debug, Clone)]
struct Kept {
    namespace: NamespaceIdentity,
    socket: Arc<Mutex<Socket>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sockets {
    /// Closes the socket of a namespace that shall go, or has gone: as long as it is open the namespace stays.
    pub(super) fn forget(&self, namespace: &str) {
        if let Some(kept) = lock(&self.0).remove(namespace) {
            // Closing may wait for the kernel.
            tokio::task::spawn_blocking(move || drop(kept));
        }
    }

    /// Closes the sockets of all namespaces but these.
    pub(super) fn retain(&self, is_there: impl Fn(&str) -> bool) {
        lock(&self.0).retain(|namespace, _| is_there(namespace));
    }

    /// The socket of a namespace. Blocks.
    fn of(&self, namespace: &str) -> Result<Arc<Mutex<Socket>>, ExecutorError> {
        let identity = namespace::identity(namespace)?;
        if let Some(kept) = lock(&self.0).get(namespace)
            && kept.namespace == identity
        {
            return Ok(kept.socket.clone());
        }
        let socket = namespace::in_namespace(namespace, Socket::open)?.map_err(failed(namespace))?;
        let kept = Kept { namespace: identity, socket: Arc::new(Mutex::new(socket)) };
        lock(&self.0).insert(namespace.to_owned(), kept.clone());
        Ok(kept.socket)
    }

    async fn run<T: Send + 'static>(
        &self,
        namespace: &str,
        run: impl FnOnce(&Socket) -> io::Result<T> + Send + 'static,
    ) -> Result<T, ExecutorError> {
        let (sockets, name) = (self.clone(), namespace.to_owned());
        let done = tokio::task::spawn_blocking(move || {
            let socket = sockets.of(&name)?;
            run(&lock(&socket)).map_err(failed(&name))
        });
        done.await.unwrap_or_else(|_| Err(NamespaceError::Panicked(namespace.to_owned()).into()))
    }

    /// Puts a ruleset in the place of whatever is loaded in a namespace.
    pub(super) async fn replace(&self, namespace: &str, ruleset: &Ruleset) -> Result<(), ExecutorError> {
        let ruleset = ruleset.clone();
        self.run(namespace, move |socket| {
            let tables = socket.tables(Family::Inet.number())?;
            socket.commit(compiled(ruleset.replace(&tables))?)
        })
        .await
    }

    /// Makes a ruleset from the one that is loaded; false if that is another one, or if it isn't worth it.
    pub(super) async fn change(
        &self,
        namespace: &str,
        old: &Ruleset,
        new: &Ruleset,
    ) -> Result<bool, ExecutorError> {
        let Some(batch) = compiled(new.change(old)).map_err(failed(namespace))? else { return Ok(false) };
        self.run(namespace, move |socket| Ok(socket.commit(batch).is_ok())).await
    }

    /// Which ruleset is loaded in a namespace.
    pub(super) async fn loaded(&self, namespace: &str) -> Result<Option<Digest>, ExecutorError> {
        let tables = self.run(namespace, |socket| socket.tables(Family::Inet.number())).await?;
        Ok(tables.iter().find_map(|table| Digest::from_marker(table)))
    }
}

fn failed(namespace: &str) -> impl FnOnce(io::Error) -> ExecutorError {
    let namespace = namespace.to_owned();
    move |source| ExecutorError::Filter { namespace, source }
}

/// A batch that can't be made isn't something that the kernel said.
fn compiled<T>(batch: Result<T, LanguageError>) -> io::Result<T> {
    batch.map_err(io::Error::other)
}

/// Whether this kernel's conntrack sees bridged packets. Nothing is changed.
pub(super) async fn conntrack() -> Conntrack {
    let probe = || {
        let (table, chain) = (Family::Bridge, (Family::Bridge, "probe"));
        let mut batch = Batch::new();
        batch.add_table(table, TABLE);
        batch.add_chain(chain, None);
        compiled(batch.add_rule(chain, "ct state new accept"))?;
        Socket::open()?.check(batch)
    };
    if matches!(tokio::task::spawn_blocking(probe).await, Ok(Ok(()))) {
        return Conntrack::Bridge;
    }
    let there = || Path::new(BRIDGE_NETFILTER).exists();
    let loaded = tokio::task::spawn_blocking(move || {
        if !there() {
            // Whether it worked is what is looked at next.
            let _ = Command::new("modprobe").arg("br_netfilter").stderr(Stdio::null()).status();
        }
        there()
    });
    if matches!(loaded.await, Ok(true)) { Conntrack::BridgeNetfilter } else { Conntrack::Missing }
}
