//! What the tour prints: numbered steps, a sentence on each, and aligned numbers. Plain text, at most 100 columns.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use anyhow::Context as _;

use super::place::Stop;

const WIDTH: usize = 100;
const INDENT: &str = "   ";
/// Room for what stands before a number.
const LABEL: usize = 26;

/// Standard output. Each line is also where a request to stop is heeded.
pub struct Console {
    steps: usize,
    stop: Stop,
}

impl Console {
    pub fn new(stop: Stop) -> Self {
        Self { steps: 0, stop }
    }

    /// Fails if the tour is to stop.
    pub fn stop(&self) -> &Stop {
        &self.stop
    }

    fn print(&self, line: &str) -> anyhow::Result<()> {
        self.stop.check()?;
        self.print_anyway(line)
    }

    fn print_anyway(&self, line: &str) -> anyhow::Result<()> {
        // `println!` would panic when the reader has gone, as with `| head`.
        let mut out = io::stdout().lock();
        writeln!(out, "{}", line.trim_end())
            .and_then(|()| out.flush())
            .context("cannot print")
    }

    /// A paragraph at the margin.
    pub fn text(&self, text: &str) -> anyhow::Result<()> {
        for line in wrap(text, WIDTH) {
            self.print(&line)?;
        }
        self.print("")
    }

    /// A heading with the next number, and what happens in this step.
    pub fn step(&mut self, title: &str, sentence: &str) -> anyhow::Result<()> {
        self.steps += 1;
        self.print(&format!("{}. {title}", self.steps))?;
        self.paragraph(sentence)?;
        self.gap()
    }

    /// A paragraph of a step.
    pub fn paragraph(&self, text: &str) -> anyhow::Result<()> {
        let mut lines = wrap(text, WIDTH - INDENT.len()).into_iter();
        lines.try_for_each(|line| self.print(&format!("{INDENT}{line}")))
    }

    /// A line of a step.
    pub fn line(&self, line: &str) -> anyhow::Result<()> {
        self.print(&format!("{INDENT}  {line}"))
    }

    /// Something and what it is.
    pub fn fact(&self, label: &str, value: &str) -> anyhow::Result<()> {
        self.line(&format!("{label:<LABEL$}{value}"))
    }

    /// A row of a table: a label, and columns of these widths, aligned to the right.
    pub fn row<const N: usize>(&self, label: &str, widths: [usize; N], columns: [&str; N]) -> anyhow::Result<()> {
        let columns = columns.iter().zip(widths);
        let columns: String = columns.map(|(column, width)| format!("{column:>width$}")).collect();
        self.line(&format!("{label:<LABEL$}{columns}"))
    }

    /// The end of a step.
    pub fn gap(&self) -> anyhow::Result<()> {
        self.print("")
    }

    /// What is said when all is over, even if the tour was to stop meanwhile.
    pub fn last(&self, text: &str) -> anyhow::Result<()> {
        wrap(text, WIDTH).iter().try_for_each(|line| self.print_anyway(line))
    }
}

/// Breaks a text between words.
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

/// A time as people read it.
pub fn time(time: Duration) -> String {
    let milliseconds = time.as_secs_f64() * 1e3;
    match milliseconds {
        0.0..10.0 => format!("{milliseconds:.1} ms"),
        10.0..1000.0 => format!("{milliseconds:.0} ms"),
        _ => format!("{:.1} s", milliseconds / 1e3),
    }
}

/// How much `part` is of `whole`.
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
    fn texts_are_broken_between_words() {
        assert_eq!(wrap("a bc  d\n efg", 4), ["a bc", "d", "efg"]);
        assert_eq!(wrap("longer-than-the-line x", 4), ["longer-than-the-line", "x"]);
    }

    #[test]
    fn numbers_as_people_read_them() {
        assert_eq!(time(Duration::from_micros(1234)), "1.2 ms");
        assert_eq!(time(Duration::from_millis(1234)), "1.2 s");
        assert_eq!(percent(1, 8), "12.5 %");
        assert_eq!(
            (plural(1, "file"), plural(2, "directory")),
            ("1 file".into(), "2 directories".into())
        );
    }
}
