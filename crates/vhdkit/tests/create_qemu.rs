//! What QEMU says of the images that we make, and whether it reads the same bytes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::single_range_in_vec_init,
    reason = "test code"
)]

mod create_support;

use std::path::Path;
use std::sync::Arc;

use create_support::{allocated, existing, file_storage, marked, open, raw};
use vhdkit::image::BlockDevice;
use vhdkit::ops::compare::compare;
use vhdkit::ops::convert::{ConvertOptions, Destination, Source, convert};
use vhdkit::ops::create::{BlockState, CreateOptions, NewDiskType, create};
use vhdkit::storage::Storage;
use vhdkit_testkit::foreign::{assert_success, qemu_img};
use vhdkit_testkit::harness::{Case, Needs, main_with};

const MIB: u64 = 1 << 20;

fn virtual_size(path: &Path) -> u64 {
    let output = qemu_img(&["info", "-f", "vhdx", path.to_str().unwrap()]);
    assert_success(&output);
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find(|line| line.starts_with("virtual size:")).unwrap();
    let digits = line.split('(').nth(1).unwrap().split(' ').next().unwrap();
    digits.parse().unwrap()
}

/// QEMU finds nothing wrong, and reads what `expected` holds.
fn judge(path: &Path, expected: &Arc<dyn Storage>) {
    let name = path.to_str().unwrap();
    assert_eq!(virtual_size(path), expected.len().unwrap(), "{name}");
    assert_success(&qemu_img(&["check", "-f", "vhdx", name]));
    let raw_path = path.with_extension("raw");
    assert_success(&qemu_img(&["convert", "-f", "vhdx", "-O", "raw", name, raw_path.to_str().unwrap()]));
    let read = existing(&raw_path);
    let compared = compare(&raw(expected), &raw(&read), &()).unwrap();
    assert_eq!((compared.first_difference, compared.size_note), (None, None), "{name}");
    std::fs::remove_file(raw_path).unwrap();
}

fn layouts() -> impl Iterator<Item = (String, CreateOptions)> {
    (20..=28).flat_map(|shift| {
        [
            (NewDiskType::Dynamic, BlockState::NotPresent),
            (NewDiskType::Dynamic, BlockState::Zero),
            (NewDiskType::Fixed, BlockState::NotPresent),
        ]
        .map(|(disk_type, block_state)| {
            let layout =
                CreateOptions { disk_type, block_state, block_size: Some(1 << shift), ..CreateOptions::default() };
            (format!("{disk_type:?}-{block_state:?}-{shift}.vhdx"), layout)
        })
    })
}

/// A size for a layout, no multiple of any block. QEMU reads every byte of a disk, so that only two layouts go past
/// the first chunk of 4 GiB: those where a mistake about its bitmap slot shows first.
fn size_for(layout: &CreateOptions) -> u64 {
    let past_a_chunk = layout.block_size == Some(1 << 20) && layout.block_state == BlockState::NotPresent;
    if past_a_chunk { 4100 * MIB + 512 } else { 300 * MIB + 1536 }
}

fn qemu_accepts_new_images_of_every_block_size() {
    let directory = tempfile::tempdir().unwrap();
    for (name, layout) in layouts() {
        let size = size_for(&layout);
        let path = directory.path().join(name);
        create(&file_storage(&path), &CreateOptions { size: Some(size), ..layout }, &()).unwrap();
        judge(&path, &marked(size, []));
    }
}

fn qemu_reads_what_we_convert() {
    let directory = tempfile::tempdir().unwrap();
    for (name, layout) in layouts() {
        let size = size_for(&layout);
        let mut marks = vec![0..1, MIB - 1..3 * MIB + 5, 270 * MIB..271 * MIB, size - 1..size];
        if size > 4097 * MIB {
            marks.push(4096 * MIB - 70_000..4096 * MIB + 70_000); // on both sides of the end of the first chunk
        }
        let source = marked(size, marks);
        let path = directory.path().join(name);
        let target = file_storage(&path);
        let destination = Destination::Vhdx { storage: &target, layout: &layout, spill: None };
        convert(Source::Disk(&raw(&source)), destination, &ConvertOptions::default(), &()).unwrap();
        judge(&path, &source);
        assert!(allocated(&path) < 40 * MIB, "sparse");
    }
}

fn qemu_reads_a_stream_of_unknown_size() {
    let directory = tempfile::tempdir().unwrap();
    let size = 9 * MIB + 1024;
    let source = marked(size, [0..1, 3 * MIB..4 * MIB, size - 1..size]);
    let mut content = vec![0; size as usize];
    source.read_at(&mut content, 0).unwrap();
    for (name, layout) in layouts() {
        let path = directory.path().join(name);
        let target = file_storage(&path);
        let spill = file_storage(&directory.path().join("spill"));
        convert(
            Source::Stream { reader: &mut content.as_slice(), size: None },
            Destination::Vhdx { storage: &target, layout: &layout, spill: Some(&spill) },
            &ConvertOptions::default(),
            &(),
        )
        .unwrap();
        judge(&path, &source);
    }
}

fn we_read_what_qemu_converts() {
    let directory = tempfile::tempdir().unwrap();
    let size = 4200 * MIB + 512;
    let source = marked(size, [0..1, 4095 * MIB..4097 * MIB, size - 1..size]);
    let raw_path = directory.path().join("source.raw");
    let raw_file = file_storage(&raw_path);
    convert(Source::Disk(&raw(&source)), Destination::Raw { storage: &raw_file }, &ConvertOptions::default(), &())
        .unwrap();
    let (from, image_path) = (raw_path.to_str().unwrap(), directory.path().join("image.vhdx"));
    let to = image_path.to_str().unwrap();
    for options in ["subformat=dynamic,block_size=1M", "subformat=fixed"] {
        assert_success(&qemu_img(&["convert", "-f", "raw", "-O", "vhdx", "-o", options, from, to]));
        let image = vhdkit::image::OpenOptions::new().open(existing(&image_path), None).unwrap();
        assert_eq!(image.size(), size);
        let back = file_storage(&directory.path().join("back.raw"));
        convert(Source::Disk(&image), Destination::Raw { storage: &back }, &ConvertOptions::default(), &()).unwrap();
        let compared = compare(&raw(&source), &raw(&back), &()).unwrap();
        assert_eq!((compared.first_difference, compared.size_note), (None, None), "{options}");
    }
}

fn qemu_accepts_64_tib() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("large.vhdx");
    let storage = file_storage(&path);
    create(&storage, &CreateOptions { block_size: Some(256 << 20), ..CreateOptions::new(64 << 40) }, &()).unwrap();
    assert_eq!(virtual_size(&path), 64 << 40);
    assert_eq!(open(&storage).size(), 64 << 40);
    assert!(allocated(&path) < 2 * MIB, "an empty image is sparse");
}

fn main() {
    let needs = || Needs::tools(&["qemu-img"]);
    main_with(vec![
        Case::new("qemu_accepts_new_images_of_every_block_size", needs(), qemu_accepts_new_images_of_every_block_size),
        Case::new("qemu_reads_what_we_convert", needs(), qemu_reads_what_we_convert),
        Case::new("qemu_reads_a_stream_of_unknown_size", needs(), qemu_reads_a_stream_of_unknown_size),
        Case::new("we_read_what_qemu_converts", needs(), we_read_what_qemu_converts),
        Case::new("qemu_accepts_64_tib", needs(), qemu_accepts_64_tib),
    ]);
}
