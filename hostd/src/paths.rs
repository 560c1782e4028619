//! Where a host agent keeps things. Every path in this crate is made here.
//!
//! ```text
//! <state>/                      survives a reboot of the host
//!   lock                        held (flock) by the one mote-hostd of this directory
//!   identity.json               who this host is: cloud, host id, secret, URL (0600)
//!   desired.json                the last complete desired state (0600: it holds user data)
//!   netns-prefix                what the names of this host's network namespaces start with
//!   images/                     content-addressed image cache
//!   servers/<server id>/
//!     server.json               the ledger of this server
//!     root.img                  its disk number 1 (root.img.partial while it is being made)
//!     root.img.unsynced         there until the disk was synced once: the boot in which it was made
//!     root-2.img …              further disks, with the same
//!     config-1.img              its config drive of that number, if it has one
//!     capture-<image id>.img    a copy of its root disk on the way to the controller
//!     vmm.json  exit.json       configuration and exit report of its VMM
//!     console.log[.1]           its serial console, bounded by the VMM
//!     console.log.previous      the end of that of the VMM before
//!     console.json              how far rotation has gone, see `console`
//!     vmm.log                   what the VMM itself had to say
//!   servers/.removed-<id>/      a directory that is being deleted
//! <run>/                        gone after a reboot
//!   hostd.sock                  local status socket (0600)
//!   servers/<server id>/        vmm.sock, console.sock
//! ```

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use mote_host_api::{ImageId, ServerId};

/// Where state is kept by default.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/mote/host";
/// Where sockets are kept by default.
pub const DEFAULT_RUN_DIR: &str = "/run/mote";
/// Prefix of a server directory that is being deleted.
pub const REMOVED_PREFIX: &str = ".removed-";
/// Longest path of a Unix socket (`sun_path` less its NUL, unix(7)).
pub const SOCKET_PATH_MAX: usize = 107;

/// The state directory.
#[derive(Debug, Clone)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// Names it; nothing is created.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }
    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }
    /// Lock file.
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }
    /// Identity file.
    pub fn identity(&self) -> PathBuf {
        self.0.join("identity.json")
    }
    /// The last complete desired state.
    pub fn desired(&self) -> PathBuf {
        self.0.join("desired.json")
    }
    /// What the names of this host's network namespaces start with.
    pub fn netns_prefix(&self) -> PathBuf {
        self.0.join("netns-prefix")
    }
    /// Image cache.
    pub fn images(&self) -> PathBuf {
        self.0.join("images")
    }
    /// Directory of all servers.
    pub fn servers(&self) -> PathBuf {
        self.0.join("servers")
    }
    /// Directory of one server.
    pub fn server(&self, id: ServerId) -> ServerDir {
        ServerDir(self.servers().join(id.to_string()))
    }
    /// The name that a server's directory has while it is deleted.
    pub fn removed(&self, id: ServerId) -> PathBuf {
        self.servers().join(format!("{REMOVED_PREFIX}{id}"))
    }
}

/// The directory of one server under the state directory.
#[derive(Debug, Clone)]
pub struct ServerDir(PathBuf);

impl ServerDir {
    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }
    /// Ledger.
    pub fn ledger(&self) -> PathBuf {
        self.0.join("server.json")
    }
    /// The disk of that number.
    pub fn disk(&self, number: u32) -> PathBuf {
        self.0.join(disk_name(number))
    }
    /// A disk that is being made (`mote_images::disk::clone_sparse` names it so).
    pub fn disk_unfinished(&self, number: u32) -> PathBuf {
        self.0.join(format!("{}.partial", disk_name(number)))
    }
    /// Says in which boot of the host the disk was made, until it was synced.
    pub fn disk_unsynced(&self, number: u32) -> PathBuf {
        self.0.join(format!("{}.unsynced", disk_name(number)))
    }
    /// Numbers of the disks that are complete; a directory that isn't there has none.
    pub fn disks(&self) -> BTreeSet<u32> {
        self.names().filter_map(|name| disk_number(&name)).collect()
    }
    /// Numbers of the disks of which something is there: complete, unfinished or only marked.
    pub fn traces_of_disks(&self) -> BTreeSet<u32> {
        let trace = |name: String| {
            let name =
                name.strip_suffix(".partial").or_else(|| name.strip_suffix(".unsynced")).unwrap_or(&name);
            disk_number(name)
        };
        self.names().filter_map(trace).collect()
    }
    /// The config drive of that number.
    pub fn config_drive(&self, number: u32) -> PathBuf {
        self.0.join(format!("{CONFIG_DRIVE_PREFIX}{number}.img"))
    }
    /// All that is there of config drives of other numbers, and of unfinished ones.
    pub fn other_config_drives(&self, number: u32) -> Vec<PathBuf> {
        let kept = self.config_drive(number);
        let names = self.names().filter(|name| name.starts_with(CONFIG_DRIVE_PREFIX));
        names.map(|name| self.0.join(name)).filter(|path| *path != kept).collect()
    }
    /// A copy of the root disk that shall become this image.
    pub fn capture(&self, image: ImageId) -> PathBuf {
        self.0.join(format!("{CAPTURE_PREFIX}{image}.img"))
    }
    /// The captures that are complete.
    pub fn captures(&self) -> BTreeSet<ImageId> {
        let image = |name: String| name.strip_prefix(CAPTURE_PREFIX)?.strip_suffix(".img")?.parse().ok();
        self.names().filter_map(image).collect()
    }
    fn names(&self) -> impl Iterator<Item = String> {
        let entries = std::fs::read_dir(&self.0).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok())
    }
    /// What a suspended VMM held: complete as soon as this directory is there.
    pub fn suspended(&self) -> PathBuf {
        self.0.join("suspended")
    }
    /// The same while it is being written or removed.
    pub fn suspended_unfinished(&self) -> PathBuf {
        self.0.join("suspended.partial")
    }
    /// Configuration of the VMM.
    pub fn vmm_config(&self) -> PathBuf {
        self.0.join("vmm.json")
    }
    /// The VMM's report when it ended.
    pub fn exit_report(&self) -> PathBuf {
        self.0.join("exit.json")
    }
    /// Serial console.
    pub fn console_log(&self) -> PathBuf {
        self.0.join("console.log")
    }
    /// The older part of the serial console.
    pub fn console_log_old(&self) -> PathBuf {
        self.0.join("console.log.1")
    }
    /// Serial console of the VMM before this one.
    pub fn console_log_previous(&self) -> PathBuf {
        self.0.join("console.log.previous")
    }
    /// Offsets of the console files.
    pub fn console_track(&self) -> PathBuf {
        self.0.join("console.json")
    }
    /// Standard output and error of the VMM.
    pub fn vmm_log(&self) -> PathBuf {
        self.0.join("vmm.log")
    }
}

/// Prefix of the name of a config drive.
const CONFIG_DRIVE_PREFIX: &str = "config-";
/// Prefix of the name of a capture.
const CAPTURE_PREFIX: &str = "capture-";

fn disk_name(number: u32) -> String {
    match number {
        0 | 1 => "root.img".to_owned(),
        number => format!("root-{number}.img"),
    }
}

fn disk_number(name: &str) -> Option<u32> {
    match name {
        "root.img" => Some(1),
        name => name.strip_prefix("root-")?.strip_suffix(".img")?.parse().ok(),
    }
}

/// The run directory.
#[derive(Debug, Clone)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// Names it; nothing is created.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }
    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }
    /// The agent's own socket.
    pub fn control_socket(&self) -> PathBuf {
        self.0.join("hostd.sock")
    }
    /// Directory of all servers.
    pub fn servers(&self) -> PathBuf {
        self.0.join("servers")
    }
    /// Directory of one server.
    pub fn server(&self, id: ServerId) -> ServerRun {
        ServerRun(self.servers().join(id.to_string()))
    }
    /// Whether the socket paths of servers fit into `sun_path`; if not, the length of the longest.
    pub fn check_length(&self) -> Result<(), usize> {
        let longest = self.server(ServerId(uuid::Uuid::nil())).console_socket();
        let length = longest.as_os_str().len();
        if length > SOCKET_PATH_MAX { Err(length) } else { Ok(()) }
    }
}

/// The directory of one server under the run directory.
#[derive(Debug, Clone)]
pub struct ServerRun(PathBuf);

impl ServerRun {
    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }
    /// The VMM's API.
    pub fn api_socket(&self) -> PathBuf {
        self.0.join("vmm.sock")
    }
    /// The serial console, both ways.
    pub fn console_socket(&self) -> PathBuf {
        self.0.join("console.sock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_run_dir_leaves_room_for_sockets_and_a_long_one_does_not() {
        assert_eq!(RunDir::new(DEFAULT_RUN_DIR).check_length(), Ok(()));
        assert!(RunDir::new(format!("/{}", "x".repeat(80))).check_length().is_err());
    }

    #[test]
    fn disks_and_captures_are_found_by_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let (server, image) = (ServerDir(dir.path().to_owned()), ImageId::new());
        for path in [
            server.disk(1),
            server.disk(7),
            server.capture(image),
            server.disk_unfinished(3),
            server.vmm_log(),
        ] {
            std::fs::write(path, b"").unwrap();
        }
        std::fs::write(dir.path().join("root-x.img"), b"").unwrap();
        assert_eq!(server.disks(), BTreeSet::from([1, 7]));
        assert_eq!(server.traces_of_disks(), BTreeSet::from([1, 3, 7]));
        assert_eq!(server.captures(), BTreeSet::from([image]));
        assert_eq!(ServerDir(dir.path().join("none")).disks(), BTreeSet::new());
    }
}
