//! What a command writes: a new file that appears when it is complete, or a block device.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhdkit::storage::{FileAccess, FileStorage, NewFile, NewFileOptions, Sharing, Storage, StorageIdentity};
use vhdkit::{Error, ErrorKind};

use crate::cli::Context;
use crate::failure::Failure;
use crate::formats::is_block_device;

/// Something to write to. A new file that is dropped before [`Target::commit`] leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Target {
    path: PathBuf,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    File(NewFile),
    Device(Arc<FileStorage>),
}

impl Target {
    /// Opens the target, which must not be one of the sources, and exist only with `--force`.
    pub(crate) fn open(context: &Context, path: &Path, sources: Vec<StorageIdentity>) -> Result<Self, Failure> {
        let replace = context.global.force;
        let kind = if is_block_device(path) {
            Kind::Device(Arc::new(open_device(path, replace, &sources)?))
        } else {
            Kind::File(NewFile::create(path, NewFileOptions { replace, sources, ..NewFileOptions::default() })?)
        };
        Ok(Self { path: path.to_owned(), kind })
    }

    /// What to write to.
    pub(crate) fn storage(&self) -> Arc<dyn Storage> {
        match &self.kind {
            Kind::File(file) => file.storage(),
            Kind::Device(device) => Arc::<FileStorage>::clone(device),
        }
    }

    /// Finishes the target. A file gets its name; with `sync` everything is on the medium afterwards.
    pub(crate) fn commit(self, sync: bool) -> Result<(), Failure> {
        match self.kind {
            Kind::File(file) => file.commit(sync)?,
            Kind::Device(device) if sync => {
                let synced = device.sync();
                synced
                    .map_err(|error| Error::io("cannot bring the data to the medium", error).with_path(&self.path))?;
            }
            Kind::Device(_) => {}
        }
        Ok(())
    }
}

fn open_device(path: &Path, force: bool, sources: &[StorageIdentity]) -> Result<FileStorage, Failure> {
    if !force {
        let error = Error::new(ErrorKind::Refused, "this is a block device, and everything on it would be lost");
        return Err(error.with_path(path).with_hint("make sure that it is the right one, then say --force").into());
    }
    // Looked at before it is opened in earnest, since the source's own lock would be taken for another program's.
    let looked_at = FileStorage::open(path, FileAccess::Read, Sharing::ForceShare);
    if looked_at.is_ok_and(|device| device.identity().is_some_and(|identity| sources.contains(&identity))) {
        let error = Error::new(ErrorKind::Refused, "source and target are the same device").with_path(path);
        return Err(error.with_hint("choose another target").into());
    }
    Ok(FileStorage::open_block_target(path)?)
}
