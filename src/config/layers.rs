//! The layers of a config laid over each other, with a note of where each key came from.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::Value;

use super::ConfigError;
use super::keys::{self, Key, Shape};
use super::render::inline;

/// The layer a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The type's own default.
    Default,
    /// The config file of this name.
    File(String),
    /// The environment variable of this name.
    Environment(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File(name) | Origin::Environment(name) => f.write_str(name),
        }
    }
}

/// The merged value and the origin of each key that is not a default.
#[derive(Debug, Clone)]
pub struct Layers {
    pub(super) value: Value,
    pub(super) defaults: Value,
    origins: BTreeMap<String, Origin>,
}

impl Layers {
    /// Lays a file and the environment over the defaults of `T`; problems of shape are reported all at once.
    pub(super) fn merge<T: Serialize + Default>(
        schema: &Value,
        file: Option<(String, String)>,
        environment: Vec<(String, String)>,
    ) -> Result<Self, ConfigError> {
        let defaults = serde_json::to_value(T::default())
            .map_err(|e| ConfigError::Problems(vec![format!("the defaults cannot be written as JSON: {e}")]))?;
        let mut layers = Layers { value: defaults.clone(), defaults, origins: BTreeMap::new() };
        let mut problems = Vec::new();
        if let Some((name, text)) = file {
            let value = parse(&name, &text)?;
            problems.extend(keys::check(schema, &value).into_iter().map(|problem| format!("{name}: {problem}")));
            layers.lay(Shape(schema), &mut Vec::new(), value, &Origin::File(name));
        }
        for (name, text) in environment {
            let Some(path) = path_of(&name) else { continue };
            match override_value(schema, &path, &text) {
                Ok(Some(value)) => layers.lay(Shape(schema), &mut Vec::new(), value, &Origin::Environment(name)),
                Ok(None) => {}
                Err(problem) => problems.push(format!("{name}: {problem}")),
            }
        }
        if problems.is_empty() { Ok(layers) } else { Err(ConfigError::Problems(problems)) }
    }

    /// Lays `value` over what is there: sections key by key, everything else (lists and maps too) as a whole.
    fn lay(&mut self, shape: Shape<'_>, path: &mut Vec<String>, value: Value, origin: &Origin) {
        match value {
            Value::Object(map) if shape.is_section() => {
                for (key, item) in map {
                    // An unknown key was reported by the check of the shape.
                    let Some(child) = shape.child(&key) else { continue };
                    path.push(key);
                    self.lay(child, path, item, origin);
                    path.pop();
                }
            }
            value => {
                self.origins.insert(path.join("."), origin.clone());
                keys::set(&mut self.value, path, value);
            }
        }
    }

    /// Returns where the value of a key came from.
    pub(super) fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// Adds to a section's complaint, which starts with the key, the layer that set the key.
    pub(super) fn blame(&self, problem: String) -> String {
        let key = problem.split([' ', ':', '=']).next().unwrap_or_default();
        match self.origins.get(key) {
            Some(origin) => format!("{origin}: {problem}"),
            None => problem,
        }
    }

    /// Adds the values to what the schema says of a key.
    pub(super) fn complete(&self, key: Key) -> Key {
        let shown = |value: &Value| keys::lookup(value, &key.key).map(inline);
        Key {
            default: shown(&self.defaults),
            value: shown(&self.value),
            origin: self.origin(&key.key).to_string(),
            ..key
        }
    }
}

fn parse(name: &str, text: &str) -> Result<Value, ConfigError> {
    toml::from_str(text).map_err(|e| {
        let start = e.span().map_or(0, |span| span.start).min(text.len());
        let line = text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count() + 1;
        ConfigError::Syntax { file: name.to_string(), line, message: e.message().replace('\n', "; ") }
    })
}

/// Returns the path that a variable names (`TAOD__SCHEDULE__CRON`), or `None` for a variable that is no override.
fn path_of(variable: &str) -> Option<Vec<String>> {
    let path = variable.strip_prefix("TAOD__")?;
    Some(path.split("__").map(str::to_lowercase).collect())
}

/// Returns the tree with the one value that a variable sets; `None` for a secret, which its stage reads itself.
fn override_value(schema: &Value, path: &[String], text: &str) -> Result<Option<Value>, String> {
    let key = path.join(".");
    let shape = path.iter().try_fold(Shape(schema), |shape, part| shape.child(part));
    let Some(shape) = shape else {
        let (parents, last) = path.split_at(path.len().saturating_sub(1));
        let parent = parents.iter().try_fold(Shape(schema), |shape, part| shape.child(part));
        let file = last.first().and_then(|name| parent?.child(&format!("{name}_file")));
        // The scorers of one's own stand in a list, so their secrets go by their names.
        let is_scorers = matches!(path, [section, _, last] if section == "rewards" && last == "api_key");
        return if file.is_some() || is_scorers { Ok(None) } else { Err(keys::unknown(schema, &key)) };
    };
    if shape.is_section() || shape.is_list_of_tables() {
        return Err(format!("{key} is a table and cannot be set as a whole; set one of its keys, or use the file"));
    }
    let value = match shape.takes_text() {
        true => Value::String(text.to_string()),
        false => toml::from_str::<Value>(&format!("value = {text}"))
            .ok()
            .and_then(|table| table.get("value").cloned())
            .ok_or_else(|| format!("{key} = {text:?} is not {}", shape.holds()))?,
    };
    let mut tree = Value::Null;
    keys::set(&mut tree, path, value);
    match keys::check(schema, &tree).into_iter().next() {
        Some(problem) => Err(problem),
        None => Ok(Some(tree)),
    }
}
