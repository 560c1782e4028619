//! What a device does to be part of a snapshot: [`Stateful`] for whatever is on the machine's list of devices, and
//! [`DeviceState`], which is what it says about itself.

use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A device that can be stopped, saved, and made again from what was saved.
///
/// A machine that is paused stops its vCPUs first and then calls [`Stateful::pause`] of each device; [`Stateful::save`]
/// is only called in between that and [`Stateful::resume`]. A machine that is made from a snapshot makes its devices
/// from the saved configuration as at a boot, calls [`Stateful::restore`] of each, and later `resume`: so a device comes
/// back to life by one path, whether the process is the same or not.
///
/// What is live (files, sockets, taps, eventfds) is never part of the state: the new device has its own.
pub trait Stateful: Send {
    /// Stops: when this returns, the device has no thread that touches guest memory, and it interrupts nobody until it
    /// is resumed. Twice in a row is harmless.
    fn pause(&mut self) {}

    /// Goes on where [`Stateful::pause`] or [`Stateful::restore`] left it. Harmless when not paused.
    fn resume(&mut self) {}

    /// What has to be known to make the same device again.
    ///
    /// # Errors
    /// The device can't be part of a snapshot, and why.
    fn save(&self) -> Result<DeviceState, StateError>;

    /// Brings a device that was just made into the saved state, paused.
    ///
    /// # Errors
    /// The state isn't one of this device, or can't be had here; the device must not be used then.
    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError>;
}

/// The state of one device: a value of the device's own plain type, in JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceState(serde_json::Value);

impl DeviceState {
    /// No state: everything about the device is in its configuration.
    pub const NONE: Self = Self(serde_json::Value::Null);

    /// From the device's own type.
    ///
    /// # Errors
    /// It can't be written as JSON (a map with keys that are no strings).
    pub fn new(state: &impl Serialize) -> Result<Self, StateError> {
        serde_json::to_value(state).map(Self).map_err(|error| StateError(error.to_string()))
    }

    /// As the device's own type. Give fields that were added later a default, so that older snapshots can be read.
    ///
    /// # Errors
    /// It is something else.
    pub fn get<T: DeserializeOwned>(&self) -> Result<T, StateError> {
        T::deserialize(&self.0).map_err(|error| StateError(error.to_string()))
    }
}

/// Why a device can't be saved or restored, in words for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateError(String);

impl StateError {
    /// In these words.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StateError {}
