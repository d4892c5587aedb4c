//! A config as TOML text: the defaults with the doc of every key, or what is in use with where it came from.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use super::keys::{self, Shape, join};
use super::layers::{Layers, Origin};

const WIDTH: usize = 110;

/// Returns every key of `T` at its default, with its doc as a comment.
pub(super) fn defaults<T: Serialize + JsonSchema + Default>() -> String {
    let schema = keys::schema::<T>();
    let values = serde_json::to_value(T::default()).unwrap_or_default();
    let head = "# Every key of taod at its default, with what it does. Generated from the types: a test compares them.\n\
                # A config needs only the keys that it changes. An environment variable wins over the file:\n\
                # TAOD__SECTION__KEY. `taod config explain SECTION.KEY` says the same about one key.\n";
    let mut writer = Writer { text: head.to_string(), notes: Notes::Docs };
    writer.table(Shape(&schema), "", Some(&values));
    writer.text
}

/// Returns every key that has a value, with a comment where it is not the default.
pub(super) fn effective(schema: &Value, layers: &Layers) -> String {
    let mut writer = Writer { text: String::new(), notes: Notes::Origins(layers) };
    writer.table(Shape(schema), "", Some(&layers.value));
    writer.text.trim_start().to_string()
}

/// What the comments say.
enum Notes<'a> {
    /// Before each key, what it is for; keys without a value are named too.
    Docs,
    /// After each value that is not a default, where it came from.
    Origins(&'a Layers),
}

struct Writer<'a> {
    text: String,
    notes: Notes<'a>,
}

impl Writer<'_> {
    /// Writes one table: plain keys first, as TOML demands, then the tables below it.
    fn table(&mut self, shape: Shape<'_>, path: &str, value: Option<&Value>) {
        let value_of = |key: &str| value.and_then(|value| value.get(key)).filter(|value| !value.is_null());
        let is_table = |shape: Shape<'_>| shape.is_section() || shape.is_list_of_tables();
        let (below, plain): (Vec<_>, Vec<_>) = shape.properties().into_iter().partition(|(_, child)| is_table(*child));
        for (key, child) in plain {
            self.key(key, child, path, value_of(key));
        }
        for (key, child) in below {
            let path = join(path, key);
            match (value_of(key), child.items()) {
                (Some(Value::Array(items)), Some(item)) if !items.is_empty() => self.tables(item, &path, items),
                (_, Some(item)) => self.no_tables(child, item, &path),
                (value, None) => {
                    self.text.push('\n');
                    self.doc(child);
                    self.text.push_str(&format!("[{path}]\n"));
                    self.table(child, &path, value);
                }
            }
        }
    }

    fn key(&mut self, key: &str, shape: Shape<'_>, section: &str, value: Option<&Value>) {
        self.doc(shape);
        match (value, &self.notes) {
            (Some(value), Notes::Docs) => self.text.push_str(&format!("{key} = {}\n", inline(value))),
            (Some(value), Notes::Origins(layers)) => {
                let note = match layers.origin(&join(section, key)) {
                    Origin::Default => String::new(),
                    origin => format!("  # {origin}"),
                };
                self.text.push_str(&format!("{key} = {}{note}\n", inline(value)));
            }
            (None, Notes::Docs) => self.text.push_str(&format!("# {key} is not set; it holds {}.\n", shape.holds())),
            (None, Notes::Origins(_)) => {}
        }
    }

    fn tables(&mut self, item: Shape<'_>, path: &str, values: &[Value]) {
        let note = match &self.notes {
            Notes::Origins(layers) if layers.origin(path) != Origin::Default => format!("  # {}", layers.origin(path)),
            _ => String::new(),
        };
        for value in values {
            self.text.push_str(&format!("\n[[{path}]]{note}\n"));
            self.table(item, path, Some(value));
        }
    }

    /// Writes, commented out, what one table of a list holds that is empty by default.
    fn no_tables(&mut self, list: Shape<'_>, item: Shape<'_>, path: &str) {
        if !matches!(self.notes, Notes::Docs) {
            return;
        }
        self.text.push('\n');
        self.doc(list);
        self.text.push_str(&format!("# [[{path}]]\n"));
        for (key, child) in item.properties() {
            let doc = child.doc().replace('\n', " ");
            self.text.push_str(&comment(&format!("{key}: {} {doc}", child.holds())));
        }
    }

    fn doc(&mut self, shape: Shape<'_>) {
        if matches!(self.notes, Notes::Docs) {
            self.text.push_str(&comment(&shape.doc()));
        }
    }
}

/// Returns a doc as comment lines. A paragraph, wrapped at the width of the source before, is wrapped anew; the values
/// of an enum (`- "name": ...`) keep lines of their own.
fn comment(doc: &str) -> String {
    let mut text = String::new();
    for paragraph in doc.replace("\n- ", "\n\n- ").split("\n\n") {
        let mut line = "#".to_string();
        for word in paragraph.split_whitespace() {
            if line.chars().count() + 1 + word.chars().count() > WIDTH {
                text.push_str(&format!("{line}\n"));
                line = "#".into();
            }
            line = format!("{line} {word}");
        }
        if line.len() > 1 {
            text.push_str(&format!("{line}\n"));
        }
    }
    text
}

/// Returns a value as TOML on one line.
pub(super) fn inline(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let entries: Vec<String> = map
                .iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| format!("{} = {}", toml_key(key), inline(value)))
                .collect();
            if entries.is_empty() { "{}".into() } else { format!("{{ {} }}", entries.join(", ")) }
        }
        Value::Array(items) => format!("[{}]", items.iter().map(inline).collect::<Vec<_>>().join(", ")),
        // A JSON string is a TOML string but for one character; JSON's numbers and booleans are TOML's.
        other => other.to_string().replace('\u{7f}', "\\u007f"),
    }
}

fn toml_key(key: &str) -> String {
    let plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if plain { key.to_string() } else { inline(&Value::from(key)) }
}
