//! Writes the seed corpus of each fuzz target below the directory that the argument names.

use std::{env, fs, path::PathBuf};

use anyhow::Context as _;
use nydus_store::fuzzing::{TARGETS, seeds};

fn main() -> anyhow::Result<()> {
    let dir = PathBuf::from(env::args_os().nth(1).context("usage: seeds DIR")?);
    for target in TARGETS {
        let dir = dir.join(target.name);
        fs::create_dir_all(&dir)?;
        for (number, seed) in seeds(target.name)?.iter().enumerate() {
            fs::write(dir.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
