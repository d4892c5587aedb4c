//! The keys of a config, read from the JSON Schema of its types: which exist, what they hold, what they mean.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

/// What there is to know about one key.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Key {
    /// Full name, such as `schedule.cron`.
    pub key: String,
    /// What it holds, such as `an integer` or `one of "a", "b"`.
    pub holds: String,
    /// Purpose, unit, range.
    pub doc: String,
    /// The default as TOML; `None` where the key is not set by default.
    pub default: Option<String>,
    /// The value in use as TOML; `None` where it is not set.
    pub value: Option<String>,
    /// Where the value in use came from.
    pub origin: String,
    /// The environment variable that overrides it.
    pub variable: String,
}

/// Returns the schema of `T` as one tree without references.
pub(super) fn schema<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<T>().into();
    spread(&mut schema);
    schema
}

/// Gives the keys of a struct to each alternative of an enum that is flattened into it, so that a node has either keys
/// or alternatives, never both.
fn spread(node: &mut Value) {
    match node {
        Value::Array(items) => items.iter_mut().for_each(spread),
        Value::Object(map) => {
            map.values_mut().for_each(spread);
            if !(map.contains_key("oneOf") && map.contains_key("properties")) {
                return;
            }
            let shared = ["properties", "required"].map(|word| map.remove(word));
            for alternative in map.get_mut("oneOf").and_then(Value::as_array_mut).into_iter().flatten() {
                if let ([Some(Value::Object(keys)), needed], Value::Object(inner)) = (&shared, alternative) {
                    add_keys(inner, keys, needed.as_ref().and_then(Value::as_array));
                }
            }
        }
        _ => {}
    }
}

fn add_keys(node: &mut Map<String, Value>, keys: &Map<String, Value>, needed: Option<&Vec<Value>>) {
    if let Some(own) = node.entry("properties").or_insert_with(|| Value::Object(Map::new())).as_object_mut() {
        own.extend(keys.clone());
    }
    if let Some(own) = node.entry("required").or_insert_with(|| Value::Array(vec![])).as_array_mut() {
        own.extend(needed.into_iter().flatten().cloned());
    }
}

/// One node of the schema: a type of value. An `Option<T>` or an enum has several [`Shape::alternatives`].
#[derive(Clone, Copy)]
pub(super) struct Shape<'a>(pub(super) &'a Value);

impl<'a> Shape<'a> {
    /// Returns the shapes that a value may have; null is left out, since TOML cannot write it.
    pub(super) fn alternatives(self) -> Vec<Shape<'a>> {
        let listed = ["anyOf", "oneOf"].iter().find_map(|word| self.0.get(word)?.as_array());
        match listed {
            Some(list) => list.iter().flat_map(|item| Shape(item).alternatives()).collect(),
            None if self.types() == ["null"] => vec![],
            None => vec![self],
        }
    }

    /// Returns the JSON types that the schema names.
    fn types(self) -> Vec<&'a str> {
        match self.0.get("type") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).collect(),
            _ => vec![],
        }
    }

    /// Returns the alternative that a table takes by its tag (`kind = "regex"`); the shape itself where there is no tag.
    fn resolve(self, value: &Value) -> Result<Shape<'a>, String> {
        let tables: Vec<Shape<'a>> =
            self.alternatives().into_iter().filter(|shape| shape.0.get("properties").is_some()).collect();
        let word = |shape: &Shape<'a>, key: &str| shape.0.get("properties")?.get(key)?.get("const")?.as_str();
        let tagged = |key: &&str| tables.len() > 1 && tables.iter().all(|shape| word(shape, key).is_some());
        let Some(tag) = self.properties().into_iter().map(|(key, _)| key).find(tagged) else { return Ok(self) };
        let given = value.get(tag).and_then(Value::as_str);
        if let Some(shape) = tables.iter().find(|shape| word(shape, tag) == given && given.is_some()) {
            return Ok(*shape);
        }
        let words: Vec<&str> = tables.iter().filter_map(|shape| word(shape, tag)).collect();
        let near = given.and_then(|text| nearest(text, words.iter().copied()));
        let hint = near.map(|near| format!("; did you mean {near:?}?")).unwrap_or_default();
        let given = given.map_or("is missing".into(), |text| format!("= {text:?}"));
        Err(format!("{tag} {given}: it must be one of {}{hint}", words.join(", ")))
    }

    /// Returns the keys that a table must have.
    fn required(self) -> Vec<&'a str> {
        self.0.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
    }

    /// Returns the named keys of a struct, in the order of its fields.
    pub(super) fn properties(self) -> Vec<(&'a str, Shape<'a>)> {
        let mut found: Vec<(&str, Shape<'a>)> = Vec::new();
        for shape in self.alternatives() {
            for (key, value) in shape.0.get("properties").and_then(Value::as_object).into_iter().flatten() {
                if found.iter().all(|(known, _)| known != key) {
                    found.push((key, Shape(value)));
                }
            }
        }
        found
    }

    /// Returns the shape of a key: a named one, or that of any entry where keys are free (a map).
    pub(super) fn child(self, key: &str) -> Option<Shape<'a>> {
        let named = self.properties().into_iter().find(|(name, _)| *name == key).map(|(_, shape)| shape);
        named.or_else(|| {
            let free = |shape: Shape<'a>| shape.0.get("additionalProperties").filter(|any| any.is_object());
            self.alternatives().into_iter().find_map(free).map(Shape)
        })
    }

    /// Returns true where keys are checked: the shape is a struct, not a map or free JSON.
    fn is_struct(self) -> bool {
        self.alternatives().iter().any(|shape| shape.0.get("properties").is_some())
    }

    /// Returns the shape of the items of a list.
    pub(super) fn items(self) -> Option<Shape<'a>> {
        self.alternatives().into_iter().find_map(|shape| shape.0.get("items").map(Shape))
    }

    /// Returns true for a list of tables (`[[name]]` in TOML).
    pub(super) fn is_list_of_tables(self) -> bool {
        self.items().is_some_and(|item| item.is_struct())
    }

    /// Returns true for a section that is written under a `[header]`.
    pub(super) fn is_section(self) -> bool {
        self.is_struct() && self.items().is_none()
    }

    /// Returns the doc of the key; for an enum also that of each value.
    pub(super) fn doc(self) -> String {
        let text = |node: &'a Value| node.get("description").and_then(Value::as_str);
        let mut doc = text(self.0).unwrap_or_default().to_string();
        for choice in self.choices() {
            if let (Some(name), Some(what)) = (choice.0.get("const").and_then(Value::as_str), text(choice.0)) {
                doc.push_str(&format!("\n- \"{name}\": {}", what.replace('\n', " ")));
            }
        }
        doc.trim_start_matches('\n').to_string()
    }

    fn choices(self) -> Vec<Shape<'a>> {
        self.alternatives().into_iter().filter(|shape| shape.0.get("const").is_some()).collect()
    }

    /// Returns the texts that an enum allows; empty for any other shape.
    fn words(self) -> Vec<&'a str> {
        let mut words = Vec::new();
        for Shape(node) in self.alternatives() {
            words.extend(node.get("const").and_then(Value::as_str));
            let listed = node.get("enum").and_then(Value::as_array);
            words.extend(listed.into_iter().flatten().filter_map(Value::as_str));
        }
        words
    }

    /// Returns what the key holds, for people.
    pub(super) fn holds(self) -> String {
        let words = self.words();
        if !words.is_empty() {
            let quoted: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
            return format!("one of {}", quoted.join(", "));
        }
        let kinds: Vec<&str> =
            self.alternatives().into_iter().flat_map(|s| s.types()).filter(|t| *t != "null").collect();
        match kinds.first().copied() {
            Some("array") => match self.items().map(|item| item.holds()) {
                Some(item) => format!("a list, each item {item}"),
                None => "a list".into(),
            },
            Some("object") => "a table".into(),
            Some("integer") if self.alternatives().iter().any(|s| s.0.get("minimum").is_some()) => {
                "a whole number from 0".into()
            }
            Some("integer") => "a whole number".into(),
            Some("number") => "a number".into(),
            Some("boolean") => "true or false".into(),
            Some("string") => "a text".into(),
            _ => "any value".into(),
        }
    }

    /// Returns true where a text given by the environment is the value itself, without TOML's quotes.
    pub(super) fn takes_text(self) -> bool {
        let takes = |shape: Shape<'a>| shape.types().contains(&"string") || shape.0.get("const").is_some();
        self.alternatives().into_iter().any(takes)
    }

    fn accepts(self, value: &Value) -> bool {
        let words = self.words();
        if let (false, Some(text)) = (words.is_empty(), value.as_str()) {
            return words.contains(&text);
        }
        let fits = |kind: &str| match kind {
            "integer" => value.is_i64() || value.is_u64(),
            "number" => value.is_number(),
            "boolean" => value.is_boolean(),
            "string" => value.is_string(),
            "array" => value.is_array(),
            "object" => value.is_object(),
            _ => false,
        };
        let takes = |shape: Shape<'_>| shape.types().is_empty() || shape.types().into_iter().any(fits);
        let negative = value.as_f64().is_some_and(|number| number < 0.0);
        let unsigned = |shape: Shape<'_>| shape.0.get("minimum").and_then(Value::as_f64) == Some(0.0);
        self.alternatives().into_iter().any(|shape| takes(shape) && !(negative && unsigned(shape)))
    }
}

/// Checks the shape of `value` against the schema and returns every problem, each with the full key first.
pub(super) fn check(root: &Value, value: &Value) -> Vec<String> {
    let mut problems = Vec::new();
    check_at(root, Shape(root), "", value, &mut problems);
    problems
}

fn check_at(root: &Value, shape: Shape<'_>, path: &str, value: &Value, problems: &mut Vec<String>) {
    if !shape.accepts(value) {
        let mut problem = format!("{path} = {} is not {}", short(value), shape.holds());
        if let Some(near) = value.as_str().and_then(|text| nearest(text, shape.words().into_iter())) {
            problem.push_str(&format!("; did you mean {near:?}?"));
        }
        return problems.push(problem);
    }
    match value {
        Value::Object(map) => {
            let shape = match shape.resolve(value) {
                Ok(shape) => shape,
                Err(problem) => return problems.push(join(path, &problem)),
            };
            for key in shape.required().into_iter().filter(|key| !map.contains_key(*key)) {
                problems.push(format!("{} is missing; it holds {}", join(path, key), holds_of(shape, key)));
            }
            for (key, item) in map {
                let path = join(path, key);
                match shape.child(key) {
                    Some(child) => check_at(root, child, &path, item, problems),
                    None if shape.is_struct() => problems.push(unknown(root, &path)),
                    None => {}
                }
            }
        }
        Value::Array(items) => {
            let Some(shape) = shape.items() else { return };
            for (index, item) in items.iter().enumerate() {
                check_at(root, shape, &format!("{path}[{index}]"), item, problems);
            }
        }
        _ => {}
    }
}

fn holds_of(shape: Shape<'_>, key: &str) -> String {
    shape.child(key).map(Shape::holds).unwrap_or_default()
}

/// Returns the message for a key that does not exist, with the nearest one that does.
pub(super) fn unknown(root: &Value, path: &str) -> String {
    let (section, name) = path.rsplit_once('.').unwrap_or(("", path));
    let known: Vec<String> = all(root).into_iter().map(|(key, _)| key).collect();
    let plain_section = without_indexes(section);
    let sibling = join(&plain_section, name);
    if known.contains(&format!("{sibling}_file")) {
        let variable = crate::secret::variable(&sibling);
        return format!(
            "{path}: a secret does not stand in a config; put it in a file and set {sibling}_file, or set {variable}"
        );
    }
    let siblings = known.iter().filter_map(|key| match key.rsplit_once('.') {
        Some((parent, last)) => (parent == plain_section).then_some(last),
        None => section.is_empty().then_some(key.as_str()),
    });
    if let Some(near) = nearest(name, siblings) {
        return format!("{path} is not a key; did you mean {}?", join(&plain_section, near));
    }
    let elsewhere = known.iter().find(|key| key.rsplit('.').next() == Some(name));
    match elsewhere {
        Some(key) => format!("{path} is not a key; did you mean {key}?"),
        None if section.is_empty() => format!("{path} is not a section; `taod config show` lists all"),
        None => format!("{path} is not a key; `taod config explain {plain_section}` lists those there are"),
    }
}

fn nearest<'a>(text: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let scored = known.map(|word| (strsim::jaro_winkler(text, word), word)).filter(|(score, _)| *score > 0.8);
    scored.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, word)| word)
}

/// Returns every key with its shape, sections included, in the order of the fields.
pub(super) fn all(root: &Value) -> Vec<(String, Shape<'_>)> {
    fn walk<'a>(path: &str, shape: Shape<'a>, found: &mut Vec<(String, Shape<'a>)>) {
        for (key, child) in shape.properties() {
            let path = join(path, key);
            found.push((path.clone(), child));
            walk(&path, child.items().unwrap_or(child), found);
        }
    }
    let mut found = Vec::new();
    walk("", Shape(root), &mut found);
    found
}

/// Returns the schema's half of what there is to know about `key`, or about each key of the section `key`.
pub(super) fn explain(root: &Value, key: &str) -> Vec<Key> {
    let section = format!("{key}.");
    let wanted = |name: &str, shape: Shape<'_>| match shape.is_section() {
        true => false,
        false => name == key || name.starts_with(&section),
    };
    let describe = |(name, shape): (String, Shape<'_>)| Key {
        holds: shape.holds(),
        doc: shape.doc(),
        default: None,
        value: None,
        origin: String::new(),
        variable: crate::secret::variable(&name),
        key: name,
    };
    all(root).into_iter().filter(|(name, shape)| wanted(name, *shape)).map(describe).collect()
}

/// Returns the value at a dotted path.
pub(super) fn lookup<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(value, |value, key| value.get(key)).filter(|value| !value.is_null())
}

/// Sets the value at a path, making the tables on the way.
pub(super) fn set(value: &mut Value, path: &[String], new: Value) {
    let Some((key, rest)) = path.split_first() else { return *value = new };
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    if let Some(map) = value.as_object_mut() {
        set(map.entry(key.clone()).or_insert(Value::Null), rest, new);
    }
}

/// Joins a section and a key by a dot.
pub(super) fn join(section: &str, key: &str) -> String {
    if section.is_empty() { key.to_string() } else { format!("{section}.{key}") }
}

fn without_indexes(path: &str) -> String {
    path.split('.').map(|part| part.split('[').next().unwrap_or(part)).collect::<Vec<_>>().join(".")
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() > 60 { text.chars().take(57).collect::<String>() + "..." } else { text }
}
