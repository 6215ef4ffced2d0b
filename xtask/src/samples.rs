//! Makes the images in `samples/`: a FAT volume with a few files in a dynamic parent, and a child that changed some.
//!
//! The volume is made by mkfs.vfat and mtools, the images by the testkit's builder, which shares no code with the library:
//! so the samples are files that another program wrote. Writing to children is not part of the library yet.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use vhdkit_testkit::{BlockSpec, Content, Guid, ImageBuilder, SectorMask};

use crate::shell::{Outcome, output, root};

/// Bytes of the disk and of a block.
const DISK: usize = 16 << 20;
const BLOCK: usize = 1 << 20;
const SECTOR: usize = 512;

/// The files of the parent: name, and text.
const PARENT_FILES: [(&str, &str); 3] = [
    ("README.TXT", "A FAT volume inside a VHDX, made for the samples of vhdkit.\n"),
    ("HELLO.TXT", "Hello from the parent.\n"),
    ("POEM.TXT", "Sectors in a row,\nholes where nothing was written,\nzero is the rest.\n"),
];

/// The task `samples`.
pub(crate) fn run(arguments: &[String]) -> Outcome {
    if let Some(argument) = arguments.first() {
        return Err(format!("there is no argument \"{argument}\"").into());
    }
    let directory = tempfile::tempdir()?;
    let volume = directory.path().join("volume.raw");
    std::fs::File::create(&volume)?.set_len(DISK as u64)?;
    output(Command::new("mkfs.vfat").args(["--invariant", "-F", "16", "-n", "VHDKIT", "-i", "20260101"]).arg(&volume))?;
    for (name, text) in PARENT_FILES {
        copy_in(&volume, directory.path(), name, text.as_bytes())?;
    }
    let before = std::fs::read(&volume)?;
    copy_in(&volume, directory.path(), "HELLO.TXT", b"Hello from the child: this file was changed.\n")?;
    copy_in(&volume, directory.path(), "NEW.TXT", b"This file exists in the child only.\n")?;
    // Enough to fill a block of its own.
    let numbers: String = (0..300_000).map(|number| format!("{number}\n")).collect();
    copy_in(&volume, directory.path(), "NUMBERS.TXT", numbers.as_bytes())?;
    output(Command::new("mdel").arg("-i").arg(&volume).arg("::POEM.TXT"))?;
    let after = std::fs::read(&volume)?;

    let parent = Arc::new(parent(&before).build());
    let child = child(&before, &after, &parent).build();
    let samples = root()?.join("samples");
    std::fs::create_dir_all(&samples)?;
    parent.write_to(&samples.join("parent.vhdx"))?;
    child.write_to(&samples.join("child.vhdx"))?;
    println!("samples/parent.vhdx and samples/child.vhdx are made");
    Ok(())
}

/// Copies a file into the root of the volume.
fn copy_in(volume: &Path, directory: &Path, name: &str, bytes: &[u8]) -> Outcome {
    let file = directory.join(name);
    std::fs::write(&file, bytes)?;
    output(Command::new("touch").args(["-d", "2026-01-01T00:00:00Z"]).arg(&file))?;
    let mut command = Command::new("mcopy");
    command.env("TZ", "UTC").args(["-o", "-m", "-i"]).arg(volume).arg(&file).arg("::");
    output(&mut command).map(|_| ())
}

/// Every block of the volume that is not all zero is present.
fn parent(volume: &[u8]) -> ImageBuilder {
    let mut builder = ImageBuilder::new(DISK as u64, 1 << 20).named("parent.vhdx").with(|image| {
        image.creator = "vhdkit samples".encode_utf16().collect();
        image.disk_id = Guid(*b"vhdkit sample ID");
        for header in &mut image.headers {
            header.data_write_guid = Guid(*b"vhdkit parent v1");
            header.file_write_guid = Guid(*b"vhdkit parent f1");
        }
    });
    for (index, block) in (0..).zip(volume.chunks(BLOCK)) {
        if block.iter().any(|byte| *byte != 0) {
            builder = builder.block(index, BlockSpec::present(Content::bytes(block)));
        }
    }
    builder
}

/// Sectors that differ are in the child: the whole block where all of it differs, else sector by sector.
fn child(before: &[u8], after: &[u8], parent: &Arc<vhdkit_testkit::BuiltImage>) -> ImageBuilder {
    let mut builder = ImageBuilder::new(DISK as u64, 1 << 20).named("child.vhdx").with(|image| {
        image.creator = "vhdkit samples".encode_utf16().collect();
        for header in &mut image.headers {
            header.data_write_guid = Guid(*b"vhdkit child  v1");
            header.file_write_guid = Guid(*b"vhdkit child  f1");
        }
    });
    builder = builder.differencing(parent);
    for (index, (old, new)) in (0..).zip(before.chunks(BLOCK).zip(after.chunks(BLOCK))) {
        let changed: Vec<bool> = old.chunks(SECTOR).zip(new.chunks(SECTOR)).map(|(old, new)| old != new).collect();
        if changed.iter().all(|changed| !changed) {
            continue;
        }
        let content = Content::bytes(new);
        let whole = changed.iter().all(|changed| *changed);
        let block =
            if whole { BlockSpec::present(content) } else { BlockSpec::partial(content, SectorMask::bits(changed)) };
        builder = builder.block(index, block);
    }
    builder
}
