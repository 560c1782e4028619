//! virtio-balloon (virtio 1.2 §5.5): the host asks the guest to give memory back, with statistics, free page hinting and
//! free page reporting.
//!
//! What the guest gives is punched out of the memory file, so that it costs nothing until it is touched again; then it
//! reads as zeros. One thread, started when the driver activates the device, serves the queues ([`server`]); what the API
//! wants and sees is shared with it ([`BalloonControl`]).

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use mote_vmm_api as api;
use vmm_sys_util::epoll::EventSet;

use super::queue::VirtQueue;
use super::worker::{Poller, Worker};
use super::{Activation, VirtioDevice, device_type, read_config_bytes};
use crate::devices::DeviceError;
use crate::snapshot::{DeviceState, StateError};

mod control;
mod server;
mod statistics;

pub use control::{BalloonControl, HintingOff};
use control::{Shared, pages};
use server::{Queues, Server};

const QUEUE_SIZE: u16 = 256;

/// Statistics queue.
const F_STATS_VQ: u64 = 1 << 1;
/// The guest may take its pages back when it has no others.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// Free page hinting queue.
const F_FREE_PAGE_HINT: u64 = 1 << 3;
/// Free page reporting queue.
const F_REPORTING: u64 = 1 << 5;

/// Place of `actual` in the configuration space, the one field that the driver writes.
const ACTUAL_AT: u64 = 4;

/// Why a balloon can't be made.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// Pages are counted in 32 bits.
    #[error("amount_mib {0} is more than a balloon can hold (16777215)")]
    Amount(u32),
}

/// A memory balloon.
pub struct Balloon {
    features: u64,
    shared: Arc<Shared>,
    worker: Option<Worker>,
}

impl Balloon {
    /// As configured.
    ///
    /// # Errors
    /// The amount is impossible, or no eventfd could be made.
    pub fn open(config: &api::Balloon) -> Result<Self, DeviceError> {
        pages(config.amount_mib)?;
        let features = [
            (config.stats_polling_interval_s > 0, F_STATS_VQ),
            (config.deflate_on_oom, F_DEFLATE_ON_OOM),
            (config.free_page_hinting, F_FREE_PAGE_HINT),
            (config.free_page_reporting, F_REPORTING),
        ]
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .fold(0, |features, (_, feature)| features | feature);
        Ok(Self { features, shared: Shared::new(config)?, worker: None })
    }

    /// The API's handle.
    pub fn control(&self) -> BalloonControl {
        BalloonControl(self.shared.clone())
    }

    /// Number of queues with these features; those of features that are missing don't count.
    fn queues(features: u64) -> usize {
        2 + (features & (F_STATS_VQ | F_FREE_PAGE_HINT | F_REPORTING)).count_ones() as usize
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        device_type::BALLOON
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 5][..Self::queues(self.features)]
    }

    fn queues_used(&self, features: u64) -> usize {
        Self::queues(features & self.features)
    }

    fn features(&self) -> u64 {
        self.features
    }

    /// `struct virtio_balloon_config` up to `free_page_hint_cmd_id`: the page poison feature isn't offered.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.state();
        let mut config = [0; 12];
        config[0..4].copy_from_slice(&state.target_pages.to_le_bytes());
        config[4..8].copy_from_slice(&state.actual_pages.to_le_bytes());
        config[8..12].copy_from_slice(&state.host_command.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Some(at) = offset.checked_sub(ACTUAL_AT).and_then(|at| usize::try_from(at).ok()) else { return };
        let mut state = self.shared.state();
        let mut actual = state.actual_pages.to_le_bytes();
        for (at, byte) in (at..).zip(data) {
            if let Some(to) = actual.get_mut(at) {
                *to = *byte;
            }
        }
        state.actual_pages = u32::from_le_bytes(actual);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let (features, given) = (activation.features, activation.queues.len());
        if given != Self::queues(features) {
            return Err(DeviceError::QueueCount { device: "balloon", given });
        }
        let mut queues = activation.queues.into_iter();
        let mut next = |feature| if feature == 0 || features & feature != 0 { queues.next() } else { None };
        let (Some(inflate), Some(deflate)) = (next(0), next(0)) else {
            return Err(DeviceError::QueueCount { device: "balloon", given });
        };
        let queues = Queues {
            inflate,
            deflate,
            statistics: next(F_STATS_VQ),
            hinting: next(F_FREE_PAGE_HINT),
            reporting: next(F_REPORTING),
        };
        let mut fds: Vec<(RawFd, EventSet)> =
            queues.each().map(|queue| (queue.notifier_fd(), EventSet::IN)).collect();
        fds.push((self.shared.wake.as_raw_fd(), EventSet::IN));
        let mut poller = Poller::new(&fds).map_err(DeviceError::EventFd)?;
        self.shared.set_interrupt(Some(activation.interrupt));
        let mut server = Server::new(queues, self.shared.clone());
        self.worker = Some(Worker::spawn("balloon", move |stop| server.run(&mut poller, stop))?);
        Ok(())
    }

    /// The guest keeps its balloon: only the thread ends.
    fn pause(&mut self) {
        self.worker = None;
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(&self.shared.state().saved())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        self.shared.state().restore(&state.get()?);
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.set_interrupt(None);
        self.worker = None;
        let mut state = self.shared.state();
        state.actual_pages = 0;
        state.guest_command = None;
        state.host_command = control::COMMAND_STOP;
    }
}

impl Queues {
    fn each(&self) -> impl Iterator<Item = &VirtQueue> {
        let optional = [&self.statistics, &self.hinting, &self.reporting];
        [&self.inflate, &self.deflate].into_iter().chain(optional.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests;
