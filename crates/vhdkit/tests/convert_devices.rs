//! Conversions on file systems that can clone, and onto block devices.
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

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use create_support::{allocated, file_storage, marked, open, raw};
use vhdkit::ErrorKind;
use vhdkit::ops::compare::compare;
use vhdkit::ops::convert::{ConvertOptions, ConvertReport, Destination, Source, convert};
use vhdkit::ops::create::{CreateOptions, NewDiskType, create};
use vhdkit::storage::{FileStorage, Storage};
use vhdkit_testkit::foreign::{assert_success, run_tool};
use vhdkit_testkit::harness::{Case, Needs, main_with};

const MIB: u64 = 1 << 20;

/// A mounted file system in a file, which goes away with this.
struct Mounted {
    directory: tempfile::TempDir,
}

impl Mounted {
    fn xfs() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("xfs.img");
        file_storage(&file).set_len(512 * MIB).unwrap();
        let point = directory.path().join("mounted");
        std::fs::create_dir(&point).unwrap();
        assert_success(&run_tool("mkfs.xfs", &["-q", "-m", "reflink=1", file.to_str().unwrap()]));
        assert_success(&run_tool("mount", &["-o", "loop", file.to_str().unwrap(), point.to_str().unwrap()]));
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join("mounted").join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run_tool("umount", &[self.path("").to_str().unwrap()]);
    }
}

/// A loop device over a file, which goes away with this.
struct Loop {
    device: String,
    _directory: tempfile::TempDir,
}

impl Loop {
    /// A device full of old bytes.
    fn stale(size: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("device.img");
        file_storage(&file).write_at(&vec![0xe7; size as usize], 0).unwrap();
        let output = run_tool("losetup", &["-f", "--show", file.to_str().unwrap()]);
        assert_success(&output);
        let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        Self { device, _directory: directory }
    }

    /// Other tests look for free loop devices, and claim each for a moment.
    fn storage(&self) -> Arc<dyn Storage> {
        for _ in 0..100 {
            match FileStorage::open_block_target(Path::new(&self.device)) {
                Ok(storage) => return Arc::new(storage),
                Err(error) if error.kind() == ErrorKind::Refused => std::thread::sleep(Duration::from_millis(20)),
                Err(error) => panic!("{error}"),
            }
        }
        panic!("{} stays in use", self.device);
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run_tool("losetup", &["-d", &self.device]);
    }
}

fn to_vhdx(source: &Arc<dyn Storage>, target: &Arc<dyn Storage>, layout: &CreateOptions) -> ConvertReport {
    let destination = Destination::Vhdx { storage: target, layout, spill: None };
    convert(Source::Disk(&raw(source)), destination, &ConvertOptions::default(), &()).unwrap()
}

fn data_is_cloned_where_the_file_system_can() {
    let mounted = Mounted::xfs();
    let source = file_storage(&mounted.path("source.raw"));
    // Nearly all aligned, a hole, and an end in the middle of a block of the file system.
    let size = 50 * MIB + 512;
    let content = marked(size, [0..20 * MIB, 40 * MIB..size]);
    let raw_copy = Destination::Raw { storage: &source };
    convert(Source::Disk(&raw(&content)), raw_copy, &ConvertOptions::default(), &()).unwrap();
    source.sync().unwrap();
    for disk_type in [NewDiskType::Dynamic, NewDiskType::Fixed] {
        let target_path = mounted.path(&format!("{disk_type:?}.vhdx"));
        let target = file_storage(&target_path);
        let report = to_vhdx(&source, &target, &CreateOptions { disk_type, ..CreateOptions::default() });
        assert_eq!(report.bytes_cloned, 30 * MIB, "{report:?}");
        assert_eq!(report.bytes_read + report.bytes_copied, 512, "{report:?}");
        target.sync().unwrap();
        let image = open(&target);
        let back = file_storage(&mounted.path("back.raw"));
        let destination = Destination::Raw { storage: &back };
        let report = convert(Source::Disk(&image), destination, &ConvertOptions::default(), &()).unwrap();
        assert!(report.bytes_cloned >= 30 * MIB, "{report:?}");
        back.sync().unwrap();
        for read in [&back, &source] {
            let compared = compare(&raw(&content), &raw(read), &()).unwrap();
            assert_eq!((compared.first_difference, compared.size_note), (None, None));
        }
        assert!(allocated(&mounted.path("back.raw")) < 35 * MIB, "holes stay holes");
    }
}

fn a_device_reads_as_the_source_everywhere() {
    let source = marked(24 * MIB + 512, [5..6, 9 * MIB..10 * MIB + 3, 24 * MIB..24 * MIB + 512]);
    let device = Loop::stale(64 * MIB);
    {
        let storage = device.storage();
        let destination = Destination::Raw { storage: &storage };
        convert(Source::Disk(&raw(&source)), destination, &ConvertOptions::default(), &()).unwrap();
        let mut expected = vec![0; 24 * MIB as usize + 512];
        let mut read = expected.clone();
        source.read_at(&mut expected, 0).unwrap();
        storage.read_at(&mut read, 0).unwrap();
        assert!(read == expected);
    }
    for disk_type in [NewDiskType::Dynamic, NewDiskType::Fixed] {
        let storage = device.storage();
        let layout = CreateOptions { disk_type, block_size: Some(2 << 20), ..CreateOptions::default() };
        to_vhdx(&source, &storage, &layout);
        assert!(compare(&raw(&source), &open(&storage), &()).unwrap().is_equal(), "{disk_type:?}");
        create(&storage, &CreateOptions { size: Some(30 * MIB), ..layout }, &()).unwrap();
        let zeros = marked(30 * MIB, []);
        assert!(compare(&raw(&zeros), &open(&storage), &()).unwrap().is_equal(), "{disk_type:?}");
    }
}

fn a_device_that_is_too_small_is_refused() {
    let device = Loop::stale(8 * MIB);
    let storage = device.storage();
    let source = marked(16 * MIB, [0..16 * MIB]);
    let layout = CreateOptions { disk_type: NewDiskType::Fixed, ..CreateOptions::default() };
    for destination in [
        Destination::Raw { storage: &storage },
        Destination::Vhdx { storage: &storage, layout: &layout, spill: None },
        Destination::Vhdx { storage: &storage, layout: &CreateOptions::default(), spill: None },
    ] {
        let what = format!("{destination:?}");
        let error = convert(Source::Disk(&raw(&source)), destination, &ConvertOptions::default(), &()).unwrap_err();
        assert!(error.hint().is_some(), "{what}: {error}");
    }
}

fn main() {
    let mounting = || Needs::tools(&["mkfs.xfs", "mount", "umount", "losetup"]).and_root();
    let devices = || Needs::tools(&["losetup"]).and_root();
    main_with(vec![
        Case::new("data_is_cloned_where_the_file_system_can", mounting(), data_is_cloned_where_the_file_system_can),
        Case::new("a_device_reads_as_the_source_everywhere", devices(), a_device_reads_as_the_source_everywhere),
        Case::new("a_device_that_is_too_small_is_refused", devices(), a_device_that_is_too_small_is_refused),
    ]);
}
