//! Control groups: one for each VM, made below a parent, with values, and this process put into it.
//!
//! Version 1 has a hierarchy for each controller, of which only those are used whose files are set; version 2 has one,
//! in which controllers are enabled on the way down.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Longest list of mounts that is read.
const MOUNTS: &str = "/proc/self/mounts";

/// A file of a cgroup and what to write to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// File name, like `cpu.shares`.
    pub file: String,
    /// What to write.
    pub value: String,
}

/// Cgroups could not be made or set.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file could not be read or written.
    #[error("cannot {what} {}", .path.display())]
    File {
        /// What was done.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The host doesn't have it.
    #[error("no cgroup version {version} hierarchy with controller {controller:?} is mounted")]
    NoHierarchy {
        /// 1 or 2.
        version: u8,
        /// The part of the file's name before the dot.
        controller: String,
    },
}

/// `FILE=VALUE`, FILE being `CONTROLLER.NAME`.
pub(super) fn parse_setting(text: &str) -> Result<Setting, String> {
    let (file, value) = text.split_once('=').ok_or("FILE=VALUE")?;
    let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let valid =
        file.contains('.') && !file.starts_with('.') && !file.contains("..") && file.chars().all(name);
    if !valid || value.is_empty() {
        return Err(format!("{file:?} is no file of a cgroup, like cpu.shares, or its value is empty"));
    }
    Ok(Setting { file: file.to_owned(), value: value.to_owned() })
}

/// Reads `--cgroup-version`.
pub(super) fn parse_version(text: &str) -> Result<u8, String> {
    match text {
        "1" => Ok(1),
        "2" => Ok(2),
        _ => Err("1 or 2".to_owned()),
    }
}

/// A relative path without `..`.
pub(super) fn parse_parent(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    let inside = path.components().all(|part| matches!(part, Component::Normal(_)));
    if inside && !text.is_empty() { Ok(path) } else { Err("a relative path without ..".to_owned()) }
}

impl Setting {
    fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

/// Where version 1's hierarchy of `controller`, or version 2's, is mounted, by the text of /proc/self/mounts.
fn hierarchy(mounts: &str, version: u8, controller: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (place, kind, options) = (words.next()?, words.next()?, words.next()?);
        let found = match version {
            1 => kind == "cgroup" && options.split(',').any(|option| option == controller),
            _ => kind == "cgroup2",
        };
        found.then(|| PathBuf::from(place))
    })
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::File { what, path, source }
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    // Not created: a file that isn't there is a mistake of the user or another kernel.
    let mut file = fs::File::options().write(true).open(path).map_err(failed("open", path))?;
    io::Write::write_all(&mut file, value.as_bytes()).map_err(failed("write to", path))
}

/// Makes the cgroups, sets their values, and moves this process into them. Without settings no cgroup is made in
/// version 1; in version 2 the process is moved in any case if a parent was asked for by name (as Firecracker's does).
pub(super) fn enter(version: u8, parent: &Path, id: &str, settings: &[Setting]) -> Result<(), CgroupError> {
    if settings.is_empty() {
        return Ok(());
    }
    let mounts = fs::read_to_string(MOUNTS).map_err(failed("read", Path::new(MOUNTS)))?;
    let mut groups: Vec<PathBuf> = Vec::new();
    for setting in settings {
        let controller = setting.controller();
        let root = hierarchy(&mounts, version, controller)
            .ok_or_else(|| CgroupError::NoHierarchy { version, controller: controller.to_owned() })?;
        let group = root.join(parent).join(id);
        if !groups.contains(&group) {
            fs::create_dir_all(&group).map_err(failed("create", &group))?;
            if version == 1 && controller == "cpuset" {
                inherit_cpuset(&root, &group)?;
            }
            groups.push(group.clone());
        }
        if version == 2 && controller != "cgroup" {
            enable(&root, &group, controller)?;
        }
        write(&group.join(&setting.file), &setting.value)?;
    }
    groups.iter().try_for_each(|group| write(&group.join("cgroup.procs"), &std::process::id().to_string()))
}

/// Enables a controller of version 2 from the root down to the parent of `group`.
fn enable(root: &Path, group: &Path, controller: &str) -> Result<(), CgroupError> {
    let mut above: Vec<&Path> = group.ancestors().skip(1).take_while(|path| path.starts_with(root)).collect();
    above.reverse();
    above.iter().try_for_each(|path| write(&path.join("cgroup.subtree_control"), &format!("+{controller}")))
}

/// A new cpuset of version 1 is empty, and nothing can run in it: what the one above has is copied down.
fn inherit_cpuset(root: &Path, group: &Path) -> Result<(), CgroupError> {
    let mut down: Vec<&Path> = group.ancestors().take_while(|path| *path != root).collect();
    down.reverse();
    for path in down {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let (own, above) = (path.join(file), path.parent().unwrap_or(root).join(file));
            let read = |path: &Path| fs::read_to_string(path).map_err(failed("read", path));
            if read(&own)?.trim().is_empty() {
                write(&own, read(&above)?.trim())?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_by_controller_and_version() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,cpu,cpuacct 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw,nsdelegate 0 0\n";
        let v1 = |controller| hierarchy(mounts, 1, controller);
        assert_eq!(v1("cpu"), Some(PathBuf::from("/sys/fs/cgroup/cpu,cpuacct")));
        assert_eq!(v1("cpuacct"), v1("cpu"));
        assert_eq!(v1("memory"), None);
        assert_eq!(hierarchy(mounts, 2, "memory"), Some(PathBuf::from("/sys/fs/cgroup/unified")));
    }

    #[test]
    fn settings_name_a_file_of_a_cgroup_only() {
        assert_eq!(parse_setting("cpu.shares=10").unwrap().controller(), "cpu");
        assert_eq!(parse_setting("cpuset.cpus=0-1,3").unwrap().value, "0-1,3");
        for bad in
            ["cpu.shares", "shares=1", "../cpu.shares=1", "cpu/x.y=1", "cpu..x=1", ".x=1", "cpu.shares="]
        {
            assert!(parse_setting(bad).is_err(), "{bad}");
        }
        assert!(parse_parent("a/b").is_ok());
        for bad in ["", "/a", "../a", "a/../../b"] {
            assert!(parse_parent(bad).is_err(), "{bad}");
        }
    }
}
