//! From the command line to the exit code.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser as _;
use vhdkit::{Error, ErrorKind};

use crate::args::{Command, GlobalArgs, LowArgs};
use crate::commands;
use crate::failure::{Answer, Failure, exit_code};
use crate::formats::is_standard_stream;
use crate::signals::Interrupt;
use crate::ui::Ui;

/// What every command works with.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) ui: Ui,
    pub(crate) global: GlobalArgs,
    pub(crate) interrupt: Interrupt,
}

/// Runs the program.
pub(crate) fn run(arguments: Vec<OsString>) -> ExitCode {
    let json = arguments.iter().take_while(|argument| *argument != "--").any(|argument| argument == "--json");
    let low = match LowArgs::try_parse_from(arguments) {
        Ok(low) => low,
        Err(error) => return finish(Err(Failure::Clap(error)), &Ui::before_parsing(json), &Interrupt::default()),
    };
    let ui = Ui::new(&low.global);
    let interrupt = match Interrupt::install(has_an_end_to_bring_about(&low.command)) {
        Ok(interrupt) => interrupt,
        Err(error) => {
            let failure = Failure::Library(Error::io("cannot handle signals", error));
            return finish(Err(failure), &ui, &Interrupt::default());
        }
    };
    let context = Context { ui, global: low.global, interrupt };
    let result = dispatch(&context, low.command);
    finish(result, &context.ui, &context.interrupt)
}

/// Whether there is something to do when a signal comes: a new file to remove, an image to close, clients to
/// answer.
fn has_an_end_to_bring_about(command: &Command) -> bool {
    match command {
        Command::Create(_) | Command::Write(_) | Command::Zero(_) | Command::Discard(_) => true,
        Command::Replay(_) | Command::Serve(_) | Command::Apply(_) => true,
        Command::Resize(_) | Command::Compact(_) | Command::Merge(_) | Command::Reparent(_) | Command::Set(_) => true,
        Command::Diff(args) => args.export.as_deref().is_some_and(|target| !is_standard_stream(target)),
        Command::Repair(args) => args.apply || args.restore.is_some(),
        Command::Recover(_) => true,
        Command::Convert(args) => !is_standard_stream(&args.target),
        Command::Map(args) => args.svg.as_deref().is_some_and(|svg| !is_standard_stream(svg)),
        _ => false,
    }
}

fn dispatch(context: &Context, command: Command) -> Result<Answer, Failure> {
    match command {
        Command::Info(args) => commands::info::run(context, &args),
        Command::Create(args) => commands::create::run(context, &args),
        Command::Convert(args) => commands::convert::run(context, &args),
        Command::Check(args) => commands::check::run(context, &args),
        Command::Compare(args) => commands::compare::run(context, &args),
        Command::Diff(args) => commands::diff::run(context, &args),
        Command::Apply(args) => commands::apply::run(context, &args),
        Command::Chain(args) => commands::chain::run(context, &args),
        Command::Read(args) => commands::read::run(context, &args),
        Command::Write(args) => commands::write::run(context, &args),
        Command::Zero(args) => commands::clear::zero(context, &args),
        Command::Discard(args) => commands::clear::discard(context, &args),
        Command::Replay(args) => commands::replay::run(context, &args),
        Command::Repair(args) => commands::repair::run(context, &args),
        Command::Resize(args) => commands::resize::run(context, &args),
        Command::Compact(args) => commands::compact::run(context, &args),
        Command::Merge(args) => commands::merge::run(context, &args),
        Command::Reparent(args) => commands::reparent::run(context, &args),
        Command::Set(args) => commands::set::run(context, &args),
        Command::Recover(args) => commands::recover::run(context, &args),
        Command::Serve(args) => commands::serve::run(context, &args),
        Command::Map(args) => commands::map::run(context, &args),
        Command::Measure(args) => commands::measure::run(context, &args),
        Command::Completions(args) => commands::manual::completions(&args),
        Command::Man(args) => commands::manual::man(&args),
    }
}

/// Says what went wrong, and ends with the code for it.
fn finish(result: Result<Answer, Failure>, ui: &Ui, interrupt: &Interrupt) -> ExitCode {
    let stopped = interrupt.exit_code().filter(|_| result.is_err());
    let code = stopped.unwrap_or_else(|| exit_code(&result));
    let Err(failure) = result else { return ExitCode::from(code) };
    if stopped.is_some() && !matches!(failure, Failure::Cut { .. }) {
        let error = Error::new(
            ErrorKind::Cancelled,
            "stopped by a signal; unfinished files were removed, and an image that was being changed is valid",
        );
        ui.report(&Failure::Library(error.with_hint("run it again")), code);
    } else if !failure.is_broken_pipe() {
        ui.report(&failure, code);
    }
    ExitCode::from(code)
}
