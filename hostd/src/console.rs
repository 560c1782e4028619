//! The serial consoles of servers, as the VMM leaves them: `console.log`, renamed to `console.log.1` (replacing an older
//! one) whenever it would pass its limit.
//!
//! Offsets count from the start of the VMM, but files only know their own length. So `console.json` notes which file is
//! the current one and how many bytes came before it; [`Track::follow`] moves it on when files were exchanged. If more than
//! one exchange was missed, bytes in between are not counted: offsets never go back, and a reader just goes on with what
//! is kept.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::MetadataExt,
    path::Path,
    time::SystemTime,
};

use serde::{Deserialize, Serialize};

use crate::{
    files::{self, Durability, FileError},
    paths::ServerDir,
};

/// Most bytes of one answer, before base64.
pub const ANSWER_MAX: usize = 256 << 10;

/// Which file is which, though names move: inode number and birth (numbers are used again).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct FileId {
    inode: u64,
    birth_ns: u128,
}

/// One console file, as far as it had been written when it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    id: FileId,
    size: u64,
}

/// What `console.json` says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Track {
    /// Bytes since the VMM's start that came before the current file.
    base: u64,
    /// Length of the current file when it was last seen.
    seen: u64,
    current: Option<FileId>,
}

impl Track {
    /// Moves on to the files as they are now.
    fn follow(self, old: Option<Part>, current: Option<Part>) -> Self {
        let Some(now) = current else {
            // Between rename and create, or no output yet: what was current is `.1` now; wait for the new one.
            return self;
        };
        let base = match self.current {
            None => old.map_or(0, |old| old.size),
            Some(id) if id == now.id => self.base,
            // One exchange: the old one is what was current, with its final length.
            Some(id) if old.is_some_and(|old| old.id == id) => self.base + old.map_or(0, |old| old.size),
            // More than one.
            Some(_) => self.base + self.seen + old.map_or(0, |old| old.size),
        };
        Self { base, seen: now.size, current: Some(now.id) }
    }
}

/// Forgets the console of an earlier VMM; its end is kept as `console.log.previous`.
///
/// # Errors
/// [`FileError`].
pub fn start_over(dir: &ServerDir) -> Result<(), FileError> {
    // What isn't a file is no console of a VMM that does what it should.
    if fs::symlink_metadata(dir.console_log()).is_ok_and(|found| found.is_file()) {
        fs::rename(dir.console_log(), dir.console_log_previous())
            .map_err(|source| FileError::Write { path: dir.console_log_previous(), source })?;
    }
    files::remove_file(&dir.console_log_old())?;
    files::remove_file(&dir.console_track())
}

/// The last `lines` lines of what is kept (all without), at most [`ANSWER_MAX`] bytes; invalid UTF-8 is replaced.
///
/// # Errors
/// Of reading the files; a console without output is empty.
pub fn tail(dir: &ServerDir, lines: Option<u32>) -> Result<String, FileError> {
    let mut open = Open::of(dir)?;
    let read = |source| FileError::Read { path: dir.console_log(), source };
    let current = open.read_current_end(ANSWER_MAX as u64).map_err(read)?;
    let mut bytes = open.read_old_end((ANSWER_MAX - current.len()) as u64).map_err(read)?;
    bytes.extend(current);
    let start = lines.map_or(0, |lines| start_of_last_lines(&bytes, lines));
    Ok(String::from_utf8_lossy(&bytes[start..]).into_owned())
}

fn start_of_last_lines(bytes: &[u8], lines: u32) -> usize {
    if lines == 0 {
        return bytes.len();
    }
    let end = bytes.strip_suffix(b"\n").unwrap_or(bytes).len();
    let breaks = bytes[..end].iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
    breaks.map(|(at, _)| at + 1).nth(lines as usize - 1).unwrap_or(0)
}

/// Bytes from an offset on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Offset after the last byte.
    pub next_offset: u64,
    /// At most [`ANSWER_MAX`] bytes.
    pub data: Vec<u8>,
}

/// Reads from `offset` on; what is no longer kept is skipped, and an offset beyond the end (of an earlier VMM, say) is
/// brought back to the end. Notes in `console.json` when files were exchanged.
///
/// # Errors
/// [`FileError`].
pub fn read(dir: &ServerDir, offset: u64) -> Result<Chunk, FileError> {
    let mut open = Open::of(dir)?;
    let track = follow(dir, &open)?;
    let end = track.base + track.seen;
    let older = open.old_size().min(track.base);
    let from = if offset > end { end } else { offset.max(track.base - older) };
    let most = (end - from).min(ANSWER_MAX as u64);
    let from_old = track.base.saturating_sub(from).min(most);
    let error = |source| FileError::Read { path: dir.console_log(), source };
    let mut data = Vec::new();
    if from_old > 0 {
        let at = from - (track.base - open.old_size());
        data = open.read_old(at, from_old).map_err(error)?;
    }
    if data.len() as u64 == from_old {
        let at = from.saturating_sub(track.base);
        data.extend(open.read_current(at, most - from_old).map_err(error)?);
    }
    Ok(Chunk { next_offset: from + data.len() as u64, data })
}

/// Looks whether files were exchanged, and notes it. To be called now and then, so that no exchange is missed.
///
/// # Errors
/// [`FileError`].
pub fn observe(dir: &ServerDir) -> Result<(), FileError> {
    follow(dir, &Open::of(dir)?).map(|_| ())
}

fn follow(dir: &ServerDir, open: &Open) -> Result<Track, FileError> {
    let noted = files::read_json::<Track>(&dir.console_track()).unwrap_or_default().unwrap_or_default();
    let track =
        noted.follow(open.old.as_ref().map(|(part, _)| *part), open.current.as_ref().map(|(part, _)| *part));
    if (track.base, track.current) != (noted.base, noted.current) {
        files::replace_json(&dir.console_track(), &track, Durability::Process)?;
    }
    Ok(track)
}

/// Both files, opened so that an exchange meanwhile doesn't matter.
struct Open {
    old: Option<(Part, File)>,
    current: Option<(Part, File)>,
}

impl Open {
    fn of(dir: &ServerDir) -> Result<Self, FileError> {
        loop {
            let current = open_part(&dir.console_log())?;
            let old = open_part(&dir.console_log_old())?;
            // Exchanged between the two calls: the same file twice.
            let same =
                old.as_ref().zip(current.as_ref()).is_some_and(|((old, _), (new, _))| old.id == new.id);
            if !same {
                return Ok(Self { old, current });
            }
        }
    }

    fn old_size(&self) -> u64 {
        self.old.as_ref().map_or(0, |(part, _)| part.size)
    }

    fn read_old(&mut self, from: u64, most: u64) -> io::Result<Vec<u8>> {
        read_part(self.old.as_mut(), from, most)
    }

    fn read_current(&mut self, from: u64, most: u64) -> io::Result<Vec<u8>> {
        read_part(self.current.as_mut(), from, most)
    }

    fn read_old_end(&mut self, most: u64) -> io::Result<Vec<u8>> {
        self.read_old(self.old_size().saturating_sub(most), most)
    }

    fn read_current_end(&mut self, most: u64) -> io::Result<Vec<u8>> {
        let size = self.current.as_ref().map_or(0, |(part, _)| part.size);
        self.read_current(size.saturating_sub(most), most)
    }
}

fn open_part(path: &Path) -> Result<Option<(Part, File)>, FileError> {
    let open = || -> io::Result<(Part, File)> {
        let file = files::open_untrusted(path)?;
        let metadata = file.metadata()?;
        let birth = metadata.created().ok().and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
        let id = FileId { inode: metadata.ino(), birth_ns: birth.map_or(0, |birth| birth.as_nanos()) };
        Ok((Part { id, size: metadata.len() }, file))
    };
    match open() {
        Ok(opened) => Ok(Some(opened)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(FileError::Read { path: path.to_owned(), source }),
    }
}

fn read_part(part: Option<&mut (Part, File)>, from: u64, most: u64) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    if let Some((part, file)) = part {
        file.seek(SeekFrom::Start(from))?;
        file.take(most.min(part.size.saturating_sub(from))).read_to_end(&mut data)?;
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use mote_host_api::ServerId;
    use proptest::prelude::*;

    use super::*;
    use crate::paths::StateDir;

    fn server() -> (tempfile::TempDir, ServerDir) {
        let dir = tempfile::tempdir().unwrap();
        let server = StateDir::new(dir.path()).server(ServerId::new());
        fs::create_dir_all(server.vm_run()).unwrap();
        (dir, server)
    }

    /// Writes as the VMM does.
    fn write(dir: &ServerDir, bytes: &[u8], limit: u64) {
        let path = dir.console_log();
        if fs::metadata(&path).is_ok_and(|m| m.len() + bytes.len() as u64 > limit) {
            fs::rename(&path, dir.console_log_old()).unwrap();
        }
        let mut file = fs::OpenOptions::new().append(true).create(true).open(&path).unwrap();
        file.write_all(bytes).unwrap();
    }

    #[test]
    fn a_console_without_output_is_empty() {
        let (_guard, dir) = server();
        assert_eq!(tail(&dir, Some(5)).unwrap(), "");
        assert_eq!(read(&dir, 7).unwrap(), Chunk { next_offset: 0, data: vec![] });
    }

    #[test]
    fn last_lines_span_both_files() {
        let (_guard, dir) = server();
        fs::write(dir.console_log_old(), "a\nb\n").unwrap();
        fs::write(dir.console_log(), "c\nd").unwrap();
        let of = |lines| tail(&dir, lines).unwrap();
        assert_eq!(of(None), "a\nb\nc\nd");
        assert_eq!(of(Some(1)), "d");
        assert_eq!(of(Some(3)), "b\nc\nd");
        assert_eq!(of(Some(9)), "a\nb\nc\nd");
        assert_eq!(of(Some(0)), "");
        fs::write(dir.console_log(), b"x\xff\n").unwrap();
        assert_eq!(of(Some(1)), "x\u{fffd}\n");
    }

    #[test]
    fn the_answer_is_bounded() {
        let (_guard, dir) = server();
        fs::write(dir.console_log_old(), vec![b'o'; ANSWER_MAX]).unwrap();
        fs::write(dir.console_log(), vec![b'n'; ANSWER_MAX - 1]).unwrap();
        let text = tail(&dir, None).unwrap();
        assert_eq!(text.len(), ANSWER_MAX);
        assert!(text.starts_with("on"));
        assert_eq!(read(&dir, 0).unwrap().data.len(), ANSWER_MAX);
    }

    #[test]
    fn missed_exchanges_lose_bytes_but_never_turn_offsets_back() {
        let (_guard, dir) = server();
        write(&dir, b"0123456", 10);
        assert_eq!(read(&dir, 0).unwrap().next_offset, 7);
        for _ in 0..4 {
            write(&dir, b"abcdefg", 10);
        }
        let chunk = read(&dir, 7).unwrap();
        assert_eq!(chunk.data, b"abcdefgabcdefg");
        assert!(chunk.next_offset >= 21);
        assert_eq!(read(&dir, chunk.next_offset).unwrap().data, b"");
    }

    #[test]
    fn a_new_vmm_starts_at_zero_and_an_old_offset_is_brought_back() {
        let (_guard, dir) = server();
        write(&dir, b"before", 100);
        assert_eq!(read(&dir, 0).unwrap().next_offset, 6);
        start_over(&dir).unwrap();
        assert_eq!(fs::read(dir.console_log_previous()).unwrap(), b"before");
        write(&dir, b"new", 100);
        assert_eq!(read(&dir, 6).unwrap(), Chunk { next_offset: 3, data: vec![] });
        assert_eq!(read(&dir, 0).unwrap().data, b"new");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_reader_that_keeps_up_sees_every_byte_once(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..20), 1..40),
        ) {
            let (_guard, dir) = server();
            let (mut offset, mut seen) = (0, Vec::new());
            for piece in &pieces {
                write(&dir, piece, 20);
                let chunk = read(&dir, offset).unwrap();
                offset = chunk.next_offset;
                seen.extend(chunk.data);
            }
            prop_assert_eq!(seen, pieces.concat());
            prop_assert_eq!(offset, pieces.concat().len() as u64);
        }
    }
}
