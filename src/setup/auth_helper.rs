//! The script that Podman runs at each pull. It is needed because `additional-layer-store-auth-helper` in
//! registries.conf takes a program without arguments.

use std::path::{Path, PathBuf};

use super::SetupError;

const HEADER: &str = "\
#!/bin/sh
# Written by nydus-store setup. Podman starts it at each pull, with the credentials on standard input.
";

/// Text of the script for the daemon of `root`.
pub fn script(program: &Path, root: &Path) -> String {
    format!("{HEADER}exec {} auth-helper --root {}\n", quoted(program), quoted(root))
}

/// Fails unless setup wrote the script.
pub fn check(path: &Path, text: &str) -> Result<(), SetupError> {
    if text.starts_with(HEADER) {
        Ok(())
    } else {
        let path = path.to_owned();
        Err(SetupError::NotOurs { path })
    }
}

/// The program that the script runs and the daemon's root; `None` if setup did not write the script.
pub fn parse(text: &str) -> Option<(PathBuf, PathBuf)> {
    let (program, rest) = word(text.strip_prefix(HEADER)?.strip_prefix("exec ")?)?;
    let (root, rest) = word(rest.strip_prefix(" auth-helper --root ")?)?;
    (rest == "\n").then(|| (program.into(), root.into()))
}

/// Parses a word of [`quoted`] at the start of `text`. Returns the word and the rest.
fn word(text: &str) -> Option<(String, &str)> {
    let (mut word, mut rest) = (String::new(), text.strip_prefix('\'')?);
    loop {
        let (part, after) = rest.split_once('\'')?;
        word.push_str(part);
        match after.strip_prefix(r"\''") {
            Some(more) => rest = more,
            None => return Some((word, after)),
        }
        word.push('\'');
    }
}

/// Quotes a path as one shell word.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn script_quotes_paths_and_is_parsed_back() {
        let made = script(Path::new("/opt/it's/nydus-store"), Path::new("/var/a b"));
        assert!(
            made.ends_with("exec '/opt/it'\\''s/nydus-store' auth-helper --root '/var/a b'\n"),
            "{made}"
        );
        assert!(check(Path::new("x"), &made).is_ok());
        let parsed = parse(&made).unwrap();
        assert_eq!(parsed, ("/opt/it's/nydus-store".into(), "/var/a b".into()));
        for other in [
            "",
            HEADER,
            "#!/bin/sh\nexec true\n",
            &made.replace("a b'", "a b"),
            &made.repeat(2),
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
        assert!(check(Path::new("x"), "#!/bin/sh\nexec true\n").is_err());
    }
}
