use std::process::ExitCode;

use clap::Parser as _;
use nydus_store::{cli::Cli, error_chain::ErrorChain};

fn main() -> ExitCode {
    // Wrong usage ends here, with status 2.
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nydus-store: {}", ErrorChain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
