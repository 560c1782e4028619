//! Guest images made on this machine from Debian packages.
//!
//! [`build_debian`] makes a directory with a kernel, an initial ramdisk, a root disk and `image.json`, which names them and
//! the image properties they want ([`Bundle`]). The directory appears whole or not at all: it is made beside its place and
//! renamed. A bundle made by the same recipe is left as it is.

use std::{
    ffi::OsStr,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde::{Deserialize, Serialize};

use crate::kernel_payload;

/// Grows with every change of what a bundle contains.
const RECIPE: u32 = 3;
/// The most of a failed program's error text that is shown, in bytes.
const SHOWN: usize = 2000;
/// What each step runs.
const SCRIPT: &str = include_str!("debian/build.sh");
/// Files that go into the image.
const FILES: [(&str, &str); 5] = [
    ("initramfs-init", include_str!("debian/initramfs-init")),
    ("inittab", include_str!("debian/inittab")),
    ("boot", include_str!("debian/boot")),
    ("fetch", include_str!("debian/fetch")),
    ("udhcpc", include_str!("debian/udhcpc")),
];

/// `image.json`: an image of several files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle {
    /// Which recipe made it.
    pub recipe: u32,
    /// File of the kernel, in the same directory.
    pub kernel: PathBuf,
    /// File of the initial ramdisk.
    pub ramdisk: PathBuf,
    /// File of the root disk.
    pub disk: PathBuf,
    /// Image properties: the command line and what the host must be able to do.
    pub properties: std::collections::BTreeMap<String, String>,
}

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file.
    #[error("can't write {0}")]
    File(PathBuf, #[source] std::io::Error),
    /// A program is missing.
    #[error("can't run {0}: is its package installed?")]
    Program(&'static str, #[source] std::io::Error),
    /// A step failed.
    #[error("the step {step:?} failed: {stderr}")]
    Step {
        /// Which.
        step: &'static str,
        /// The end of its error text.
        stderr: String,
    },
    /// The kernel package.
    #[error("the kernel package has no kernel that can be unpacked (zstd, xz and gzip were tried)")]
    Kernel,
}

/// Reads a bundle's `image.json`; `None` where there is none of this recipe.
pub fn bundle(dir: &Path) -> Option<Bundle> {
    let bundle: Bundle = serde_json::from_slice(&fs::read(dir.join("image.json")).ok()?).ok()?;
    (bundle.recipe == RECIPE).then_some(bundle)
}

/// Makes a small Debian: busybox's init, DHCP, SSH with the server's key pair, a page on port 80. Needs root, the machine's
/// package sources, and apt, dpkg, cpio, xz, zstd, mmdebstrap, mke2fs and a static busybox. `progress` is told each step.
///
/// # Errors
/// [`BuildError`]; nothing is left of a failed attempt.
pub fn build_debian(out: &Path, mut progress: impl FnMut(&str)) -> Result<Bundle, BuildError> {
    if let Some(bundle) = bundle(out) {
        progress("up to date");
        return Ok(bundle);
    }
    let parent = out.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|e| BuildError::File(parent.into(), e))?;
    let work = tempfile::Builder::new().prefix(".mote-image-").tempdir_in(parent);
    let work = work.map_err(|e| BuildError::File(parent.into(), e))?;
    let made = work.path().join("out");
    fs::create_dir_all(&made).map_err(|e| BuildError::File(made.clone(), e))?;
    let files = work.path().join("files");
    fs::create_dir_all(&files).map_err(|e| BuildError::File(files.clone(), e))?;
    for (name, text) in FILES {
        write(&files.join(name), text.as_bytes())?;
    }
    progress("downloading Debian's 6.12 cloud kernel");
    step("kernel", work.path(), &made)?;
    progress("unpacking the kernel");
    write(&made.join("vmlinux"), &vmlinux(&work.path().join("kernel/boot"))?)?;
    progress("making the initial ramdisk");
    step("modules", work.path(), &made)?;
    progress("making the root file system from Debian's packages (about a minute)");
    step("root", work.path(), &made)?;
    progress("making the disk");
    step("disk", work.path(), &made)?;
    let bundle = Bundle {
        recipe: RECIPE,
        kernel: "vmlinux".into(),
        ramdisk: "initrd.img".into(),
        disk: "disk.raw".into(),
        properties: [
            ("os_command_line", "console=ttyS0 quiet root=/dev/vda rw panic=-1 noxsave"),
            ("trait:CUSTOM_HW_VIRTUALIZATION", "required"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into(),
    };
    let json = serde_json::to_vec_pretty(&bundle)
        .map_err(|e| BuildError::File(made.join("image.json"), e.into()))?;
    write(&made.join("image.json"), &json)?;
    if out.exists() {
        fs::remove_dir_all(out).map_err(|e| BuildError::File(out.into(), e))?;
    }
    fs::rename(&made, out).map_err(|e| BuildError::File(out.into(), e))?;
    Ok(bundle)
}

pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    fs::write(path, bytes).map_err(|e| BuildError::File(path.into(), e))
}

/// Runs one step of the script.
fn step(step: &'static str, work: &Path, out: &Path) -> Result<(), BuildError> {
    run_step(SCRIPT, step, &[work.as_os_str(), out.as_os_str()])
}

/// Runs one step of a script with these arguments.
pub(crate) fn run_step(script: &str, step: &'static str, arguments: &[&OsStr]) -> Result<(), BuildError> {
    let run = Command::new("sh")
        .args(["-c", script, "build.sh", step])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| BuildError::Program("sh", e))?;
    if run.status.success() {
        return Ok(());
    }
    Err(BuildError::Step { step, stderr: end_of(&run.stderr) })
}

fn end_of(text: &[u8]) -> String {
    String::from_utf8_lossy(&text[text.len().saturating_sub(SHOWN)..]).trim().to_owned()
}

/// The ELF inside the compressed kernel of a package's /boot.
fn vmlinux(boot: &Path) -> Result<Vec<u8>, BuildError> {
    let entries = fs::read_dir(boot).map_err(|e| BuildError::File(boot.into(), e))?;
    let path = entries.flatten().map(|e| e.path()).find(|p| p.display().to_string().contains("vmlinuz-"));
    let path = path.ok_or(BuildError::Kernel)?;
    let image = fs::read(&path).map_err(|e| BuildError::File(path.clone(), e))?;
    for (program, at) in kernel_payload::candidates(&image) {
        let unpacked = unpack(program, &image[at..])?;
        if unpacked.starts_with(b"\x7fELF") {
            return Ok(unpacked);
        }
    }
    Err(BuildError::Kernel)
}

/// Pipes bytes through an unpacker. What follows the compressed part makes it complain, so its exit code says nothing; the
/// caller looks at what came out.
fn unpack(program: &'static str, bytes: &[u8]) -> Result<Vec<u8>, BuildError> {
    let mut arguments = vec!["-dc"];
    if program == "xz" {
        arguments.push("--single-stream");
    }
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| BuildError::Program(program, e))?;
    let mut stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Some(stdin) = &mut stdin {
                // It may end before it has read what is no part of its stream.
                let _ = stdin.write_all(bytes);
            }
        });
        child.wait_with_output()
    });
    Ok(output.map_err(|e| BuildError::Program(program, e))?.stdout)
}
