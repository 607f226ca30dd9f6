//! Text from outside (registries, files, programs) made fit for messages and logs.

/// Most characters kept of a text.
const MAX_CHARS: usize = 200;

/// The first 200 characters of `text`, with a space for each control character.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_CHARS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_become_spaces_and_long_text_is_cut() {
        assert_eq!(printable("a\x1b[31m\nb"), "a [31m b");
        assert_eq!(printable(&"é".repeat(300)).chars().count(), MAX_CHARS);
    }
}
