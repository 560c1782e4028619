//! A bounded run of each target without libFuzzer: the corpus (`vmm/fuzz/corpus/NAME`), then mutations of it. The seed is
//! always the same unless `MOTE_FUZZ_SEED` says otherwise; `MOTE_FUZZ_SECONDS` is how long each target runs. A finding prints
//! seed and input; the input goes into the corpus with its fix.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::{TARGETS, Target};

const SEED: u64 = 0x6d6f_7465_6675_7a7a;
const SECONDS: u64 = 3;
const MAX_INPUT: usize = 16 << 10;
/// No input takes longer, however busy the machine is.
const SLOW: Duration = Duration::from_secs(20);

fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Values that checks are about.
const EDGES: [u64; 9] = [0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX];

fn mutate(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut data = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(8) {
        let at = random.below(data.len());
        match random.below(8) {
            0 | 1 => {
                if let Some(byte) = data.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            2 => {
                if let Some(byte) = data.get_mut(at) {
                    *byte = random.next() as u8;
                }
            }
            3 | 4 => {
                let edge =
                    EDGES[random.below(EDGES.len())].wrapping_add(random.below(3) as u64).wrapping_sub(1);
                let edge = if random.below(2) == 0 { edge.to_le_bytes() } else { edge.to_be_bytes() };
                let width = [1, 2, 4, 8][random.below(4)];
                let from = if random.below(2) == 0 { 0 } else { 8 - width };
                for (to, from) in data.iter_mut().skip(at).zip(&edge[from..from + width]) {
                    *to = *from;
                }
            }
            5 => data.truncate(at),
            6 => {
                let piece: Vec<u8> = (0..random.below(64)).map(|_| random.next() as u8).collect();
                data.splice(at..at, piece);
            }
            _ => {
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len());
                let to = from + random.below(other.len() - from);
                data.splice(at..at, other[from..to].iter().copied());
            }
        }
    }
    data.truncate(MAX_INPUT);
    data
}

fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target.name);
    let mut files: Vec<_> = std::fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

fn try_input(target: &Target, seed: u64, data: &[u8]) {
    let start = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(data)));
    let hex = || data.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    if let Err(panic) = outcome {
        eprintln!("target {}, seed {seed}: this input is a finding:\n{}", target.name, hex());
        std::panic::resume_unwind(panic);
    }
    assert!(start.elapsed() < SLOW, "target {}, seed {seed}: slow on {}", target.name, hex());
}

fn fuzz(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let corpus = corpus(target);
    assert!(corpus.len() >= 2, "a corpus of {name}");
    let seed = variable("MOTE_FUZZ_SEED", SEED);
    corpus.iter().for_each(|data| try_input(target, seed, data));
    let mut random = Random(seed);
    let end = Instant::now() + Duration::from_secs(variable("MOTE_FUZZ_SECONDS", SECONDS));
    let mut runs = 0;
    while Instant::now() < end {
        try_input(target, seed, &mutate(&mut random, &corpus));
        runs += 1;
    }
    eprintln!("{name}: {runs} inputs");
    assert!(runs > 0);
}

macro_rules! fuzz_tests {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            fuzz(stringify!($name));
        })*

        #[test]
        fn every_target_is_run_and_has_a_program() {
            let run = [$(stringify!($name)),*];
            let targets: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(run.as_slice(), targets);
            let manifest = include_str!("../../fuzz/Cargo.toml");
            for name in targets {
                assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
            }
        }
    };
}

fuzz_tests! { balloon block console http kernel mem mmds net pci pmem qcow2 rng vsock }
