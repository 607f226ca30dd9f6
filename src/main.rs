//! The `nydus-store` program: parses the command line, runs the command and prints its error.

use std::process::ExitCode;

use clap::Parser as _;
use nydus_store::{Cli, ErrorChain};

fn main() -> ExitCode {
    // `parse` exits with status 2 on wrong usage.
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nydus-store: {}", ErrorChain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
