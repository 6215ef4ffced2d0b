//! `completions` and `man`: made from the definitions of the command line.

use std::io::{self, Write as _};
use std::path::Path;

use clap::CommandFactory as _;

use crate::args::{CompletionsArgs, LowArgs, ManArgs};
use crate::failure::{Answer, Failure, file_error};

/// Prints a completion script.
pub(crate) fn completions(args: &CompletionsArgs) -> Result<Answer, Failure> {
    let mut script = Vec::new(); // clap panics when it writes to a closed pipe
    clap_complete::generate(args.shell, &mut LowArgs::command(), "vhdkit", &mut script);
    io::stdout().lock().write_all(&script)?;
    Ok(Answer::Yes)
}

/// Prints the manual page, or writes all of them.
pub(crate) fn man(args: &ManArgs) -> Result<Answer, Failure> {
    let mut command = LowArgs::command();
    command.build();
    let Some(directory) = &args.directory else {
        let page = render(&command)?;
        io::stdout().lock().write_all(&page)?;
        return Ok(Answer::Yes);
    };
    let made = std::fs::create_dir_all(directory);
    made.map_err(|error| file_error(directory, "cannot make the directory for the manual pages", error))?;
    write_page(directory, "vhdkit.1", &render(&command)?)?;
    for subcommand in command.get_subcommands().filter(|subcommand| subcommand.get_name() != "help") {
        // The page is for `vhdkit-info`, and its usage says `vhdkit info`.
        let name = format!("vhdkit-{}", subcommand.get_name());
        let usage = format!("vhdkit {}", subcommand.get_name());
        let subcommand = subcommand.clone().display_name(name.clone()).bin_name(usage);
        write_page(directory, &format!("{name}.1"), &render(&subcommand)?)?;
    }
    Ok(Answer::Yes)
}

fn render(command: &clap::Command) -> Result<Vec<u8>, Failure> {
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    Ok(page)
}

fn write_page(directory: &Path, name: &str, page: &[u8]) -> Result<(), Failure> {
    let path = directory.join(name);
    std::fs::write(&path, page).map_err(|error| file_error(&path, "cannot write the manual page", error))
}
