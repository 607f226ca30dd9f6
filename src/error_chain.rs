//! Prints an error with its causes.

use std::{error::Error, fmt};

/// Displays an error followed by its causes: `error: cause: cause`. Skips causes that the text contains already.
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
    struct WithCause(#[source] WithHiddenCause);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot connect")]
    struct WithHiddenCause(#[source] std::io::Error);

    #[test]
    fn each_cause_is_shown_once() {
        let error = WithCause(WithHiddenCause(std::io::Error::other("no route")));
        assert_eq!(ErrorChain(&error).to_string(), "cannot start: cannot connect: no route");
    }
}
