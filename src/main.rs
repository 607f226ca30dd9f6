use std::process::ExitCode;

use clap::Parser as _;
use nydus_store::cli::Cli;

fn main() -> ExitCode {
    // Wrong usage ends here, with status 2.
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nydus-store: {}", message(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes, without those that it has told already.
fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}
