//! The life of a server as Nova's API shows it, and how a host's reports move it. Pure.
//!
//! The database says what is wanted (power, run generation, disk, rescue); a host reports what is. Where a server comes to
//! rest follows from the wish alone ([`Known::resting`]):
//!
//! | wish | `vm_state` | `power_state` |
//! |---|---|---|
//! | no host any more, with an image | `shelved_offloaded` | 0 |
//! | boots from another disk (rescue) | `rescued` | by power |
//! | the flavor of before is kept (resize) | `resized` | by power |
//! | power running | `active` | 1 |
//! | power paused | `paused` | 3 |
//! | power suspended | `suspended` | 4 |
//! | power stopped | `stopped` | 4 |
//!
//! and an action changes the wish and says by `task_state` what it waits for. This is the whole of what is possible:
//!
//! | action | from `vm_state` | meanwhile `task_state` | rests in |
//! |---|---|---|---|
//! | create | – | `scheduling`, `spawning` | `active`; `error` when no host takes it |
//! | os-start | stopped | `powering-on` | `active` |
//! | os-stop | active, error | `powering-off` | `stopped` |
//! | reboot SOFT | active | `rebooting` | `active` |
//! | reboot HARD | active, stopped, paused, suspended, error | `rebooting_hard` | `active` |
//! | pause | active | `pausing` | `paused` |
//! | unpause | paused | `unpausing` | `active` |
//! | suspend | active | `suspending` | `suspended` |
//! | resume | suspended | `resuming` | `active` |
//! | rebuild | active, stopped, error | `rebuilding` | `active`, `stopped` |
//! | resize | active, stopped | `resize_finish` | `resized` |
//! | confirmResize | resized | – | `active`, `stopped` |
//! | revertResize | resized | `resize_reverting` | `active`, `stopped` |
//! | rescue | active, stopped, error | `rescuing` | `rescued` |
//! | unrescue | rescued | `unrescuing` | `active` |
//! | createImage, createBackup | active, stopped, paused, suspended | `image_uploading` | as before |
//! | shelve | active, stopped, paused, suspended | `shelving_image_uploading`, `shelving_offloading` | `shelved_offloaded` |
//! | unshelve | shelved_offloaded | `spawning` | `active` |
//! | delete, forceDelete | any | `deleting` | gone; `deleted` in lists for a while |
//! | *a guest powers itself off* | any that runs | – | `stopped` (rescued and resized servers keep their state) |
//! | *a host reports a failure* | any | – | `error` |
//!
//! [`observe`] is the only place where a report moves a server. `run_generation` grows with every start and reboot, so that
//! a report made before the host knew of it can be told from one made after.

use mote_host_api::{DesiredPower, ObservedServer, ServerState};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// The word in the API and the database.
            pub(crate) fn word(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// The value of that word.
            pub(crate) fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

words! {
    /// Nova's `vm_state`.
    VmState {
        /// Not started yet.
        Building = "building",
        /// Its VMM runs.
        Active = "active",
        /// Its VMM holds it, it stands still.
        Paused = "paused",
        /// No VMM; what it held is on its host's disk.
        Suspended = "suspended",
        /// No VMM; its disk is kept.
        Stopped = "stopped",
        /// It boots from another disk.
        Rescued = "rescued",
        /// With a new flavor that is neither confirmed nor taken back.
        Resized = "resized",
        /// On no host; its disk is an image.
        ShelvedOffloaded = "shelved_offloaded",
        /// See its fault.
        Error = "error",
        /// Gone; shown for a while.
        Deleted = "deleted",
    }
}

words! {
    /// Nova's `task_state`: what is going on.
    TaskState {
        /// Its host was chosen, but hasn't begun yet.
        Scheduling = "scheduling",
        /// Its host prepares it.
        Spawning = "spawning",
        /// os-stop was asked.
        PoweringOff = "powering-off",
        /// os-start was asked.
        PoweringOn = "powering-on",
        /// A soft reboot was asked.
        Rebooting = "rebooting",
        /// A hard reboot was asked.
        RebootingHard = "rebooting_hard",
        /// pause was asked.
        Pausing = "pausing",
        /// unpause was asked.
        Unpausing = "unpausing",
        /// suspend was asked.
        Suspending = "suspending",
        /// resume was asked.
        Resuming = "resuming",
        /// A new disk is made of an image.
        Rebuilding = "rebuilding",
        /// A new flavor is being applied.
        ResizeFinish = "resize_finish",
        /// The flavor of before is being applied.
        ResizeReverting = "resize_reverting",
        /// rescue was asked.
        Rescuing = "rescuing",
        /// unrescue was asked.
        Unrescuing = "unrescuing",
        /// A copy of its disk is on its way to an image.
        ImageUploading = "image_uploading",
        /// The same, to be shelved.
        ShelvingImageUploading = "shelving_image_uploading",
        /// Its host removes it, to be shelved.
        ShelvingOffloading = "shelving_offloading",
        /// Its host removes it.
        Deleting = "deleting",
    }
}

/// The `status` that users see, by Nova's table (`nova/api/openstack/common.py` `_STATE_MAP`).
pub(crate) fn status(vm_state: VmState, task_state: Option<TaskState>) -> &'static str {
    use TaskState::{Rebooting, RebootingHard, Rebuilding, ResizeFinish, ResizeReverting};
    match (vm_state, task_state) {
        (VmState::Building, _) => "BUILD",
        (VmState::Active, Some(Rebooting)) => "REBOOT",
        (
            VmState::Active | VmState::Stopped | VmState::Paused | VmState::Suspended | VmState::Error,
            Some(RebootingHard),
        ) => "HARD_REBOOT",
        (VmState::Active | VmState::Stopped | VmState::Error, Some(Rebuilding)) => "REBUILD",
        (VmState::Active | VmState::Stopped, Some(ResizeFinish)) => "RESIZE",
        (VmState::Resized, Some(ResizeReverting)) => "REVERT_RESIZE",
        (VmState::Active, _) => "ACTIVE",
        (VmState::Paused, _) => "PAUSED",
        (VmState::Suspended, _) => "SUSPENDED",
        (VmState::Stopped, _) => "SHUTOFF",
        (VmState::Rescued, _) => "RESCUE",
        (VmState::Resized, _) => "VERIFY_RESIZE",
        (VmState::ShelvedOffloaded, _) => "SHELVED_OFFLOADED",
        (VmState::Error, _) => "ERROR",
        (VmState::Deleted, _) => "DELETED",
    }
}

/// The words of `status` that Nova knows, also those that no server of ours can have.
pub(crate) const STATUSES: [&str; 20] = [
    "ACTIVE",
    "BUILD",
    "DELETED",
    "ERROR",
    "HARD_REBOOT",
    "MIGRATING",
    "PASSWORD",
    "PAUSED",
    "REBOOT",
    "REBUILD",
    "RESCUE",
    "RESIZE",
    "REVERT_RESIZE",
    "SHELVED",
    "SHELVED_OFFLOADED",
    "SHUTOFF",
    "SOFT_DELETED",
    "SUSPENDED",
    "UNKNOWN",
    "VERIFY_RESIZE",
];

/// Whether a server has this `status`, for the filter of a list.
pub(crate) fn has_status(vm_state: VmState, task_state: Option<TaskState>, wanted: &str) -> bool {
    status(vm_state, task_state).eq_ignore_ascii_case(wanted)
}

/// Nova's `power_state` numbers.
pub(crate) fn power_state(vm_state: VmState, desired: DesiredPower) -> u8 {
    const NOSTATE: u8 = 0;
    const RUNNING: u8 = 1;
    const PAUSED: u8 = 3;
    const SHUTDOWN: u8 = 4;
    const CRASHED: u8 = 6;
    match (vm_state, desired) {
        (VmState::Building | VmState::ShelvedOffloaded | VmState::Deleted, _) => NOSTATE,
        (VmState::Active, _) => RUNNING,
        (VmState::Paused, _) => PAUSED,
        (VmState::Stopped | VmState::Suspended, _)
        | (VmState::Rescued | VmState::Resized, DesiredPower::Stopped) => SHUTDOWN,
        (VmState::Rescued | VmState::Resized, _) => RUNNING,
        (VmState::Error, _) => CRASHED,
    }
}

/// The word of a wanted power in the database.
pub(crate) fn power_word(power: DesiredPower) -> &'static str {
    match power {
        DesiredPower::Running => "running",
        DesiredPower::Paused => "paused",
        DesiredPower::Stopped => "stopped",
        DesiredPower::Suspended => "suspended",
    }
}

/// The wanted power of a word in the database.
pub(crate) fn power_from_word(word: &str) -> DesiredPower {
    match word {
        "paused" => DesiredPower::Paused,
        "stopped" => DesiredPower::Stopped,
        "suspended" => DesiredPower::Suspended,
        _ => DesiredPower::Running,
    }
}

/// What the database knows of a server, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Known {
    /// State.
    pub(crate) vm_state: VmState,
    /// What is going on.
    pub(crate) task_state: Option<TaskState>,
    /// Wanted power.
    pub(crate) desired_power: DesiredPower,
    /// Number of starts wanted so far.
    pub(crate) run_generation: u64,
    /// The host's generation when the wish last changed.
    pub(crate) changed_generation: u64,
    /// The root disk that is wanted.
    pub(crate) disk_number: u32,
    /// It boots from another disk.
    pub(crate) rescued: bool,
    /// The flavor of before is kept.
    pub(crate) resized: bool,
    /// It shall go from its host.
    pub(crate) leaving: bool,
}

impl Known {
    /// Where it comes to rest with that power.
    fn resting(&self, power: DesiredPower) -> VmState {
        match power {
            _ if self.rescued => VmState::Rescued,
            _ if self.resized => VmState::Resized,
            DesiredPower::Running => VmState::Active,
            DesiredPower::Paused => VmState::Paused,
            DesiredPower::Stopped => VmState::Stopped,
            DesiredPower::Suspended => VmState::Suspended,
        }
    }

    /// What is left of the task once a host reports the server as it is wanted: only the transfer of a disk goes on.
    fn task_at_rest(&self) -> Option<TaskState> {
        self.task_state.filter(|task| task.is_transfer())
    }
}

impl TaskState {
    /// A copy of the disk is under way, whatever the server does.
    pub(crate) fn is_transfer(self) -> bool {
        matches!(self, Self::ImageUploading | Self::ShelvingImageUploading)
    }
}

/// What a report makes of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    /// New state.
    pub(crate) vm_state: VmState,
    /// New task.
    pub(crate) task_state: Option<TaskState>,
    /// New wish: a guest that powers itself off stays off.
    pub(crate) desired_power: DesiredPower,
    /// Why it failed (with [`VmState::Error`] only).
    pub(crate) fault: Option<String>,
}

/// What a host's report makes of a server; `None` when it moves nothing.
///
/// `applied_generation` is that of the report. A report of a run older than the one wanted moves nothing, save a failure
/// that the host found after it had seen the newest wish (a server that can't even be prepared has never run).
pub(crate) fn observe(known: &Known, observed: &ObservedServer, applied_generation: u64) -> Option<Change> {
    if known.leaving {
        return None;
    }
    let current = observed.run_generation >= known.run_generation;
    let seen = current || applied_generation >= known.changed_generation;
    let wants = known.desired_power;
    let at_rest = |power| (known.resting(power), known.task_at_rest(), power);
    let ((vm_state, task_state, desired_power), fault) = match observed.state {
        ServerState::Preparing if known.vm_state == VmState::Building => {
            ((VmState::Building, Some(TaskState::Spawning), wants), None)
        }
        ServerState::Running if current && wants == DesiredPower::Running => (at_rest(wants), None),
        ServerState::Paused if current && wants == DesiredPower::Paused => (at_rest(wants), None),
        ServerState::Suspended if current && wants == DesiredPower::Suspended => (at_rest(wants), None),
        // A server that is off gets its new disk first.
        ServerState::Stopped if wants == DesiredPower::Stopped && lacks_disk(known, observed) => return None,
        ServerState::Stopped if current || (wants == DesiredPower::Stopped && seen) => {
            (at_rest(DesiredPower::Stopped), None)
        }
        // It shall be stopped and no VMM runs: that is what was wanted, unless it got a new disk that could not be made.
        ServerState::Failed if seen && wants == DesiredPower::Stopped && !lacks_disk(known, observed) => {
            (at_rest(wants), None)
        }
        ServerState::Failed if seen => {
            let message = observed.message.clone().unwrap_or_else(|| "The server failed on its host.".into());
            ((VmState::Error, known.task_at_rest(), wants), Some(message))
        }
        _ => return None,
    };
    let same =
        (vm_state, task_state, desired_power) == (known.vm_state, known.task_state, known.desired_power);
    (!same).then_some(Change { vm_state, task_state, desired_power, fault })
}

/// A disk other than the first is made also for a server that is off.
fn lacks_disk(known: &Known, observed: &ObservedServer) -> bool {
    known.disk_number > 1 && !observed.disks.contains(&known.disk_number)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use mote_host_api::ServerId;
    use proptest::prelude::*;

    use super::*;

    fn building() -> Known {
        Known {
            vm_state: VmState::Building,
            task_state: Some(TaskState::Scheduling),
            desired_power: DesiredPower::Running,
            run_generation: 1,
            changed_generation: 5,
            disk_number: 1,
            rescued: false,
            resized: false,
            leaving: false,
        }
    }

    fn report(state: ServerState, run_generation: u64) -> ObservedServer {
        ObservedServer {
            id: ServerId::new(),
            state,
            run_generation,
            disks: [1].into(),
            ports: None,
            since: Timestamp::UNIX_EPOCH,
            message: Some("why".into()),
            given_up: Vec::new(),
        }
    }

    fn after(known: &Known, change: Change) -> Known {
        Known {
            vm_state: change.vm_state,
            task_state: change.task_state,
            desired_power: change.desired_power,
            ..*known
        }
    }

    #[test]
    fn a_server_goes_from_scheduling_through_spawning_to_active() {
        let known = building();
        let change = observe(&known, &report(ServerState::Preparing, 0), 4).expect("moves");
        assert_eq!((change.vm_state, change.task_state), (VmState::Building, Some(TaskState::Spawning)));
        let known = after(&known, change);
        assert_eq!(observe(&known, &report(ServerState::Preparing, 0), 5), None, "no second write");
        let change = observe(&known, &report(ServerState::Running, 1), 5).expect("moves");
        assert_eq!((change.vm_state, change.task_state), (VmState::Active, None));
        let known = after(&known, change);
        assert_eq!(observe(&known, &report(ServerState::Running, 1), 5), None);
    }

    #[test]
    fn a_server_that_never_started_fails_once_the_host_has_seen_the_wish() {
        assert_eq!(observe(&building(), &report(ServerState::Failed, 0), 4), None);
        let change = observe(&building(), &report(ServerState::Failed, 0), 5).expect("moves");
        assert_eq!((change.vm_state, change.fault.as_deref()), (VmState::Error, Some("why")));
    }

    #[test]
    fn a_guest_that_powers_off_stays_off() {
        let known = Known { vm_state: VmState::Active, task_state: None, ..building() };
        let change = observe(&known, &report(ServerState::Stopped, 1), 5).expect("moves");
        assert_eq!((change.vm_state, change.desired_power), (VmState::Stopped, DesiredPower::Stopped));
    }

    #[test]
    fn a_reboot_ends_with_the_new_run_only() {
        let known = Known {
            vm_state: VmState::Active,
            task_state: Some(TaskState::Rebooting),
            run_generation: 2,
            changed_generation: 6,
            ..building()
        };
        assert_eq!(status(known.vm_state, known.task_state), "REBOOT");
        for state in
            [ServerState::Running, ServerState::Stopped, ServerState::Preparing, ServerState::Removing]
        {
            assert_eq!(observe(&known, &report(state, 1), 9), None, "{state:?}");
        }
        let change = observe(&known, &report(ServerState::Running, 2), 6).expect("moves");
        assert_eq!((change.vm_state, change.task_state), (VmState::Active, None));
    }

    #[test]
    fn a_stop_ends_when_no_vmm_runs_however_it_ended() {
        let known = Known {
            vm_state: VmState::Error,
            task_state: Some(TaskState::PoweringOff),
            desired_power: DesiredPower::Stopped,
            ..building()
        };
        assert_eq!(observe(&known, &report(ServerState::Running, 1), 5), None);
        for state in [ServerState::Stopped, ServerState::Failed] {
            let change = observe(&known, &report(state, 1), 5).expect("moves");
            assert_eq!((change.vm_state, change.task_state), (VmState::Stopped, None));
            assert_eq!(change.fault, None);
        }
    }

    #[test]
    fn a_pause_ends_with_a_guest_that_stands_still() {
        let known = Known {
            vm_state: VmState::Active,
            task_state: Some(TaskState::Pausing),
            desired_power: DesiredPower::Paused,
            ..building()
        };
        assert_eq!(observe(&known, &report(ServerState::Running, 1), 9), None);
        let change = observe(&known, &report(ServerState::Paused, 1), 5).expect("moves");
        assert_eq!((change.vm_state, change.task_state), (VmState::Paused, None));
        assert_eq!(power_state(VmState::Paused, DesiredPower::Paused), 3);
    }

    #[test]
    fn a_resize_of_a_server_that_is_off_ends_with_its_new_disk() {
        let known = Known {
            vm_state: VmState::Stopped,
            task_state: Some(TaskState::ResizeFinish),
            desired_power: DesiredPower::Stopped,
            disk_number: 2,
            resized: true,
            ..building()
        };
        assert_eq!(status(known.vm_state, known.task_state), "RESIZE");
        assert_eq!(observe(&known, &report(ServerState::Stopped, 1), 9), None);
        let made = ObservedServer { disks: [1, 2].into(), ..report(ServerState::Stopped, 1) };
        let change = observe(&known, &made, 9).expect("moves");
        assert_eq!((change.vm_state, change.task_state), (VmState::Resized, None));
        assert_eq!(power_state(change.vm_state, change.desired_power), 4);
        let change = observe(&known, &report(ServerState::Failed, 1), 9).expect("moves");
        assert_eq!(change.vm_state, VmState::Error, "its disk could not be made");
    }

    #[test]
    fn an_error_heals_when_the_host_starts_it_again() {
        let known = Known { vm_state: VmState::Error, task_state: None, ..building() };
        let change = observe(&known, &report(ServerState::Running, 2), 5).expect("moves");
        assert_eq!(change.vm_state, VmState::Active);
    }

    proptest! {
        /// Reports are level, not edge: the same one twice moves a server once; one that leaves never moves.
        #[test]
        fn reports_are_idempotent(
            vm in 0..8usize, task in 0..14usize, power in 0..3usize, state in 0..6usize,
            rg in 0..3u64, wanted_rg in 1..3u64, applied in 0..3u64, changed in 0..3u64, leaving: bool,
            disk_number in 1..3u32, rescued: bool, resized: bool,
        ) {
            let vm_states = [
                VmState::Building, VmState::Active, VmState::Stopped, VmState::Error, VmState::Paused,
                VmState::Rescued, VmState::Resized, VmState::ShelvedOffloaded,
            ];
            let tasks = [
                "scheduling", "spawning", "powering-off", "powering-on", "rebooting", "rebooting_hard", "deleting",
                "pausing", "rebuilding", "resize_finish", "rescuing", "image_uploading", "shelving_image_uploading",
            ];
            let powers = [DesiredPower::Running, DesiredPower::Stopped, DesiredPower::Paused];
            let states = [
                ServerState::Preparing, ServerState::Running, ServerState::Stopped, ServerState::Failed,
                ServerState::Removing, ServerState::Paused,
            ];
            let known = Known {
                vm_state: vm_states[vm],
                task_state: tasks.get(task).and_then(|word| TaskState::from_word(word)),
                desired_power: powers[power],
                run_generation: wanted_rg,
                changed_generation: changed,
                disk_number,
                rescued,
                resized,
                leaving,
            };
            let seen = report(states[state], rg);
            if let Some(change) = observe(&known, &seen, applied) {
                prop_assert!(!leaving);
                // Never shown as running when it shall be stopped, never left stopped when it shall run.
                prop_assert!(change.vm_state != VmState::Active || change.desired_power == DesiredPower::Running);
                prop_assert!(change.vm_state != VmState::Stopped || change.desired_power == DesiredPower::Stopped);
                prop_assert!(change.vm_state != VmState::Paused || change.desired_power == DesiredPower::Paused);
                prop_assert_eq!(change.fault.is_some(), change.vm_state == VmState::Error);
                // A transfer is ended by its end only.
                let transfers = |task: Option<TaskState>| task.is_some_and(TaskState::is_transfer);
                prop_assert!(!transfers(known.task_state) || known.vm_state == VmState::Building
                    || change.task_state == known.task_state);
                let next = after(&known, change);
                prop_assert_eq!(observe(&next, &seen, applied), None);
            }
        }
    }
}
