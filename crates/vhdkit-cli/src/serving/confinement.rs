//! What a server gives up before it talks to anybody: a client that finds a way in finds little behind it.
//!
//! Everything is open by then, and what is open stays usable. Where the kernel lacks a part of this, the rest is done.

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _,
    RulesetError, RulesetStatus, Scope,
};

use super::sockets::Made;
use crate::ui::Ui;

/// The newest version of Landlock that is made use of; older ones do less.
const NEWEST: ABI = ABI::V10;

/// Gives up what is not needed any more. Threads that are made from here on are held to it too.
pub(crate) fn confine(ui: &Ui, made: Option<&Made>) {
    match restrict_files(made) {
        Ok(RulesetStatus::FullyEnforced) => ui.detail("Landlock: other files and connections are out of reach"),
        Ok(RulesetStatus::PartiallyEnforced) => {
            ui.detail("Landlock: other files are out of reach; this kernel does not know all of the rest");
        }
        Ok(RulesetStatus::NotEnforced) => ui.detail("Landlock: this kernel has none; other files stay within reach"),
        Err(error) => ui.detail(&format!("Landlock: {error}; other files stay within reach")),
    }
    match system_calls::restrict() {
        Ok(()) => ui.detail("seccomp: system calls that a server does not need are refused"),
        Err(why) => ui.detail(&format!("seccomp: {why}; all system calls stay allowed")),
    }
}

/// No file by its name but to remove the own socket, no TCP or UDP but what listens, no signals to others.
fn restrict_files(made: Option<&Made>) -> Result<RulesetStatus, RulesetError> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?;
    let mut ruleset = ruleset.create()?;
    let places = [
        (made.and_then(Made::place_of_socket), AccessFs::RemoveFile),
        (made.and_then(Made::place_of_directory), AccessFs::RemoveDir),
    ];
    for (place, access) in places {
        // A place that cannot be opened is not allowed: then the socket stays behind, dead.
        if let Some(Ok(place)) = place.map(PathFd::new) {
            ruleset = ruleset.add_rule(PathBeneath::new(place, access))?;
        }
    }
    Ok(ruleset.restrict_self()?.ruleset)
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod system_calls {
    //! What fails from here on, whoever asks for it.

    use std::collections::BTreeMap;

    use seccompiler::{BpfProgram, Error, SeccompAction, SeccompFilter, apply_filter};

    /// What a server that is up never does: other programs, other processes, new connections, and the system itself.
    const REFUSED: [libc::c_long; 58] = [
        // Programs.
        libc::SYS_execve,
        libc::SYS_execveat,
        // Other processes.
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_process_madvise,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_pidfd_send_signal,
        libc::SYS_kcmp,
        // Connections and sockets; listening ones are there, and accept gives the others.
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        // File systems and name spaces.
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_fsopen,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_mount_setattr,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_open_by_handle_at,
        libc::SYS_name_to_handle_at,
        libc::SYS_mknodat,
        libc::SYS_symlinkat,
        libc::SYS_linkat,
        libc::SYS_quotactl,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_acct,
        // The kernel.
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_kexec_load,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_reboot,
        libc::SYS_syslog,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_keyctl,
        libc::SYS_personality,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_adjtimex,
        libc::SYS_vhangup,
    ];

    /// The same where processors differ.
    #[cfg(target_arch = "x86_64")]
    const REFUSED_TOO: [libc::c_long; 7] = [
        libc::SYS_kexec_file_load,
        libc::SYS_iopl,
        libc::SYS_ioperm,
        libc::SYS_modify_ldt,
        libc::SYS_uselib,
        libc::SYS_fork,
        libc::SYS_vfork,
    ];
    /// kexec_file_load, which the crate does not know for all C libraries.
    #[cfg(target_arch = "aarch64")]
    const REFUSED_TOO: [libc::c_long; 1] = [294];

    /// Refuses them to this thread, and to those that it makes.
    pub(super) fn restrict() -> Result<(), String> {
        let filter = || -> Result<(), Error> {
            let rules: BTreeMap<i64, _> =
                REFUSED.iter().chain(&REFUSED_TOO).map(|number| (*number, Vec::new())).collect();
            let eperm = SeccompAction::Errno(libc::EPERM.unsigned_abs());
            let filter = SeccompFilter::new(rules, SeccompAction::Allow, eperm, std::env::consts::ARCH.try_into()?)?;
            let program: BpfProgram = filter.try_into()?;
            apply_filter(&program)
        };
        filter().map_err(|error| error.to_string())
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod system_calls {
    pub(super) fn restrict() -> Result<(), String> {
        Err("not for this processor".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::io::{self, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::process::Command;

    #[test]
    fn what_was_given_up_is_gone_and_what_is_open_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let mut open = File::create(&path).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // It holds for the thread that asks for it, and for those that it makes.
        let confined = std::thread::spawn(move || {
            let status = restrict_files(None).unwrap();
            let calls = system_calls::restrict();
            std::thread::spawn(move || {
                let denied = |error: io::Error| assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
                open.write_all(b"more").unwrap();
                open.set_len(1 << 20).unwrap();
                open.sync_all().unwrap();
                if status != RulesetStatus::NotEnforced {
                    denied(File::open(&path).unwrap_err());
                    denied(File::create(path.with_extension("new")).unwrap_err());
                    denied(fs::remove_file(&path).unwrap_err());
                    denied(fs::read_dir("/").unwrap_err());
                }
                if calls.is_ok() {
                    denied(Command::new("/bin/true").spawn().unwrap_err());
                    denied(TcpStream::connect(address).unwrap_err());
                    denied(TcpListener::bind("127.0.0.1:0").unwrap_err());
                }
            })
            .join()
        });
        confined.join().unwrap().unwrap();
        assert_eq!(fs::metadata(directory.path().join("file")).unwrap().len(), 1 << 20);
        TcpStream::connect(address).unwrap();
    }
}
