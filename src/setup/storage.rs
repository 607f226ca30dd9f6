//! The stores' entries in a storage.conf, whose other contents stay as they are, comments and white space too.
//!
//! [`Stores`] says what is entered, [`File`] edits the text.

use std::path::Path;

use toml_edit::{Array, Document, DocumentMut, Item, Value};

use super::Error;

/// What a storage.conf begins with that there was not before.
pub const SKELETON: &str = "# Made by nydus-store setup.\n";

const MARK: &str = "# Added by nydus-store setup.\n";
const IMAGE_STORES: &str = "additionalimagestores";
const LAYER_STORES: &str = "additionallayerstores";
/// The lists that have our entries, and their names for messages.
const LISTS: [(&str, &str); 2] = [
    (IMAGE_STORES, "storage.options.additionalimagestores"),
    (LAYER_STORES, "storage.options.additionallayerstores"),
];

/// The stores of one root, as containers/storage is told of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stores {
    /// The directory of the additional image store.
    pub images: String,
    /// The directory of the additional layer store, in which Podman up to 5.0 and CRI-O up to 1.30 announce pulls.
    pub layers: String,
}

/// An element of a list in `[storage.options]`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    list: &'static str,
    dir: String,
    value: String,
    /// Podman 4 asks the first additional layer store only.
    first: bool,
}

impl Entry {
    fn of_images(dir: &str) -> Self {
        Self {
            list: IMAGE_STORES,
            dir: dir.to_owned(),
            value: dir.to_owned(),
            first: false,
        }
    }

    /// With `ref`, references are part of the paths that are looked up.
    fn of_layers(dir: &str) -> Self {
        Self {
            list: LAYER_STORES,
            dir: dir.to_owned(),
            value: format!("{dir}:ref"),
            first: true,
        }
    }

    /// Whether `value` names the same directory, with whatever options.
    fn is_named_by(&self, value: &str) -> bool {
        let path = value.split(':').next();
        path.is_some_and(|path| path.trim_end_matches('/') == self.dir)
    }
}

impl Stores {
    fn entries(&self) -> [Entry; 2] {
        [Entry::of_images(&self.images), Entry::of_layers(&self.layers)]
    }

    /// What earlier versions have entered: the directory was a layer store then.
    fn earlier_entries(&self) -> [Entry; 1] {
        [Entry::of_layers(&self.images)]
    }

    /// The same as driver options, which CRI-O takes in its own configuration.
    pub fn driver_options(&self) -> [String; 2] {
        [
            format!("overlay.imagestore={}", self.images),
            format!("overlay.additionallayerstore={}:ref", self.layers),
        ]
    }
}

/// What a storage.conf has of our entries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Named {
    /// The image store.
    pub images: bool,
    /// The layer store, with references.
    pub layers: bool,
    /// Whether another layer store comes before it.
    pub layers_behind: bool,
    /// The entry of an earlier version.
    pub earlier: bool,
}

impl Named {
    /// Whether there is any.
    pub fn any(self) -> bool {
        self.images || self.layers || self.earlier
    }
}

/// A storage.conf: its name, for messages, and its text.
#[derive(Clone, Copy)]
pub struct File<'a> {
    /// Where it is.
    pub path: &'a Path,
    /// What it holds.
    pub text: &'a str,
}

impl File<'_> {
    /// Its text with the stores, and without what earlier versions have entered.
    pub fn with(&self, stores: &Stores) -> Result<String, Error> {
        let text = self.without_entries(&stores.earlier_entries())?;
        File { text: &text, ..*self }.with_entries(&stores.entries())
    }

    fn with_entries(&self, entries: &[Entry]) -> Result<String, Error> {
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
            return Ok(format!("{}{newline}{}", self.text, block(table, entries)));
        }
        let mut document = parsed.into_mut();
        if let Some(options) = options(&mut document) {
            entries.iter().for_each(|entry| add(options, entry));
        }
        Ok(document.to_string())
    }

    /// Its text without the stores, whichever version has entered them.
    pub fn without(&self, stores: &Stores) -> Result<String, Error> {
        let text = self.without_entries(&stores.entries())?;
        File { text: &text, ..*self }.without_entries(&stores.earlier_entries())
    }

    fn without_entries(&self, entries: &[Entry]) -> Result<String, Error> {
        let parsed = self.parse()?;
        for table in [TABLE, ""] {
            match self.text.split_once(&block(table, entries)) {
                // What follows may be the person's, and would join the table before.
                Some((before, after)) if !continues(after) => {
                    let rest = format!("{before}{after}");
                    if self.is_rest(&rest, table, entries) {
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
        if self.is_rest(&rest, "", entries) {
            return Ok(rest);
        }
        Err(Error::Entangled {
            path: self.path.to_owned(),
        })
    }

    /// Whether `rest` means the same as its text, but for the entries and the keys of `table`.
    fn is_rest(&self, rest: &str, table: &str, entries: &[Entry]) -> bool {
        let expected = meaning(self.text, table, entries);
        expected.is_some() && expected == meaning(rest, "", entries)
    }

    /// Which of the stores it names.
    pub fn names(&self, stores: &Stores) -> Result<Named, Error> {
        let mut document = self.parse()?.into_mut();
        let options = options(&mut document).and_then(|options| options.as_table_like());
        let place = |entry: &Entry| {
            let mut list = options?.get(entry.list)?.as_array()?.iter();
            list.position(|value| value.as_str() == Some(&entry.value))
        };
        let [images, layers] = stores.entries().each_ref().map(place);
        let [earlier] = stores.earlier_entries().each_ref().map(place);
        Ok(Named {
            images: images.is_some(),
            layers: layers.is_some(),
            layers_behind: layers.is_some_and(|place| place > 0),
            earlier: earlier.is_some(),
        })
    }

    /// The additional layer stores that are not ours.
    pub fn other_layer_stores(&self, stores: &Stores) -> Result<Vec<String>, Error> {
        let mut document = self.parse()?.into_mut();
        let list = options(&mut document).and_then(|options| options.get(LAYER_STORES)?.as_array());
        let ours = stores.entries();
        let all = list.into_iter().flatten().filter_map(Value::as_str);
        let others = all.filter(|value| !ours.iter().any(|entry| entry.is_named_by(value)));
        Ok(others.map(str::to_owned).collect())
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
        for (list, name) in LISTS {
            match options.get(list) {
                Some(stores) if stores.as_array().is_none() => return Err(wrong(stores, name, "a list of texts")),
                _ => {}
            }
        }
        Ok(parsed)
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
fn block(table: &str, entries: &[Entry]) -> String {
    let line = |entry: &Entry| format!("{} = [{}]\n", entry.list, Value::from(&entry.value));
    let lines: String = entries.iter().map(line).collect();
    format!("\n{MARK}{table}[storage.options]\n{lines}")
}

/// Whether a table that ends before `text` goes on in it.
fn continues(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim);
    let next = lines.find(|line| !line.is_empty() && !line.starts_with('#'));
    next.is_some_and(|line| !line.starts_with('['))
}

/// What a file says without the entries, the keys of `table` as they are there, and what is empty without them.
fn meaning(text: &str, table: &str, entries: &[Entry]) -> Option<toml::Table> {
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

/// Where the directory of `entry` is named, with whatever options.
fn place_of(stores: &Array, entry: &Entry) -> Option<usize> {
    let names = |value: &Value| value.as_str().is_some_and(|value| entry.is_named_by(value));
    stores.iter().position(names)
}

fn add(options: &mut Item, entry: &Entry) {
    // Podman's TOML has no comments and no line breaks within braces.
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
    match place_of(stores, entry) {
        Some(place) if place == 0 || !entry.first => {
            if let Some(value) = stores.get_mut(place)
                && value.as_str() != Some(&entry.value)
            {
                let decor = value.decor().clone();
                *value = Value::from(&entry.value);
                *value.decor_mut() = decor;
            }
        }
        Some(place) => {
            take_out(stores, place);
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

/// Adds a value in the manner of the one before: on a line of its own, or not.
fn push(stores: &mut Array, value: &str) {
    let mut new = Value::from(value);
    if let Some(last) = stores.len().checked_sub(1).and_then(|last| stores.get_mut(last)) {
        let (prefix, suffix) = decor(last);
        new.decor_mut().set_suffix(suffix);
        last.decor_mut().set_suffix("");
        // A comment before that value is about that one.
        let indent = prefix.rsplit('\n').next().unwrap_or_default();
        new.decor_mut().set_prefix(if prefix.contains('\n') {
            format!("\n{indent}")
        } else {
            " ".to_owned()
        });
    }
    stores.push_formatted(new);
}

/// The same before all others.
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
fn take_out(stores: &mut Array, place: usize) {
    let removed = stores.remove(place);
    let (prefix, suffix) = decor(&removed);
    if stores.is_empty() {
        let trailing = stores.trailing().as_str().unwrap_or_default().to_owned();
        stores.set_trailing(suffix + &trailing);
    } else if place == stores.len() {
        if let Some(last) = stores.get_mut(place - 1) {
            last.decor_mut().set_suffix(suffix);
        }
    } else if let (0, false, Some(first)) = (place, prefix.contains('\n'), stores.get_mut(0)) {
        first.decor_mut().set_prefix(prefix);
    }
}

fn remove(options: &mut Item, entry: &Entry) {
    let inline = options.is_inline_table();
    let Some(options) = options.as_table_like_mut() else {
        return;
    };
    let Some(stores) = options.get_mut(entry.list).and_then(Item::as_array_mut) else {
        return;
    };
    let mut found = false;
    while let Some(place) = place_of(stores, entry) {
        found = true;
        take_out(stores, place);
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
