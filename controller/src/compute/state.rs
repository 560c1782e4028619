//! The life of a server as Nova's API shows it, and how a host's reports move it. Pure.
//!
//! ```text
//!            create                    no host fits, host reports Failed
//!              │        ┌──────────────────────────────────────────────┐
//!              ▼        │                                              ▼
//!          building ────┴──► active ◄──── reboot, start ──── stopped  error ──► (hard reboot) active
//!        scheduling,           │  └──── stop, guest powers off ──►▲     ▲
//!        spawning              └───────── VMM dies ────────────────┼─────┘
//!              └───────────────── delete (from every state) ───────┴──► deleting ──► gone
//! ```
//!
//! The database says what is wanted (`desired_power`, `run_generation`); a host reports what is. [`observe`] is the only
//! place where a report moves a server. `run_generation` grows with every start and reboot, so that a report made
//! before the host knew of it can be told from one made after.

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
        /// No VMM; its disk is kept.
        Stopped = "stopped",
        /// See its fault.
        Error = "error",
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
        /// Its host removes it.
        Deleting = "deleting",
    }
}

/// The `status` that users see, by Nova's table (`nova/api/openstack/common.py` `_STATE_MAP`).
pub(crate) fn status(vm_state: VmState, task_state: Option<TaskState>) -> &'static str {
    match (vm_state, task_state) {
        (VmState::Building, _) => "BUILD",
        (VmState::Active, Some(TaskState::Rebooting)) => "REBOOT",
        (VmState::Active | VmState::Stopped | VmState::Error, Some(TaskState::RebootingHard)) => {
            "HARD_REBOOT"
        }
        (VmState::Active, _) => "ACTIVE",
        (VmState::Stopped, _) => "SHUTOFF",
        (VmState::Error, _) => "ERROR",
    }
}

/// The states behind a `status`, for the filter of a list; `None` for one that no server of ours can have.
pub(crate) fn has_status(vm_state: VmState, task_state: Option<TaskState>, wanted: &str) -> bool {
    status(vm_state, task_state).eq_ignore_ascii_case(wanted)
}

/// Nova's `power_state` numbers.
pub(crate) fn power_state(vm_state: VmState) -> u8 {
    match vm_state {
        VmState::Building => 0, // NOSTATE
        VmState::Active => 1,   // RUNNING
        VmState::Stopped => 4,  // SHUTDOWN
        VmState::Error => 6,    // CRASHED
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
    /// It shall go.
    pub(crate) deleting: bool,
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
    if known.deleting {
        return None;
    }
    let current = observed.run_generation >= known.run_generation;
    let seen = current || applied_generation >= known.changed_generation;
    let wants_to_run = known.desired_power == DesiredPower::Running;
    let (vm_state, task_state, fault) = match observed.state {
        ServerState::Preparing if known.vm_state == VmState::Building => {
            (VmState::Building, Some(TaskState::Spawning), None)
        }
        ServerState::Running if current && wants_to_run => (VmState::Active, None, None),
        ServerState::Stopped if current || (!wants_to_run && seen) => (VmState::Stopped, None, None),
        // It shall be stopped and no VMM runs: that is what was wanted.
        ServerState::Failed if seen && !wants_to_run => (VmState::Stopped, None, None),
        ServerState::Failed if seen => {
            let message = observed.message.clone().unwrap_or_else(|| "The server failed on its host.".into());
            (VmState::Error, None, Some(message))
        }
        _ => return None,
    };
    let desired_power =
        if vm_state == VmState::Stopped { DesiredPower::Stopped } else { known.desired_power };
    let same =
        (vm_state, task_state, desired_power) == (known.vm_state, known.task_state, known.desired_power);
    (!same).then_some(Change { vm_state, task_state, desired_power, fault })
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
            deleting: false,
        }
    }

    fn report(state: ServerState, run_generation: u64) -> ObservedServer {
        ObservedServer {
            id: ServerId::new(),
            state,
            run_generation,
            since: Timestamp::UNIX_EPOCH,
            message: Some("why".into()),
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
    fn an_error_heals_when_the_host_starts_it_again() {
        let known = Known { vm_state: VmState::Error, task_state: None, ..building() };
        let change = observe(&known, &report(ServerState::Running, 2), 5).expect("moves");
        assert_eq!(change.vm_state, VmState::Active);
    }

    proptest! {
        /// Reports are level, not edge: the same one twice moves a server once; a deleting server never moves.
        #[test]
        fn reports_are_idempotent(
            vm in 0..4usize, task in 0..8usize, stopped: bool, state in 0..5usize,
            rg in 0..3u64, wanted_rg in 1..3u64, applied in 0..3u64, changed in 0..3u64, deleting: bool,
        ) {
            let vm_states = [VmState::Building, VmState::Active, VmState::Stopped, VmState::Error];
            let tasks = ["scheduling", "spawning", "powering-off", "powering-on", "rebooting", "rebooting_hard", "deleting"];
            let states = [
                ServerState::Preparing, ServerState::Running, ServerState::Stopped, ServerState::Failed,
                ServerState::Removing,
            ];
            let known = Known {
                vm_state: vm_states[vm],
                task_state: tasks.get(task).and_then(|word| TaskState::from_word(word)),
                desired_power: if stopped { DesiredPower::Stopped } else { DesiredPower::Running },
                run_generation: wanted_rg,
                changed_generation: changed,
                deleting,
            };
            let seen = report(states[state], rg);
            if let Some(change) = observe(&known, &seen, applied) {
                prop_assert!(!deleting);
                // Never shown as running when it shall be stopped, never left stopped when it shall run.
                prop_assert!(change.vm_state != VmState::Active || change.desired_power == DesiredPower::Running);
                prop_assert!(change.vm_state != VmState::Stopped || change.desired_power == DesiredPower::Stopped);
                prop_assert_eq!(change.fault.is_some(), change.vm_state == VmState::Error);
                let next = after(&known, change);
                prop_assert_eq!(observe(&next, &seen, applied), None);
            }
        }
    }
}
