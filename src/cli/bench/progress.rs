//! How far a measurement is.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// How often progress is told where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// What the whole is on a bar.
const WHOLE: f64 = 1000.0;

/// A live line on a terminal, and a line now and then elsewhere; on standard error.
pub(super) struct Live {
    bar: Option<ProgressBar>,
    told: Instant,
    name: String,
}

impl Live {
    /// Nothing is shown yet.
    pub(super) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(WHOLE as u64);
            let style = ProgressStyle::with_template("{prefix} {bar:24} {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        let (told, name) = (Instant::now(), String::new());
        Self { bar, told, name }
    }

    /// A run of that name begins.
    pub(super) fn begin(&mut self, name: &str) {
        (self.name, self.told) = (name.to_owned(), Instant::now());
        match &self.bar {
            Some(bar) => {
                bar.set_prefix(self.name.clone());
                bar.set_position(0);
                bar.set_message("");
            }
            None => eprintln!("{name}"),
        }
    }

    /// So much of the run, from 0 to 1, is over; `tell` says the rest.
    pub(super) fn show(&mut self, share: f64, tell: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            bar.set_position((share * WHOLE) as u64);
            bar.set_message(tell());
        } else if self.told.elapsed() >= LINE_EVERY {
            self.told = Instant::now();
            eprintln!("  {}: {}", self.name, tell());
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
