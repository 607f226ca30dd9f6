//! [`FetchOrder`]: the order in which an image's chunks are fetched.

use std::{path::PathBuf, str::FromStr};

/// The order of requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FetchOrder {
    /// By blob and offset.
    Seq,
    /// Shuffled.
    Random,
    /// By a trace file.
    Trace(PathBuf),
}

/// The text is not an order.
#[derive(Debug, thiserror::Error)]
#[error("invalid order `{0}`: expected seq, random or trace:FILE")]
pub struct InvalidFetchOrder(String);

impl FromStr for FetchOrder {
    type Err = InvalidFetchOrder;

    fn from_str(text: &str) -> Result<Self, InvalidFetchOrder> {
        match (text, text.strip_prefix("trace:")) {
            ("seq", _) => Ok(Self::Seq),
            ("random", _) => Ok(Self::Random),
            (_, Some(file)) if !file.is_empty() => Ok(Self::Trace(file.into())),
            _ => Err(InvalidFetchOrder(text.to_owned())),
        }
    }
}

impl std::fmt::Display for FetchOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Seq => f.write_str("seq"),
            Self::Random => f.write_str("random"),
            Self::Trace(file) => write!(f, "trace:{}", file.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_parsed_and_displayed() {
        for text in ["seq", "random", "trace:/a/b"] {
            assert_eq!(text.parse::<FetchOrder>().unwrap().to_string(), text);
        }
        for text in ["", "trace:", "trace", "Seq"] {
            assert!(text.parse::<FetchOrder>().is_err(), "{text}");
        }
    }
}
