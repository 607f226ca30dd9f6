use std::process::ExitCode;

use clap::Parser as _;
use nydus_store::cli::Cli;

fn main() -> ExitCode {
    // Wrong usage ends here, with status 2.
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nydus-store: {error:#}");
            ExitCode::FAILURE
        }
    }
}
