//! The script by which Podman hands over the credentials of a pull: `additional-layer-store-auth-helper` names a program
//! and no arguments.

use std::path::Path;

use super::Error;

const HEADER: &str = "\
#!/bin/sh
# Written by nydus-store setup. Podman starts it at each pull, with the credentials on standard input.
";

/// The script for the daemon of `root`.
pub fn script(program: &Path, root: &Path) -> String {
    format!("{HEADER}exec {} auth-helper --root {}\n", quoted(program), quoted(root))
}

/// Makes sure that setup has written it.
pub fn check(path: &Path, text: &str) -> Result<(), Error> {
    if text.starts_with(HEADER) {
        Ok(())
    } else {
        let path = path.to_owned();
        Err(Error::NotOurs { path })
    }
}

/// A path as one word of a shell.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_words() {
        let made = script(Path::new("/opt/it's/nydus-store"), Path::new("/var/a b"));
        assert!(
            made.ends_with("exec '/opt/it'\\''s/nydus-store' auth-helper --root '/var/a b'\n"),
            "{made}"
        );
        assert!(check(Path::new("x"), &made).is_ok());
        assert!(check(Path::new("x"), "#!/bin/sh\nexec true\n").is_err());
    }
}
