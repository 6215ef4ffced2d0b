//! The power goes in the middle of a load that syncs every file: the guest finds every file that it has promised.
//!
//! ```text
//!   boot 0    mkfs, load       guest cut; the server goes on
//!   boot 1    verify, load     server killed, then guest cut
//!   boot 2    verify, load     both at once
//!   boot 3    verify, unmount, switch off; server ends; e2fsck and `check` are content
//! ```

use std::time::{Duration, Instant, SystemTime};

use vhdkit_testkit::foreign::{assert_success, run_tool};
use vhdkit_testkit::harness::{Case, Needs};
use vhdkit_testkit::rng::Rng;

use crate::common::Scratch;
use crate::guest::{Guest, Task};
use crate::promises::Promises;
use crate::server::{Server, WRITE};

/// Whose power is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// The guest's, while the server goes on with what it holds in memory.
    Guest,
    /// The server's; the guest's kernel sees errors for a moment.
    Server,
    /// Both at once.
    Both,
}

/// A disk, and the ways in which its power is cut one after the other.
#[derive(Clone, Copy, Debug)]
struct Plan {
    name: &'static str,
    create: &'static [&'static str],
    /// Bytes of a sector, for the kernel's client.
    sector: u64,
    /// Whether it is a child, of a parent that holds an older state of the file system.
    child: bool,
    cuts: &'static [Cut],
}

/// A seed that is another each time, unless `VHDKIT_CUT_SEED` names it.
pub(crate) fn seed() -> u64 {
    let named = std::env::var("VHDKIT_CUT_SEED").ok().map(|text| text.parse().expect("VHDKIT_CUT_SEED is a number"));
    named.unwrap_or_else(|| SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64 & 0xffff_ffff)
}

/// Reads the image where it lies, as another program would find it: no errors, and a file system that recovers.
fn judge_image(scratch: &Scratch, clean: bool) {
    scratch.run(&["check", "disk.vhdx"]).expect(0);
    scratch.run(&["convert", "disk.vhdx", "disk.raw", "--force", "--quiet"]).expect(0);
    let raw = scratch.join("disk.raw");
    let raw = raw.to_str().unwrap();
    if !clean {
        let output = run_tool("e2fsck", &["-f", "-p", raw]);
        let code = output.status.code();
        // One: something was corrected, as the journal and files that were deleted while they were open.
        assert!(matches!(code, Some(0 | 1)), "{code:?}: {}", String::from_utf8_lossy(&output.stdout));
    }
    assert_success(&run_tool("e2fsck", &["-f", "-n", raw]));
}

fn power_cuts(plan: Plan) {
    let seed = seed();
    println!("{}: seed {seed}", plan.name);
    let started = Instant::now();
    let mut rng = Rng::new(seed);
    let scratch = Scratch::new();
    let name = if plan.child { "base.vhdx" } else { "disk.vhdx" };
    scratch.run(&[&["create", name, "--quiet"], plan.create].concat()).expect(0);
    let mut promises = Promises::default();
    let (mut server, mut port) = Server::on_port(&scratch, name, WRITE);
    let mut image = name;
    for (boot, &cut) in plan.cuts.iter().enumerate() {
        let guest = Guest::boot(&scratch, port, plan.sector, boot, Task::Load);
        judge_guest(&guest, &promises, boot);
        println!("{} {:.1?}: boot {boot} found what was promised", plan.name, started.elapsed());
        let count = rng.between(15, 120) as usize;
        guest.wait_for_promises(&mut promises, count);
        println!("{} {:.1?}: {count} promises more, then {cut:?}", plan.name, started.elapsed());
        std::thread::sleep(Duration::from_millis(rng.below(60)));
        if cut == Cut::Guest {
            guest.cut(&mut promises);
            continue;
        }
        guest.hear_so_far(&mut promises);
        promises.note("the server is killed");
        server.kill();
        if cut == Cut::Server {
            std::thread::sleep(Duration::from_millis(300));
        }
        promises.note("and has been dead for a while when the guest is cut");
        guest.cut(&mut promises);
        if plan.child && image == "base.vhdx" {
            // From here on the parent stays as it is.
            scratch.run(&["replay", "base.vhdx", "--quiet"]).expect(0);
            scratch.run(&["create", "disk.vhdx", "--parent", "base.vhdx", "--quiet"]).expect(0);
            image = "disk.vhdx";
        }
        judge_image(&scratch, false);
        (server, port) = Server::on_port(&scratch, image, WRITE);
    }
    let boot = plan.cuts.len();
    let guest = Guest::boot(&scratch, port, plan.sector, boot, Task::End);
    judge_guest(&guest, &promises, boot);
    guest.wait_for_end();
    server.end();
    judge_image(&scratch, true);
    println!("{} {:.1?}: {} promises, {} cuts", plan.name, started.elapsed(), promises.given, plan.cuts.len());
}

/// After a cut the file system recovers, and everything that was promised is there.
#[track_caller]
fn judge_guest(guest: &Guest, promises: &Promises, boot: usize) {
    let found = guest.found();
    assert_eq!(found.recovered, boot > 0, "boot {boot}: {}", guest.console());
    let wrong = promises.judge(&found.files);
    assert!(wrong.is_empty(), "boot {boot}:\n{}", wrong.join("\n"));
}

pub(crate) fn cases() -> Vec<Case> {
    let plain = Plan {
        name: "guest_power_cut",
        create: &["--size", "256M", "--block-size", "1M"],
        sector: 512,
        child: false,
        cuts: &[Cut::Guest, Cut::Server, Cut::Both],
    };
    let child = Plan {
        name: "guest_power_cut_child_4k",
        create: &["--size", "200M", "--block-size", "2M", "--logical-sector-size", "4096"],
        sector: 4096,
        child: true,
        cuts: &[Cut::Both, Cut::Server, Cut::Guest],
    };
    let needs = || Needs::tools(&["qemu-system-x86_64", "e2fsck"]).and_guest();
    let plans = [plain, child];
    plans.into_iter().map(|plan| Case::new(plan.name, needs(), move || power_cuts(plan))).collect()
}
