//! convert

use crate::args::ConvertArgs;
use crate::cli::Context;
use crate::failure::{Answer, Failure};

pub(crate) fn run(_context: &Context, _args: &ConvertArgs) -> Result<Answer, Failure> {
    Ok(Answer::Yes)
}
