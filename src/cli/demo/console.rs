//! Prints the tour as plain text of at most 100 columns: numbered steps, explanations and aligned numbers.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use anyhow::Context as _;

use super::sandbox::StopFlag;

const WIDTH: usize = 100;
const INDENT: &str = "   ";
/// Columns for the label before a value.
const LABEL_WIDTH: usize = 26;

/// Standard output. Each method fails if a signal has requested to stop, unless noted.
pub struct Console {
    steps: usize,
    stop: StopFlag,
}

impl Console {
    pub fn new(stop: StopFlag) -> Self {
        Self { steps: 0, stop }
    }

    /// The flag that signals set.
    pub fn stop(&self) -> &StopFlag {
        &self.stop
    }

    fn print(&self, line: &str) -> anyhow::Result<()> {
        self.stop.check()?;
        self.write_line(line)
    }

    fn write_line(&self, line: &str) -> anyhow::Result<()> {
        // `println!` would panic on a closed pipe (`| head`).
        let mut out = io::stdout().lock();
        writeln!(out, "{}", line.trim_end())
            .and_then(|()| out.flush())
            .context("cannot print")
    }

    /// Prints an unindented paragraph.
    pub fn text(&self, text: &str) -> anyhow::Result<()> {
        for line in wrap(text, WIDTH) {
            self.print(&line)?;
        }
        self.print("")
    }

    /// Starts a step: prints a numbered heading and an explanation.
    pub fn step(&mut self, title: &str, explanation: &str) -> anyhow::Result<()> {
        self.steps += 1;
        self.print(&format!("{}. {title}", self.steps))?;
        self.paragraph(explanation)?;
        self.gap()
    }

    /// Prints a paragraph of a step.
    pub fn paragraph(&self, text: &str) -> anyhow::Result<()> {
        let mut lines = wrap(text, WIDTH - INDENT.len()).into_iter();
        lines.try_for_each(|line| self.print(&format!("{INDENT}{line}")))
    }

    /// Prints a line of a step.
    pub fn line(&self, line: &str) -> anyhow::Result<()> {
        self.print(&format!("{INDENT}  {line}"))
    }

    /// Prints a label and its value.
    pub fn fact(&self, label: &str, value: &str) -> anyhow::Result<()> {
        self.line(&format!("{label:<LABEL_WIDTH$}{value}"))
    }

    /// Prints a table row: a label and right-aligned columns.
    pub fn row<const N: usize>(&self, label: &str, widths: [usize; N], columns: [&str; N]) -> anyhow::Result<()> {
        let columns = columns.iter().zip(widths);
        let columns: String = columns.map(|(column, width)| format!("{column:>width$}")).collect();
        self.line(&format!("{label:<LABEL_WIDTH$}{columns}"))
    }

    /// Prints an empty line.
    pub fn gap(&self) -> anyhow::Result<()> {
        self.print("")
    }

    /// Prints the closing paragraph, also after a request to stop.
    pub fn print_unconditionally(&self, text: &str) -> anyhow::Result<()> {
        wrap(text, WIDTH).iter().try_for_each(|line| self.write_line(line))
    }
}

/// Breaks a text into lines between words.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Formats a time as `1.2 ms`, `123 ms` or `1.2 s`.
pub fn time(time: Duration) -> String {
    let milliseconds = time.as_secs_f64() * 1e3;
    match milliseconds {
        0.0..10.0 => format!("{milliseconds:.1} ms"),
        10.0..1000.0 => format!("{milliseconds:.0} ms"),
        _ => format!("{:.1} s", milliseconds / 1e3),
    }
}

/// Formats `part` as a percentage of `whole`.
pub fn percent(part: u64, whole: u64) -> String {
    format!("{:.1} %", part as f64 * 100.0 / whole.max(1) as f64)
}

/// `1 file`, `2 files`, `3 directories`
pub fn plural(count: u64, thing: &str) -> String {
    match thing.strip_suffix('y') {
        _ if count == 1 => format!("1 {thing}"),
        Some(stem) => format!("{count} {stem}ies"),
        None => format!("{count} {thing}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_wrapped_between_words() {
        assert_eq!(wrap("a bc  d\n efg", 4), ["a bc", "d", "efg"]);
        assert_eq!(wrap("longer-than-the-line x", 4), ["longer-than-the-line", "x"]);
    }

    #[test]
    fn numbers_are_formatted_with_units() {
        assert_eq!(time(Duration::from_micros(1234)), "1.2 ms");
        assert_eq!(time(Duration::from_millis(1234)), "1.2 s");
        assert_eq!(percent(1, 8), "12.5 %");
        assert_eq!(
            (plural(1, "file"), plural(2, "directory")),
            ("1 file".into(), "2 directories".into())
        );
    }
}
