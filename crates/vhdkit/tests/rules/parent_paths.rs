//! Where the file resolver looks for parents, and where it never does.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use vhdkit::error::{Error, ErrorKind};
use vhdkit::format::finding::Code;
use vhdkit::image::{BlockDevice, FileResolver, Image, OpenOptions};
use vhdkit_testkit::spec::LocatorSpec;
use vhdkit_testkit::{BuiltImage, Guid};

use crate::judge::compare;
use crate::table::{Made, Row, child_of, parent, parent_builder, special};

pub(crate) fn rows() -> Vec<Row> {
    let mut rows = relative();
    rows.extend(windows());
    rows.extend(names());
    rows.extend(kinds());
    rows.extend(identities());
    rows
}

/// A directory with `images/child.vhdx`, whose locator has these paths.
struct Place {
    directory: TempDir,
    made: Made,
}

impl Place {
    fn new(paths: &[(&str, &str)]) -> Self {
        let parent = parent();
        let locator = paths.iter().fold(LocatorSpec::new(parent.data_write_guid, "x").without("relative_path"), {
            |locator, (key, value)| locator.pair(key, value)
        });
        Self::with(child_of(&parent).locator(locator).build())
    }

    fn relative(path: &str) -> Self {
        Self::new(&[("relative_path", path)])
    }

    fn absolute(path: &str) -> Self {
        Self::new(&[("absolute_win32_path", path)])
    }

    fn with(child: BuiltImage) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("images")).unwrap();
        child.write_to(&directory.path().join("images/child.vhdx")).unwrap();
        Self { directory, made: child.into() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Puts the right parent here.
    fn parent_at(self, name: &str) -> Self {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        parent().write_to(&path).unwrap();
        self
    }

    fn open(&self, resolver: FileResolver) -> Result<Image, Error> {
        OpenOptions::new().parents(Arc::new(resolver)).open_path(&self.path("images/child.vhdx"))
    }

    /// The parent is found beneath the child's own directory.
    fn finds(self) -> Vec<Code> {
        self.finds_by(FileResolver::new().allow_own_directory())
    }

    fn finds_by(self, resolver: FileResolver) -> Vec<Code> {
        let image = self.open(resolver).unwrap();
        assert_eq!(compare(&self.made, &image, 0..image.size()), None);
        Vec::new()
    }

    /// The parent is not found beneath the child's own directory.
    fn refuses(self, kind: ErrorKind) -> Vec<Code> {
        self.refuses_by(FileResolver::new().allow_own_directory(), kind)
    }

    fn refuses_by(self, resolver: FileResolver, kind: ErrorKind) -> Vec<Code> {
        let error = self.open(resolver).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.hint().is_some() || error.code().is_some(), "says what to do: {error}");
        assert!(error.path().is_some(), "names the file: {error}");
        error.code().into_iter().collect()
    }
}

/// A row that must see no code.
fn plain(name: &str, run: impl Fn() -> Vec<Code> + Send + 'static) -> Row {
    special("V-151", name, &[], run)
}

fn missing(name: &str, run: impl Fn() -> Vec<Code> + Send + 'static) -> Row {
    special("V-151", name, &[Code::ParentNotFound], run)
}

fn own() -> FileResolver {
    FileResolver::new().allow_own_directory()
}

fn allowed(directory: &Path) -> FileResolver {
    own().allow_directory(directory).unwrap()
}

fn relative() -> Vec<Row> {
    use ErrorKind::{ParentDenied, ParentNotFound};
    vec![
        plain("beside the child", || Place::relative(".\\parent.vhdx").parent_at("images/parent.vhdx").finds()),
        plain("without the leading .\\", || Place::relative("parent.vhdx").parent_at("images/parent.vhdx").finds()),
        plain("with slashes", || Place::relative("a/b/parent.vhdx").parent_at("images/a/b/parent.vhdx").finds()),
        plain("beneath the child's directory", || {
            Place::relative(".\\a\\b\\parent.vhdx").parent_at("images/a/b/parent.vhdx").finds()
        }),
        plain("up and down again, within the child's directory", || {
            Place::relative("..\\images\\parent.vhdx").parent_at("images/parent.vhdx").finds()
        }),
        plain("above the child's directory is denied", || {
            Place::relative("..\\parent.vhdx").parent_at("parent.vhdx").refuses(ParentDenied)
        }),
        plain("above the child's directory, where it is allowed", || {
            let place = Place::relative("..\\base\\parent.vhdx").parent_at("base/parent.vhdx");
            let resolver = allowed(&place.path("base"));
            place.finds_by(resolver)
        }),
        plain("above the child's directory, where everything is", || {
            Place::relative("..\\base\\parent.vhdx").parent_at("base/parent.vhdx").finds_by(own().allow_any())
        }),
        plain("into a directory whose name begins like an allowed one", || {
            let place = Place::relative("..\\base2\\parent.vhdx").parent_at("base2/parent.vhdx");
            std::fs::create_dir(place.path("base")).unwrap();
            let resolver = allowed(&place.path("base"));
            place.refuses_by(resolver, ParentDenied)
        }),
        plain("down and then far above", || {
            Place::relative("a\\..\\..\\..\\..\\parent.vhdx").parent_at("parent.vhdx").refuses(ParentDenied)
        }),
        plain("above the root", || Place::relative(&"..\\".repeat(60)).parent_at("parent.vhdx").refuses(ParentDenied)),
        plain("the default allows nothing", || {
            let place = Place::relative("parent.vhdx").parent_at("images/parent.vhdx");
            place.refuses_by(FileResolver::new(), ParentDenied)
        }),
        missing("nobody there", || Place::relative("parent.vhdx").refuses(ParentNotFound)),
        missing("a component is a file", || {
            Place::relative("parent.vhdx\\parent.vhdx").parent_at("images/parent.vhdx").refuses(ParentNotFound)
        }),
        missing("a name that no file system takes", || {
            Place::relative(&format!("{}.vhdx", "x".repeat(300))).refuses(ParentNotFound)
        }),
    ]
}

fn windows() -> Vec<Row> {
    use ErrorKind::{ParentDenied, ParentNotFound};
    let volume = r"\\?\Volume{01234567-89ab-cdef-0123-456789abcdef}\vms\base\parent.vhdx";
    vec![
        plain("a drive: the file's name alone", || {
            Place::absolute(r"\\?\C:\vms\base\parent.vhdx").parent_at("images/parent.vhdx").finds()
        }),
        plain("a drive: the end of the path", || {
            Place::absolute(r"\\?\C:\vms\base\parent.vhdx").parent_at("images/base/parent.vhdx").finds()
        }),
        plain("a drive: beneath an allowed directory", || {
            let place = Place::absolute(r"\\?\d:\vms\base\parent.vhdx").parent_at("disks/vms/base/parent.vhdx");
            let resolver = allowed(&place.path("disks"));
            place.finds_by(resolver)
        }),
        plain("a drive without the prefix", || {
            Place::absolute(r"C:\vms\parent.vhdx").parent_at("images/parent.vhdx").finds()
        }),
        plain("a drive with slashes", || {
            Place::absolute("C:/vms/parent.vhdx").parent_at("images/vms/parent.vhdx").finds()
        }),
        missing("a drive, and nobody there", || Place::absolute(r"\\?\C:\vms\parent.vhdx").refuses(ParentNotFound)),
        missing("a drive, not outside of what is allowed", || {
            Place::absolute(r"\\?\C:\parent.vhdx").parent_at("parent.vhdx").refuses(ParentNotFound)
        }),
        special("V-151", "a drive with .. leads nowhere", &[Code::ParentNotFound], || {
            Place::absolute(r"\\?\C:\..\parent.vhdx").parent_at("parent.vhdx").refuses(ParentNotFound)
        }),
        plain("the current directory of a drive is nobody's", || {
            Place::absolute("C:parent.vhdx").parent_at("images/parent.vhdx").refuses(ParentDenied)
        }),
        plain("a volume", move || Place::new(&[("volume_path", volume)]).parent_at("images/base/parent.vhdx").finds()),
        missing("a volume, and nobody there", move || Place::new(&[("volume_path", volume)]).refuses(ParentNotFound)),
        plain("a share is never opened", || {
            Place::absolute(r"\\server\share\parent.vhdx").parent_at("images/parent.vhdx").refuses(ParentDenied)
        }),
        plain("a share with the prefix is never opened, even where everything is allowed", || {
            let place = Place::absolute(r"\\?\UNC\server\share\parent.vhdx").parent_at("images/parent.vhdx");
            place.refuses_by(own().allow_any(), ParentDenied)
        }),
        plain("a share as relative path is never opened", || {
            Place::relative("//server/share/parent.vhdx").parent_at("images/parent.vhdx").refuses(ParentDenied)
        }),
        plain("a device path is never opened", || {
            Place::absolute(r"\\.\PhysicalDrive0").parent_at("images/PhysicalDrive0").refuses(ParentDenied)
        }),
        plain("a path of this system is never opened", || {
            let place = Place::relative("x").parent_at("base/parent.vhdx");
            let path = place.path("base/parent.vhdx").to_str().unwrap().to_owned();
            Place::relative(&path).refuses_by(own().allow_any(), ParentDenied)
        }),
        plain("the relative path comes first, then the volume, then the drive", || {
            let paths = [
                ("absolute_win32_path", r"\\?\C:\wrong.vhdx"),
                ("volume_path", r"\\?\Volume{01234567-89ab-cdef-0123-456789abcdef}\wrong.vhdx"),
                ("relative_path", ".\\parent.vhdx"),
            ];
            let place = Place::new(&paths).parent_at("images/parent.vhdx");
            std::fs::write(place.path("images/wrong.vhdx"), b"not a VHDX").unwrap();
            place.finds()
        }),
        plain("what is wrong at the first place does not hide the second", || {
            let paths = [("relative_path", "wrong.vhdx"), ("absolute_win32_path", r"\\?\C:\vms\parent.vhdx")];
            let place = Place::new(&paths).parent_at("images/parent.vhdx");
            let other = parent_builder().both_headers(|header| header.data_write_guid = Guid::seeded(70));
            other.build().write_to(&place.path("images/wrong.vhdx")).unwrap();
            place.finds()
        }),
    ]
}

fn names() -> Vec<Row> {
    use ErrorKind::ParentNotFound;
    vec![
        plain("another case of the file", || Place::relative("PARENT.vhdx").parent_at("images/Parent.VHDX").finds()),
        plain("another case of a directory", || {
            Place::relative("Base\\Images\\parent.vhdx").parent_at("images/BASE/images/parent.vhdx").finds()
        }),
        plain("the exact name wins", || {
            let place = Place::relative("parent.vhdx").parent_at("images/parent.vhdx");
            std::fs::write(place.path("images/PARENT.vhdx"), b"not a VHDX").unwrap();
            place.finds()
        }),
        missing("two other cases are ambiguous", || {
            let place = Place::relative("parent.vhdx").parent_at("images/PARENT.vhdx");
            place.parent_at("images/Parent.vhdx").refuses(ParentNotFound)
        }),
        plain("a name that is not ASCII", || {
            Place::relative("Stra\u{df}e\u{1F600}.vhdx").parent_at("images/Stra\u{df}e\u{1F600}.vhdx").finds()
        }),
    ]
}

fn kinds() -> Vec<Row> {
    use ErrorKind::{InvalidArgument, ParentDenied};
    vec![
        plain("a symbolic link is refused", || {
            let place = Place::relative("parent.vhdx").parent_at("images/real.vhdx");
            symlink("real.vhdx", place.path("images/parent.vhdx")).unwrap();
            place.refuses(ParentDenied)
        }),
        plain("a symbolic link to a directory is refused", || {
            let place = Place::relative("base\\parent.vhdx").parent_at("real/parent.vhdx");
            symlink(place.path("real"), place.path("images/base")).unwrap();
            place.refuses(ParentDenied)
        }),
        plain("a symbolic link that is named is followed", || {
            let place = Place::relative("parent.vhdx").parent_at("images/real.vhdx");
            symlink("real.vhdx", place.path("images/link.vhdx")).unwrap();
            let resolver = own().name_parent(&place.path("images/link.vhdx"));
            place.finds_by(resolver)
        }),
        plain("a FIFO is refused at once", || {
            let place = Place::relative("parent.vhdx");
            fifo(&place.path("images/parent.vhdx"));
            place.refuses(ParentDenied)
        }),
        plain("a named FIFO is refused at once", || {
            let place = Place::relative("parent.vhdx");
            fifo(&place.path("fifo"));
            let resolver = own().name_parent(&place.path("fifo"));
            place.refuses_by(resolver, InvalidArgument)
        }),
        plain("a socket is refused", || {
            let place = Place::relative("parent.vhdx");
            let _listener = UnixListener::bind(place.path("images/parent.vhdx")).unwrap();
            place.refuses(ParentDenied)
        }),
        plain("a directory is refused", || {
            let place = Place::relative("parent.vhdx");
            std::fs::create_dir(place.path("images/parent.vhdx")).unwrap();
            place.refuses(ParentDenied)
        }),
        plain("a device is refused", || {
            let place = Place::absolute(r"\\?\C:\null");
            let resolver = allowed(Path::new("/dev"));
            place.refuses_by(resolver, ParentDenied)
        }),
        plain("a named device is refused", || {
            let place = Place::relative("parent.vhdx");
            place.refuses_by(own().name_parent(Path::new("/dev/zero")), InvalidArgument)
        }),
    ]
}

fn fifo(path: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
    assert!(std::fs::metadata(path).unwrap().file_type().is_fifo());
}

fn identities() -> Vec<Row> {
    use ErrorKind::{Chain, ParentMismatch};
    let zero = || {
        let parent = parent_builder().both_headers(|header| header.data_write_guid = Guid::ZERO);
        let parent = Arc::new(parent.build());
        let place = Place::with(child_of(&parent).build());
        parent.write_to(&place.path("images/parent.vhdx")).unwrap();
        place
    };
    let mismatch = |name: &str, run: fn() -> Vec<Code>| special("V-152", name, &[Code::ParentMismatch], run);
    vec![
        mismatch("the file there is another one", || {
            let place = Place::relative("parent.vhdx");
            let other = parent_builder().both_headers(|header| header.data_write_guid = Guid::seeded(70));
            other.build().write_to(&place.path("images/parent.vhdx")).unwrap();
            place.refuses(ParentMismatch)
        }),
        special("V-152", "an all-zero linkage finds nobody", &[Code::ParentMismatch], move || {
            zero().refuses(ParentMismatch)
        }),
        special("V-152", "an all-zero linkage, and the file is named", &[], move || {
            let place = zero();
            let resolver = own().name_parent(&place.path("images/parent.vhdx"));
            place.finds_by(resolver)
        }),
        special("V-150", "no path, and the file is named", &[], || {
            let place = Place::new(&[]).parent_at("elsewhere/base.vhdx");
            let resolver = FileResolver::new().name_parent(&place.path("elsewhere/base.vhdx"));
            place.finds_by(resolver)
        }),
        special("V-150", "no path, and nothing is named", &[Code::LocatorNoPath], || {
            Place::new(&[]).parent_at("images/parent.vhdx").refuses(ErrorKind::Corrupt)
        }),
        special("V-152", "named files, nearest first", &[], nearest_first),
        special("V-154", "a file whose path names itself", &[Code::ChainCycle], || {
            let place = Place::relative("child.vhdx");
            place.refuses(Chain)
        }),
        special("V-154", "a hard link to itself", &[Code::ChainCycle], || {
            let place = Place::relative("parent.vhdx");
            std::fs::hard_link(place.path("images/child.vhdx"), place.path("images/parent.vhdx")).unwrap();
            place.refuses(Chain)
        }),
        special("V-156", "files of a chain are left as they are", &[], || {
            let place = Place::relative("parent.vhdx").parent_at("images/parent.vhdx");
            let path = place.path("images/parent.vhdx");
            let state = || {
                let metadata = std::fs::metadata(&path).unwrap();
                (metadata.mtime(), metadata.mtime_nsec(), metadata.len())
            };
            let before = (state(), std::fs::read(&path).unwrap());
            for write in [false, true] {
                let options = OpenOptions::new().write(write).parents(Arc::new(own()));
                let image = options.open_path(&place.path("images/child.vhdx")).unwrap();
                assert_eq!(compare(&place.made, &image, 0..image.size()), None);
            }
            assert!(before == (state(), std::fs::read(&path).unwrap()));
            Vec::new()
        }),
    ]
}

/// Three files that were all renamed.
fn nearest_first() -> Vec<Code> {
    let bottom = parent();
    let middle = child_of(&bottom).named("middle.vhdx").both_headers(|header| {
        header.data_write_guid = Guid::seeded(71);
    });
    let middle = Arc::new(middle.build());
    let place = Place::with(child_of(&middle).build());
    middle.write_to(&place.path("one")).unwrap();
    bottom.write_to(&place.path("two")).unwrap();
    let (one, two) = (place.path("one"), place.path("two"));
    let image = place.open(FileResolver::new().name_parent(&one).name_parent(&two)).unwrap();
    assert_eq!(compare(&place.made, &image, 0..image.size()), None);
    let error = place.open(FileResolver::new().name_parent(&two).name_parent(&one)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ParentMismatch);
    Vec::new()
}
