//! The kept corpus (`vmm/fuzz/corpus/NAME`) through every target, without libFuzzer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::TARGETS;

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries =
        std::fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}

#[test]
fn every_target_has_a_corpus_and_every_corpus_a_target() {
    let corpora: Vec<_> =
        entries(&corpus()).iter().map(|path| path.file_name().unwrap().to_owned()).collect();
    let targets: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    assert_eq!(corpora, targets, "directories of {}", corpus().display());
}

#[test]
fn every_input_of_the_kept_corpus_is_survived() {
    for target in TARGETS {
        let inputs = entries(&corpus().join(target.name));
        assert!(inputs.len() >= 2, "a corpus of {}", target.name);
        for path in inputs {
            let data = std::fs::read(&path).unwrap();
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.run)(&data))) {
                eprintln!("this input is a finding: {}", path.display());
                std::panic::resume_unwind(panic);
            }
        }
    }
}
