//! compare

use crate::args::CompareArgs;
use crate::cli::Context;
use crate::failure::{Answer, Failure};

pub(crate) fn run(_context: &Context, _args: &CompareArgs) -> Result<Answer, Failure> {
    Ok(Answer::Yes)
}
