//! The store's entry in a storage.conf, whose other contents stay as they are, comments and white space too.

use std::path::Path;

use toml_edit::{Array, Document, DocumentMut, Item, Value};

use super::Error;

/// What a storage.conf begins with that there was not before.
pub const SKELETON: &str = "# Made by nydus-store setup.\n";

const MARK: &str = "# Added by nydus-store setup.\n";
const KEY: &str = "additionallayerstores";
const FULL_KEY: &str = "storage.options.additionallayerstores";

/// A storage.conf: its name, for messages, and its text.
#[derive(Clone, Copy)]
pub struct File<'a> {
    /// Where it is.
    pub path: &'a Path,
    /// What it holds.
    pub text: &'a str,
}

impl File<'_> {
    /// Its text with `store` as an additional layer store.
    pub fn with(&self, store: &str) -> Result<String, Error> {
        let parsed = self.parse()?;
        self.check_driver(&parsed)?;
        let storage = parsed.get("storage").filter(has_header);
        let table = parsed.get("storage").and_then(|storage| storage.get("options"));
        if table.filter(has_header).is_none() {
            let table = if storage.is_some() { "" } else { TABLE };
            let newline = if self.text.is_empty() || self.text.ends_with('\n') {
                ""
            } else {
                "\n"
            };
            return Ok(format!("{}{newline}{}", self.text, block(table, store)));
        }
        let mut document = parsed.into_mut();
        if let Some(options) = options(&mut document) {
            add(options, store);
        }
        Ok(document.to_string())
    }

    /// Its text without `store`.
    pub fn without(&self, store: &str) -> Result<String, Error> {
        let parsed = self.parse()?;
        for table in [TABLE, ""] {
            match self.text.split_once(&block(table, store)) {
                // What follows may be the person's, and would join the table before.
                Some((before, after)) if !continues(after) => {
                    let rest = format!("{before}{after}");
                    if self.is_rest(&rest, table, store) {
                        return Ok(rest);
                    }
                }
                _ => {}
            }
        }
        let mut document = parsed.into_mut();
        if let Some(options) = options(&mut document) {
            remove(options, store);
        }
        let rest = document.to_string();
        if self.is_rest(&rest, "", store) {
            return Ok(rest);
        }
        Err(Error::Entangled {
            path: self.path.to_owned(),
        })
    }

    /// Whether `rest` means the same as its text, but for the store and the keys of `table`.
    fn is_rest(&self, rest: &str, table: &str, store: &str) -> bool {
        let expected = meaning(self.text, table, store);
        expected.is_some() && expected == meaning(rest, "", store)
    }

    /// Whether it has `store` as an additional layer store with references, as the store needs them.
    pub fn names(&self, store: &str) -> Result<bool, Error> {
        let mut document = self.parse()?.into_mut();
        let stores = options(&mut document).and_then(|options| options.as_table_like()?.get(KEY)?.as_array().cloned());
        let named = |value: &Value| value.as_str() == Some(&entry(store));
        Ok(stores.is_some_and(|stores| stores.iter().any(named)))
    }

    /// Reads it, and makes sure that what is to be edited can be.
    fn parse(&self) -> Result<Document<String>, Error> {
        let parsed = Document::parse(self.text.to_owned()).map_err(|source| Error::Storage {
            path: self.path.to_owned(),
            source: Box::new(source),
        })?;
        let Some(storage) = parsed.get("storage") else {
            return Ok(parsed);
        };
        let wrong = |item: &Item, key, expected| Error::Kind {
            path: self.path.to_owned(),
            line: self.line(item),
            key,
            expected,
        };
        if !storage.is_table() {
            return Err(wrong(storage, "storage", "a table of its own, as [storage]"));
        }
        let Some(options) = storage.get("options") else {
            return Ok(parsed);
        };
        if options.as_table_like().is_none() {
            return Err(wrong(options, "storage.options", "a table"));
        }
        match options.get(KEY) {
            Some(stores) if stores.as_array().is_none() => Err(wrong(stores, FULL_KEY, "a list of texts")),
            _ => Ok(parsed),
        }
    }

    fn check_driver(&self, parsed: &Document<String>) -> Result<(), Error> {
        let Some(driver) = parsed.get("storage").and_then(|storage| storage.get("driver")) else {
            return Ok(());
        };
        match driver.as_str() {
            // None leaves the choice to Podman, which chooses overlay where it can.
            Some("" | "overlay" | "overlay2") => Ok(()),
            Some(other) => Err(Error::Driver {
                path: self.path.to_owned(),
                line: self.line(driver),
                driver: other.to_owned(),
            }),
            None => Err(Error::Kind {
                path: self.path.to_owned(),
                line: self.line(driver),
                key: "storage.driver",
                expected: "a text",
            }),
        }
    }

    /// The line that an item is in.
    fn line(&self, item: &Item) -> usize {
        let start = item.span().map_or(0, |span| span.start);
        let before = self.text.as_bytes().get(..start).unwrap_or_default();
        1 + before.iter().filter(|byte| **byte == b'\n').count()
    }
}

/// What containers/storage takes without a file. With one, older versions want all of it.
const TABLE: &str = "\
[storage]
driver = \"overlay\"
runroot = \"/run/containers/storage\"
graphroot = \"/var/lib/containers/storage\"
";

/// Whether a table is written anywhere, and does not merely follow from one inside it.
fn has_header(item: &&Item) -> bool {
    !item
        .as_table()
        .is_some_and(|table| table.is_implicit() && !table.is_dotted())
}

/// What is put at the end of a file that has no table for it.
fn block(table: &str, store: &str) -> String {
    format!(
        "\n{MARK}{table}[storage.options]\n{KEY} = [{}]\n",
        Value::from(entry(store))
    )
}

/// With `ref`, references are part of the paths that are looked up.
fn entry(store: &str) -> String {
    format!("{store}:ref")
}

/// Whether a table that ends before `text` goes on in it.
fn continues(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim);
    let next = lines.find(|line| !line.is_empty() && !line.starts_with('#'));
    next.is_some_and(|line| !line.starts_with('['))
}

/// What a file says without the store, the keys of `table` as they are there, and what is empty without them.
fn meaning(text: &str, table: &str, store: &str) -> Option<toml::Table> {
    let mut all: toml::Table = text.parse().ok()?;
    let ours: toml::Table = table.parse().ok()?;
    let Some(storage) = all.get_mut("storage").and_then(toml::Value::as_table_mut) else {
        return Some(all);
    };
    if let Some(ours) = ours.get("storage").and_then(toml::Value::as_table) {
        storage.retain(|key, value| ours.get(key) != Some(value));
    }
    if let Some(options) = storage.get_mut("options").and_then(toml::Value::as_table_mut) {
        if let Some(stores) = options.get_mut(KEY).and_then(toml::Value::as_array_mut) {
            stores.retain(|value| !value.as_str().is_some_and(|entry| is_of(entry, store)));
            if stores.is_empty() {
                options.remove(KEY);
            }
        }
        if options.is_empty() {
            storage.remove("options");
        }
    }
    if storage.is_empty() {
        all.remove("storage");
    }
    Some(all)
}

fn options(document: &mut DocumentMut) -> Option<&mut Item> {
    document.get_mut("storage")?.get_mut("options")
}

/// Which entry names the store, with whatever options.
fn place_of(stores: &Array, store: &str) -> Option<usize> {
    let names = |value: &Value| value.as_str().is_some_and(|entry| is_of(entry, store));
    stores.iter().position(names)
}

/// Whether an entry names the store, with whatever options.
fn is_of(entry: &str, store: &str) -> bool {
    let path = entry.split(':').next();
    path.is_some_and(|path| path.trim_end_matches('/') == store)
}

fn add(options: &mut Item, store: &str) {
    let entry = entry(store);
    // Podman's TOML has no comments and no line breaks within braces.
    let inline = options.is_inline_table();
    let Some(options) = options.as_table_like_mut() else {
        return;
    };
    match options.get_mut(KEY).and_then(Item::as_array_mut) {
        Some(stores) => match place_of(stores, store).and_then(|place| stores.get_mut(place)) {
            Some(value) if value.as_str() == Some(&entry) => {}
            Some(value) => {
                let decor = value.decor().clone();
                *value = Value::from(entry);
                *value.decor_mut() = decor;
            }
            None => push(stores, &entry),
        },
        None => {
            let stores: Array = [entry].into_iter().collect();
            options.insert(KEY, Item::Value(stores.into()));
            if let (false, Some(mut key)) = (inline, options.key_mut(KEY)) {
                key.leaf_decor_mut().set_prefix(MARK);
            }
        }
    }
}

/// Adds an entry in the manner of the one before: on a line of its own, or not.
fn push(stores: &mut Array, entry: &str) {
    let mut new = Value::from(entry);
    let count = stores.len();
    if let Some(last) = count.checked_sub(1).and_then(|last| stores.get_mut(last)) {
        let text = |raw: Option<&toml_edit::RawString>| raw.and_then(|raw| raw.as_str()).unwrap_or_default().to_owned();
        let (prefix, suffix) = (text(last.decor().prefix()), text(last.decor().suffix()));
        let own_line = prefix.contains('\n');
        new.decor_mut().set_suffix(suffix);
        last.decor_mut().set_suffix("");
        // A comment before that entry is about that one.
        let indent = prefix.rsplit('\n').next().unwrap_or_default().to_owned();
        new.decor_mut().set_prefix(if own_line {
            format!("\n{indent}")
        } else {
            " ".to_owned()
        });
    }
    stores.push_formatted(new);
}

fn remove(options: &mut Item, store: &str) {
    let inline = options.is_inline_table();
    let Some(options) = options.as_table_like_mut() else {
        return;
    };
    let Some(stores) = options.get_mut(KEY).and_then(Item::as_array_mut) else {
        return;
    };
    let mut found = false;
    while let Some(place) = place_of(stores, store) {
        found = true;
        let removed = stores.remove(place);
        if let (true, Some(last)) = (place == stores.len(), place.checked_sub(1)) {
            let suffix = removed.decor().suffix().cloned();
            if let (Some(last), Some(suffix)) = (stores.get_mut(last), suffix) {
                last.decor_mut().set_suffix(suffix);
            }
        }
    }
    let empty = found && stores.is_empty();
    let prefix = options.key(KEY).and_then(|key| key.leaf_decor().prefix()?.as_str());
    if empty && (inline || prefix == Some(MARK)) {
        options.remove(KEY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORE: &str = "/var/lib/nydus-store/store";

    fn file(text: &str) -> File<'_> {
        File {
            path: Path::new("storage.conf"),
            text,
        }
    }

    /// Adds the store, makes sure that a second time changes nothing and that taking it out restores the text.
    fn round_trip(text: &str) -> String {
        let with = file(text).with(STORE).unwrap();
        assert!(file(&with).names(STORE).unwrap(), "{with}");
        assert_eq!(file(&with).with(STORE).unwrap(), with);
        assert_eq!(file(&with).without(STORE).unwrap(), text, "{with}");
        let read: toml::Table = with.parse().unwrap();
        let stores = &read["storage"]["options"]["additionallayerstores"];
        let ours = stores
            .as_array()
            .unwrap()
            .iter()
            .filter(|entry| entry.as_str() == Some("/var/lib/nydus-store/store:ref"));
        assert_eq!(ours.count(), 1);
        with
    }

    #[test]
    fn all_else_stays_as_it_is() {
        for (text, line) in [
            ("", "additionallayerstores = [\"/var/lib/nydus-store/store:ref\"]"),
            (
                SKELETON,
                "[storage.options]\nadditionallayerstores = [\"/var/lib/nydus-store/store:ref\"]",
            ),
            ("# all by default\n", "[storage]\ndriver = \"overlay\"\nrunroot = "),
            (
                "[storage]\n# mine\ndriver = \"overlay\"   # really\n\n[storage.options]\n# none yet\nsize = \"\"\n\n# tuned\n\
                 [storage.options.overlay]\nmountopt = \"nodev\"\n",
                "size = \"\"\n# Added by nydus-store setup.\nadditionallayerstores = [\"/var/lib/nydus-store/store:ref\"]\n\n# tuned",
            ),
            (
                "[storage]\n[storage.options]\n# nothing here\n\n[storage.options.overlay]\n",
                "[storage.options]\n# Added by",
            ),
            (
                "[storage.options]\nadditionallayerstores = [\"/a:ref\"] # theirs\n",
                "[\"/a:ref\", \"/var/lib/nydus-store/store:ref\"] # theirs",
            ),
            (
                "[storage.options]\nadditionallayerstores = [ \"/a\" ]\n",
                "[ \"/a\", \"/var/lib/nydus-store/store:ref\" ]",
            ),
            (
                "[storage.options]\nadditionallayerstores = [\n  # theirs\n  \"/a:ref\",\n]\n",
                "[\n  # theirs\n  \"/a:ref\",\n  \"/var/lib/nydus-store/store:ref\",\n]",
            ),
            (
                "[storage.options]\nadditionallayerstores = [\n\t\"/a\"\n]\n",
                "[\n\t\"/a\",\n\t\"/var/lib/nydus-store/store:ref\"\n]",
            ),
            (
                "[storage.options]\nadditionallayerstores = []\n",
                "additionallayerstores = [\"/var/lib/nydus-store/store:ref\"]",
            ),
            (
                "[storage.options]\nadditionallayerstores = [\"/a\", {append = true}]\n",
                "[\"/a\", {append = true}, \"/var/lib/nydus-store/store:ref\"]",
            ),
            (
                "[storage]\noptions = { size = \"1\" }\n",
                "additionallayerstores = [\"/var/lib/nydus-store/store:ref\"]",
            ),
            ("storage.driver = \"overlay\"\n", "[storage.options]"),
            (
                "storage.options.size = \"1\"\n",
                "additionallayerstores = [\"/var/lib/nydus-store/store:ref\"]",
            ),
            (
                "[storage]\n[storage.options.overlay]\nmountopt = \"nodev\"\n",
                "\"nodev\"\n\n# Added by nydus-store setup.\n[storage.options]\n",
            ),
            (
                "[storage.options.overlay]\nmountopt = \"nodev\"\n",
                "\"nodev\"\n\n# Added by nydus-store setup.\n[storage]\ndriver",
            ),
        ] {
            let with = round_trip(text);
            assert!(with.contains(line), "{with}");
        }
    }

    #[test]
    fn nothing_within_braces_needs_a_newer_toml() {
        for options in [
            "{ size = \"1\" }",
            "{size = \"1\"}",
            "{}",
            "{ overlay.size = \"1\" } # mine",
        ] {
            let text = format!("[storage]\noptions = {options}\n");
            let with = round_trip(&text);
            let (_, inside) = with.split_once('{').unwrap();
            let (inside, _) = inside.split_once('}').unwrap();
            assert!(!inside.contains(['\n', '#']), "{with}");
            assert!(!inside.trim().ends_with(','), "{with}");
        }
    }

    #[test]
    fn what_was_added_below_keeps_its_meaning() {
        for before in [
            "",
            "[storage]\ndriver = \"overlay\"\n",
            "[storage.options.overlay]\nmountopt = \"nodev\"\n",
        ] {
            let with = file(before).with(STORE).unwrap();
            for (below, joins) in [
                ("size = \"10G\"\n", true),
                ("\n# mine\n  size = \"10G\"\n\n[storage.options.vfs]\n", true),
                ("\n# mine\n\n[storage.options.vfs]\nsize = \"10G\"\n", false),
                ("# mine\n", false),
            ] {
                let text = format!("{with}{below}");
                let rest = file(&text).without(STORE).unwrap();
                assert!(!file(&rest).names(STORE).unwrap() && rest.ends_with(below), "{rest}");
                let (was, is): (toml::Table, toml::Table) = (text.parse().unwrap(), rest.parse().unwrap());
                if joins {
                    assert_eq!(is["storage"]["options"]["size"].as_str(), Some("10G"), "{rest}");
                    assert_eq!(meaning(&text, "", STORE).unwrap(), meaning(&rest, "", STORE).unwrap());
                    assert_eq!(was["storage"].get("driver"), is["storage"].get("driver"));
                } else {
                    assert_eq!(rest, format!("{before}{below}"));
                }
            }
        }
    }

    #[test]
    fn an_entry_made_by_hand_is_put_right() {
        let text = "[storage.options]\nadditionallayerstores = [\"/a\", \"/var/lib/nydus-store/store/\"]\n";
        let with = file(text).with(STORE).unwrap();
        let expected = "[storage.options]\nadditionallayerstores = [\"/a\", \"/var/lib/nydus-store/store:ref\"]\n";
        assert_eq!(with, expected);
        assert!(!file(text).names(STORE).unwrap());
        assert_eq!(
            file(&with).without(STORE).unwrap(),
            "[storage.options]\nadditionallayerstores = [\"/a\"]\n"
        );
    }

    #[test]
    fn what_cannot_be_edited_is_told_with_its_line() {
        for (text, expected) in [
            ("[storage]\ndriver = \n", "line 2"),
            ("[storage]\ndriver = \"vfs\"\n", "line 2: the storage driver is \"vfs\""),
            ("[storage]\n\ndriver = 3\n", "line 3: `storage.driver` must be a text"),
            ("storage = 1\n", "line 1: `storage` must be a table"),
            ("[storage]\noptions = 1\n", "line 2: `storage.options` must be a table"),
            (
                "[storage.options]\n# x\nadditionallayerstores = \"/a\"\n",
                "line 3: `storage.options.additionallayerstores` must be a list",
            ),
        ] {
            let message = file(text).with(STORE).unwrap_err().to_string();
            assert!(
                message.starts_with("storage.conf") && message.contains(expected),
                "{message}"
            );
        }
    }
}
