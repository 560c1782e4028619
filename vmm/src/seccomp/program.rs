//! The built-in lists as BPF programs: a binary search over the call's number.
//!
//! What a filter costs is its length, three times: the kernel checks and compiles it, then runs it once for every call
//! number there is to learn which calls it always allows. A list of comparisons one after the other took half a
//! millisecond of a start; a search takes a tenth of it.
//!
//! ```text
//!   wrong architecture? ──► refuse
//!   number ≥ middle? ──► … ──► allow │ refuse │ compare an argument ──► allow │ refuse
//! ```

use seccompiler::{BpfProgram, SeccompAction, sock_filter};

use super::lists::{Arguments, Group};

/// `AUDIT_ARCH_X86_64` (linux/audit.h).
const ARCHITECTURE: u32 = 0xc000_003e;
/// Offsets in `struct seccomp_data` (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;
const ARGUMENT_SIZE: u32 = 8;

// linux/bpf_common.h
const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// What happens to the numbers from `from` up to the next run's.
struct Run<'a> {
    from: u32,
    verdict: Verdict<'a>,
}

enum Verdict<'a> {
    Allow,
    Refuse,
    /// Allowed if one of these holds.
    Compare(Vec<&'a Arguments>),
}

/// The program that allows what `groups` list and answers anything else with `otherwise`.
pub(super) fn compile(groups: &[&Group], otherwise: SeccompAction) -> BpfProgram {
    let refuse = u32::from(otherwise);
    let mut program = vec![
        step(LOAD, ARCH),
        branch(IF_EQUAL, ARCHITECTURE, 1, 0),
        step(RETURN, refuse),
        step(LOAD, NUMBER),
    ];
    search(&runs(groups), refuse, &mut program);
    program
}

/// The whole range of numbers, in runs with one verdict; the first begins at 0.
fn runs<'a>(groups: &[&'a Group]) -> Vec<Run<'a>> {
    let mut calls: Vec<(u32, &Arguments)> = groups
        .iter()
        .flat_map(|group| group.calls)
        .filter_map(|(number, arguments)| Some((u32::try_from(*number).ok()?, arguments)))
        .collect();
    calls.sort_by_key(|(number, _)| *number);
    let mut runs = vec![Run { from: 0, verdict: Verdict::Refuse }];
    for same in calls.chunk_by(|a, b| a.0 == b.0) {
        let number = same[0].0;
        let verdict = if same.iter().any(|(_, arguments)| matches!(arguments, Arguments::All)) {
            Verdict::Allow
        } else {
            Verdict::Compare(same.iter().map(|(_, arguments)| *arguments).collect())
        };
        // A run of refused numbers ends here: it may be empty, and then this number follows on the one before.
        if runs.last().is_some_and(|refused| refused.from == number) {
            runs.pop();
        }
        let goes_on = matches!(verdict, Verdict::Allow)
            && runs.last().is_some_and(|run| matches!(run.verdict, Verdict::Allow));
        if !goes_on {
            runs.push(Run { from: number, verdict });
        }
        runs.push(Run { from: number + 1, verdict: Verdict::Refuse });
    }
    runs
}

/// Appends the search through `runs`, of which there is at least one, with the number in the accumulator.
fn search(runs: &[Run<'_>], refuse: u32, program: &mut BpfProgram) {
    let (low, high) = runs.split_at(runs.len() / 2);
    if low.is_empty() {
        return high.iter().for_each(|run| decide(&run.verdict, refuse, program));
    }
    let mut below = BpfProgram::new();
    search(low, refuse, &mut below);
    let middle = high[0].from;
    match u8::try_from(below.len()) {
        Ok(distance) => program.push(branch(IF_AT_LEAST, middle, distance, 0)),
        Err(_) => {
            program.push(branch(IF_AT_LEAST, middle, 0, 1));
            program.push(step(JUMP, below.len() as u32));
        }
    }
    program.append(&mut below);
    search(high, refuse, program);
}

/// Appends what is returned for a number.
fn decide(verdict: &Verdict<'_>, refuse: u32, program: &mut BpfProgram) {
    let allow = step(RETURN, SeccompAction::Allow.into());
    let compare = match verdict {
        Verdict::Allow => return program.push(allow),
        Verdict::Refuse => return program.push(step(RETURN, refuse)),
        Verdict::Compare(compare) => compare,
    };
    for (index, values, mask) in compare.iter().filter_map(|arguments| arguments.condition()) {
        // The low half: the kernel takes these arguments (requests, flags, families) as 32-bit numbers.
        program.push(step(LOAD, FIRST_ARGUMENT + u32::from(index) * ARGUMENT_SIZE));
        if mask != u32::MAX {
            program.push(step(AND, mask));
        }
        for value in values {
            program.extend([branch(IF_EQUAL, *value, 0, 1), allow.clone()]);
        }
    }
    program.push(step(RETURN, refuse));
}

const fn step(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

const fn branch(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}
