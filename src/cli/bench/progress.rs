//! Shows the progress of a measurement.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// Interval of progress lines when standard error is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// Length of the bar, for a share of 1.
const BAR_LENGTH: f64 = 1000.0;

/// A progress bar on a terminal, or a line every [`LINE_INTERVAL`] elsewhere; on standard error.
pub(super) struct ProgressDisplay {
    bar: Option<ProgressBar>,
    last_line: Instant,
    name: String,
}

impl ProgressDisplay {
    /// A display that shows nothing until [`Self::begin`].
    pub(super) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(BAR_LENGTH as u64);
            let style = ProgressStyle::with_template("{prefix} {bar:24} {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        let (last_line, name) = (Instant::now(), String::new());
        Self { bar, last_line, name }
    }

    /// Starts the display of a run.
    pub(super) fn begin(&mut self, name: &str) {
        (self.name, self.last_line) = (name.to_owned(), Instant::now());
        match &self.bar {
            Some(bar) => {
                bar.set_prefix(self.name.clone());
                bar.set_position(0);
                bar.set_message("");
            }
            None => eprintln!("{name}"),
        }
    }

    /// Shows the finished share of the run (0 to 1) and the text of `message`.
    pub(super) fn show(&mut self, share: f64, message: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            bar.set_position((share * BAR_LENGTH) as u64);
            bar.set_message(message());
        } else if self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            eprintln!("  {}: {}", self.name, message());
        }
    }
}

impl Drop for ProgressDisplay {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
