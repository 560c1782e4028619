//! A content-addressed directory of immutable files.
//!
//! # Layout on disk
//! ```text
//! DIR/sha256/ab/abcdef…   one file per content, named by its SHA-256 (64 lower-case hex digits), mode 0444, sparse
//! DIR/tmp/<random>        a writer's file in progress, held under an exclusive flock(2) by the process that writes it
//! ```
//!
//! # What holds
//! - A file under `sha256/` is complete: it was written elsewhere, fsync'ed, and renamed into place, and its directory
//!   was fsync'ed before [`Writer::commit`] returned. A crash leaves at most a file in `tmp/`.
//! - [`Store::open`] removes files in `tmp/` that no living process holds the lock of, so several processes may share
//!   one store: the kernel drops a dead process's locks.
//! - Names are checked before they become paths ([`is_sha256_hex`]), so no caller can reach outside the directory.
//! - Content is never overwritten. Committing content that is there already gives the same result and keeps the old file.
//!
//! The store checks content against its name when it is written. [`Store::verify`] does so again for a file at rest.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write};
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};

use crate::digest::{Digest, Hasher, SHA256_HEX_LEN, is_sha256_hex};

/// Bytes collected before they are hashed and written.
const WRITE_BUFFER_BYTES: usize = 256 * 1024;
/// Runs of zeros are left out of the file in units of this size (the page size, and the block size of common file systems).
const SPARSE_BLOCK_BYTES: usize = 4096;
/// How often creating a temporary file is tried when another process cleans it away before it could be locked.
const CREATE_ATTEMPTS: u32 = 16;
/// Largest content a writer takes unless told otherwise: 1 TiB.
pub const DEFAULT_LIMIT_BYTES: u64 = 1 << 40;

/// Why an operation on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A system call on a file of the store failed.
    #[error("can't {operation} {path}")]
    Io {
        /// What was tried, as a verb phrase.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The content is not what its sender promised.
    #[error("content has SHA-256 {actual}, but {expected} was expected")]
    DigestMismatch {
        /// What the caller expected.
        expected: String,
        /// What the bytes are.
        actual: String,
    },
    /// A name is not a SHA-256 digest.
    #[error("'{0}' is not a SHA-256 digest (64 lower-case hexadecimal digits)")]
    BadName(String),
    /// The named content is not in the store.
    #[error("no content {0} in the store")]
    Missing(String),
}

fn io_error<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io { operation, path: path.to_owned(), source }
}

/// One file of the store, as [`Store::list`] reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The content's name: SHA-256 in hexadecimal.
    pub sha256: String,
    /// Length of the content in bytes.
    pub size: u64,
    /// Bytes that it occupies on disk (less than `size` where it is sparse).
    pub allocated: u64,
}

/// A content-addressed directory. Cheap to clone; see the module's documentation.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// Opens the store at `dir`, making it (and its parents) if it isn't there, and removes what crashed writers left.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the directory can't be made, read or cleaned.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let store = Self { dir: dir.into() };
        for part in [store.objects_dir(), store.tmp_dir()] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(&part)
                .map_err(io_error("create directory", &part))?;
        }
        sync_dir(&store.dir)?;
        store.remove_leftovers()?;
        Ok(store)
    }

    /// Starts writing new content.
    ///
    /// # Errors
    /// [`StoreError::Io`] if no temporary file can be made.
    pub fn writer(&self) -> Result<Writer, StoreError> {
        let (file, path) = self.create_tmp()?;
        Ok(Writer {
            store: self.clone(),
            file,
            path,
            hasher: Hasher::new(),
            buffer: Vec::with_capacity(WRITE_BUFFER_BYTES),
            limit: DEFAULT_LIMIT_BYTES,
        })
    }

    /// Where the content named `sha256` is, if it is in the store. A malformed name is in no store.
    #[must_use]
    pub fn path(&self, sha256: &str) -> Option<PathBuf> {
        let path = self.object_path(sha256)?;
        path.is_file().then_some(path)
    }

    /// Removes content; `false` if it wasn't there. Processes that have the file open keep it.
    ///
    /// # Errors
    /// [`StoreError::BadName`], or [`StoreError::Io`] if it can't be removed.
    pub fn remove(&self, sha256: &str) -> Result<bool, StoreError> {
        let path = self.object_path(sha256).ok_or_else(|| StoreError::BadName(sha256.to_owned()))?;
        match fs::remove_file(&path) {
            Ok(()) => sync_dir(path.parent().unwrap_or(&self.dir)).map(|()| true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(io_error("remove", &path)(e)),
        }
    }

    /// All content, ordered by name. Foreign files in the directory are not listed.
    ///
    /// # Errors
    /// [`StoreError::Io`] if a directory can't be read.
    pub fn list(&self) -> Result<Vec<Entry>, StoreError> {
        let mut entries = Vec::new();
        for fan in read_dir(&self.objects_dir())? {
            if !fan.is_dir() {
                continue;
            }
            for path in read_dir(&fan)? {
                let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
                if self.object_path(name).as_deref() != Some(&path) {
                    continue;
                }
                match fs::metadata(&path) {
                    Ok(m) => entries.push(Entry {
                        sha256: name.to_owned(),
                        size: m.len(),
                        allocated: m.blocks() * 512,
                    }),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {} // removed meanwhile
                    Err(e) => return Err(io_error("examine", &path)(e)),
                }
            }
        }
        entries.sort_unstable_by(|a, b| a.sha256.cmp(&b.sha256));
        Ok(entries)
    }

    /// Reads the content named `sha256` again and checks that it still is what its name says.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::DigestMismatch`] if the file was damaged, or [`StoreError::Io`].
    pub fn verify(&self, sha256: &str) -> Result<Digest, StoreError> {
        let path = self.path(sha256).ok_or_else(|| StoreError::Missing(sha256.to_owned()))?;
        let mut file = File::open(&path).map_err(io_error("open", &path))?;
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; WRITE_BUFFER_BYTES];
        loop {
            match file.read(&mut buffer).map_err(io_error("read", &path))? {
                0 => break,
                n => hasher.update(&buffer[..n]),
            }
        }
        let digest = hasher.finish();
        if digest.sha256 == sha256 {
            Ok(digest)
        } else {
            Err(StoreError::DigestMismatch { expected: sha256.to_owned(), actual: digest.sha256 })
        }
    }

    fn objects_dir(&self) -> PathBuf {
        self.dir.join("sha256")
    }

    fn tmp_dir(&self) -> PathBuf {
        self.dir.join("tmp")
    }

    /// The path of an object, whether it exists or not; `None` if the name isn't a digest.
    fn object_path(&self, sha256: &str) -> Option<PathBuf> {
        is_sha256_hex(sha256).then(|| self.objects_dir().join(&sha256[..2]).join(sha256))
    }

    /// Makes a temporary file and locks it. Between the two another process's [`Store::open`] may take it for a
    /// leftover; then it has no name any more, and we try again.
    fn create_tmp(&self) -> Result<(File, PathBuf), StoreError> {
        let dir = self.tmp_dir();
        for _ in 0..CREATE_ATTEMPTS {
            let path = dir.join(random_name());
            let file =
                match OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path) {
                    Ok(file) => file,
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                    Err(e) => return Err(io_error("create", &path)(e)),
                };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => continue, // being cleaned away
                Err(TryLockError::Error(e)) => return Err(io_error("lock", &path)(e)),
            }
            if file.metadata().map_err(io_error("examine", &path))?.nlink() > 0 {
                return Ok((file, path));
            }
        }
        let source = io::Error::other("temporary files are being removed as fast as they are made");
        Err(StoreError::Io { operation: "create a file in", path: dir, source })
    }

    fn remove_leftovers(&self) -> Result<(), StoreError> {
        for path in read_dir(&self.tmp_dir())? {
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue, // committed or cleaned meanwhile
                Err(e) => return Err(io_error("open", &path)(e)),
            };
            // With the lock in hand no writer lives. The name is checked to be still this file's own, since names
            // could be reused; they are random, so this is only a matter of principle.
            if file.try_lock().is_err() {
                continue;
            }
            let ours = file.metadata().map_err(io_error("examine", &path))?.ino();
            match fs::metadata(&path) {
                Ok(m) if m.ino() == ours => {
                    tracing::info!(path = %path.display(), bytes = m.len(), "removing what a crashed writer left");
                    match fs::remove_file(&path) {
                        Err(e) if e.kind() != io::ErrorKind::NotFound => {
                            return Err(io_error("remove", &path)(e));
                        }
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// New content on its way into the store. Dropping it without [`Writer::commit`] removes what was written.
///
/// Long runs of zeros become holes in the file.
pub struct Writer {
    store: Store,
    file: File,
    path: PathBuf,
    hasher: Hasher,
    buffer: Vec<u8>,
    limit: u64,
}

impl Writer {
    /// Refuses content longer than `bytes` (default [`DEFAULT_LIMIT_BYTES`]): a write beyond fails with
    /// [`io::ErrorKind::FileTooLarge`].
    #[must_use]
    pub fn limit(mut self, bytes: u64) -> Self {
        self.limit = bytes;
        self
    }

    /// Number of bytes written so far.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.hasher.size() + self.buffer.len() as u64
    }

    /// Writes out the file in progress and gives its path, so that it can be examined before it is committed.
    /// The path is gone after commit or drop.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the rest can't be written.
    pub fn flushed_path(&mut self) -> Result<&Path, StoreError> {
        self.write_out().map_err(io_error("write", &self.path))?;
        self.file.set_len(self.hasher.size()).map_err(io_error("set length of", &self.path))?;
        Ok(&self.path)
    }

    /// Makes the content part of the store and gives its digest. When it returns, the content survives a crash.
    ///
    /// # Errors
    /// [`StoreError::DigestMismatch`] if `expected` (SHA-256 in hexadecimal) is given and the content is another;
    /// [`StoreError::Io`]. In each case the store is as before.
    pub fn commit(mut self, expected: Option<&str>) -> Result<Digest, StoreError> {
        self.flushed_path()?;
        let digest = std::mem::take(&mut self.hasher).finish();
        if let Some(expected) = expected
            && !expected.eq_ignore_ascii_case(&digest.sha256)
        {
            return Err(StoreError::DigestMismatch { expected: shorten(expected), actual: digest.sha256 });
        }
        if self.store.path(&digest.sha256).is_some() {
            return Ok(digest);
        }
        let target = self
            .store
            .object_path(&digest.sha256)
            .ok_or_else(|| StoreError::BadName(digest.sha256.clone()))?;
        let fan = target.parent().unwrap_or(&self.store.dir).to_owned();
        match fs::create_dir(&fan) {
            Ok(()) => sync_dir(&self.store.objects_dir())?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(io_error("create directory", &fan)(e)),
        }
        self.file
            .set_permissions(fs::Permissions::from_mode(0o444))
            .map_err(io_error("set mode of", &self.path))?;
        self.file.sync_all().map_err(io_error("sync", &self.path))?;
        fs::rename(&self.path, &target).map_err(io_error("move into place", &target))?;
        sync_dir(&fan)?;
        Ok(digest)
    }

    /// Hashes and writes what is buffered, leaving out blocks of zeros.
    fn write_out(&mut self) -> io::Result<()> {
        let mut offset = self.hasher.size();
        let bytes = std::mem::take(&mut self.buffer);
        let mut run = 0..0; // bytes to be written that follow each other
        for (index, block) in bytes.chunks(SPARSE_BLOCK_BYTES).enumerate() {
            let start = index * SPARSE_BLOCK_BYTES;
            if block.iter().all(|&b| b == 0) {
                self.file.write_all_at(&bytes[run.clone()], offset + run.start as u64)?;
                run = start + block.len()..start + block.len();
            } else {
                run.end = start + block.len();
            }
        }
        self.file.write_all_at(&bytes[run.clone()], offset + run.start as u64)?;
        self.hasher.update(&bytes);
        offset += bytes.len() as u64;
        debug_assert_eq!(offset, self.hasher.size());
        self.buffer = bytes;
        self.buffer.clear();
        Ok(())
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.size() + bytes.len() as u64 > self.limit {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("content is longer than the limit of {} bytes", self.limit),
            ));
        }
        let n = bytes.len().min(WRITE_BUFFER_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..n]);
        if self.buffer.len() == WRITE_BUFFER_BYTES {
            self.write_out()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_out()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // After a commit that moved the file, the name is gone and this finds nothing.
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.path.display(), error = %e, "can't remove an unfinished file");
            }
            _ => {}
        }
    }
}

/// A digest that came from outside, cut to a length that is fit for a message.
fn shorten(text: &str) -> String {
    text.chars().take(2 * SHA256_HEX_LEN).collect()
}

fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(io_error("sync directory", dir))
}

fn read_dir(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    fs::read_dir(dir)
        .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect())
        .map_err(io_error("read directory", dir))
}

/// A file name that nobody else uses. Exclusive creation makes sure of it, so the kernel's per-process random state
/// that the standard library seeds its hash maps with is good enough.
fn random_name() -> String {
    use std::hash::{BuildHasher as _, RandomState};
    let (a, b) = (RandomState::new(), RandomState::new());
    format!("{:016x}{:016x}", a.hash_one(std::process::id()), b.hash_one(std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let store = Store::open(dir.path().join("store")).expect("open");
        (dir, store)
    }

    fn put(store: &Store, bytes: &[u8]) -> Digest {
        let mut writer = store.writer().expect("writer");
        writer.write_all(bytes).expect("write");
        writer.commit(None).expect("commit")
    }

    fn tmp_files(store: &Store) -> usize {
        read_dir(&store.tmp_dir()).expect("tmp").len()
    }

    #[test]
    fn committed_content_is_found_by_its_digest_and_is_read_only() {
        let (_dir, store) = store();
        let digest = put(&store, b"abc");
        let path = store.path(&digest.sha256).expect("present");
        assert!(path.ends_with(format!("sha256/ba/{}", digest.sha256)));
        assert_eq!(fs::read(&path).expect("read"), b"abc");
        assert_eq!(fs::metadata(&path).expect("metadata").permissions().mode() & 0o777, 0o444);
        assert_eq!(tmp_files(&store), 0);
        assert_eq!(store.verify(&digest.sha256).expect("verify"), digest);
    }

    #[test]
    fn empty_content_is_content() {
        let (_dir, store) = store();
        let digest = put(&store, b"");
        assert_eq!(digest.size, 0);
        assert!(store.path(&digest.sha256).is_some());
    }

    #[test]
    fn same_content_twice_is_stored_once() {
        let (_dir, store) = store();
        assert_eq!(put(&store, b"twice"), put(&store, b"twice"));
        assert_eq!(store.list().expect("list").len(), 1);
        assert_eq!(tmp_files(&store), 0);
    }

    #[test]
    fn dropped_writer_leaves_nothing() {
        let (_dir, store) = store();
        let mut writer = store.writer().expect("writer");
        writer.write_all(&vec![7; WRITE_BUFFER_BYTES * 2]).expect("write");
        assert_eq!(tmp_files(&store), 1);
        drop(writer);
        assert_eq!(tmp_files(&store), 0);
        assert!(store.list().expect("list").is_empty());
    }

    #[test]
    fn wrong_digest_is_refused_and_leaves_nothing() {
        let (_dir, store) = store();
        let mut writer = store.writer().expect("writer");
        writer.write_all(b"abc").expect("write");
        let error = writer.commit(Some(&"0".repeat(64))).expect_err("refused");
        assert!(matches!(error, StoreError::DigestMismatch { .. }), "{error}");
        assert_eq!(tmp_files(&store), 0);
        assert!(store.list().expect("list").is_empty());
    }

    #[test]
    fn expected_digest_may_be_upper_case() {
        let (_dir, store) = store();
        let mut writer = store.writer().expect("writer");
        writer.write_all(b"abc").expect("write");
        let name = "BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD";
        assert_eq!(writer.commit(Some(name)).expect("commit").sha256, name.to_lowercase());
    }

    #[test]
    fn limit_is_enforced_to_the_byte() {
        let (_dir, store) = store();
        let mut writer = store.writer().expect("writer").limit(5);
        writer.write_all(b"12345").expect("fits");
        let error = writer.write_all(b"6").expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(writer.commit(None).expect("commit").size, 5);
    }

    #[test]
    fn open_removes_leftovers_of_dead_writers_and_spares_living_ones() {
        let (_dir, store) = store();
        fs::write(store.tmp_dir().join("leftover"), b"half").expect("write");
        let mut living = store.writer().expect("writer");
        living.write_all(b"still here").expect("write");
        let again = Store::open(&store.dir).expect("open again");
        assert_eq!(tmp_files(&again), 1);
        let digest = living.commit(None).expect("commit");
        assert!(again.path(&digest.sha256).is_some());
    }

    #[test]
    fn remove_says_whether_there_was_something() {
        let (_dir, store) = store();
        let digest = put(&store, b"gone soon");
        assert!(store.remove(&digest.sha256).expect("remove"));
        assert!(!store.remove(&digest.sha256).expect("remove again"));
        assert!(store.path(&digest.sha256).is_none());
        assert!(matches!(store.remove("../tmp"), Err(StoreError::BadName(_))));
    }

    #[test]
    fn list_ignores_foreign_files() {
        let (_dir, store) = store();
        let digest = put(&store, b"listed");
        let fan = store.path(&digest.sha256).expect("path").parent().expect("parent").to_owned();
        fs::write(fan.join("README"), b"x").expect("write");
        fs::write(store.objects_dir().join("stray"), b"x").expect("write");
        let list = store.list().expect("list");
        assert_eq!(
            list.iter().map(|e| (e.sha256.as_str(), e.size)).collect::<Vec<_>>(),
            [(digest.sha256.as_str(), 6)]
        );
    }

    #[test]
    fn zeros_take_no_room() {
        let (_dir, store) = store();
        let mut content = vec![0; 8 << 20];
        content[5_000_000] = 1;
        let digest = put(&store, &content);
        let entry = &store.list().expect("list")[0];
        assert_eq!(entry.size, content.len() as u64);
        assert!(entry.allocated < 1 << 20, "{} bytes allocated", entry.allocated);
        assert_eq!(fs::read(store.path(&digest.sha256).expect("path")).expect("read"), content);
    }

    #[test]
    fn damaged_content_is_noticed() {
        let (_dir, store) = store();
        let digest = put(&store, b"sound");
        let path = store.path(&digest.sha256).expect("path");
        fs::remove_file(&path).expect("remove");
        fs::write(&path, b"rotten").expect("write");
        assert!(matches!(store.verify(&digest.sha256), Err(StoreError::DigestMismatch { .. })));
    }

    #[test]
    fn many_threads_commit_the_same_and_different_content() {
        let (_dir, store) = store();
        std::thread::scope(|scope| {
            for n in 0..8_u8 {
                let store = store.clone();
                scope.spawn(move || {
                    put(&store, b"same");
                    put(&store, &[n; 10_000]);
                    Store::open(&store.dir).expect("open");
                });
            }
        });
        assert_eq!(store.list().expect("list").len(), 9);
        assert_eq!(tmp_files(&store), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn content_comes_back_whatever_its_pieces(
            pieces in proptest::collection::vec((any::<bool>(), 0..200_000_usize), 0..8)
        ) {
            let (_dir, store) = store();
            let mut writer = store.writer().expect("writer");
            let mut all = Vec::new();
            for (index, (zero, len)) in pieces.iter().enumerate() {
                let piece = vec![if *zero { 0 } else { 1 + index as u8 }; *len];
                writer.write_all(&piece).expect("write");
                all.extend_from_slice(&piece);
            }
            let mut hasher = Hasher::new();
            hasher.update(&all);
            let expected = hasher.finish();
            prop_assert_eq!(&writer.commit(Some(&expected.sha256)).expect("commit"), &expected);
            prop_assert!(fs::read(store.path(&expected.sha256).expect("path")).expect("read") == all);
        }

        #[test]
        fn no_name_reaches_outside(name in "\\PC*") {
            let (_dir, store) = store();
            prop_assert!(store.path(&name).is_none());
        }
    }
}
