//! The images that this host has, by content: fetched from the controller once, however many servers want them at a time.

use std::{
    collections::HashMap,
    io::Write,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bytes::Bytes;
use futures_util::{StreamExt, future::BoxFuture, stream::BoxStream};
use mote_host_api::ImageSpec;
use mote_images::store::{Store, StoreError, Writer};
use tokio::sync::{Semaphore, mpsc};

use crate::parts::{ImageError, Images};

/// Images that are fetched at the same time.
pub const FETCHES_MAX: usize = 2;
/// Pieces of an image that wait for the disk.
const PIECES_MAX: usize = 16;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Where images come from.
pub trait ImageSource: Send + Sync {
    /// Begins to fetch the content of that digest.
    fn fetch<'a>(
        &'a self,
        sha256: &'a str,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<Bytes, BoxError>>, FetchError>>;
}

/// Why an image does not come.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// There is none.
    #[error("no such image")]
    Unknown,
    /// Not now.
    #[error(transparent)]
    Away(BoxError),
}

/// Images in a content-addressed store.
pub struct ImageCache {
    store: Store,
    source: Arc<dyn ImageSource>,
    slots: Semaphore,
    /// One lock per image that is being fetched: who waits for it finds the image there afterwards.
    fetching: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

impl ImageCache {
    /// A cache over a store.
    pub fn new(store: Store, source: Arc<dyn ImageSource>) -> Self {
        Self { store, source, slots: Semaphore::new(FETCHES_MAX), fetching: Mutex::default() }
    }

    fn lock_of(&self, sha256: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
        fetching.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = fetching.get(sha256).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::default();
        fetching.insert(sha256.to_owned(), Arc::downgrade(&lock));
        lock
    }

    async fn get(&self, image: &ImageSpec) -> Result<PathBuf, ImageError> {
        if let Some(path) = self.store.path(&image.sha256) {
            return Ok(path);
        }
        let lock = self.lock_of(&image.sha256);
        let _fetching = lock.lock().await;
        if let Some(path) = self.store.path(&image.sha256) {
            return Ok(path);
        }
        let away = |e: BoxError| ImageError::Away { sha256: image.sha256.clone(), source: e };
        let _slot = self.slots.acquire().await.map_err(|e| away(Box::new(e)))?;
        tracing::info!(image = image.sha256, bytes = image.size, "fetching");
        let pieces = self.source.fetch(&image.sha256).await.map_err(|e| match e {
            FetchError::Unknown => ImageError::Unknown { sha256: image.sha256.clone() },
            FetchError::Away(e) => away(e),
        })?;
        self.store_pieces(image, pieces).await?;
        tracing::info!(image = image.sha256, "fetched");
        self.store.path(&image.sha256).ok_or_else(|| ImageError::Unknown { sha256: image.sha256.clone() })
    }

    /// Hands the pieces to a thread that writes them. If this future is dropped, the thread ends without a commit.
    async fn store_pieces(
        &self,
        image: &ImageSpec,
        mut pieces: BoxStream<'static, Result<Bytes, BoxError>>,
    ) -> Result<(), ImageError> {
        let stored = |e: BoxError| ImageError::Store { sha256: image.sha256.clone(), source: e };
        let (sender, receiver) = mpsc::channel::<Option<Bytes>>(PIECES_MAX);
        let (store, spec) = (self.store.clone(), image.clone());
        let writing = tokio::task::spawn_blocking(move || write(&store, &spec, receiver));
        let mut broken = None;
        while let Some(piece) = pieces.next().await {
            match piece {
                // A closed channel means that the writer has given up; its error is told below.
                Ok(piece) => {
                    if sender.send(Some(piece)).await.is_err() {
                        break;
                    }
                }
                Err(e) => {
                    broken = Some(e);
                    break;
                }
            }
        }
        if broken.is_none() {
            // The end, as opposed to a sender that was dropped on the way.
            let _ = sender.send(None).await;
        }
        drop(sender);
        let written = writing.await.map_err(|e| stored(Box::new(e)))?;
        match (broken, written) {
            (Some(e), _) => Err(ImageError::Away { sha256: image.sha256.clone(), source: e }),
            (None, result) => result,
        }
    }
}

impl Images for ImageCache {
    fn ensure<'a>(&'a self, image: &'a ImageSpec) -> BoxFuture<'a, Result<PathBuf, ImageError>> {
        Box::pin(self.get(image))
    }
}

fn write(
    store: &Store,
    image: &ImageSpec,
    mut pieces: mpsc::Receiver<Option<Bytes>>,
) -> Result<(), ImageError> {
    let sha256 = || image.sha256.clone();
    let stored = |e: StoreError| ImageError::Store { sha256: sha256(), source: Box::new(e) };
    let wrong = |e: BoxError| ImageError::Wrong { sha256: sha256(), source: e };
    let mut writer: Writer = store.writer().map_err(stored)?;
    while let Some(piece) = pieces.blocking_recv() {
        let Some(piece) = piece else {
            return match writer.commit(Some(&image.sha256)) {
                Ok(_) => Ok(()),
                Err(e @ StoreError::DigestMismatch { .. }) => Err(wrong(Box::new(e))),
                Err(e) => Err(stored(e)),
            };
        };
        if writer.size() + piece.len() as u64 > image.size {
            return Err(wrong(format!("more than {} bytes", image.size).into()));
        }
        writer.write_all(&piece).map_err(|e| ImageError::Store { sha256: sha256(), source: Box::new(e) })?;
    }
    Err(wrong("it was broken off".into()))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::stream;
    use sha2::{Digest, Sha256};

    use super::*;

    /// Answers with `content` in pieces of one byte; optionally breaks off.
    struct Source {
        content: Vec<u8>,
        breaks_off: bool,
        asked: AtomicUsize,
    }

    impl ImageSource for Source {
        fn fetch<'a>(
            &'a self,
            _sha256: &'a str,
        ) -> BoxFuture<'a, Result<BoxStream<'static, Result<Bytes, BoxError>>, FetchError>> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            let mut pieces: Vec<Result<Bytes, BoxError>> =
                self.content.iter().map(|byte| Ok(Bytes::copy_from_slice(&[*byte]))).collect();
            if self.breaks_off {
                pieces.pop();
                pieces.push(Err("connection reset".into()));
            }
            Box::pin(async { Ok(stream::iter(pieces).boxed()) })
        }
    }

    fn cache(content: &[u8], breaks_off: bool) -> (tempfile::TempDir, Arc<Source>, ImageCache) {
        let dir = tempfile::tempdir().unwrap();
        let source = Arc::new(Source { content: content.to_vec(), breaks_off, asked: AtomicUsize::new(0) });
        let cache = ImageCache::new(Store::open(dir.path()).unwrap(), source.clone());
        (dir, source, cache)
    }

    fn spec(content: &[u8]) -> ImageSpec {
        ImageSpec { sha256: hex::encode(Sha256::digest(content)), size: content.len() as u64 }
    }

    #[tokio::test]
    async fn many_who_want_an_image_at_once_fetch_it_once() {
        let (_dir, source, cache) = cache(b"kernel", false);
        let spec = spec(b"kernel");
        let paths = futures_util::future::join_all((0..8).map(|_| cache.ensure(&spec))).await;
        for path in paths {
            assert_eq!(std::fs::read(path.unwrap()).unwrap(), b"kernel");
        }
        assert_eq!(source.asked.load(Ordering::SeqCst), 1);
        assert!(cache.lock_of("other").try_lock().is_ok());
        assert_eq!(cache.fetching.lock().unwrap().len(), 1, "finished fetches leave nothing");
    }

    #[tokio::test]
    async fn other_content_more_content_and_a_broken_connection_are_told_apart_and_store_nothing() {
        let (_dir, _, other) = cache(b"kernex", false);
        assert!(matches!(other.ensure(&spec(b"kernel")).await, Err(ImageError::Wrong { .. })));
        let (_dir, _, longer) = cache(b"kernel and more", false);
        assert!(matches!(longer.ensure(&spec(b"kernel")).await, Err(ImageError::Wrong { .. })));
        let (dir, _, broken) = cache(b"kernel", true);
        assert!(matches!(broken.ensure(&spec(b"kernel")).await, Err(ImageError::Away { .. })));
        assert!(Store::open(dir.path()).unwrap().list().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_fetch_that_is_given_up_does_not_block_the_next() {
        let (_dir, _, cache) = cache(b"kernel", false);
        let spec = spec(b"kernel");
        drop(futures_util::poll!(cache.ensure(&spec)));
        assert!(cache.ensure(&spec).await.is_ok());
    }
}
