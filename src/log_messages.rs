//! Checks the form of all log messages, and that docs/troubleshooting.md and CONTRIBUTING.md quote them as they are.
//!
//! Reads the source files as tokens, so that comments, line breaks in literals and formatting make no difference.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use proc_macro2::{Group, Literal, TokenStream, TokenTree};
use walkdir::{DirEntry, WalkDir};

const PAGE: &str = include_str!("../docs/troubleshooting.md");
const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];

/// What the source files contain, without those of tests.
#[derive(Default)]
struct Sources {
    literals: Vec<String>,
    calls: Vec<LogCall>,
}

/// A call of one of tracing's macros.
struct LogCall {
    file: PathBuf,
    level: String,
    /// The message, unless it is missing or comes from a variable.
    message: Option<String>,
}

impl Sources {
    fn read() -> Self {
        let mut sources = Self::default();
        let is_test = |entry: &DirEntry| ["tests", "tests.rs"].iter().any(|name| entry.file_name() == *name);
        let all = WalkDir::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).into_iter();
        for entry in all.filter_entry(|entry| !is_test(entry)).map(Result::unwrap) {
            if entry.path().extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(entry.path()).unwrap();
                sources.add(entry.path(), text.parse().unwrap());
            }
        }
        sources
    }

    fn add(&mut self, file: &Path, tokens: TokenStream) {
        let tokens: Vec<_> = tokens.into_iter().collect();
        let mut rest = tokens.as_slice();
        while let [first, tail @ ..] = rest {
            rest = tail;
            match (first, tail) {
                // `#[cfg(test)] mod tests { … }`
                (
                    TokenTree::Punct(_),
                    [
                        TokenTree::Group(attribute),
                        TokenTree::Ident(keyword),
                        _,
                        TokenTree::Group(_),
                        after @ ..,
                    ],
                ) if is_attribute(attribute, "cfg(test)") && keyword == "mod" => rest = after,
                // A documentation comment is an attribute.
                (TokenTree::Group(attribute), _) if is_attribute(attribute, "doc=") => {}
                (TokenTree::Group(group), _) => self.add(file, group.stream()),
                (TokenTree::Literal(literal), _) => self.literals.extend(string(literal)),
                (TokenTree::Ident(level), [TokenTree::Punct(mark), TokenTree::Group(arguments), ..])
                    if mark.as_char() == '!' && LEVELS.iter().any(|name| level == name) =>
                {
                    self.calls.push(LogCall {
                        file: file.to_owned(),
                        level: level.to_string(),
                        message: message(arguments),
                    });
                }
                _ => {}
            }
        }
    }

    /// Whether one literal contains all parts of `quoted`, in order. `…` separates the parts.
    fn contain(&self, quoted: &str) -> bool {
        let is_quoted = |literal: &&String| {
            let mut rest = literal.as_str();
            quoted.split('…').all(|part| match rest.split_once(part) {
                Some((_, after)) => {
                    rest = after;
                    true
                }
                None => false,
            })
        };
        self.literals.iter().any(|literal| is_quoted(&literal))
    }
}

fn is_attribute(group: &Group, prefix: &str) -> bool {
    group.stream().to_string().replace(' ', "").starts_with(prefix)
}

/// The first string that is an argument of its own, and not the value of a field.
fn message(arguments: &Group) -> Option<String> {
    let mut is_start = true;
    for token in arguments.stream() {
        match &token {
            TokenTree::Literal(literal) if is_start => return string(literal),
            _ => is_start = matches!(&token, TokenTree::Punct(comma) if comma.as_char() == ','),
        }
    }
    None
}

/// The value of a string literal. Resolves those escapes that occur in messages.
fn string(literal: &Literal) -> Option<String> {
    let text = literal.to_string();
    if let Some(raw) = text.strip_prefix('r') {
        return Some(raw.trim_matches('#').trim_matches('"').to_owned());
    }
    let mut chars = text.strip_prefix('"')?.strip_suffix('"')?.chars().peekable();
    let mut value = String::new();
    while let Some(char) = chars.next() {
        match char {
            '\\' => match chars.next()? {
                '\n' => while chars.next_if(|next| next.is_whitespace()).is_some() {},
                'n' => value.push('\n'),
                escaped => value.push(escaped),
            },
            _ => value.push(char),
        }
    }
    Some(value)
}

/// The first two cells of each row with a quotation in the tables of a section of the page.
fn rows(section: &str) -> Vec<(&'static str, &'static str)> {
    let mut sections = PAGE.split("\n## ");
    let section = sections.find(|text| text.lines().next() == Some(section)).unwrap();
    let cells = section.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| ")?.split(" | ");
        Some((cells.next()?, cells.next()?))
    });
    cells.filter(|(first, _)| first.contains('`')).collect()
}

#[test]
fn log_messages_are_constant_lower_case_phrases() {
    for LogCall { file, level, message } in Sources::read().calls {
        let message = message.unwrap_or_else(|| panic!("{}: {level}! without a message", file.display()));
        let is_phrase = message.starts_with(|first: char| first.is_lowercase()) && !message.ends_with('.');
        assert!(is_phrase, "{}: {message:?}", file.display());
        // What varies belongs into fields.
        assert!(!message.contains(['{', '\n']), "{}: {message:?}", file.display());
    }
}

/// Warnings and errors have to be listed, with their level. Of the other messages, those that are listed have to exist.
#[test]
fn troubleshooting_page_lists_all_warnings_and_errors() {
    let calls = Sources::read().calls.into_iter();
    let logged: BTreeSet<_> = calls
        .filter_map(|call| Some((call.message?, call.level.to_uppercase())))
        .collect();
    let rows = rows("Log messages").into_iter();
    let listed: BTreeSet<_> = rows
        .map(|(message, level)| (message.trim_matches('`').to_owned(), level.to_owned()))
        .collect();
    let unknown: Vec<_> = listed.difference(&logged).collect();
    assert!(
        unknown.is_empty(),
        "docs/troubleshooting.md lists what is never logged: {unknown:#?}"
    );
    let missing = logged.difference(&listed);
    let missing: Vec<_> = missing
        .filter(|(_, level)| level == "WARN" || level == "ERROR")
        .collect();
    assert!(missing.is_empty(), "docs/troubleshooting.md does not list {missing:#?}");
}

/// Debug messages too: the table tells developers what to look for.
#[test]
fn contributing_page_lists_existing_messages() {
    let page = include_str!("../CONTRIBUTING.md");
    let calls = Sources::read().calls.into_iter();
    let logged: BTreeSet<_> = calls.filter_map(|call| call.message).collect();
    let (_, table) = page.split_once("| line of the log | says |\n").unwrap();
    let rows: Vec<_> = table.lines().take_while(|line| line.starts_with('|')).skip(1).collect();
    assert!(rows.len() > 5, "{rows:?}");
    for row in rows {
        let messages = row.split(" | ").next().unwrap().split('`').skip(1).step_by(2);
        for message in messages {
            assert!(
                logged.contains(message),
                "CONTRIBUTING.md lists what is never logged: {message}"
            );
        }
    }
}

#[test]
fn troubleshooting_page_quotes_existing_error_messages() {
    let sources = Sources::read();
    let rows = rows("Error messages");
    assert!(rows.len() > 10, "{rows:?}");
    for (messages, _) in rows {
        for quoted in messages.split('`').skip(1).step_by(2) {
            assert!(
                sources.contain(quoted),
                "docs/troubleshooting.md quotes an unknown message: {quoted}"
            );
        }
    }
}
