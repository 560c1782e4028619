use mote_host_api::{CaptureSpec, CloudId, DiskSpec, HostId, LocalDiskSpec};
use proptest::prelude::*;

use super::*;
use crate::sim::{server_in_network, server_spec};

const MEMORY_MIB: u64 = 1024;

fn process(pid: i32) -> ProcessIdentity {
    ProcessIdentity { pid, start_ticks: 1, boot_id: "boot".into() }
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap()
}

fn desired(parts: Vec<(NetworkSpec, ServerSpec)>) -> DesiredState {
    let (networks, servers) = parts.into_iter().unzip();
    DesiredState {
        cloud_id: CloudId::new(),
        host_id: HostId::new(),
        generation: 1,
        networks,
        servers,
        ..DesiredState::default()
    }
}

fn observed(servers: Vec<SeenServer>, networks: SeenNetworks) -> Observed {
    let servers = servers.into_iter().map(|seen| (seen.record.id, seen)).collect();
    Observed { servers, networks, memory_mib: MEMORY_MIB, now: at(1000) }
}

fn in_line(desired: &DesiredState) -> SeenNetworks {
    let goal = network_goal(
        desired,
        &desired.servers.iter().map(|s| (s.id, s)).collect(),
        &observed(vec![], SeenNetworks::default()),
    );
    let existing = desired.networks.iter().map(|n| n.id.into()).collect();
    SeenNetworks { last: Some((goal, Converged { existing, failed: BTreeMap::new() })), ..Default::default() }
}

fn seen(spec: &ServerSpec, phase: Phase) -> SeenServer {
    let mut record = ServerRecord::new(spec.id, at(0));
    record.phase = phase;
    record.run_generation = spec.run_generation;
    record.attempted = spec.run_generation;
    record.fingerprint = Some(fingerprint(spec));
    record.started_at = Some(at(990));
    record.process = Some(process(1));
    SeenServer {
        given_up: BTreeSet::new(),
        record,
        alive: vec![],
        ended: None,
        disks: [1].into(),
        captures: [].into(),
        task: None,
        retry_at: None,
        nics: nics(&spec.ports),
    }
}

fn nics(ports: &[PortId]) -> SeenNics {
    SeenNics::Are { ports: ports.iter().copied().collect(), not_before: None }
}

fn running(spec: &ServerSpec) -> SeenServer {
    SeenServer { alive: vec![process(1)], ..seen(spec, Phase::Running) }
}

fn ended(reason: Option<ExitReason>) -> Option<Ended> {
    let report = reason.map(|reason| ExitReport { reason, message: "why".into() });
    Some(Ended { report, host_rebooted: false })
}

/// The one action for a single wanted server whose networks are in line.
fn next(spec: &ServerSpec, network: &NetworkSpec, seen: SeenServer) -> Option<Action> {
    let desired = desired(vec![(network.clone(), spec.clone())]);
    let networks = in_line(&desired);
    let mut decision = reconcile(&desired, &observed(vec![seen], networks));
    assert!(decision.actions.len() <= 1, "{decision:?}");
    decision.actions.pop()
}

#[test]
fn a_new_server_is_prepared_while_its_network_is_made_and_started_when_both_are_done() {
    let (network, spec) = server_in_network(1);
    let desired = desired(vec![(network, spec.clone())]);
    let mut state = observed(vec![], SeenNetworks::default());
    let actions = reconcile(&desired, &state).actions;
    assert!(matches!(actions.as_slice(), [Action::Prepare(_), Action::Networks(_)]), "{actions:?}");

    let mut prepared = seen(&spec, Phase::Preparing);
    prepared.record.process = None;
    state.servers.insert(spec.id, prepared);
    assert!(matches!(reconcile(&desired, &state).actions.as_slice(), [Action::Networks(_)]));
    state.networks = in_line(&desired);
    assert_eq!(reconcile(&desired, &state).actions, vec![Action::Start(spec.id)]);
    state.networks.last.as_mut().unwrap().1.failed.insert(desired.networks[0].id.into(), "no".into());
    assert!(
        matches!(reconcile(&desired, &state).actions.as_slice(), [Action::Networks(_)]),
        "no start without it"
    );
}

#[test]
fn nics_of_a_running_server_are_brought_in_line_but_not_while_it_stands_still() {
    let (network, mut spec) = server_in_network(1);
    let rewire = Some(Action::Rewire(spec.id));
    let with = |nics| SeenServer { nics, ..running(&spec) };
    let (other, not_before) = (PortId::new(), Some(at(2000)));
    assert_eq!(next(&spec, &network, with(SeenNics::Unknown)), rewire);
    assert_eq!(next(&spec, &network, with(SeenNics::Fixed)), None);
    assert_eq!(next(&spec, &network, with(nics(&[]))), rewire, "one is missing");
    let more = [spec.ports[0], other];
    assert_eq!(next(&spec, &network, with(nics(&more))), rewire, "one is too much");
    let clinging = SeenNics::Are { ports: more.into(), not_before };
    assert_eq!(next(&spec, &network, with(clinging)), None, "its guest was asked a moment ago");
    let mut state = observed(vec![with(nics(&[]))], SeenNetworks::default());
    let desired = desired(vec![(network.clone(), spec.clone())]);
    let actions = reconcile(&desired, &state).actions;
    assert!(matches!(actions.as_slice(), [Action::Networks(_)]), "its network comes first: {actions:?}");
    state.networks = in_line(&desired);
    assert_eq!(reconcile(&desired, &state).actions, rewire.clone().into_iter().collect::<Vec<_>>());

    let mut paused = with(nics(&[]));
    paused.record.paused = Some(true);
    let mut unknown = with(SeenNics::Unknown);
    unknown.record.paused = Some(true);
    spec.power = DesiredPower::Paused;
    assert_eq!(next(&spec, &network, paused), None);
    assert_eq!(next(&spec, &network, unknown), rewire, "it is only asked");
}

#[test]
fn a_right_server_is_left_alone_and_a_grown_run_generation_restarts_it() {
    let (network, mut spec) = server_in_network(1);
    assert_eq!(next(&spec, &network, running(&spec)), None);
    let now = running(&spec);
    spec.metadata.name = "renamed".into();
    spec.restart_policy = RestartPolicy::OnFailure;
    assert_eq!(next(&spec, &network, now.clone()), None);
    spec.run_generation += 1;
    assert_eq!(next(&spec, &network, now.clone()), Some(Action::Terminate(spec.id)));
    spec.run_generation -= 2;
    assert_eq!(next(&spec, &network, now), None, "a smaller one is no reason");
}

#[test]
fn what_became_of_an_ended_vmm_is_settled_by_reason_and_policy() {
    let (network, mut spec) = server_in_network(1);
    let settle = |spec: &ServerSpec, reason| {
        let seen = SeenServer { ended: ended(reason), ..seen(spec, Phase::Running) };
        match next(spec, &network, seen) {
            Some(Action::Settle(_, outcome)) => outcome,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(settle(&spec, Some(ExitReason::PowerOff)), Outcome::Stopped { by_guest: true });
    let reboot = settle(&spec, Some(ExitReason::Reboot));
    assert!(matches!(reboot, Outcome::Again { not_before, .. } if not_before == at(1000)), "{reboot:?}");
    for (reason, word) in [
        (Some(ExitReason::Crash), "crashed: why"),
        (None, "killed"),
        (Some(ExitReason::HostError), "failed: why"),
        (Some(ExitReason::Terminated), "signal"),
        (Some(ExitReason::BadConfig), "cannot be started: why"),
    ] {
        let outcome = settle(&spec, reason);
        assert!(matches!(&outcome, Outcome::Failed { message } if message.contains(word)), "{outcome:?}");
    }
    spec.restart_policy = RestartPolicy::OnFailure;
    let again = settle(&spec, None);
    assert!(matches!(again, Outcome::Again { not_before, quick_failures: 1, .. } if not_before == at(1001)));
    assert!(
        matches!(settle(&spec, Some(ExitReason::BadConfig)), Outcome::Failed { .. }),
        "it never gets better"
    );
}

#[test]
fn quick_failures_wait_longer_each_time_and_end_but_one_after_a_long_run_counts_anew() {
    let mut record = ServerRecord::new(ServerId::new(), at(0));
    record.process = Some(process(1));
    let killed = Ended { report: None, host_rebooted: false };
    let mut pauses = Vec::new();
    let mut now = at(1000);
    let last = loop {
        record.started_at = Some(now);
        match outcome(&record, &killed, RestartPolicy::OnFailure, now) {
            Outcome::Again { not_before, quick_failures, .. } => {
                pauses.push(since(not_before, now).as_secs());
                record.quick_failures = quick_failures;
                now = not_before;
            }
            other => break other,
        }
    };
    assert_eq!(pauses, [1, 2, 4, 8, 16]);
    assert!(matches!(last, Outcome::Failed { message } if message.contains("given up after 5")));
    record.started_at = Some(at(0));
    let later = outcome(&record, &killed, RestartPolicy::OnFailure, at(10_000));
    assert!(matches!(later, Outcome::Again { quick_failures: 1, .. }));
}

#[test]
fn a_guest_that_reboots_all_the_time_is_slowed_down_but_never_given_up() {
    let mut record = ServerRecord::new(ServerId::new(), at(0));
    let report = Some(ExitReport { reason: ExitReason::Reboot, message: String::new() });
    let ended = Ended { report, host_rebooted: false };
    let mut pauses = Vec::new();
    for _ in 0..12 {
        record.started_at = Some(at(999));
        let Outcome::Again { not_before, quick_reboots, .. } =
            outcome(&record, &ended, RestartPolicy::Never, at(1000))
        else {
            panic!("given up")
        };
        record.quick_reboots = quick_reboots;
        pauses.push(since(not_before, at(1000)).as_secs());
    }
    assert_eq!(pauses, [0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60]);
}

#[test]
fn after_a_reboot_of_the_host_what_ran_is_started_again_whatever_its_policy() {
    let (network, spec) = server_in_network(1);
    for report in [None, Some(ExitReport { reason: ExitReason::Terminated, message: String::new() })] {
        let rebooted = Some(Ended { report, host_rebooted: true });
        let seen = SeenServer { ended: rebooted, ..seen(&spec, Phase::Running) };
        assert!(matches!(next(&spec, &network, seen), Some(Action::Settle(_, Outcome::Again { .. }))));
    }
    let off = SeenServer {
        ended: Some(Ended { host_rebooted: true, ..ended(Some(ExitReason::PowerOff)).unwrap() }),
        ..seen(&spec, Phase::Running)
    };
    let action = next(&spec, &network, off);
    assert_eq!(action, Some(Action::Settle(spec.id, Outcome::Stopped { by_guest: true })));
}

#[test]
fn an_interrupted_start_is_adopted_if_its_vmm_runs_and_repeated_if_not() {
    let (network, spec) = server_in_network(1);
    let mut started = seen(&spec, Phase::Starting);
    started.record.process = None;
    started.alive = vec![process(7)];
    assert_eq!(next(&spec, &network, started.clone()), Some(Action::Adopt(spec.id, process(7))));
    started.alive = vec![process(7), process(8)];
    assert_eq!(next(&spec, &network, started.clone()), Some(Action::Terminate(spec.id)), "two of them");
    started.alive = vec![];
    started.ended = ended(None);
    let again = next(&spec, &network, started);
    assert!(matches!(again, Some(Action::Settle(_, Outcome::Again { .. }))), "{again:?}");
}

#[test]
fn what_cannot_run_here_fails_with_the_reason_and_is_not_tried_again_until_something_changes() {
    let (network, mut spec) = server_in_network(1);
    spec.memory_mib = 4096;
    let all = desired(vec![(network.clone(), spec.clone())]);
    let decision = reconcile(&all, &observed(vec![], in_line(&all)));
    let [Action::Settle(_, Outcome::Failed { message })] = decision.actions.as_slice() else {
        panic!("{decision:?}")
    };
    assert!(message.contains("4096 MiB") && message.contains("1024 MiB"), "{message}");

    let failed = seen(&spec, Phase::Failed);
    assert_eq!(next(&spec, &network, failed.clone()), None);
    let smaller = ServerSpec { memory_mib: 512, ..spec.clone() };
    assert_eq!(next(&smaller, &network, failed.clone()), Some(Action::Start(spec.id)));
    let asked = ServerSpec { run_generation: 2, ..spec.clone() };
    assert!(matches!(next(&asked, &network, failed), Some(Action::Settle(_, Outcome::Failed { .. }))));

    let stray = server_spec(&[PortId::new()]);
    let all = desired(vec![(network, stray)]);
    let decision = reconcile(&all, &observed(vec![], in_line(&all)));
    assert!(
        matches!(&decision.actions[0], Action::Settle(_, Outcome::Failed { message }) if message.contains("port"))
    );
}

#[test]
fn a_server_that_was_stopped_on_request_starts_again_and_one_that_switched_itself_off_does_not() {
    let (network, spec) = server_in_network(1);
    let mut off = seen(&spec, Phase::Stopped);
    assert_eq!(next(&spec, &network, off.clone()), Some(Action::Start(spec.id)));
    off.record.stopped_by_guest = true;
    assert_eq!(next(&spec, &network, off.clone()), None);
    let asked = ServerSpec { run_generation: 2, ..spec.clone() };
    assert_eq!(next(&asked, &network, off), Some(Action::Start(spec.id)));
}

#[test]
fn a_preparation_that_nobody_wants_any_more_is_cancelled_once() {
    let (network, mut spec) = server_in_network(1);
    let mut busy = seen(&spec, Phase::Preparing);
    busy.task = Some(SeenTask { cancellable: true, cancelled: false, fingerprint: Some(fingerprint(&spec)) });
    assert_eq!(next(&spec, &network, busy.clone()), None);
    spec.power = DesiredPower::Stopped;
    assert_eq!(next(&spec, &network, busy.clone()), Some(Action::Cancel(spec.id)));
    busy.task.as_mut().unwrap().cancelled = true;
    assert_eq!(next(&spec, &network, busy), None);
}

#[test]
fn a_server_that_has_to_go_is_forgotten_only_after_its_network() {
    let (network, spec) = server_in_network(1);
    let nothing = desired(vec![]);
    let mut state = observed(vec![running(&spec)], in_line(&desired(vec![(network.clone(), spec.clone())])));
    state.servers.get_mut(&spec.id).unwrap().record.networks = [network.id].into();
    let actions = reconcile(&nothing, &state).actions;
    let [Action::Teardown(_), Action::Networks(goal)] = actions.as_slice() else { panic!("{actions:?}") };
    assert_eq!(goal.keep, [network.id].into(), "a VMM is still plugged in");

    let gone = state.servers.get_mut(&spec.id).unwrap();
    gone.alive.clear();
    gone.record.phase = Phase::Removing;
    let actions = reconcile(&nothing, &state).actions;
    let [Action::Networks(goal)] = actions.as_slice() else { panic!("{actions:?}") };
    assert!(goal.keep.is_empty());
    state.networks.last = Some((goal.clone(), Converged::default()));
    assert_eq!(reconcile(&nothing, &state).actions, vec![Action::Forget(spec.id)]);
}

#[test]
fn a_pause_is_told_to_the_vmm_once_and_again_while_it_is_not_known() {
    let (network, mut spec) = server_in_network(1);
    spec.power = DesiredPower::Paused;
    assert_eq!(next(&spec, &network, running(&spec)), Some(Action::SetPaused(spec.id, true)));
    let mut paused = running(&spec);
    paused.record.paused = Some(true);
    assert_eq!(paused.record.observed([].into()).state, mote_host_api::ServerState::Paused);
    assert_eq!(next(&spec, &network, paused.clone()), None);
    spec.power = DesiredPower::Running;
    assert_eq!(next(&spec, &network, paused.clone()), Some(Action::SetPaused(spec.id, false)));
    paused.record.paused = None;
    assert_eq!(next(&spec, &network, paused), Some(Action::SetPaused(spec.id, false)));
}

#[test]
fn a_new_disk_is_made_before_the_start_and_the_old_one_goes_when_nothing_names_it() {
    let (network, mut spec) = server_in_network(1);
    spec.disk = DiskSpec { number: 2, copy_of: Some(1) };
    spec.kept_disk = Some(1);
    let mut off = seen(&spec, Phase::Stopping);
    off.record.process = None;
    assert_eq!(next(&spec, &network, off.clone()), Some(Action::Prepare(spec.id)));
    off.disks.insert(2);
    assert_eq!(next(&spec, &network, off), Some(Action::Start(spec.id)));
    let both = SeenServer { disks: [1, 2].into(), ..running(&spec) };
    assert_eq!(next(&spec, &network, both.clone()), None, "one is kept");
    spec.kept_disk = None;
    assert_eq!(next(&spec, &network, both), Some(Action::Prune(spec.id)));
    // Also for one that is off and stays so.
    spec.power = DesiredPower::Stopped;
    let stopped = seen(&spec, Phase::Stopped);
    assert_eq!(next(&spec, &network, stopped), Some(Action::Prepare(spec.id)));
    let without = SeenServer { disks: [].into(), ..seen(&spec, Phase::Stopped) };
    spec.disk = DiskSpec::default();
    assert_eq!(next(&spec, &network, without), None, "what never ran has no disk");
}

#[test]
fn local_disks_are_made_before_the_start_and_go_when_nothing_names_them() {
    let (network, mut spec) = server_in_network(1);
    let disk = |number, copy_of| LocalDiskSpec { number, copy_of, size_mib: 1, swap: false };
    spec.local_disks = vec![disk(2, None), disk(3, None)];
    let mut off = seen(&spec, Phase::Preparing);
    off.record.process = None;
    off.disks = [1, 2].into();
    assert_eq!(next(&spec, &network, off.clone()), Some(Action::Prepare(spec.id)));
    off.disks.insert(3);
    assert_eq!(next(&spec, &network, off), Some(Action::Start(spec.id)));
    // A larger copy is made of one that is kept until the change is confirmed; another isn't needed any more.
    spec.local_disks = vec![disk(4, Some(2))];
    assert_eq!(needed_disks(&spec, &[1, 2, 3].into()), [1, 2, 4].into());
    spec.kept_local_disks = vec![2, 3];
    assert_eq!(needed_disks(&spec, &[1, 2, 3, 4].into()), [1, 2, 3, 4].into());
    let all = SeenServer { disks: [1, 2, 3, 4].into(), ..running(&spec) };
    assert_eq!(next(&spec, &network, all.clone()), None);
    spec.kept_local_disks.clear();
    assert_eq!(next(&spec, &network, all), Some(Action::Prune(spec.id)));
}

#[test]
fn a_capture_is_made_once_and_removed_when_nobody_waits_for_it() {
    let (network, mut spec) = server_in_network(1);
    let image_id = ImageId::new();
    spec.captures = vec![CaptureSpec { image_id }];
    assert_eq!(next(&spec, &network, running(&spec)), Some(Action::Capture(spec.id, image_id)));
    let made = SeenServer { captures: [image_id].into(), ..running(&spec) };
    assert_eq!(next(&spec, &network, made.clone()), None);
    spec.captures.clear();
    assert_eq!(next(&spec, &network, made), Some(Action::Prune(spec.id)));
    // Also of one that is suspended, but not before its VMM has ended.
    spec.captures = vec![CaptureSpec { image_id }];
    spec.power = DesiredPower::Suspended;
    let ending = SeenServer {
        record: ServerRecord { phase: Phase::Suspended, ..running(&spec).record },
        ..running(&spec)
    };
    assert_eq!(next(&spec, &network, ending), Some(Action::Suspend(spec.id)));
    let mut suspended = seen(&spec, Phase::Suspended);
    suspended.record.process = None;
    assert_eq!(next(&spec, &network, suspended), Some(Action::Capture(spec.id, image_id)));
}

// --- Convergence from any state -------------------------------------------------------------------------------------

/// What a preparation makes.
fn make_disks(want: &ServerSpec, disks: &mut BTreeSet<u32>) {
    let copied = want.disk.copy_of.filter(|_| !disks.contains(&want.disk.number));
    assert!(copied.is_none_or(|source| disks.contains(&source)), "the disk to copy is still there");
    disks.insert(want.disk.number);
    disks.extend(want.local_disks.iter().map(|disk| disk.number));
    disks.extend(want.rescue.as_ref().map(|rescue| rescue.disk));
}

/// A server that has just been recorded.
fn fresh(id: ServerId, now: Timestamp) -> SeenServer {
    SeenServer {
        nics: SeenNics::Unknown,
        record: ServerRecord::new(id, now),
        alive: vec![],
        ended: None,
        disks: [].into(),
        captures: [].into(),
        task: None,
        retry_at: None,
        given_up: [].into(),
    }
}

/// What the agent's tasks make of an action, when all goes well.
fn apply(action: Action, desired: &DesiredState, state: &mut Observed, next_pid: &mut i32) {
    let now = state.now;
    let want = action.server().and_then(|id| desired.servers.iter().find(|s| s.id == id));
    if let Action::Networks(goal) = action {
        let mut existing: BTreeSet<NetworkKey> = goal.desired.networks.iter().map(|n| n.id.into()).collect();
        existing.extend(goal.keep.iter().map(|id| NetworkKey::from(*id)));
        state.networks.last = Some((goal, Converged { existing, failed: BTreeMap::new() }));
        state.networks.stale = false;
        return;
    }
    let id = action.server().unwrap();
    if matches!(action, Action::Forget(_)) {
        state.servers.remove(&id);
        return;
    }
    let fresh = fresh(id, now);
    let seen = state.servers.entry(id).or_insert(fresh);
    seen.ended = None;
    let attempt = |record: &mut ServerRecord| {
        let want = want.expect("only wanted servers are prepared and started");
        if record.attempted < want.run_generation {
            record.not_before = None;
        }
        record.attempted = record.attempted.max(want.run_generation);
        record.fingerprint = Some(fingerprint(want));
    };
    match action {
        Action::Cancel(_) => seen.task = None,
        Action::Prepare(_) => {
            attempt(&mut seen.record);
            seen.record.phase = Phase::Preparing;
            make_disks(want.unwrap(), &mut seen.disks);
        }
        Action::Start(_) => {
            *next_pid += 1;
            attempt(&mut seen.record);
            seen.record.phase = Phase::Running;
            seen.record.run_generation = want.unwrap().run_generation;
            seen.record.process = Some(process(*next_pid));
            seen.record.stopped_by_guest = false;
            seen.record.paused = Some(false);
            seen.alive = vec![process(*next_pid)];
            seen.nics = nics(&want.unwrap().ports);
        }
        Action::Rewire(_) => {
            assert_eq!(seen.alive.len(), 1, "a VMM can be asked");
            seen.nics = nics(&want.unwrap().ports);
        }
        Action::SetPaused(_, paused) => seen.record.paused = Some(paused),
        Action::Capture(_, image) => {
            seen.captures.insert(image);
        }
        Action::Prune(_) => {
            let want = want.unwrap();
            let needed = needed_disks(want, &seen.disks);
            seen.disks.retain(|number| needed.contains(number));
            seen.captures.retain(|image| want.captures.iter().any(|capture| capture.image_id == *image));
        }
        Action::Adopt(_, process) => {
            seen.record.phase = Phase::Running;
            seen.record.process = Some(process);
        }
        Action::Suspend(_) | Action::Terminate(_) | Action::Teardown(_) => {
            seen.record.phase = match action {
                Action::Teardown(_) => Phase::Removing,
                Action::Suspend(_) => Phase::Suspended,
                _ => Phase::Stopping,
            };
            seen.alive.clear();
            seen.record.process = None;
            seen.nics = SeenNics::Unknown;
        }
        Action::Settle(_, outcome) => {
            seen.record.process = None;
            match outcome {
                Outcome::Stopped { by_guest } => {
                    seen.record.phase = Phase::Stopped;
                    seen.record.stopped_by_guest = by_guest;
                }
                Outcome::Failed { .. } => {
                    attempt(&mut seen.record);
                    seen.record.phase = Phase::Failed;
                }
                Outcome::Again { not_before, .. } => {
                    seen.record.phase = Phase::Preparing;
                    seen.record.not_before = Some(not_before);
                }
            }
        }
        Action::Networks(_) | Action::Forget(_) => unreachable!("handled above"),
    }
}

fn any_reason() -> impl Strategy<Value = Option<ExitReason>> {
    prop::sample::select(vec![
        None,
        Some(ExitReason::PowerOff),
        Some(ExitReason::Reboot),
        Some(ExitReason::Crash),
        Some(ExitReason::HostError),
        Some(ExitReason::BadConfig),
        Some(ExitReason::Terminated),
    ])
}

/// How one server is wanted: not at all, or so.
fn any_want() -> impl Strategy<Value = Option<(DesiredPower, u64, bool, u32, u32, bool)>> {
    let powers =
        vec![DesiredPower::Running, DesiredPower::Paused, DesiredPower::Stopped, DesiredPower::Suspended];
    prop::option::of((
        prop::sample::select(powers),
        1..4_u64,
        any::<bool>(),
        prop::sample::select(vec![128_u32, 4096]),
        1..4_u32,
        any::<bool>(),
    ))
}

#[derive(Debug, Clone)]
struct AnySeen {
    phase: Phase,
    run_generation: u64,
    attempted: u64,
    right_fingerprint: bool,
    recorded_process: bool,
    alive: u8,
    disks: BTreeSet<u32>,
    paused: Option<bool>,
    by_guest: bool,
    not_before_s: Option<i64>,
    task: Option<bool>,
    plugged: bool,
    reason: Option<ExitReason>,
    rebooted: bool,
}

fn any_seen() -> impl Strategy<Value = Option<AnySeen>> {
    let phases = vec![
        Phase::Preparing,
        Phase::Starting,
        Phase::Running,
        Phase::Stopping,
        Phase::Suspended,
        Phase::Stopped,
        Phase::Failed,
        Phase::Removing,
    ];
    let first = (prop::sample::select(phases), 0..4_u64, 0..4_u64, any::<bool>(), any::<bool>(), 0..3_u8);
    let second = (
        prop::collection::btree_set(1..4_u32, 0..3),
        any::<Option<bool>>(),
        any::<bool>(),
        prop::option::of(900..1100_i64),
        prop::option::weighted(0.2, any::<bool>()),
        any::<bool>(),
        any_reason(),
        any::<bool>(),
    );
    let make = |(a, b): (_, _)| {
        let (phase, run_generation, attempted, right_fingerprint, recorded_process, alive) = a;
        let (disks, paused, by_guest, not_before_s, task, plugged, reason, rebooted) = b;
        AnySeen {
            phase,
            run_generation,
            attempted,
            right_fingerprint,
            recorded_process,
            alive,
            disks,
            paused,
            by_guest,
            not_before_s,
            task,
            plugged,
            reason,
            rebooted,
        }
    };
    prop::option::of((first, second).prop_map(make))
}

impl AnySeen {
    fn server(&self, spec: &ServerSpec, network: NetworkId, number: i32) -> SeenServer {
        let mut record = ServerRecord::new(spec.id, at(0));
        record.phase = self.phase;
        record.run_generation = self.run_generation;
        record.attempted = self.attempted;
        record.fingerprint = self.right_fingerprint.then(|| fingerprint(spec));
        record.process = self.recorded_process.then(|| process(number * 10));
        record.stopped_by_guest = self.by_guest;
        record.paused = self.paused;
        record.not_before = self.not_before_s.map(at);
        record.networks = if self.plugged { [network].into() } else { BTreeSet::new() };
        let task = self.task.map(|cancellable| SeenTask { cancellable, cancelled: false, fingerprint: None });
        let alive = (0..i32::from(self.alive)).map(|n| process(number * 10 + n)).collect();
        SeenServer {
            nics: SeenNics::Unknown,
            record,
            alive,
            ended: None,
            disks: self.disks.clone(),
            captures: [].into(),
            task,
            retry_at: None,
            given_up: [].into(),
        }
    }
}

/// What must hold of a wanted or unwanted server in the end.
fn is_right(want: Option<&ServerSpec>, seen: Option<&SeenServer>) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{what}: {want:?} {seen:?}"));
    match (want, seen) {
        (None, None) => Ok(()),
        (None, Some(_)) | (Some(_), None) => wrong("exists but is not wanted, or the other way round"),
        (Some(want), Some(seen)) if want.power == DesiredPower::Stopped => {
            let off = matches!(seen.record.phase, Phase::Stopped | Phase::Failed);
            if off && seen.alive.is_empty() { Ok(()) } else { wrong("not stopped") }
        }
        (Some(want), Some(seen)) => match seen.record.phase {
            Phase::Suspended if want.power == DesiredPower::Suspended => {
                let gone = seen.alive.is_empty() && seen.record.process.is_none();
                if gone { Ok(()) } else { wrong("its VMM is still there") }
            }
            Phase::Running if want.power == DesiredPower::Suspended => wrong("not suspended"),
            Phase::Running
                if seen.alive.len() == 1
                    && seen.record.process.as_ref() == seen.alive.first()
                    && seen.record.run_generation >= want.run_generation
                    && seen.record.paused == Some(want.power == DesiredPower::Paused)
                    && seen.nics == nics(&want.ports)
                    // Of a disk that was lost there is no copy.
                    && (!seen.disks.contains(&want.disk.number)
                        || want.captures.iter().all(|capture| seen.captures.contains(&capture.image_id)))
                    && seen.disks.is_subset(&needed_disks(want, &seen.disks)) =>
            {
                Ok(())
            }
            Phase::Failed | Phase::Stopped
                if seen.alive.is_empty() && seen.record.attempted >= want.run_generation =>
            {
                Ok(())
            }
            _ => wrong("neither running nor ended for a reason"),
        },
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn from_any_state_it_converges_and_never_touches_what_is_right(
        wants in prop::collection::vec(any_want(), 3),
        seens in prop::collection::vec(any_seen(), 3),
        looked in any::<bool>(),
    ) {
        let all: Vec<_> = (1..4).map(server_in_network).collect();
        let reasons: BTreeMap<ServerId, (Option<ExitReason>, bool)> = all.iter().zip(&seens)
            .filter_map(|((_, spec), seen)| seen.as_ref().map(|s| (spec.id, (s.reason, s.rebooted)))).collect();
        let desired = desired(all.iter().zip(&wants).filter_map(|((network, spec), want)| {
            let (power, run_generation, on_failure, memory_mib, number, capture) = (*want)?;
            let mut spec = ServerSpec { power, run_generation, memory_mib, ..spec.clone() };
            spec.disk.number = number;
            if capture { spec.captures = vec![CaptureSpec { image_id: ImageId::new() }]; }
            if on_failure { spec.restart_policy = RestartPolicy::OnFailure; }
            Some((network.clone(), spec))
        }).collect());
        let servers = all.iter().zip(&seens).enumerate().filter_map(|(n, ((network, spec), seen))| {
            Some(seen.as_ref()?.server(spec, network.id, n as i32 + 1))
        }).collect();
        let mut state = observed(servers, SeenNetworks::default());
        if looked {
            let existing = all.iter().map(|(network, _)| network.id.into()).collect();
            let done = Converged { existing, failed: BTreeMap::new() };
            state.networks.last = Some((NetworkGoal::default(), done));
            state.networks.stale = true;
        }
        let want = |id: &ServerId| desired.servers.iter().find(|s| s.id == *id);
        let right_before: BTreeSet<ServerId> = state.servers.iter()
            .filter(|(id, seen)| want(id).is_some_and(|w| w.power != DesiredPower::Stopped && w.captures.is_empty())
                && seen.record.phase == Phase::Running && is_right(want(id), Some(seen)).is_ok())
            .map(|(id, _)| *id).collect();

        let mut next_pid = 1000;
        let mut rounds = 0;
        loop {
            rounds += 1;
            prop_assert!(rounds < 40, "no end: {state:?}");
            for seen in state.servers.values_mut() {
                let over = matches!(seen.record.phase, Phase::Starting | Phase::Running);
                if over && seen.alive.is_empty() && seen.task.is_none() {
                    let (reason, host_rebooted) = reasons.get(&seen.record.id).copied().unwrap_or_default();
                    let report = reason.map(|reason| ExitReport { reason, message: "why".into() });
                    seen.ended = Some(Ended { report, host_rebooted });
                }
            }
            let decision = reconcile(&desired, &state);
            let mut named = BTreeSet::new();
            for action in &decision.actions {
                if let Some(id) = action.server() {
                    prop_assert!(named.insert(id), "two actions for one server");
                    prop_assert!(!right_before.contains(&id), "touched a right server: {action:?}");
                }
            }
            let tasks = state.servers.values().any(|seen| seen.task.is_some());
            match (decision.actions.is_empty(), decision.wake_at) {
                (true, None) if !tasks => break,
                (true, Some(wake)) if !tasks => state.now = wake,
                _ => {}
            }
            for action in decision.actions {
                apply(action, &desired, &mut state, &mut next_pid);
            }
            // Tasks of an earlier time end sometime.
            for seen in state.servers.values_mut() {
                seen.task = None;
            }
        }
        for (_, spec) in &all {
            is_right(want(&spec.id), state.servers.get(&spec.id)).map_err(TestCaseError::fail)?;
        }
        let (_, done) = state.networks.last.as_ref().expect("looked at");
        let named: BTreeSet<NetworkKey> = desired.networks.iter().map(|n| n.id.into()).collect();
        prop_assert_eq!(&done.existing, &named);
    }
}
