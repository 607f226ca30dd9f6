//! Errors as people read them.

use std::{error::Error, fmt};

/// An error with its causes; one that is told already is not told again.
pub struct ErrorChain<'a>(pub &'a dyn Error);

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.0.to_string();
        let mut next = self.0.source();
        while let Some(error) = next {
            let cause = error.to_string();
            if !text.contains(&cause) {
                text = format!("{text}: {cause}");
            }
            next = error.source();
        }
        f.write_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot start: {0}")]
    struct Told(#[source] Untold);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot connect")]
    struct Untold(#[source] std::io::Error);

    #[test]
    fn every_cause_is_told_once() {
        let error = Told(Untold(std::io::Error::other("no route")));
        assert_eq!(ErrorChain(&error).to_string(), "cannot start: cannot connect: no route");
    }
}
