//! Changing an image that is there: opened with the warnings that belong to it, and closed whatever happened between.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use vhdkit::format::header::{HEADER_BYTES, OFFSETS};
use vhdkit::image::{BlockDevice as _, Image, Layer, OpenOptions, ReplayReport};
use vhdkit::storage::{FileSystem, Storage};
use vhdkit::{Error, ErrorKind};

use crate::args::{Format, WritingArgs};
use crate::cli::Context;
use crate::commands::info::{refuse_raw, replay_json};
use crate::failure::{Done, Failure};
use crate::opening::{about_parents, check_parent_options, open_options, warn_about};
use crate::show;

/// What Hyper-V's change tracking appends to the name of a disk for its own files.
const TRACKING_EXTENSIONS: [&str; 4] = ["rct", "mrt", "RCT", "MRT"];

/// An image while it is changed.
#[derive(Debug)]
pub(crate) struct Session<'a> {
    pub(crate) image: Arc<Image>,
    context: &'a Context,
    path: &'a Path,
    /// The headers before anything was changed; every session of writing begins by changing them.
    headers: Option<Vec<u8>>,
}

/// What a dry run of something that writes ends with, once its plan is printed: what the real one would say to the log.
pub(crate) fn refuse_dirty(image: &Image, path: &Path, args: &WritingArgs) -> Result<(), Failure> {
    match image.layers().first() {
        Some(layer) if !args.replay => Ok(layer.refuse_dirty().map_err(|error| error.with_path(path))?),
        _ => Ok(()),
    }
}

impl<'a> Session<'a> {
    /// Opens an image for writing, with the parents that the options allow.
    pub(crate) fn open(context: &'a Context, path: &'a Path, args: &WritingArgs) -> Result<Self, Failure> {
        check(context, path, args.from.from)?;
        check_parent_options(&context.global)?;
        let named = context.global.parent.iter().map(AsRef::as_ref);
        let options = open_options(&context.global, named)?.write(true).replay(args.replay);
        let image = options.open_path(path).map_err(|error| about_parents(&context.global, error))?;
        warn_about(context, &image);
        Ok(Self::begin(context, path, image))
    }

    /// Opens an image for writing without its parents: for what concerns the file alone.
    pub(crate) fn open_alone(context: &'a Context, path: &'a Path, args: &WritingArgs) -> Result<Self, Failure> {
        check(context, path, args.from.from)?;
        let image = OpenOptions::new().without_parents().write(true).replay(args.replay).open_path(path)?;
        warn_about(context, &image);
        Ok(Self::begin(context, path, image))
    }

    /// Opens an image alone to put its log into place; `None` when it is clean, which is found by reading only.
    pub(crate) fn open_dirty(
        context: &'a Context,
        path: &'a Path,
        from: Option<Format>,
    ) -> Result<Option<Self>, Failure> {
        check(context, path, from)?;
        let options = OpenOptions::new().without_parents();
        let image = options.open_path(path).map_err(without_sharing)?;
        if top(&image)?.replay().is_none() {
            return Ok(None);
        }
        drop(image);
        let image = options.write(true).replay(true).open_path(path)?;
        Ok(Some(Self::begin(context, path, image)))
    }

    /// The image alone, for an operation that takes it, and who says afterwards what the user has to know.
    pub(crate) fn into_parts(self) -> Result<(Image, Aftermath<'a>), Failure> {
        let Self { image, context, path, headers } = self;
        let layer = top(&image)?;
        let aftermath =
            Aftermath { context, path, headers, storage: Arc::clone(layer.storage()), replay: layer.replay().cloned() };
        let image = Arc::try_unwrap(image).map_err(|_| Error::new(ErrorKind::Busy, "the image is in use"))?;
        Ok((image, aftermath))
    }

    fn begin(context: &'a Context, path: &'a Path, image: Image) -> Self {
        let session = Self { headers: headers(&image), image: Arc::new(image), context, path };
        if let Some(warning) = session.file_system().and_then(lock_warning) {
            context.ui.warn(Some(path), &warning);
        }
        session
    }

    fn file_system(&self) -> Option<FileSystem> {
        let storage = self.image.layers().first()?.storage();
        FileSystem::of(storage.as_file()?).ok()
    }

    /// The image itself, without its parents.
    pub(crate) fn layer(&self) -> Result<&Layer, Failure> {
        top(&self.image)
    }

    /// Says something about the image.
    pub(crate) fn warn(&self, message: &str) {
        self.context.ui.warn(Some(self.path), message);
    }

    /// The file of the image.
    pub(crate) fn path(&self) -> &'a Path {
        self.path
    }

    /// A range of the disk, which must lie on it.
    pub(crate) fn range(&self, offset: u64, length: u64) -> Result<Range<u64>, Failure> {
        let size = self.image.size();
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(offset..end),
            _ => {
                let what = match length {
                    0 => format!("offset {offset} lies behind the end of the disk, which has {size} bytes"),
                    _ => format!("the range reaches past the end of the disk, which has {size} bytes"),
                };
                let error = Error::new(ErrorKind::OutOfRange, what).with_path(self.path);
                Err(error.with_hint("choose --offset and --length inside the disk; nothing was changed").into())
            }
        }
    }

    /// Closes the image, and says what the user has to know afterwards.
    pub(crate) fn close(&self) -> Result<(), Error> {
        let closed = self.image.close();
        if self.was_changed() {
            warn_of_change_tracking(self.context, self.path);
        }
        closed
    }

    /// Closes the image, whatever became of the work: so many bytes of it were done.
    pub(crate) fn finish(&self, worked: Result<(), Error>, verb: &'static str, bytes: u64) -> Result<(), Failure> {
        let closed = self.close();
        let done = Done { verb, bytes, closed: closed.is_ok() };
        // The first error is the one to tell; a second one mostly is its consequence.
        let error = worked.err().or(closed.err());
        error.map_or(Ok(()), |error| Err(Failure::Cut { error: error.with_path(self.path), done }))
    }

    /// Whether anything was written to the file.
    pub(crate) fn was_changed(&self) -> bool {
        self.headers != headers(&self.image)
    }

    /// What was replayed, for scripts.
    pub(crate) fn replayed_json(&self) -> Value {
        let replayed = self.replayed_entries().and_then(|_| self.image.layers().first()?.replay().map(replay_json));
        replayed.unwrap_or_default()
    }

    /// For people, behind what was done.
    pub(crate) fn replayed_text(&self) -> String {
        replayed_text(self.replayed_entries())
    }

    fn replayed_entries(&self) -> Option<u64> {
        let entries = self.image.layers().first()?.replay()?.entries;
        self.was_changed().then_some(entries)
    }
}

/// What there is to say of an image that an operation has closed.
#[derive(Debug)]
pub(crate) struct Aftermath<'a> {
    context: &'a Context,
    path: &'a Path,
    headers: Option<Vec<u8>>,
    storage: Arc<dyn Storage>,
    replay: Option<ReplayReport>,
}

impl Aftermath<'_> {
    /// Names the image in an error, and warns of what does not know of a change.
    pub(crate) fn name<T>(&self, worked: Result<T, Error>) -> Result<T, Failure> {
        if self.was_changed() {
            warn_of_change_tracking(self.context, self.path);
        }
        worked.map_err(|error| error.with_path(self.path).into())
    }

    fn was_changed(&self) -> bool {
        self.headers != headers_of(&self.storage)
    }

    /// What was replayed, for scripts.
    pub(crate) fn replayed_json(&self) -> Value {
        self.replay.as_ref().filter(|_| self.was_changed()).map(replay_json).unwrap_or_default()
    }

    /// For people, behind what was done.
    pub(crate) fn replayed_text(&self) -> String {
        replayed_text(self.replay.as_ref().filter(|_| self.was_changed()).map(|replay| replay.entries))
    }
}

fn replayed_text(entries: Option<u64>) -> String {
    match entries {
        Some(1) => ", after replaying its log (1 entry)".to_owned(),
        Some(entries) => format!(", after replaying its log ({entries} entries)"),
        None => String::new(),
    }
}

fn check(context: &Context, path: &Path, from: Option<Format>) -> Result<(), Failure> {
    refuse_raw(context, path, from)?;
    refuse_sharing(context)
}

/// Refuses to write what others may be writing.
pub(crate) fn refuse_sharing(context: &Context) -> Result<(), Failure> {
    if context.global.force_share {
        return Err(Failure::usage(
            "--force-share is for looking at an image; one that others may be writing is not written",
            "leave it out, and close the program that uses the image",
        ));
    }
    Ok(())
}

/// Warns when a file lies where the locks of others cannot be seen.
pub(crate) fn warn_of_hidden_locks(context: &Context, path: &Path, storage: &dyn Storage) {
    let file_system = storage.as_file().and_then(|file| FileSystem::of(file).ok());
    if let Some(warning) = file_system.and_then(lock_warning) {
        context.ui.warn(Some(path), &warning);
    }
}

/// Says when Hyper-V keeps track of the changes of a disk that was changed.
pub(crate) fn warn_of_change_tracking(context: &Context, path: &Path) {
    let files: Vec<String> = change_tracking_files(path).iter().map(|file| show::file_name(file)).collect();
    if !files.is_empty() {
        let files = files.join(" and ");
        let what = format!("the change tracking of Hyper-V ({files}) does not know of this change");
        context.ui.warn(Some(path), &format!("{what}; the next backup must be full"));
    }
}

/// An error of opening for reading what is to be written: looking at a file in use is no way out then.
fn without_sharing(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Locked => error.with_hint("shut down the virtual machine or close the program that uses it"),
        _ => error,
    }
}

fn top(image: &Image) -> Result<&Layer, Failure> {
    let layer = image.layers().first();
    layer.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "the image has no layers").into())
}

/// Both copies of the header as they are in the file now.
fn headers(image: &Image) -> Option<Vec<u8>> {
    headers_of(image.layers().first()?.storage())
}

fn headers_of(storage: &Arc<dyn Storage>) -> Option<Vec<u8>> {
    let mut bytes = vec![0; HEADER_BYTES * OFFSETS.len()];
    for (copy, offset) in bytes.chunks_exact_mut(HEADER_BYTES).zip(OFFSETS) {
        storage.read_at(copy, offset).ok()?;
    }
    Some(bytes)
}

/// The same for the file of a layer.
pub(crate) fn lock_warning_of(layer: &Layer) -> Option<String> {
    FileSystem::of(layer.storage().as_file()?).ok().and_then(lock_warning)
}

/// What has to be said about writing to a file that lies there.
fn lock_warning(file_system: FileSystem) -> Option<String> {
    file_system.hides_locks_of_others().then(|| {
        format!(
            "it lies on {file_system}, where the locks of others (Hyper-V, WSL, other machines) cannot be seen; \
             make sure that nobody else uses it"
        )
    })
}

/// The files of Hyper-V's change tracking beside a disk, beside what a symbolic link leads to.
fn change_tracking_files(disk: &Path) -> Vec<PathBuf> {
    let disk = disk.canonicalize().unwrap_or_else(|_| disk.to_owned());
    let mut found: Vec<PathBuf> = Vec::new();
    for extension in TRACKING_EXTENSIONS {
        let mut name = disk.clone().into_os_string();
        name.push(".");
        name.push(extension);
        let file = PathBuf::from(name);
        // Where names have no case, one file has both.
        let is_new = found.iter().all(|other| !show::path(other).eq_ignore_ascii_case(&show::path(&file)));
        if is_new && file.exists() {
            found.push(file);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_locks_of_others_are_invisible_that_is_said() {
        for (file_system, words) in [
            (FileSystem::Plan9, "9p"),
            (FileSystem::Wsl, "WSL 1"),
            (FileSystem::Smb, "SMB"),
            (FileSystem::Nfs, "NFS"),
            (FileSystem::Fuse, "FUSE"),
            (FileSystem::SharedFolder, "shared folder"),
        ] {
            let warning = lock_warning(file_system).unwrap_or_default();
            assert!(warning.contains(words) && warning.contains("cannot be seen"), "{warning}");
        }
        assert_eq!(lock_warning(FileSystem::Other(0xef53)), None);
    }
}
