//! A directory made by a script in steps, which appears whole or not at all.
//!
//! It is made in a working directory beside its place and renamed. The working directory is locked while its maker lives,
//! and what one that was killed left is removed by the next. Each step is a process group that ends with its maker, however
//! that ends.

use std::{
    fs::{self, File},
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;

use crate::build::BuildError;

/// How the names of working directories begin.
const PREFIX: &str = ".mote-making-";
/// The most of a failed program's error text that is shown, in bytes.
const SHOWN: usize = 2000;
/// Working directories that are locked by another process before it could be told whose they are.
const TRIES: usize = 100;
/// Runs a step's script. Its input is a pipe of which only the maker has the other end, so a read of it ends when the maker
/// does: then nothing of the step may go on (make and its compilers ignore that their parent is gone).
const GUARDED: &str = r#"exec 3<&0 </dev/null
(exec >/dev/null 2>&1; read -r _ <&3; kill -KILL 0) &
exec 3<&-
eval "$MOTE_STEP""#;

/// A directory in the making; what there is of it goes when this is dropped.
pub(crate) struct Making {
    work: TempDir,
    /// Says that the working directory has a maker.
    _lock: Flock<File>,
    script: &'static str,
    out: PathBuf,
}

impl Making {
    /// Begins to make `out` by a script, whose files are put into `work/files`.
    pub(crate) fn new(out: &Path, script: &'static str, files: &[(&str, &str)]) -> Result<Self, BuildError> {
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(|e| BuildError::File(parent.into(), e))?;
        remove_abandoned(parent);
        let (work, lock) = locked_directory(parent).map_err(|e| BuildError::File(parent.into(), e))?;
        let making = Self { work, _lock: lock, script, out: out.into() };
        let of_files = making.work().join("files");
        for dir in [&making.made(), &of_files] {
            fs::create_dir_all(dir).map_err(|e| BuildError::File(dir.clone(), e))?;
        }
        for (name, text) in files {
            write(&of_files.join(name), text.as_bytes())?;
        }
        Ok(making)
    }

    /// The working directory.
    pub(crate) fn work(&self) -> &Path {
        self.work.path()
    }

    /// What will be the directory.
    pub(crate) fn made(&self) -> PathBuf {
        self.work().join("out")
    }

    /// Writes a file of the directory.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), BuildError> {
        write(&self.made().join(name), bytes)
    }

    /// Runs a step: the script with the arguments STEP WORK OUT VARIANT.
    pub(crate) fn step(&self, step: &'static str, variant: &str) -> Result<(), BuildError> {
        let mut child = Command::new("sh")
            .args(["-c", GUARDED, "build.sh", step])
            .args([self.work(), &self.made(), Path::new(variant)])
            .env("MOTE_STEP", self.script)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| BuildError::Program("sh", e))?;
        // Waiting would close it, and with it the step.
        let alive = child.stdin.take();
        let output = child.wait_with_output().map_err(|e| BuildError::Program("sh", e))?;
        drop(alive);
        if output.status.success() {
            return Ok(());
        }
        Err(BuildError::Step { step, stderr: end_of(&output.stderr) })
    }

    /// Puts the directory into its place.
    pub(crate) fn finish(self) -> Result<(), BuildError> {
        let out = &self.out;
        if out.exists() {
            fs::remove_dir_all(out).map_err(|e| BuildError::File(out.clone(), e))?;
        }
        fs::rename(self.made(), out).map_err(|e| BuildError::File(out.clone(), e))
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    fs::write(path, bytes).map_err(|e| BuildError::File(path.into(), e))
}

fn end_of(text: &[u8]) -> String {
    String::from_utf8_lossy(&text[text.len().saturating_sub(SHOWN)..]).trim().to_owned()
}

/// A new directory with its lock.
fn locked_directory(parent: &Path) -> std::io::Result<(TempDir, Flock<File>)> {
    for _ in 0..TRIES {
        let work = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent)?;
        let Ok(directory) = File::open(work.path()) else { continue };
        let Ok(lock) = Flock::lock(directory, FlockArg::LockExclusiveNonblock) else { continue };
        // Between its making and its locking, another process may have taken it for one that was left.
        if fs::metadata(work.path()).is_ok_and(|now| lock.metadata().is_ok_and(|had| had.ino() == now.ino()))
        {
            return Ok((work, lock));
        }
    }
    Err(std::io::Error::other("no working directory could be locked"))
}

/// Removes the working directories whose makers are gone.
fn remove_abandoned(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let Ok(directory) = File::open(entry.path()) else { continue };
        if let Ok(_lock) = Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            // What can't be removed now is tried again by the next maker.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_directory_appears_whole_and_one_whose_step_fails_not_at_all() {
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("made");
        let script = r#"[ "$1" = good ] || { echo "$1 is bad" >&2; exit 1; }; cat "$2/files/a" >"$3/b"; printf %s "$4" >>"$3/b""#;
        let making = Making::new(&out, script, &[("a", "text ")]).unwrap();
        making.step("good", "variant").unwrap();
        making.write("c", b"more").unwrap();
        assert!(!out.exists());
        making.finish().unwrap();
        assert_eq!(fs::read_to_string(out.join("b")).unwrap(), "text variant");
        assert_eq!(names(parent.path()), ["made"]);

        let making = Making::new(&out, script, &[]).unwrap();
        assert_eq!(making.step("sad", "").unwrap_err().to_string(), r#"the step "sad" failed: sad is bad"#);
        drop(making);
        assert!(out.join("c").exists());
        assert_eq!(names(parent.path()), ["made"]);
    }

    #[test]
    fn what_a_killed_maker_left_goes_and_what_a_living_one_has_stays() {
        let parent = tempfile::tempdir().unwrap();
        fs::create_dir_all(parent.path().join(format!("{PREFIX}dead/out"))).unwrap();
        let out = parent.path().join("made");
        let living = Making::new(&out, "", &[]).unwrap();
        let other = Making::new(&parent.path().join("other"), "", &[]).unwrap();
        assert_eq!(names(parent.path()).len(), 2);
        assert!(living.made().exists() && other.made().exists());
    }

    #[test]
    fn a_step_and_all_that_it_started_end_with_their_maker() {
        let dir = tempfile::tempdir().unwrap();
        // As Making::step starts it, by a shell that can be killed.
        let marker = format!("3{:05}", std::process::id() % 100_000);
        let step = format!("sh -c 'sleep {marker}; :' & sleep {marker}; :");
        let mut child = Command::new("sh")
            .args(["-c", GUARDED])
            .env("MOTE_STEP", step)
            .current_dir(dir.path())
            .process_group(0)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let sleeping = || {
            let line = format!("sleep\0{marker}\0");
            let processes = fs::read_dir("/proc").unwrap().flatten();
            processes
                .filter(|p| fs::read_to_string(p.path().join("cmdline")).is_ok_and(|l| l == line))
                .count()
        };
        let wait_for = |count| {
            let deadline = Instant::now() + Duration::from_secs(30);
            while sleeping() != count {
                assert!(Instant::now() < deadline, "{} of {count} sleep", sleeping());
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        wait_for(2);
        // What the kernel does with a maker that is killed.
        drop(child.stdin.take());
        wait_for(0);
        child.wait().unwrap();
    }
}
