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
//!     capture-<image id>.img    a copy of its root disk on the way to the controller
//!     console.log.previous      the end of the console of the VMM before
//!     console.json              how far rotation has gone, see `console`
//!     vmm.log                   what the VMM itself had to say
//!     vm/                       the root directory of its VMM, see `jail`
//!       root.img                its disk number 1 (root.img.partial while it is being made)
//!       root.img.unsynced       there until the disk was synced once: the boot in which it was made
//!       root-2.img …            further disks, with the same
//!       config-1.img            its config drive of that number, if it has one
//!       kernel  initrd          what it boots, the image cache's files by another name
//!       suspended/              state and memory of a suspended VMM (suspended.partial in between)
//!       vmm.json                configuration of its VMM
//!       run/                    the one directory that the VMM can write to
//!         vmm.sock  console.sock
//!         console.log[.1]       its serial console, bounded by the VMM
//!         exit.json             exit report
//!   servers/.removed-<id>/      a directory that is being deleted
//! <run>/                        gone after a reboot
//!   hostd.sock                  local status socket (0600)
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
    /// The root directory of its VMM.
    pub fn vm(&self) -> PathBuf {
        self.0.join("vm")
    }
    /// What the VMM can write to. Nothing in there is to be believed: see [`crate::files::open_untrusted`].
    pub fn vm_run(&self) -> PathBuf {
        self.vm().join("run")
    }
    /// How the VMM calls a path of [`Self::vm`].
    pub fn inside(&self, path: &Path) -> PathBuf {
        Path::new("/").join(path.strip_prefix(self.vm()).unwrap_or(path))
    }
    /// Where a path is that the VMM calls so.
    pub fn outside(&self, path: &Path) -> PathBuf {
        self.vm().join(path.strip_prefix("/").unwrap_or(path))
    }
    /// The VMM's API.
    pub fn api_socket(&self) -> PathBuf {
        self.vm_run().join("vmm.sock")
    }
    /// The serial console, both ways.
    pub fn console_socket(&self) -> PathBuf {
        self.vm_run().join("console.sock")
    }
    /// The kernel that the VMM boots.
    pub fn kernel(&self) -> PathBuf {
        self.vm().join("kernel")
    }
    /// The initial RAM disk that the VMM loads.
    pub fn initrd(&self) -> PathBuf {
        self.vm().join("initrd")
    }
    /// Ledger.
    pub fn ledger(&self) -> PathBuf {
        self.0.join("server.json")
    }
    /// The disk of that number.
    pub fn disk(&self, number: u32) -> PathBuf {
        self.vm().join(disk_name(number))
    }
    /// A disk that is being made (`mote_images::disk::clone_sparse` names it so).
    pub fn disk_unfinished(&self, number: u32) -> PathBuf {
        self.vm().join(format!("{}.partial", disk_name(number)))
    }
    /// Says in which boot of the host the disk was made, until it was synced.
    pub fn disk_unsynced(&self, number: u32) -> PathBuf {
        self.vm().join(format!("{}.unsynced", disk_name(number)))
    }
    /// Numbers of the disks that are complete; a directory that isn't there has none.
    pub fn disks(&self) -> BTreeSet<u32> {
        names(&self.vm()).filter_map(|name| disk_number(&name)).collect()
    }
    /// Numbers of the disks of which something is there: complete, unfinished or only marked.
    pub fn traces_of_disks(&self) -> BTreeSet<u32> {
        let trace = |name: String| {
            let name =
                name.strip_suffix(".partial").or_else(|| name.strip_suffix(".unsynced")).unwrap_or(&name);
            disk_number(name)
        };
        names(&self.vm()).filter_map(trace).collect()
    }
    /// The config drive of that number.
    pub fn config_drive(&self, number: u32) -> PathBuf {
        self.vm().join(format!("{CONFIG_DRIVE_PREFIX}{number}.img"))
    }
    /// All that is there of config drives of other numbers, and of unfinished ones.
    pub fn other_config_drives(&self, number: u32) -> Vec<PathBuf> {
        let kept = self.config_drive(number);
        let names = names(&self.vm()).filter(|name| name.starts_with(CONFIG_DRIVE_PREFIX));
        names.map(|name| self.vm().join(name)).filter(|path| *path != kept).collect()
    }
    /// A copy of the root disk that shall become this image.
    pub fn capture(&self, image: ImageId) -> PathBuf {
        self.0.join(format!("{CAPTURE_PREFIX}{image}.img"))
    }
    /// The captures that are complete.
    pub fn captures(&self) -> BTreeSet<ImageId> {
        let image = |name: String| name.strip_prefix(CAPTURE_PREFIX)?.strip_suffix(".img")?.parse().ok();
        names(&self.0).filter_map(image).collect()
    }
    /// What a suspended VMM held: complete as soon as this directory is there.
    pub fn suspended(&self) -> PathBuf {
        self.vm().join("suspended")
    }
    /// The same while it is being written or removed.
    pub fn suspended_unfinished(&self) -> PathBuf {
        self.vm().join("suspended.partial")
    }
    /// Configuration of the VMM.
    pub fn vmm_config(&self) -> PathBuf {
        self.vm().join("vmm.json")
    }
    /// The VMM's report when it ended.
    pub fn exit_report(&self) -> PathBuf {
        self.vm_run().join("exit.json")
    }
    /// Serial console.
    pub fn console_log(&self) -> PathBuf {
        self.vm_run().join("console.log")
    }
    /// The older part of the serial console.
    pub fn console_log_old(&self) -> PathBuf {
        self.vm_run().join("console.log.1")
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

fn names(directory: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

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
    /// Whether the path of the agent's socket fits into `sun_path`; if not, its length.
    pub fn check_length(&self) -> Result<(), usize> {
        let length = self.control_socket().as_os_str().len();
        if length > SOCKET_PATH_MAX { Err(length) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_run_dir_leaves_room_for_sockets_and_a_long_one_does_not() {
        assert_eq!(RunDir::new(DEFAULT_RUN_DIR).check_length(), Ok(()));
        assert!(RunDir::new(format!("/{}", "x".repeat(100))).check_length().is_err());
    }

    #[test]
    fn disks_and_captures_are_found_by_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let (server, image) = (ServerDir(dir.path().to_owned()), ImageId::new());
        std::fs::create_dir(server.vm()).unwrap();
        for path in [
            server.disk(1),
            server.disk(7),
            server.capture(image),
            server.disk_unfinished(3),
            server.vmm_log(),
        ] {
            std::fs::write(path, b"").unwrap();
        }
        std::fs::write(server.vm().join("root-x.img"), b"").unwrap();
        assert_eq!(server.disks(), BTreeSet::from([1, 7]));
        assert_eq!(server.traces_of_disks(), BTreeSet::from([1, 3, 7]));
        assert_eq!(server.captures(), BTreeSet::from([image]));
        assert_eq!(server.inside(&server.disk(7)), Path::new("/root-7.img"));
        assert_eq!(server.inside(&server.console_log()), Path::new("/run/console.log"));
        assert_eq!(server.outside(Path::new("/run/console.log")), server.console_log());
        assert_eq!(ServerDir(dir.path().join("none")).disks(), BTreeSet::new());
    }
}
