//! Tests that need something outside the project, and are ignored, not passed, where it is absent.
//!
//! The standard harness cannot ignore a test at run time. A test file that uses this one says so in its manifest:
//!
//! ```toml
//! [[test]]
//! name = "interop"
//! harness = false
//! ```
//!
//! ```no_run
//! use vhdkit_testkit::harness::{Case, Needs, main_with};
//!
//! fn qemu_reads_our_image() {
//!     // A panic fails the case.
//! }
//!
//! fn main() {
//!     main_with(vec![Case::new("qemu_reads_our_image", Needs::tools(&["qemu-img"]), qemu_reads_our_image)]);
//! }
//! ```

use std::fmt;
use std::path::Path;

use libtest_mimic::{Arguments, Failed, Trial};

use crate::foreign;

/// What a case needs from the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Executables by name.
    pub tools: Vec<String>,
    /// The corpus of foreign images.
    pub corpus: bool,
    /// The rights of the superuser.
    pub root: bool,
    /// The guest that `.ci/guest` prepares.
    pub guest: bool,
    /// Files that have to be there, such as devices.
    pub files: Vec<String>,
}

impl Needs {
    /// Nothing.
    #[must_use]
    pub fn nothing() -> Self {
        Self::default()
    }

    /// These executables.
    #[must_use]
    pub fn tools(names: &[&str]) -> Self {
        Self { tools: names.iter().map(|name| (*name).to_owned()).collect(), ..Self::default() }
    }

    /// The corpus too.
    #[must_use]
    pub fn and_corpus(mut self) -> Self {
        self.corpus = true;
        self
    }

    /// The superuser too.
    #[must_use]
    pub fn and_root(mut self) -> Self {
        self.root = true;
        self
    }

    /// The guest too.
    #[must_use]
    pub fn and_guest(mut self) -> Self {
        self.guest = true;
        self
    }

    /// This file too.
    #[must_use]
    pub fn and_file(mut self, path: &str) -> Self {
        self.files.push(path.to_owned());
        self
    }

    /// What is absent, in words; nothing if the case can run.
    #[must_use]
    pub fn missing(&self) -> Option<String> {
        let mut missing: Vec<&str> =
            self.tools.iter().filter(|name| foreign::tool(name).is_none()).map(String::as_str).collect();
        if self.corpus && foreign::corpus_dir().is_none() {
            missing.push("corpus");
        }
        if self.root && !is_root() {
            missing.push("root");
        }
        if self.guest && foreign::guest_dir().is_none() {
            missing.push("the guest (see .ci/guest)");
        }
        missing.extend(self.files.iter().map(String::as_str).filter(|path| !Path::new(path).exists()));
        (!missing.is_empty()).then(|| missing.join(" and "))
    }
}

/// Whether the process has the rights of the superuser.
fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    uids.and_then(|uids| uids.split_whitespace().nth(1)) == Some("0")
}

/// One test.
pub struct Case {
    /// Its name.
    pub name: String,
    /// What it needs.
    pub needs: Needs,
    /// The test; it fails by panicking.
    pub run: Box<dyn FnOnce() + Send>,
}

impl fmt::Debug for Case {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Case {{ name: {:?}, needs: {:?} }}", self.name, self.needs)
    }
}

impl Case {
    /// A case.
    pub fn new(name: impl Into<String>, needs: Needs, run: impl FnOnce() + Send + 'static) -> Self {
        Self { name: name.into(), needs, run: Box::new(run) }
    }

    /// The trial that stands for the case on this machine.
    fn into_trial(self, required: bool) -> Trial {
        let Self { name, needs, run } = self;
        match needs.missing() {
            None => Trial::test(name, move || {
                run();
                Ok(())
            }),
            Some(missing) if required => Trial::test(name, move || {
                Err(Failed::from(format!("{missing} is absent, and VHDKIT_REQUIRE_TOOLS is 1")))
            }),
            // The reason is the kind, so that the report shows it. Who forces ignored cases to run sees it as failure.
            Some(missing) => {
                let reason = format!("{missing} is absent");
                let kind = format!("needs {missing}");
                Trial::test(name, move || Err(Failed::from(reason))).with_kind(kind).with_ignored_flag(true)
            }
        }
    }
}

/// Runs the cases as the arguments of the process ask for, reports them as `libtest` does, and ends the process.
pub fn main_with(cases: Vec<Case>) -> ! {
    let arguments = Arguments::from_args();
    let required = foreign::tools_are_required();
    let trials = cases.into_iter().map(|case| case.into_trial(required)).collect();
    libtest_mimic::run(&arguments, trials).exit()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conclusion(required: bool) -> libtest_mimic::Conclusion {
        let absent = || Needs::tools(&["sh", "no-such-tool-anywhere"]);
        let cases = vec![
            Case::new("passes", Needs::tools(&["sh"]), || {}),
            Case::new("fails", Needs::nothing(), || panic!("a panic fails the case")),
            Case::new("absent", absent(), || {}),
        ];
        let trials = cases.into_iter().map(|case| case.into_trial(required)).collect();
        // The report of this inner run must not be mistaken for the outer one's.
        let log = tempfile::NamedTempFile::new().unwrap();
        let logfile = Some(log.path().to_str().unwrap().to_owned());
        libtest_mimic::run(&Arguments { logfile, ..Arguments::default() }, trials)
    }

    #[test]
    fn absent_needs_are_ignored_and_fail_only_where_required() {
        assert_eq!(Needs::tools(&["no-such-tool-anywhere"]).missing().unwrap(), "no-such-tool-anywhere");
        assert_eq!(Needs::nothing().and_file("/dev/null").and_file("/no/such").missing().unwrap(), "/no/such");
        let lenient = conclusion(false);
        assert_eq!((lenient.num_passed, lenient.num_failed, lenient.num_ignored), (1, 1, 1));
        let strict = conclusion(true);
        assert_eq!((strict.num_passed, strict.num_failed, strict.num_ignored), (1, 2, 0));
    }
}
