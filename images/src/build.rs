//! Guest images made on this machine from Debian packages.
//!
//! [`build_debian`] makes a directory with a kernel, an initial ramdisk, a root disk and `image.json`, which names them and
//! the image properties they want ([`Bundle`]). The directory appears whole or not at all. A bundle made by the same recipe
//! is left as it is.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde::{Deserialize, Serialize};

use crate::{kernel_payload, making::Making};

/// Grows with every change of what a bundle contains.
const RECIPE: u32 = 3;
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

/// Which Debian.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// busybox's init, DHCP, SSH with the server's key pair, a page on port 80: boots in the least time.
    #[default]
    Small,
    /// systemd, OpenSSH and cloud-init as the distribution has them.
    CloudInit,
}

impl Variant {
    /// What the script calls it.
    fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::CloudInit => "cloud-init",
        }
    }
}

/// `image.json`: an image of several files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle {
    /// Which recipe made it.
    pub recipe: u32,
    /// Which Debian it is.
    #[serde(default)]
    pub variant: Variant,
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
pub fn bundle(dir: &Path, variant: Variant) -> Option<Bundle> {
    let bundle: Bundle = serde_json::from_slice(&fs::read(dir.join("image.json")).ok()?).ok()?;
    (bundle.recipe == RECIPE && bundle.variant == variant).then_some(bundle)
}

/// Makes a Debian. Needs root, the machine's package sources, and apt, dpkg, cpio, xz, zstd, mmdebstrap, mke2fs and a static
/// busybox. `progress` is told each step.
///
/// # Errors
/// [`BuildError`]; nothing is left of a failed attempt.
pub fn build_debian(
    out: &Path,
    variant: Variant,
    mut progress: impl FnMut(&str),
) -> Result<Bundle, BuildError> {
    if let Some(bundle) = bundle(out, variant) {
        progress("up to date");
        return Ok(bundle);
    }
    let making = Making::new(out, SCRIPT, &FILES)?;
    progress("downloading Debian's 6.12 cloud kernel");
    making.step("kernel", variant.name())?;
    progress("unpacking the kernel");
    making.write("vmlinux", &vmlinux(&making.work().join("kernel/boot"))?)?;
    progress("making the initial ramdisk");
    making.step("modules", variant.name())?;
    progress("making the root file system from Debian's packages (a minute or two)");
    making.step("root", variant.name())?;
    progress("making the disk");
    making.step("disk", variant.name())?;
    let bundle = Bundle {
        recipe: RECIPE,
        variant,
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
        .map_err(|e| BuildError::File(making.made().join("image.json"), e.into()))?;
    making.write("image.json", &json)?;
    making.finish()?;
    Ok(bundle)
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
