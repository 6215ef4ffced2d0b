//! What is served: images and raw disks, opened as the options say, and closed in the end.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use vhdkit::image::{BlockDevice, Image, LayerDisk};
use vhdkit::{Error, ErrorKind};
use vhdkit_nbd::Export;

use crate::args::{Format, ServeArgs, WritingArgs};
use crate::cli::Context;
use crate::failure::Failure;
use crate::formats::{Wanted, source_format};
use crate::opening::{DiskRequest, layer_name, open_disk};
use crate::show;
use crate::writing::Session;

/// An export, and what people are told about it.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    pub(crate) export: Export,
    pub(crate) description: String,
}

/// All that is served.
#[derive(Debug)]
pub(crate) struct Disks<'a> {
    pub(crate) served: Vec<Served>,
    /// Images that are written, and have to be closed.
    sessions: Vec<Session<'a>>,
}

/// The name of the export of each image.
pub(crate) fn names(args: &ServeArgs) -> Result<Vec<String>, Failure> {
    if let Some(name) = &args.name {
        if args.images.len() > 1 {
            return Err(Failure::usage(
                "--name is for one image, and there are several",
                "leave it out: each export gets the name of its file; or start a server for each",
            ));
        }
        return Ok(vec![name.clone()]);
    }
    let names: Vec<String> = args.images.iter().map(|image| show::file_name(image)).collect();
    let mut seen = HashSet::new();
    for (name, image) in names.iter().zip(&args.images) {
        if !seen.insert(name) {
            return Err(Failure::usage(
                format!(
                    "{}: there is another image of this name, and the export has the name of its file",
                    show::path(image)
                ),
                "start a server for each, with --name; or give one of them another name by a link (ln -s)",
            ));
        }
    }
    Ok(names)
}

/// Raw disks are for reading here.
fn refuse_raw(context: &Context, args: &ServeArgs, path: &Path) -> Result<(), Failure> {
    let format = source_format(path, args.from.from, Wanted::Image, "--from", &context.ui)?;
    if format == Format::Vhdx || !path.exists() {
        return Ok(());
    }
    let error = Error::new(ErrorKind::Refused, "this is a raw disk, which is served for reading only").with_path(path);
    Err(error.with_hint("leave out --write; if it is a VHDX all the same, say --from vhdx").into())
}

impl<'a> Disks<'a> {
    /// Opens everything, or closes what was opened before it failed.
    pub(crate) fn open(context: &'a Context, args: &'a ServeArgs, names: Vec<String>) -> Result<Self, Failure> {
        let mut disks = Self { served: Vec::new(), sessions: Vec::new() };
        for (path, name) in args.images.iter().zip(names) {
            let opened = if args.write {
                disks.open_for_writing(context, args, path, name)
            } else {
                disks.open_for_reading(context, args, path, name)
            };
            if let Err(failure) = opened {
                let _ = disks.close(); // nothing was changed but by replaying logs; the first error is the one to tell
                return Err(failure);
            }
        }
        Ok(disks)
    }

    fn open_for_reading(
        &mut self,
        context: &Context,
        args: &ServeArgs,
        path: &Path,
        name: String,
    ) -> Result<(), Failure> {
        let request =
            DiskRequest { path, format: args.from.from, wanted: Wanted::Image, option: "--from", raw_sector: 512 };
        let disk = open_disk(context, request)?;
        match disk.image {
            Some(image) => self.add_image(args, name, &image, false),
            None => {
                let description = format!("{}, a raw disk", show::file_name(path));
                self.add(name, disk.device, description, false)
            }
        }
    }

    fn open_for_writing(
        &mut self,
        context: &'a Context,
        args: &ServeArgs,
        path: &'a Path,
        name: String,
    ) -> Result<(), Failure> {
        refuse_raw(context, args, path)?;
        let writing = WritingArgs { replay: args.replay, from: args.from };
        let session = Session::open(context, path, &writing).map_err(|failure| self.about_locks(failure))?;
        let image = Arc::clone(&session.image);
        self.sessions.push(session);
        self.add_image(args, name, &image, true)
    }

    /// When it is this very server that has a file in use, that is said.
    fn about_locks(&self, failure: Failure) -> Failure {
        let Failure::Library(error) = &failure else { return failure };
        let real = |path: &Path| path.canonicalize().ok();
        let Some(locked) = error.path().filter(|_| error.kind() == ErrorKind::Locked).and_then(real) else {
            return failure;
        };
        let files = self.sessions.iter().flat_map(|session| session.image.layers()).filter_map(|layer| layer.path());
        if !files.filter_map(real).any(|file| file == locked) {
            return failure;
        }
        let what = "the file belongs to two of the images, and one of them would be written through the other";
        let error = Error::new(ErrorKind::Locked, what).with_path(locked);
        error.with_hint("leave one of them out, or serve for reading, without --write").into()
    }

    fn add_image(&mut self, args: &ServeArgs, name: String, image: &Arc<Image>, writable: bool) -> Result<(), Failure> {
        let files: Vec<String> = image.layers().iter().map(layer_name).collect();
        let kind = image.disk_type().as_str();
        let parents = files.get(1..).unwrap_or_default().join(", ");
        let on = if parents.is_empty() { String::new() } else { format!(" on {parents}") };
        let description = format!("{}, a {kind} VHDX{on}", files.first().map_or("?", String::as_str));
        self.add(name.clone(), Arc::clone(image) as Arc<dyn BlockDevice>, description, writable)?;
        if !args.layers {
            return Ok(());
        }
        for (depth, file) in files.iter().enumerate() {
            let layer = LayerDisk::new(Arc::clone(image), depth)?;
            let description = format!("what {file} holds by itself, layer {depth} of {name}");
            self.add(format!("{name}/layer/{depth}"), Arc::new(layer), description, false)?;
        }
        Ok(())
    }

    fn add(
        &mut self,
        name: String,
        device: Arc<dyn BlockDevice>,
        description: String,
        writable: bool,
    ) -> Result<(), Failure> {
        let invalid = |error: vhdkit_nbd::InvalidName| Failure::usage(error.to_string(), "choose another --name");
        let export = Export::new(name, device).map_err(invalid)?;
        let description = vhdkit::text::escape(&description).into_owned();
        let export = export.writable(writable).description(description.clone());
        self.served.push(Served { export, description });
        Ok(())
    }

    /// Flushes and closes what was written. All are tried; the first error is returned, and warnings tell of the others.
    pub(crate) fn close(&self) -> Result<(), Failure> {
        let mut first = Ok(());
        for session in &self.sessions {
            let Err(error) = session.close() else { continue };
            let error = error.with_path(session.path());
            if first.is_ok() {
                first = Err(Failure::Library(error));
            } else {
                session.warn(&error.to_string());
            }
        }
        first
    }
}
