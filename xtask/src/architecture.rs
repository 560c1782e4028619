//! The invariants of docs/architecture.md, each of which says what is absent. They are checked on the text of the tree.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

/// Largest file of code, in lines without tests; one that passes it is split or named below with its reason.
const MAX_LINES: usize = 800;

/// A word that may stand only in some places.
struct Confined {
    word: &'static str,
    /// Path prefixes in which it may stand.
    allowed: &'static [&'static str],
    why: &'static str,
}

const CONFINED: &[Confined] = &[
    Confined {
        word: "kvm_ioctls::",
        allowed: &["vmm/src/kvm", "hostd/src/kvm_check", "tests/bench", "xtask"],
        why: "only vmm/src/kvm drives KVM (hostd/src/kvm_check looks whether it works)",
    },
    Confined { word: "sqlx::", allowed: &["controller", "xtask"], why: "only the controller has a database" },
    Confined {
        word: "rtnetlink::",
        allowed: &["network", "xtask"],
        why: "only network/ configures the kernel's network",
    },
    Confined { word: "dhcproto::", allowed: &["network", "xtask"], why: "DHCP is spoken by network/" },
];

/// Dependencies that a package must not have.
const WITHOUT: &[(&str, &[&str], &str)] = &[
    (
        "vmm/Cargo.toml",
        &["tokio", "sqlx", "mote-host-api", "mote-network", "axum"],
        "the VMM knows nothing of tenants, databases or tokio",
    ),
    (
        "cli/Cargo.toml",
        &["mote-host-api", "mote-vmm-api", "mote-network", "sqlx"],
        "the CLI speaks public HTTP only",
    ),
    ("images/Cargo.toml", &["tokio", "mote-host-api"], "images/ is a plain library"),
    ("network/Cargo.toml", &["mote-images", "mote-vmm-api"], "network/ knows networks only"),
    (
        "controller/Cargo.toml",
        &["mote-vmm-api", "mote-network", "kvm-ioctls"],
        "the controller never touches a host but through hostd's API",
    ),
];

/// Checks everything; the error lists every violation.
pub fn check() -> anyhow::Result<()> {
    let mut found = Vec::new();
    let table = fs::read_to_string("docs/decisions/0002-dependencies.md")
        .context("reading the record of dependencies")?;
    found.extend(undocumented(&read("Cargo.toml")?, &table));
    found.extend(twice(&read("Cargo.lock")?, &read("Cargo.toml")?));
    for (manifest, without, why) in WITHOUT {
        let text = read(manifest)?;
        for name in *without {
            if text.lines().any(|l| l.split(['.', ' ', '=']).next() == Some(name)) {
                found.push(format!("{manifest} depends on {name}: {why}"));
            }
        }
    }
    for path in rust_files(Path::new("."))? {
        found.extend(misplaced(&path, &read(&path)?));
    }
    if !found.is_empty() {
        bail!("the tree breaks its own rules:\n  {}", found.join("\n  "));
    }
    Ok(())
}

fn read(path: impl AsRef<Path>) -> anyhow::Result<String> {
    fs::read_to_string(path.as_ref()).with_context(|| format!("reading {}", path.as_ref().display()))
}

/// What one file has that it must not have.
fn misplaced(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for rule in CONFINED {
        if text.contains(rule.word) && !rule.allowed.iter().any(|p| path.starts_with(p)) {
            found.push(format!("{path} uses {}: {}", rule.word, rule.why));
        }
    }
    let lines = text.lines().take_while(|l| *l != "#[cfg(test)]").count();
    if lines > MAX_LINES {
        found.push(format!("{path} has {lines} lines, more than {MAX_LINES}"));
    }
    found
}

/// Entries of the dependency table without a line in the record.
fn undocumented(manifest: &str, record: &str) -> Vec<String> {
    table(manifest)
        .filter(|name| !name.starts_with("mote") && !record.contains(&format!("`{name}`")))
        .map(|name| format!("dependency {name} has no line in docs/decisions/0002-dependencies.md"))
        .collect()
}

/// Names in `[workspace.dependencies]`.
fn table(manifest: &str) -> impl Iterator<Item = &str> {
    manifest
        .lines()
        .skip_while(|l| *l != "[workspace.dependencies]")
        .skip(1)
        .take_while(|l| !l.starts_with('['))
        .filter_map(|l| l.split_once(" = ").map(|(name, _)| name))
}

/// Crates of the dependency table that the lock file has in more than one version of those we ask for ourselves.
fn twice(lock: &str, manifest: &str) -> Vec<String> {
    let direct: Vec<&str> = table(manifest).collect();
    let mut ours: Vec<(String, String)> = Vec::new();
    for package in lock.split("[[package]]").filter(|p| !p.contains("\nsource = ")) {
        for line in package.lines() {
            // `"name version"` in a dependency list means that there are several versions.
            let entry = line.trim().trim_matches(['"', ',']);
            if let Some((name, version)) = entry.split_once(' ')
                && direct.contains(&name)
            {
                ours.push((name.to_owned(), version.to_owned()));
            }
        }
    }
    ours.sort();
    ours.dedup();
    ours.windows(2)
        .filter(|w| w[0].0 == w[1].0)
        .map(|w| format!("packages of this workspace use {} in versions {} and {}", w[0].0, w[0].1, w[1].1))
        .collect()
}

/// All Rust files that git would track, as paths from the top.
fn rust_files(top: &Path) -> anyhow::Result<Vec<String>> {
    let mut files = Vec::new();
    let mut dirs: Vec<PathBuf> = vec![top.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
            let path = entry.with_context(|| format!("reading {}", dir.display()))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() && !name.starts_with('.') && !name.starts_with("target") {
                dirs.push(path);
            } else if name.ends_with(".rs") {
                files.push(path.strip_prefix(top).unwrap_or(&path).display().to_string());
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_in_a_wrong_place_and_a_file_that_is_too_long_are_found() {
        assert_eq!(misplaced("vmm/src/kvm/mod.rs", "use kvm_ioctls::Kvm;"), Vec::<String>::new());
        assert_eq!(misplaced("vmm/src/boot.rs", "use kvm_ioctls::Kvm;").len(), 1);
        assert_eq!(misplaced("a.rs", &"line\n".repeat(MAX_LINES + 1)).len(), 1);
        let with_tests = format!("{}#[cfg(test)]\n{}", "line\n".repeat(MAX_LINES), "line\n".repeat(500));
        assert_eq!(misplaced("a.rs", &with_tests), Vec::<String>::new());
    }

    #[test]
    fn a_dependency_without_a_line_in_the_record_is_found() {
        let manifest = "[workspace.dependencies]\nmote-x = { path = \"x\" }\nserde = \"1\"\nlibc = \"0.2\"\n\n[profile.release]\na = 1\n";
        assert_eq!(
            undocumented(manifest, "- `serde`: why"),
            ["dependency libc has no line in docs/decisions/0002-dependencies.md"]
        );
    }

    #[test]
    fn two_versions_used_by_our_own_packages_are_found() {
        let manifest = "[workspace.dependencies]\nnix = \"1\"\n";
        let lock = "[[package]]\nname = \"a\"\ndependencies = [\n \"nix 0.1.0\",\n]\n[[package]]\nname = \"b\"\ndependencies = [\n \"nix 0.2.0\",\n]\n";
        assert_eq!(twice(lock, manifest).len(), 1);
        assert_eq!(twice(&lock.replace("0.2.0", "0.1.0"), manifest), Vec::<String>::new());
    }
}
