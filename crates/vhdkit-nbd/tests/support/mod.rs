//! A server in this process, images for it, and disks that misbehave.
#![allow(dead_code, reason = "each test program uses its part")]

pub(crate) mod devices;
pub(crate) mod tls;

use std::io::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;
use vhdkit::image::{BlockDevice, FileResolver, Image, OpenOptions};
use vhdkit::ops::create::{CreateOptions, NewParent, create};
use vhdkit::storage::{FileAccess, FileStorage, MemoryStorage, Sharing, Storage};
use vhdkit_nbd::{Export, Handle, Listener, Options, Server};
use vhdkit_testkit::nbd::{Handshake, Mode, Request, Transmission, connect};

pub(crate) const MIB: u64 = 1 << 20;
/// The name of the export, unless a test has others.
pub(crate) const NAME: &str = "disk";
/// What may take a moment takes no longer than this.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) type Disk = Transmission<UnixStream>;

/// A server that runs until this is dropped.
pub(crate) struct Served {
    directory: TempDir,
    pub(crate) handle: Handle,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Served {
    /// A server of some exports.
    pub(crate) fn new(exports: Vec<Export>, options: Options) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::new(exports, options).unwrap();
        let handle = server.handle();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        let thread = std::thread::spawn(move || server.run(vec![Listener::Unix(listener)]));
        Self { directory, handle, thread: Some(thread) }
    }

    /// A server of one disk that may be written.
    pub(crate) fn disk(device: Arc<dyn BlockDevice>) -> Self {
        Self::new(vec![Export::new(NAME, device).unwrap().writable(true)], Options::default())
    }

    /// A server of one image in memory, of 64 MiB in blocks of 1 MiB, that may be written.
    pub(crate) fn image() -> (Self, Arc<Image>) {
        let image = image(64 * MIB);
        (Self::disk(Arc::clone(&image) as Arc<dyn BlockDevice>), image)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    pub(crate) fn stream(&self) -> UnixStream {
        connect::unix(&self.socket()).unwrap()
    }

    pub(crate) fn handshake(&self) -> Handshake<UnixStream> {
        Handshake::start(self.stream()).unwrap()
    }

    pub(crate) fn begin(&self, mode: Mode) -> Disk {
        connect::begin(self.stream(), mode, NAME).unwrap()
    }

    /// Waits until nobody is connected any more.
    #[track_caller]
    pub(crate) fn wait_until_empty(&self) {
        self.wait_until_connected(0);
    }

    /// Waits until so many are connected.
    #[track_caller]
    pub(crate) fn wait_until_connected(&self, count: usize) {
        let reached = || (self.handle.connections() == count).then_some(());
        let waited = connect::wait_for(PATIENCE, reached);
        assert!(waited.is_some(), "{} connections instead of {count}", self.handle.connections());
    }

    /// Whether `run` has returned.
    pub(crate) fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Stops the server and waits for its end.
    pub(crate) fn stop(mut self) {
        self.handle.stop();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.handle.stop();
        // A test that fails does not wait for a server that may be the reason.
        if let Some(thread) = self.thread.take().filter(|_| !std::thread::panicking()) {
            let ended = thread.join();
            assert!(matches!(ended, Ok(Ok(()))), "the server ended with {ended:?}");
        }
    }
}

/// Sends the requests of one connection, so that whoever receives the replies never waits for room to send.
pub(crate) struct Sender {
    queue: mpsc::Sender<Vec<u8>>,
}

impl Sender {
    pub(crate) fn new(disk: &mut Disk) -> Self {
        let mut stream = disk.stream().try_clone().unwrap();
        let (queue, requests) = mpsc::channel::<Vec<u8>>();
        // It ends with the queue, or when the connection does; who waits for a reply finds out about the latter.
        std::thread::spawn(move || requests.into_iter().try_for_each(|bytes| stream.write_all(&bytes)));
        Self { queue }
    }

    /// Sends a request without waiting for anything, and gives its cookie.
    pub(crate) fn send(&self, disk: &mut Disk, request: &Request) -> u64 {
        let cookie = disk.expect(request.clone());
        // A failure is one of the connection.
        let _ = self.queue.send(request.bytes(disk.mode(), cookie));
        cookie
    }
}

fn options(size: u64) -> CreateOptions {
    CreateOptions { block_size: Some(MIB as u32), ..CreateOptions::new(size) }
}

/// A new dynamic image in memory, with blocks of 1 MiB, for writing.
pub(crate) fn image(size: u64) -> Arc<Image> {
    image_in(&memory_image(size), true)
}

/// The file of a new dynamic image.
pub(crate) fn memory_image(size: u64) -> Arc<dyn Storage> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    create(&storage, &options(size), &()).unwrap();
    storage
}

pub(crate) fn image_in(storage: &Arc<dyn Storage>, write: bool) -> Arc<Image> {
    Arc::new(OpenOptions::new().write(write).open(Arc::clone(storage), None).unwrap())
}

/// A new image in a file.
pub(crate) fn make_file(path: &Path, options: &CreateOptions) {
    std::fs::File::create(path).unwrap();
    let storage = FileStorage::open(path, FileAccess::Write, Sharing::default()).unwrap();
    let storage: Arc<dyn Storage> = Arc::new(storage);
    create(&storage, options, &()).unwrap();
}

/// A new image in a file, with blocks of 1 MiB.
pub(crate) fn make_disk_file(path: &Path, size: u64) {
    make_file(path, &options(size));
}

/// A new image whose parent is the image in another file of the directory.
pub(crate) fn make_child_file(path: &Path, parent_path: &Path) {
    let parent = open_file(parent_path, false);
    let parent = NewParent {
        data_write_guid: parent.layers()[0].headers().current.data_write_guid,
        logical_sector_size: parent.logical_sector_size(),
        physical_sector_size: parent.physical_sector_size(),
        disk_size: parent.size(),
        disk_id: parent.disk_id().unwrap(),
        relative_path: format!(".\\{}", parent_path.file_name().unwrap().to_str().unwrap()),
        absolute_path: None,
    };
    make_file(path, &CreateOptions { block_size: Some(MIB as u32), ..CreateOptions::child(parent) });
}

/// Opens an image with its parents, which lie beside it.
pub(crate) fn open_file(path: &Path, write: bool) -> Arc<Image> {
    let resolver = Arc::new(FileResolver::new().allow_own_directory());
    Arc::new(OpenOptions::new().write(write).parents(resolver).open_path(path).unwrap())
}

/// Ends a session, so that the file can be opened by the next one.
pub(crate) fn close(image: Arc<Image>) {
    image.close().unwrap();
    assert_eq!(Arc::strong_count(&image), 1, "somebody still has the image");
}

/// Bytes that tell where they stand.
pub(crate) fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    vhdkit_testkit::pattern(seed, 0, &mut bytes);
    bytes
}
