//! What the API wants of a balloon and what the guest has said.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mote_vmm_api as api;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::BalloonError;
use super::statistics::Statistics;
use crate::devices::DeviceError;
use crate::devices::virtio::Interrupt;
use crate::metrics::{self, BalloonMetrics};

/// Pages (always 4 KiB, virtio 1.2 §5.5.6) of a MiB.
const PAGES_PER_MIB: u32 = 256;
/// `VIRTIO_BALLOON_CMD_ID_STOP`: hinting is not wanted (any more).
pub const COMMAND_STOP: u32 = 0;
/// `VIRTIO_BALLOON_CMD_ID_DONE`: the guest may use again what it has hinted.
pub const COMMAND_DONE: u32 = 1;
/// The first id of a run.
const FIRST_RUN: u32 = 2;

/// Free page hinting was not asked for when the balloon was configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("free_page_hinting was not enabled when the balloon was configured, or the guest doesn't know it")]
pub struct HintingOff;

/// The number of pages.
pub fn pages(mib: u32) -> Result<u32, BalloonError> {
    mib.checked_mul(PAGES_PER_MIB).ok_or(BalloonError::Amount(mib))
}

/// The variable part.
pub struct State {
    pub target_pages: u32,
    pub actual_pages: u32,
    /// What the host asks for: a run's id, or one of the commands.
    pub host_command: u32,
    /// The last that the guest has said.
    pub guest_command: Option<u32>,
    /// The host answers the guest's end of a run with [`COMMAND_DONE`] by itself.
    pub acknowledge_on_stop: bool,
    pub statistics_interval: Duration,
    pub statistics: Statistics,
    next_run: u32,
}

/// A balloon in a snapshot: what isn't in its configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedState {
    actual_pages: u32,
    host_command: u32,
    guest_command: Option<u32>,
    acknowledge_on_stop: bool,
    statistics: Statistics,
    next_run: u32,
}

impl State {
    pub const fn saved(&self) -> SavedState {
        SavedState {
            actual_pages: self.actual_pages,
            host_command: self.host_command,
            guest_command: self.guest_command,
            acknowledge_on_stop: self.acknowledge_on_stop,
            statistics: self.statistics,
            next_run: self.next_run,
        }
    }

    pub const fn restore(&mut self, saved: &SavedState) {
        self.actual_pages = saved.actual_pages;
        self.host_command = saved.host_command;
        self.guest_command = saved.guest_command;
        self.acknowledge_on_stop = saved.acknowledge_on_stop;
        self.statistics = saved.statistics;
        self.next_run = saved.next_run;
    }
}

/// Shared by device, worker and the API.
pub struct Shared {
    hinting: bool,
    state: Mutex<State>,
    interrupt: Mutex<Option<Arc<Interrupt>>>,
    /// Tells the worker that the statistics' interval has changed.
    pub wake: EventFd,
    /// What the balloon counts.
    pub metrics: Arc<BalloonMetrics>,
}

impl Shared {
    pub fn new(config: &api::Balloon) -> Result<Arc<Self>, DeviceError> {
        Ok(Arc::new(Self {
            hinting: config.free_page_hinting,
            state: Mutex::new(State {
                target_pages: pages(config.amount_mib)?,
                actual_pages: 0,
                host_command: COMMAND_STOP,
                guest_command: None,
                acknowledge_on_stop: true,
                statistics_interval: seconds(config.stats_polling_interval_s),
                statistics: Statistics::default(),
                next_run: FIRST_RUN,
            }),
            interrupt: Mutex::new(None),
            metrics: metrics::device("balloon", None),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DeviceError::EventFd)?,
        }))
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_interrupt(&self, interrupt: Option<Arc<Interrupt>>) {
        *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }

    /// Tells a running driver that the configuration space has changed.
    pub fn announce(&self) {
        if let Some(interrupt) = &*self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) {
            interrupt.config_changed();
        }
    }
}

fn seconds(seconds: u16) -> Duration {
    Duration::from_secs(seconds.into())
}

/// The API's handle of a balloon. Works whether or not the guest drives it.
#[derive(Clone)]
pub struct BalloonControl(pub(super) Arc<Shared>);

impl BalloonControl {
    /// Asks the guest for so much memory in all.
    ///
    /// # Errors
    /// More than a balloon can hold.
    pub fn set_amount(&self, mib: u32) -> Result<(), BalloonError> {
        let target = pages(mib)?;
        self.0.state().target_pages = target;
        self.0.announce();
        Ok(())
    }

    /// How often statistics are asked for.
    pub fn set_statistics_interval(&self, interval_s: u16) {
        self.0.state().statistics_interval = seconds(interval_s);
        // Fails only if the counter is full, and then the worker is being woken anyway.
        let _ = self.0.wake.write(1);
    }

    /// Target, actual size and what the guest has told last.
    pub fn statistics(&self) -> api::BalloonStats {
        let state = self.0.state();
        let mib = |pages: u32| pages / PAGES_PER_MIB;
        state.statistics.answer(api::BalloonStats {
            target_pages: state.target_pages,
            actual_pages: state.actual_pages,
            target_mib: mib(state.target_pages),
            actual_mib: mib(state.actual_pages),
            ..api::BalloonStats::default()
        })
    }

    /// Begins a run of free page hinting: the guest gives all pages that it doesn't use.
    ///
    /// # Errors
    /// It is off.
    pub fn start_hinting(&self, acknowledge_on_stop: bool) -> Result<(), HintingOff> {
        self.command(|state| {
            state.acknowledge_on_stop = acknowledge_on_stop;
            state.host_command = state.next_run;
            state.next_run = state.next_run.checked_add(1).unwrap_or(FIRST_RUN);
        })
    }

    /// Ends it: the guest may use its pages again.
    ///
    /// # Errors
    /// It is off.
    pub fn stop_hinting(&self) -> Result<(), HintingOff> {
        self.command(|state| state.host_command = COMMAND_DONE)
    }

    fn command(&self, change: impl FnOnce(&mut State)) -> Result<(), HintingOff> {
        if !self.0.hinting {
            return Err(HintingOff);
        }
        change(&mut self.0.state());
        self.0.announce();
        Ok(())
    }

    /// The last commands of both sides.
    ///
    /// # Errors
    /// It is off.
    pub fn hinting_status(&self) -> Result<api::BalloonHintingStatus, HintingOff> {
        if !self.0.hinting {
            return Err(HintingOff);
        }
        let state = self.0.state();
        Ok(api::BalloonHintingStatus { host_cmd: state.host_command, guest_cmd: state.guest_command })
    }
}
