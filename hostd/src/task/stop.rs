//! `terminate`, `teardown` and `forget`: from a running server to nothing.

use std::time::Duration;

use nix::sys::signal::Signal;

use super::{TaskError, TaskEvent, Work};
use crate::{files, ledger::Phase, process::ProcessIdentity};

/// How long a VMM has to end after SIGTERM (it does so at once; writing back its disk may take a while).
pub const TERMINATE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a process may need to disappear after SIGKILL.
pub const KILL_TIMEOUT: Duration = Duration::from_secs(10);

impl Work {
    /// Ends the server's VMMs on purpose; what is next follows from the phase `Stopping` without a process.
    pub(super) async fn terminate(&mut self) -> Result<(), TaskError> {
        self.enter(Phase::Stopping, None).await?;
        self.end_processes(&self.alive).await?;
        self.remove_sockets().await?;
        self.record.process = None;
        self.save().await
    }

    /// Ends VMMs (and with them their taps) and removes sockets; directory and record are left.
    pub(super) async fn teardown(&mut self) -> Result<(), TaskError> {
        self.enter(Phase::Removing, None).await?;
        self.end_processes(&self.alive).await?;
        self.remove_sockets().await?;
        self.record.process = None;
        self.save().await
    }

    /// The last trace.
    pub(super) async fn forget(&mut self) -> Result<(), TaskError> {
        let (parts, id) = (self.parts.clone(), self.record.id);
        // The teardown may have been cut off between the end of the VMM and this.
        self.remove_sockets().await?;
        self.reach("before forget").await;
        self.blocking(move || parts.ledger.remove(id)).await??;
        self.reach("after forget").await;
        tracing::info!(server = %id, "removed");
        self.tell(TaskEvent::Forgotten(id)).await;
        Ok(())
    }

    pub(super) async fn remove_sockets(&self) -> Result<(), TaskError> {
        let dir = self.parts.state.server(self.record.id);
        self.blocking(move || {
            files::remove_file(&dir.api_socket())?;
            files::remove_file(&dir.console_socket())
        })
        .await??;
        Ok(())
    }

    /// SIGTERM, then SIGKILL, to all at once.
    pub(super) async fn end_processes(&self, processes: &[ProcessIdentity]) -> Result<(), TaskError> {
        // Their taps end with them.
        self.parts.meter.last_look(self.record.id).await;
        for (signal, timeout) in [(Signal::SIGTERM, TERMINATE_TIMEOUT), (Signal::SIGKILL, KILL_TIMEOUT)] {
            for process in processes {
                self.reach("before signal").await;
                self.parts.vmms.signal(process, signal)?;
                self.reach("after signal").await;
            }
            let all = futures_util::future::join_all(processes.iter().map(|p| self.parts.vmms.ended(p)));
            tokio::select! {
                _ = all => {
                    for process in processes {
                        self.tell(TaskEvent::Ended(self.record.id, process.clone())).await;
                    }
                    return Ok(());
                }
                () = self.parts.clock.sleep(timeout) => {}
            }
        }
        Err(TaskError::Local("its VMM does not end, not even after SIGKILL".to_owned()))
    }
}
