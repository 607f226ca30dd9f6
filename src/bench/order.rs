//! In which order an image's chunks are fetched.

use std::{path::PathBuf, str::FromStr};

/// An order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// As they lie in the blobs.
    Seq,
    /// Shuffled.
    Random,
    /// As a trace of the image's use says.
    Trace(PathBuf),
}

/// Not an order.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is none of seq, random and trace:FILE")]
pub struct InvalidOrder(String);

impl FromStr for Order {
    type Err = InvalidOrder;

    fn from_str(text: &str) -> Result<Self, InvalidOrder> {
        match (text, text.strip_prefix("trace:")) {
            ("seq", _) => Ok(Self::Seq),
            ("random", _) => Ok(Self::Random),
            (_, Some(file)) if !file.is_empty() => Ok(Self::Trace(file.into())),
            _ => Err(InvalidOrder(text.to_owned())),
        }
    }
}

impl std::fmt::Display for Order {
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
    fn orders() {
        for text in ["seq", "random", "trace:/a/b"] {
            assert_eq!(text.parse::<Order>().unwrap().to_string(), text);
        }
        for text in ["", "trace:", "trace", "Seq"] {
            assert!(text.parse::<Order>().is_err(), "{text}");
        }
    }
}
