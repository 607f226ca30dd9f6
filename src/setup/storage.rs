//! Edits the stores' entries in storage.conf and preserves everything else, including comments and white space.
//!
//! [`Stores`] defines the entries, [`StorageConf`] edits the text.

use std::path::Path;

use toml_edit::{Array, Document, DocumentMut, Item, Value};

use super::SetupError;

/// First line of a storage.conf that setup creates.
pub const SKELETON: &str = "# Made by nydus-store setup.\n";

const MARK: &str = "# Added by nydus-store setup.\n";
const IMAGE_STORES: &str = "additionalimagestores";
const LAYER_STORES: &str = "additionallayerstores";
/// The lists with our entries, and their full keys for messages.
const LISTS: [(&str, &str); 2] = [
    (IMAGE_STORES, "storage.options.additionalimagestores"),
    (LAYER_STORES, "storage.options.additionallayerstores"),
];

/// The stores of one root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stores {
    /// The directory of the additional image store.
    pub images: String,
    /// The directory of the additional layer store, in which Podman up to 5.0 and CRI-O up to 1.30 announce pulls.
    pub layers: String,
}

/// An element of a list in `[storage.options]`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct StoreEntry {
    list: &'static str,
    dir: String,
    value: String,
    /// Whether the entry must come first: Podman 4 uses the first additional layer store only.
    first: bool,
}

impl StoreEntry {
    fn of_images(dir: &str) -> Self {
        Self {
            list: IMAGE_STORES,
            dir: dir.to_owned(),
            value: dir.to_owned(),
            first: false,
        }
    }

    /// The suffix `:ref` makes references part of look-up paths.
    fn of_layers(dir: &str) -> Self {
        Self {
            list: LAYER_STORES,
            dir: dir.to_owned(),
            value: format!("{dir}:ref"),
            first: true,
        }
    }

    /// Whether `value` names the same directory, with any options.
    fn is_named_by(&self, value: &str) -> bool {
        let path = value.split(':').next();
        path.is_some_and(|path| path.trim_end_matches('/') == self.dir)
    }
}

impl Stores {
    fn entries(&self) -> [StoreEntry; 2] {
        [StoreEntry::of_images(&self.images), StoreEntry::of_layers(&self.layers)]
    }

    /// Entries of earlier versions, in which the store was an additional layer store.
    fn legacy_entries(&self) -> [StoreEntry; 1] {
        [StoreEntry::of_layers(&self.images)]
    }

    /// The entries as storage driver options, for CRI-O's own configuration.
    pub fn driver_options(&self) -> [String; 2] {
        [
            format!("overlay.imagestore={}", self.images),
            format!("overlay.additionallayerstore={}:ref", self.layers),
        ]
    }
}

/// The entries that a storage.conf has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NamedStores {
    /// The image store.
    pub images: bool,
    /// The layer store, with `:ref`.
    pub layers: bool,
    /// Another layer store precedes it.
    pub layers_not_first: bool,
    /// The entry of an earlier version.
    pub legacy: bool,
}

impl NamedStores {
    /// Whether there is any entry.
    pub fn any(self) -> bool {
        self.images || self.layers || self.legacy
    }
}

/// A storage.conf: its path, for messages, and its text.
#[derive(Clone, Copy)]
pub struct StorageConf<'a> {
    /// Path, for messages.
    pub path: &'a Path,
    /// Contents.
    pub text: &'a str,
}

impl StorageConf<'_> {
    /// The text with the stores added and entries of earlier versions removed.
    pub fn with_stores(&self, stores: &Stores) -> Result<String, SetupError> {
        let text = self.without_entries(&stores.legacy_entries())?;
        StorageConf { text: &text, ..*self }.with_entries(&stores.entries())
    }

    fn with_entries(&self, entries: &[StoreEntry]) -> Result<String, SetupError> {
        let parsed = self.parse()?;
        self.check_driver(&parsed)?;
        let storage = parsed.get("storage").filter(has_header);
        let table = parsed.get("storage").and_then(|storage| storage.get("options"));
        if table.filter(has_header).is_none() {
            let table = if storage.is_some() { "" } else { DEFAULT_TABLE };
            let newline = if self.text.is_empty() || self.text.ends_with('\n') {
                ""
            } else {
                "\n"
            };
            return Ok(format!("{}{newline}{}", self.text, block(table, entries)));
        }
        let mut document = parsed.into_mut();
        if let Some(options) = options(&mut document) {
            entries.iter().for_each(|entry| add(options, entry));
        }
        Ok(document.to_string())
    }

    /// The text without the stores, also those of earlier versions.
    pub fn without_stores(&self, stores: &Stores) -> Result<String, SetupError> {
        let text = self.without_entries(&stores.entries())?;
        StorageConf { text: &text, ..*self }.without_entries(&stores.legacy_entries())
    }

    fn without_entries(&self, entries: &[StoreEntry]) -> Result<String, SetupError> {
        let parsed = self.parse()?;
        for table in [DEFAULT_TABLE, ""] {
            match self.text.split_once(&block(table, entries)) {
                // Keys after the block would move into the table before it.
                Some((before, after)) if !continues_table(after) => {
                    let rest = format!("{before}{after}");
                    if self.equals_without(&rest, table, entries) {
                        return Ok(rest);
                    }
                }
                _ => {}
            }
        }
        let mut document = parsed.into_mut();
        if let Some(options) = options(&mut document) {
            entries.iter().for_each(|entry| remove(options, entry));
        }
        let rest = document.to_string();
        if self.equals_without(&rest, "", entries) {
            return Ok(rest);
        }
        Err(SetupError::Entangled {
            path: self.path.to_owned(),
        })
    }

    /// Whether `rest` has the same values as the text, apart from `entries` and the keys of `table`.
    fn equals_without(&self, rest: &str, table: &str, entries: &[StoreEntry]) -> bool {
        let expected = parsed_without(self.text, table, entries);
        expected.is_some() && expected == parsed_without(rest, "", entries)
    }

    /// The entries that the text has.
    pub fn named_stores(&self, stores: &Stores) -> Result<NamedStores, SetupError> {
        let mut document = self.parse()?.into_mut();
        let options = options(&mut document).and_then(|options| options.as_table_like());
        let position = |entry: &StoreEntry| {
            let mut list = options?.get(entry.list)?.as_array()?.iter();
            list.position(|value| value.as_str() == Some(&entry.value))
        };
        let [images, layers] = stores.entries().each_ref().map(position);
        let [legacy] = stores.legacy_entries().each_ref().map(position);
        Ok(NamedStores {
            images: images.is_some(),
            layers: layers.is_some(),
            layers_not_first: layers.is_some_and(|position| position > 0),
            legacy: legacy.is_some(),
        })
    }

    /// Other additional layer stores in the text.
    pub fn other_layer_stores(&self, stores: &Stores) -> Result<Vec<String>, SetupError> {
        let mut document = self.parse()?.into_mut();
        let list = options(&mut document).and_then(|options| options.get(LAYER_STORES)?.as_array());
        let ours = stores.entries();
        let all = list.into_iter().flatten().filter_map(Value::as_str);
        let others = all.filter(|value| !ours.iter().any(|entry| entry.is_named_by(value)));
        Ok(others.map(str::to_owned).collect())
    }

    /// Parses the text. Fails if a table or list to edit has another type.
    fn parse(&self) -> Result<Document<String>, SetupError> {
        let parsed = Document::parse(self.text.to_owned()).map_err(|source| SetupError::Storage {
            path: self.path.to_owned(),
            source: Box::new(source),
        })?;
        let Some(storage) = parsed.get("storage") else {
            return Ok(parsed);
        };
        let wrong = |item: &Item, key, expected| SetupError::WrongType {
            path: self.path.to_owned(),
            line: self.line(item),
            key,
            expected,
        };
        if !storage.is_table() {
            return Err(wrong(storage, "storage", "a table with the header [storage]"));
        }
        let Some(options) = storage.get("options") else {
            return Ok(parsed);
        };
        if options.as_table_like().is_none() {
            return Err(wrong(options, "storage.options", "a table"));
        }
        for (list, name) in LISTS {
            match options.get(list) {
                Some(stores) if stores.as_array().is_none() => return Err(wrong(stores, name, "a list of strings")),
                _ => {}
            }
        }
        Ok(parsed)
    }

    fn check_driver(&self, parsed: &Document<String>) -> Result<(), SetupError> {
        let Some(driver) = parsed.get("storage").and_then(|storage| storage.get("driver")) else {
            return Ok(());
        };
        match driver.as_str() {
            // With an empty driver, Podman chooses overlay where it can.
            Some("" | "overlay" | "overlay2") => Ok(()),
            Some(other) => Err(SetupError::Driver {
                path: self.path.to_owned(),
                line: self.line(driver),
                driver: other.to_owned(),
            }),
            None => Err(SetupError::WrongType {
                path: self.path.to_owned(),
                line: self.line(driver),
                key: "storage.driver",
                expected: "a string",
            }),
        }
    }

    /// The line number of an item.
    fn line(&self, item: &Item) -> usize {
        let start = item.span().map_or(0, |span| span.start);
        let before = self.text.as_bytes().get(..start).unwrap_or_default();
        1 + before.iter().filter(|byte| **byte == b'\n').count()
    }
}

/// The defaults of containers/storage without a file. Older versions require these keys in any file.
const DEFAULT_TABLE: &str = "\
[storage]
driver = \"overlay\"
runroot = \"/run/containers/storage\"
graphroot = \"/var/lib/containers/storage\"
";

/// Whether a table has a header or keys of its own, and is not merely implied by a sub-table.
fn has_header(item: &&Item) -> bool {
    !item
        .as_table()
        .is_some_and(|table| table.is_implicit() && !table.is_dotted())
}

/// The block that is appended to a file without `[storage.options]`.
fn block(table: &str, entries: &[StoreEntry]) -> String {
    let line = |entry: &StoreEntry| format!("{} = [{}]\n", entry.list, Value::from(&entry.value));
    let lines: String = entries.iter().map(line).collect();
    format!("\n{MARK}{table}[storage.options]\n{lines}")
}

/// Whether `text` starts with keys that belong to the table before it.
fn continues_table(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim);
    let next = lines.find(|line| !line.is_empty() && !line.starts_with('#'));
    next.is_some_and(|line| !line.starts_with('['))
}

/// The parsed text without `entries`, without keys that equal those of `table`, and without tables and lists that are
/// empty then.
fn parsed_without(text: &str, table: &str, entries: &[StoreEntry]) -> Option<toml::Table> {
    let mut all: toml::Table = text.parse().ok()?;
    let ours: toml::Table = table.parse().ok()?;
    let Some(storage) = all.get_mut("storage").and_then(toml::Value::as_table_mut) else {
        return Some(all);
    };
    if let Some(ours) = ours.get("storage").and_then(toml::Value::as_table) {
        storage.retain(|key, value| ours.get(key) != Some(value));
    }
    if let Some(options) = storage.get_mut("options").and_then(toml::Value::as_table_mut) {
        for entry in entries {
            if let Some(stores) = options.get_mut(entry.list).and_then(toml::Value::as_array_mut) {
                stores.retain(|value| !value.as_str().is_some_and(|value| entry.is_named_by(value)));
                if stores.is_empty() {
                    options.remove(entry.list);
                }
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

/// Position of the value that names the directory of `entry`, with any options.
fn position_of(stores: &Array, entry: &StoreEntry) -> Option<usize> {
    let names = |value: &Value| value.as_str().is_some_and(|value| entry.is_named_by(value));
    stores.iter().position(names)
}

fn add(options: &mut Item, entry: &StoreEntry) {
    // Podman's TOML parser rejects comments and line breaks within braces.
    let inline = options.is_inline_table();
    let Some(options) = options.as_table_like_mut() else {
        return;
    };
    let Some(stores) = options.get_mut(entry.list).and_then(Item::as_array_mut) else {
        let stores: Array = [&entry.value].into_iter().collect();
        options.insert(entry.list, Item::Value(stores.into()));
        if let (false, Some(mut key)) = (inline, options.key_mut(entry.list)) {
            key.leaf_decor_mut().set_prefix(MARK);
        }
        return;
    };
    match position_of(stores, entry) {
        Some(position) if position == 0 || !entry.first => {
            if let Some(value) = stores.get_mut(position)
                && value.as_str() != Some(&entry.value)
            {
                let decor = value.decor().clone();
                *value = Value::from(&entry.value);
                *value.decor_mut() = decor;
            }
        }
        Some(position) => {
            remove_at(stores, position);
            push_front(stores, &entry.value);
        }
        None if entry.first => push_front(stores, &entry.value),
        None => push(stores, &entry.value),
    }
}

/// White space and comments before and after a value.
fn decor(value: &Value) -> (String, String) {
    let text = |raw: Option<&toml_edit::RawString>| raw.and_then(|raw| raw.as_str()).unwrap_or_default().to_owned();
    (text(value.decor().prefix()), text(value.decor().suffix()))
}

/// Appends a value in the style of the last one: on a separate line, or on the same line.
fn push(stores: &mut Array, value: &str) {
    let mut new = Value::from(value);
    if let Some(last) = stores.len().checked_sub(1).and_then(|last| stores.get_mut(last)) {
        let (prefix, suffix) = decor(last);
        new.decor_mut().set_suffix(suffix);
        last.decor_mut().set_suffix("");
        // A comment in the prefix describes the last value, so only the indentation is copied.
        let indent = prefix.rsplit('\n').next().unwrap_or_default();
        new.decor_mut().set_prefix(if prefix.contains('\n') {
            format!("\n{indent}")
        } else {
            " ".to_owned()
        });
    }
    stores.push_formatted(new);
}

/// Inserts a value before all others, in the style of the first one.
fn push_front(stores: &mut Array, value: &str) {
    let mut new = Value::from(value);
    if let Some(first) = stores.get_mut(0) {
        let (prefix, _) = decor(first);
        match prefix.rsplit_once('\n') {
            Some((_, indent)) => new.decor_mut().set_prefix(format!("\n{indent}")),
            None => {
                new.decor_mut().set_prefix(prefix);
                first.decor_mut().set_prefix(" ");
            }
        }
    }
    stores.insert_formatted(0, new);
}

/// Undoes [`push`] and [`push_front`].
fn remove_at(stores: &mut Array, position: usize) {
    let removed = stores.remove(position);
    let (prefix, suffix) = decor(&removed);
    if stores.is_empty() {
        let trailing = stores.trailing().as_str().unwrap_or_default().to_owned();
        stores.set_trailing(suffix + &trailing);
    } else if position == stores.len() {
        if let Some(last) = stores.get_mut(position - 1) {
            last.decor_mut().set_suffix(suffix);
        }
    } else if let (0, false, Some(first)) = (position, prefix.contains('\n'), stores.get_mut(0)) {
        first.decor_mut().set_prefix(prefix);
    }
}

fn remove(options: &mut Item, entry: &StoreEntry) {
    let inline = options.is_inline_table();
    let Some(options) = options.as_table_like_mut() else {
        return;
    };
    let Some(stores) = options.get_mut(entry.list).and_then(Item::as_array_mut) else {
        return;
    };
    let mut found = false;
    while let Some(position) = position_of(stores, entry) {
        found = true;
        remove_at(stores, position);
    }
    let empty = found && stores.is_empty();
    let prefix = options
        .key(entry.list)
        .and_then(|key| key.leaf_decor().prefix()?.as_str());
    if empty && (inline || prefix == Some(MARK)) {
        options.remove(entry.list);
    }
}

#[cfg(test)]
mod tests;
