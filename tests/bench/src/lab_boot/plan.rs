//! What the two sides of the measurement say to each other.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What lines with a [`Start`] begin with, among all that the lab's console says.
pub const RESULT: &str = "mote-lab-start ";
/// What lines of a profile begin with.
pub const PROFILE: &str = "mote-lab-profile ";
/// Printed by the guest's first program.
pub const USER_SPACE: &str = "mote-lab: user space";
/// Printed when the guest has read from its root drive.
pub const DRIVE_READ: &str = "mote-lab: drive read";

/// A program that boots the guest, as it is called in the lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Subject {
    /// Name in results.
    pub name: String,
    /// Its file.
    pub program: PathBuf,
    /// Beside the API socket's path.
    pub arguments: Vec<String>,
}

/// What is to be done in the lab.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// In turn, each round.
    pub subjects: Vec<Subject>,
    /// Rounds that count, after one that doesn't.
    pub rounds: u32,
    /// Requests that describe the machine: path and body.
    pub requests: Vec<(String, serde_json::Value)>,
    /// Where KVM's trace events are counted, which makes them slow.
    pub profile: bool,
}

/// One start, in milliseconds of the lab's clock.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Start {
    /// Name of the subject.
    pub subject: String,
    /// Process start to the guest's user space, with all requests.
    pub whole_ms: f64,
    /// `InstanceStart` sent to the guest's user space.
    pub user_space_ms: f64,
    /// `InstanceStart` sent to the guest having read its root drive.
    pub drive_read_ms: f64,
    /// KVM's counters at that moment, those that aren't 0.
    pub counters: BTreeMap<String, u64>,
}
