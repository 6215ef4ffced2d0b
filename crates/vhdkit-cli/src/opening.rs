//! Opening images and raw disks as the options say.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vhdkit::format::finding::{Code, Severity};
use vhdkit::format::guid::Guid;
use vhdkit::image::{BlockDevice, FileResolver, Image, Layer, OpenOptions, RawDisk, VisitExtent};
use vhdkit::storage::{FileAccess, FileStorage, Sharing, Storage, StorageIdentity};
use vhdkit::{Error, ErrorKind};

use crate::args::{Format, GlobalArgs};
use crate::cli::Context;
use crate::failure::Failure;
use crate::formats::{Wanted, source_format};
use crate::show;

/// How files are shared with other programs.
pub(crate) const fn sharing(global: &GlobalArgs) -> Sharing {
    if global.force_share { Sharing::ForceShare } else { Sharing::Normal }
}

/// Who decides about parents; `named` are those that the user named, nearest first.
pub(crate) fn resolver<'a>(
    global: &GlobalArgs,
    named: impl IntoIterator<Item = &'a Path>,
) -> Result<FileResolver, Failure> {
    let mut resolver = FileResolver::new().allow_own_directory().sharing(sharing(global));
    if global.any_parent {
        resolver = resolver.allow_any();
    }
    for directory in &global.parent_dir {
        resolver = resolver.allow_directory(directory)?;
    }
    Ok(named.into_iter().fold(resolver, FileResolver::name_parent))
}

/// How images are opened; `named` are the parents that the user named, nearest first.
pub(crate) fn open_options<'a>(
    global: &GlobalArgs,
    named: impl IntoIterator<Item = &'a Path>,
) -> Result<OpenOptions, Failure> {
    let options = OpenOptions::new().sharing(sharing(global));
    if global.no_parents {
        return Ok(options.without_parents());
    }
    Ok(options.parents(Arc::new(resolver(global, named)?)))
}

/// Refuses `--parent` together with `--no-parents`, which clap cannot, since `create` takes both.
pub(crate) fn check_parent_options(global: &GlobalArgs) -> Result<(), Failure> {
    if global.no_parents && !global.parent.is_empty() {
        return Err(Failure::usage("--parent and --no-parents contradict each other", "leave one of them out"));
    }
    Ok(())
}

/// An error of opening an image; when the file that is not there is a parent that the user named, a parent was not found.
pub(crate) fn about_parents(global: &GlobalArgs, error: Error) -> Error {
    let is_missing = error.io_error().is_some_and(|error| error.kind() == io::ErrorKind::NotFound);
    match error.path() {
        Some(path) if is_missing && global.parent.iter().any(|named| named == path) => {
            let missing = Error::new(ErrorKind::ParentNotFound, "the parent that --parent names does not exist");
            missing.with_path(path).with_hint("check the spelling after --parent")
        }
        _ => error,
    }
}

/// A disk to read from, whatever its format.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) device: Arc<dyn BlockDevice>,
    /// The same disk, when it is an image.
    pub(crate) image: Option<Arc<Image>>,
    /// The name of each layer's file, safe to print.
    pub(crate) layer_names: Vec<String>,
}

impl Disk {
    /// The name of a layer's file.
    pub(crate) fn layer_name(&self, layer: usize) -> &str {
        self.layer_names.get(layer).map_or("?", String::as_str)
    }

    /// The files that the disk is read from.
    pub(crate) fn identities(&self) -> Vec<StorageIdentity> {
        (0..self.layer_names.len())
            .filter_map(|layer| self.device.layer_storage(layer))
            .filter_map(|storage| storage.identity())
            .collect()
    }
}

/// What to open, and how it was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DiskRequest<'a> {
    pub(crate) path: &'a Path,
    pub(crate) format: Option<Format>,
    pub(crate) wanted: Wanted,
    /// The option that names the format, for messages.
    pub(crate) option: &'a str,
    /// Sector of a raw disk, to which it is padded.
    pub(crate) raw_sector: u32,
}

/// Opens a disk.
pub(crate) fn open_disk(context: &Context, request: DiskRequest<'_>) -> Result<Disk, Failure> {
    let format = source_format(request.path, request.format, request.wanted, request.option, &context.ui)?;
    match format {
        Format::Raw => open_raw(context, request.path, request.raw_sector),
        Format::Vhdx => {
            let image = Arc::new(open_image(context, request.path)?);
            let layer_names = image.layers().iter().map(layer_name).collect();
            Ok(Disk { device: Arc::clone(&image) as Arc<dyn BlockDevice>, image: Some(image), layer_names })
        }
    }
}

/// Opens an image with the parents that the options allow, and warns of what is odd about it.
pub(crate) fn open_image(context: &Context, path: &Path) -> Result<Image, Failure> {
    check_parent_options(&context.global)?;
    let named = context.global.parent.iter().map(AsRef::as_ref);
    let image = open_options(&context.global, named)?.open_path(path);
    let image = image.map_err(|error| about_parents(&context.global, error))?;
    warn_about(context, &image);
    Ok(image)
}

/// What well-known writers do in every image they make; `info` and `check` tell.
const HABITS: [Code; 2] = [Code::RegionRequiredFlag, Code::MetadataFlags];

/// Tells what the user should know about an image that can be used all the same.
pub(crate) fn warn_about(context: &Context, image: &Image) {
    let mut lock_note = None;
    for (depth, layer) in image.layers().iter().enumerate() {
        if let Some(path) = layer.path().filter(|_| depth > 0) {
            context.ui.detail(&format!("parent {depth}: {}", show::path(path)));
        }
        for finding in layer.findings() {
            let notable = finding.severity() >= Severity::Warning || finding.code() == Code::LogNeedsReplay;
            if notable && !HABITS.contains(&finding.code()) {
                context.ui.warn(layer.path(), &finding.to_string());
            }
        }
        lock_note = lock_note.or_else(|| layer.lock_report().and_then(|report| report.note.clone()));
    }
    if let Some(note) = lock_note {
        context.ui.warn(None, &note);
    }
}

fn open_raw(context: &Context, path: &Path, sector: u32) -> Result<Disk, Failure> {
    let storage = FileStorage::open(path, FileAccess::Read, sharing(&context.global))?;
    if let Some(note) = &storage.lock_report().note {
        context.ui.warn(None, note);
    }
    let disk = RawDisk::new(Arc::new(storage), sector).map_err(|error| error.with_path(path))?;
    if disk.padding() > 0 {
        let padding = disk.padding();
        let why = format!("the size is no multiple of the sector of {sector} bytes");
        context.ui.warn(Some(path), &format!("{why}; the disk is padded with {padding} bytes of zeros"));
    }
    let size = disk.size();
    let device = NamedRawDisk { disk, path: path.to_owned(), size };
    Ok(Disk { device: Arc::new(device), image: None, layer_names: vec![show::file_name(path)] })
}

/// A raw disk that names its file in errors, as an image does.
#[derive(Debug)]
pub(crate) struct NamedRawDisk {
    disk: RawDisk,
    path: PathBuf,
    /// Bytes that count; what comes behind them on a device belongs to nobody.
    size: u64,
}

impl NamedRawDisk {
    /// The beginning of what lies in `storage`.
    pub(crate) fn beginning(storage: Arc<dyn Storage>, path: &Path, size: u64) -> vhdkit::Result<Self> {
        let disk = RawDisk::new(storage, 512)?;
        let size = size.min(disk.size());
        Ok(Self { disk, path: path.to_owned(), size })
    }
}

impl BlockDevice for NamedRawDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn logical_sector_size(&self) -> u32 {
        self.disk.logical_sector_size()
    }

    fn physical_sector_size(&self) -> u32 {
        self.disk.physical_sector_size()
    }

    fn allocation_unit(&self) -> u64 {
        self.disk.allocation_unit()
    }

    fn unallocated_reads_zero(&self) -> bool {
        self.disk.unallocated_reads_zero()
    }

    fn is_read_only(&self) -> bool {
        self.disk.is_read_only()
    }

    fn disk_id(&self) -> Option<Guid> {
        self.disk.disk_id()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> vhdkit::Result<()> {
        self.disk.read_at(buf, offset).map_err(|error| error.with_path(&self.path))
    }

    fn visit_extents(&self, range: Range<u64>, visit: &mut VisitExtent<'_>) -> vhdkit::Result<()> {
        self.disk.visit_extents(range, visit).map_err(|error| error.with_path(&self.path))
    }

    fn layer_storage(&self, layer: usize) -> Option<Arc<dyn Storage>> {
        self.disk.layer_storage(layer)
    }
}

/// The name of the file of a layer, safe to print.
pub(crate) fn layer_name(layer: &Layer) -> String {
    layer.path().map_or_else(|| "(memory)".to_owned(), show::file_name)
}

/// A GUID for people: nothing for the all-zero one.
pub(crate) fn guid_text(guid: Guid) -> String {
    if guid.is_nil() { "none".to_owned() } else { guid.to_string() }
}
