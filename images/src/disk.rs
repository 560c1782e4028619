//! Disks of servers, made from images.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::{Whence, lseek};

/// Why a disk could not be made. Nothing is left at the destination then.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A system call failed.
    #[error("can't {operation} {path}")]
    Io {
        /// What was tried, as a verb phrase.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The wanted disk is smaller than the image.
    #[error("a disk of {wanted} bytes can't hold the image's {image} bytes")]
    TooSmall {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes of the image.
        image: u64,
    },
}

/// How the content got into a new disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloneMethod {
    /// The file system shares the blocks until they are written (FICLONE).
    Shared,
    /// Data was copied, holes were left out.
    Copied,
}

/// Makes `dst` a disk of `size` bytes that begins with the content of `src`; the rest reads as zeros.
///
/// The new file (mode 0600) appears at `dst` complete or not at all: it is made as `dst` + `.partial` and renamed.
/// Blocks are shared where the file system can, else only data is copied. It is not synced: a disk that was just
/// made is made again after a power failure.
///
/// # Errors
/// [`DiskError::TooSmall`] if the image is longer than `size`; [`DiskError::Io`].
pub fn clone_sparse(src: &Path, dst: &Path, size: u64) -> Result<CloneMethod, DiskError> {
    let err = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| DiskError::Io { operation, path, source }
    };
    let source = File::open(src).map_err(err("open", src))?;
    let image = source.metadata().map_err(err("examine", src))?.len();
    if image > size {
        return Err(DiskError::TooSmall { wanted: size, image });
    }
    let partial = partial_path(dst);
    let target = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)
        .map_err(err("create", &partial))?;
    let fill = || -> Result<CloneMethod, DiskError> {
        let method = if share(&source, &target) {
            CloneMethod::Shared
        } else {
            copy_data(&source, &target, image).map_err(err("copy the image to", &partial))?;
            CloneMethod::Copied
        };
        target.set_len(size).map_err(err("set length of", &partial))?;
        fs::rename(&partial, dst).map_err(err("move into place", dst))?;
        Ok(method)
    };
    fill().inspect_err(|_| {
        if let Err(e) = fs::remove_file(&partial) {
            tracing::warn!(path = %partial.display(), error = %e, "can't remove an unfinished disk");
        }
    })
}

fn partial_path(dst: &Path) -> PathBuf {
    let mut name = dst.as_os_str().to_owned();
    name.push(".partial");
    PathBuf::from(name)
}

/// Shares all blocks of `source` with `target`; `false` where the file system can't (or they are on different ones).
fn share(source: &File, target: &File) -> bool {
    // SAFETY: FICLONE (ioctl_ficlonerange(2)) takes two open file descriptors by value and touches no memory of ours.
    // Both files are borrowed for the whole call.
    unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONE, source.as_raw_fd()) == 0 }
}

/// Copies the data extents of the first `len` bytes; where the file system can't tell, everything is data.
fn copy_data(source: &File, target: &File, len: u64) -> io::Result<()> {
    target.set_len(len)?;
    let mut position = 0;
    while position < len {
        let start = match seek(source, position, Whence::SeekData) {
            Ok(start) => start.min(len),
            Err(nix::Error::ENXIO) => break, // only a hole up to the end
            Err(nix::Error::EINVAL) => position,
            Err(e) => return Err(e.into()),
        };
        let end = match seek(source, start, Whence::SeekHole) {
            Ok(end) => end.min(len),
            Err(nix::Error::EINVAL | nix::Error::ENXIO) => len,
            Err(e) => return Err(e.into()),
        };
        copy_range(source, target, start, end)?;
        position = end.max(position + 1);
    }
    Ok(())
}

fn seek(file: &File, offset: u64, whence: Whence) -> nix::Result<u64> {
    let offset = i64::try_from(offset).map_err(|_| nix::Error::EOVERFLOW)?;
    lseek(file, offset, whence).map(|position| position.unsigned_abs())
}

/// Copies `start..end`; the standard library lets the kernel do it where it can (copy_file_range(2)).
fn copy_range(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut from, mut to) = (source, target);
    from.seek(SeekFrom::Start(start))?;
    to.seek(SeekFrom::Start(start))?;
    if io::copy(&mut from.take(end - start), &mut to)? == end - start {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the image became shorter while it was copied"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};

    fn clone(
        content: &[(u64, Vec<u8>)],
        len: u64,
        size: u64,
    ) -> (tempfile::TempDir, Result<CloneMethod, DiskError>) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let src = File::create(dir.path().join("src")).expect("create");
        src.set_len(len).expect("length");
        for (offset, bytes) in content {
            src.write_all_at(bytes, *offset).expect("write");
        }
        let result = clone_sparse(&dir.path().join("src"), &dir.path().join("dst"), size);
        (dir, result)
    }

    #[test]
    fn disk_is_larger_than_image_and_stays_sparse() {
        let (dir, result) = clone(&[(0, b"head".to_vec()), (40 << 20, b"tail".to_vec())], 64 << 20, 1 << 30);
        result.expect("clone");
        let disk = File::open(dir.path().join("dst")).expect("open");
        let metadata = disk.metadata().expect("metadata");
        assert_eq!(metadata.len(), 1 << 30);
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        assert!(metadata.blocks() * 512 < 4 << 20, "{} blocks", metadata.blocks());
        let mut tail = [0; 4];
        disk.read_exact_at(&mut tail, 40 << 20).expect("read");
        assert_eq!(&tail, b"tail");
    }

    #[test]
    fn image_larger_than_disk_is_refused_without_leftovers() {
        let (dir, result) = clone(&[], 4097, 4096);
        assert!(matches!(result, Err(DiskError::TooSmall { wanted: 4096, image: 4097 })));
        assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 1);
    }

    #[test]
    fn failure_leaves_nothing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::write(dir.path().join("src"), b"x").expect("write");
        fs::create_dir(dir.path().join("dst")).expect("a directory in the way");
        let result = clone_sparse(&dir.path().join("src"), &dir.path().join("dst"), 1);
        assert!(matches!(result, Err(DiskError::Io { operation: "move into place", .. })));
        assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 2);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn clone_has_the_images_bytes_then_zeros(
            extents in proptest::collection::vec((0..300_000_u64, 1..9_000_usize), 0..6),
            len in 0..320_000_u64,
            extra in 0..100_000_u64,
        ) {
            let extents: Vec<_> = extents.into_iter()
                .filter(|(offset, n)| offset + *n as u64 <= len)
                .map(|(offset, n)| (offset, vec![0xa5; n]))
                .collect();
            let (dir, result) = clone(&extents, len, len + extra);
            result.expect("clone");
            let mut expected = fs::read(dir.path().join("src")).expect("read");
            expected.resize((len + extra) as usize, 0);
            prop_assert!(fs::read(dir.path().join("dst")).expect("read") == expected);
        }
    }
}
