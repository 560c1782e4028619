//! The jail's directory, and going into it by pivot_root(2).

use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, lchown};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{chdir, pivot_root};

use super::{JailError, at};

/// Where the old root is for a moment.
const OLD_ROOT: &str = "old_root";

/// What a VM needs of the host's devices: path in the jail, and whether it must be there.
const DEVICES: [(&str, bool); 3] = [("dev/kvm", true), ("dev/net/tun", true), ("dev/vhost-net", false)];

/// Makes the directory and gives it away.
pub(super) fn make(root: &Path, uid: u32, gid: u32) -> Result<(), JailError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(root)
        .map_err(at::<io::Error>("create the jail's directory", root))?;
    lchown(root, Some(uid), Some(gid)).map_err(at::<io::Error>("give away", root))?;
    let run = root.join("run");
    make_directory(&run, 0o700)?;
    lchown(&run, Some(uid), Some(gid)).map_err(at::<io::Error>("give away", &run))
}

/// Makes a directory; one that an earlier VM left must be none that leads elsewhere.
fn make_directory(path: &Path, mode: u32) -> Result<(), JailError> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let found = fs::symlink_metadata(path).map_err(at::<io::Error>("look at", path))?;
            if found.is_dir() { Ok(()) } else { Err(at("create", path)(error)) }
        }
        result => result.map_err(at::<io::Error>("create", path)),
    }
}

/// Makes the device nodes in the jail's directory, which is the current one, and mounted; on a file system of their own
/// if that of the jail takes none.
fn make_devices(uid: u32, gid: u32) -> Result<(), JailError> {
    const SOURCE: Option<&str> = Some("dev");
    let dev = Path::new("dev");
    make_directory(dev, 0o755)?;
    let file_system = statvfs(dev).map_err(at::<nix::errno::Errno>("look at the file system of", dev))?;
    if file_system.flags().contains(FsFlags::ST_NODEV) {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        mount(SOURCE, dev, Some("tmpfs"), flags, Some("size=64k,mode=0755")).map_err(at::<
            nix::errno::Errno,
        >(
            "mount a file system for devices on",
            dev,
        ))?;
    }
    make_directory(&dev.join("net"), 0o755)?;
    DEVICES.iter().try_for_each(|(device, needed)| make_device(device, *needed, uid, gid))
}

/// A node like the host's, in place of an earlier VM's.
fn make_device(device: &str, needed: bool, uid: u32, gid: u32) -> Result<(), JailError> {
    let (host, path) = (Path::new("/").join(device), Path::new(device));
    let number = match fs::metadata(&host) {
        Ok(metadata) => metadata.rdev(),
        Err(_) if !needed => return Ok(()),
        Err(error) => return Err(at::<io::Error>("find the device", &host)(error)),
    };
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        result => result.map_err(at::<io::Error>("replace", path))?,
    }
    let number = makedev(nix::sys::stat::major(number), nix::sys::stat::minor(number));
    mknod(path, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, number)
        .map_err(at::<nix::errno::Errno>("make the device", path))?;
    lchown(path, Some(uid), Some(gid)).map_err(at::<io::Error>("give away", path))
}

/// Makes `root`, with devices for this user, the root of this process in a mount namespace of its own, in which nothing
/// else is mounted.
pub(super) fn enter(root: &Path, uid: u32, gid: u32) -> Result<(), JailError> {
    let call = |what| move |error: nix::errno::Errno| JailError::Call(what, error.into());
    const NONE: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).map_err(call("make a mount namespace"))?;
    // What is mounted here from now on stays here.
    mount(NONE, "/", NONE, MsFlags::MS_SLAVE | MsFlags::MS_REC, NONE)
        .map_err(call("separate the mounts from the host's"))?;
    // pivot_root wants a mount point.
    mount(Some(root), root, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
        .map_err(call("mount the jail's directory"))?;
    chdir(root).map_err(call("change to the jail's directory"))?;
    make_devices(uid, gid)?;
    match DirBuilder::new().mode(0o700).create(OLD_ROOT) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        result => result.map_err(at::<io::Error>("create", Path::new(OLD_ROOT)))?,
    }
    pivot_root(".", OLD_ROOT).map_err(call("change the root"))?;
    chdir("/").map_err(call("change to the root"))?;
    umount2(OLD_ROOT, MntFlags::MNT_DETACH).map_err(call("unmount the host's root"))?;
    fs::remove_dir(OLD_ROOT).map_err(at::<io::Error>("remove", Path::new(OLD_ROOT)))
}

/// Whether an ELF file asks for a dynamic linker (a program header of type PT_INTERP).
pub(super) fn is_dynamic(path: &Path) -> io::Result<bool> {
    /// Program headers are looked for in so many bytes: linkers put them right behind the file's header.
    const LOOKED_AT: u64 = 64 << 10;
    const PT_INTERP: u32 = 3;
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(LOOKED_AT).read_to_end(&mut bytes)?;
    if bytes.get(..5) != Some(b"\x7fELF\x02") {
        return Ok(false);
    }
    let field = |at: usize, width: usize| -> Option<u64> {
        let mut value = [0; 8];
        value[..width].copy_from_slice(bytes.get(at..at.checked_add(width)?)?);
        Some(u64::from_le_bytes(value))
    };
    let (start, size, count) = (field(32, 8), field(54, 2), field(56, 2));
    let (Some(start), Some(size), Some(count)) = (start, size, count) else { return Ok(false) };
    Ok((0..count).any(|number| {
        let at = usize::try_from(start.saturating_add(number * size)).unwrap_or(usize::MAX);
        field(at, 4) == Some(PT_INTERP.into())
    }))
}
