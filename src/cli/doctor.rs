//! `nydus-store doctor`: prints the findings of [`crate::doctor`].

use std::{io::IsTerminal as _, path::PathBuf};

use clap::Args;

use super::{ConfigArg, print};
use crate::doctor::{DoctorReport, Finding, Status};

/// Check whether this host can run lazy images, and print what to fix
///
/// Exit status: 1 if a check fails (FAIL); warnings do not count.
#[derive(Debug, Args)]
pub struct DoctorCommand {
    /// Print JSON
    #[arg(long)]
    json: bool,

    /// The daemon's state directory (its --root)
    #[arg(long, value_name = "DIR", default_value = "/var/lib/nydus-store")]
    root: PathBuf,

    #[command(flatten)]
    config: ConfigArg,
}

impl DoctorCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        let report = DoctorReport::of_host(&self.root, self.config.config.as_deref());
        if self.json {
            print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
        } else {
            print(&text(&report, std::io::stdout().is_terminal()))?;
        }
        match report.count(Status::Fail) {
            0 => Ok(()),
            1 => anyhow::bail!("lazy images cannot run: 1 check failed"),
            many => anyhow::bail!("lazy images cannot run: {many} checks failed"),
        }
    }
}

fn text(report: &DoctorReport, colours: bool) -> String {
    let mut text: String = report
        .findings
        .iter()
        .map(|finding| paragraph(finding, colours))
        .collect();
    let warnings = match report.count(Status::Warn) {
        0 => String::new(),
        1 => ", with 1 warning".to_owned(),
        many => format!(", with {many} warnings"),
    };
    if report.ok {
        text.push_str(&format!("\nThis host can run lazy images{warnings}.\n"));
    }
    text
}

fn paragraph(finding: &Finding, colours: bool) -> String {
    let Finding {
        name,
        status,
        detail,
        advice,
    } = finding;
    let word = format!("{:<6}", status.word());
    let word = match (colours, status) {
        (false, _) => word,
        (true, Status::Ok) => format!("\x1b[32m{word}\x1b[0m"),
        (true, Status::Warn) => format!("\x1b[33m{word}\x1b[0m"),
        (true, Status::Fail) => format!("\x1b[1;31m{word}\x1b[0m"),
    };
    // Keeps the line breaks of errors that quote a position in a file.
    let detail: Vec<_> = detail.trim_end().lines().flat_map(wrap).collect();
    let advice: Vec<_> = advice.iter().flat_map(|advice| wrap(&format!("→ {advice}"))).collect();
    let lines = detail.into_iter().chain(advice);
    let text = lines.collect::<Vec<_>>().join(&format!("\n{:24}", ""));
    format!("{word}{name:<18}{text}\n")
}

/// Breaks a line between words at 92 columns.
fn wrap(line: &str) -> Vec<String> {
    const WIDTH: usize = 92;
    if line.chars().count() <= WIDTH {
        return vec![line.to_owned()];
    }
    let mut lines = vec![String::new()];
    for word in line.split(' ') {
        match lines.last_mut() {
            Some(last) if last.is_empty() => last.push_str(word),
            Some(last) if last.chars().count() + 1 + word.chars().count() <= WIDTH => {
                last.push(' ');
                last.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_wrapped() {
        let text = format!("{} end", "word ".repeat(40).trim_end());
        let lines = wrap(&text);
        assert!(
            lines.len() == 3 && lines.iter().all(|line| line.len() <= 92),
            "{lines:?}"
        );
        assert_eq!(lines.join(" "), text);
        let finding = Finding::warn("clock", "first\n second", "do");
        assert_eq!(
            paragraph(&finding, false),
            format!("warn  clock             first\n{0} second\n{0}→ do\n", " ".repeat(24))
        );
    }
}
