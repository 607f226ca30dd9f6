//! The `WWW-Authenticate` header ([RFC 9110, section 11.6.1](https://www.rfc-editor.org/rfc/rfc9110#section-11.6.1)).

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// An authentication scheme offered by a server, with its parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Challenge {
    /// In lower case, e.g. `bearer`.
    pub(super) scheme: String,
    /// Names in lower case.
    params: Vec<(String, String)>,
}

impl Challenge {
    /// The value of the parameter `name`, given in lower case.
    pub(super) fn param(&self, name: &str) -> Option<&str> {
        self.params
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

/// All challenges of an answer, in order. Skips what it cannot parse.
pub(super) fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let texts = headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok());
    texts.flat_map(parse).collect()
}

/// Parses one header, which may hold several challenges: `Bearer realm="a,b",service="c", Basic realm="d"`.
fn parse(header: &str) -> Vec<Challenge> {
    let mut found: Vec<Challenge> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let Some(first) = rest.chars().next() else { return found };
        let (word, after) = split_token(rest);
        if word.is_empty() {
            // Skips stray punctuation, such as the padding of a `token68`, so that each iteration makes progress.
            rest = &rest[first.len_utf8()..];
            continue;
        }
        match (after.trim_start().strip_prefix('='), found.last_mut()) {
            (Some(value), Some(challenge)) => {
                let (value, after) = split_value(value.trim_start());
                challenge.params.push((word.to_ascii_lowercase(), value));
                rest = after;
            }
            (Some(value), None) => rest = value,
            (None, _) => {
                found.push(Challenge {
                    scheme: word.to_ascii_lowercase(),
                    params: Vec::new(),
                });
                rest = after;
            }
        }
    }
}

/// Splits off a token, `token68` characters included.
fn split_token(text: &str) -> (&str, &str) {
    let ends = |c: char| !(c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/".contains(c));
    text.split_at(text.find(ends).unwrap_or(text.len()))
}

/// Splits off a quoted or bare value. Bare values may hold characters that RFC 9110 wants quoted: some servers do that.
fn split_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, rest) = text.split_at(text.find([',', ' ', '\t']).unwrap_or(text.len()));
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            _ => value.push(c),
        }
    }
    (value, "")
}

/// Fuzz target.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(data: &[u8]) {
    if let Ok(header) = std::str::from_utf8(data) {
        parse(header);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_with_several_challenges_is_split() {
        let found = parse(r#"Bearer realm="https://a/t?x=1,2",service="s \"q\"" , scope=pull,Basic realm="r""#);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].scheme, "bearer");
        assert_eq!(found[0].param("realm"), Some("https://a/t?x=1,2"));
        assert_eq!(found[0].param("service"), Some(r#"s "q""#));
        assert_eq!(found[0].param("scope"), Some("pull"));
        assert_eq!(
            (found[1].scheme.as_str(), found[1].param("realm")),
            ("basic", Some("r"))
        );
    }

    #[test]
    fn malformed_headers_do_not_panic() {
        let found = parse("Negotiate YWJj==, BASIC Realm = x");
        assert_eq!(
            found.iter().map(|c| c.scheme.as_str()).collect::<Vec<_>>(),
            ["negotiate", "basic"]
        );
        assert_eq!(found[1].param("realm"), Some("x"));
        assert_eq!(parse("Basic").len(), 1);
        for text in [
            "",
            "=",
            "===,,",
            "\"",
            "Bearer realm=\"open",
            "é Bearer",
            "a=b",
            "Bearer realm=\"x\\",
        ] {
            parse(text);
        }
    }
}
