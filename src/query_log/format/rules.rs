//! What an operator says about every row, whatever its format: who has opted out, and how large a row may be.
//!
//! Rules look at the row that a format made, not at the record. So one rule holds for all formats: what no column takes
//! is in `extra`, wherever the record had it, inside a body that was logged as text too.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::json::{Map, Value};
use crate::record::Query;

use super::exclusion::{self, Exclusion};
use super::fields::truth;
use super::{Mapping, oversize};

/// Most text that a row keeps where nothing else is said, in bytes.
pub const DEFAULT_TEXT_BYTES: usize = 4 << 20;

/// How records are read beyond the known formats.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Formats of the operator's own, tried before the known ones.
    pub mappings: Vec<Mapping>,
    /// Signs that a caller forbids training, beyond the known ones.
    pub opt_outs: Vec<OptOut>,
    /// Most text that a row keeps, in bytes.
    pub max_text_bytes: usize,
}

impl Default for Rules {
    fn default() -> Self {
        Rules { mappings: Vec::new(), opt_outs: Vec::new(), max_text_bytes: DEFAULT_TEXT_BYTES }
    }
}

impl Rules {
    /// Marks and cuts a row that a format made.
    pub(super) fn apply(&self, query: &mut Query, headers: &BTreeMap<String, String>) {
        if self.opt_outs.iter().any(|opt_out| opt_out.holds(query, headers)) {
            exclusion::add(query, Exclusion::OptOut);
        }
        oversize::cut(query, self.max_text_bytes);
    }
}

/// A sign of your own that a caller forbids training.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptOut {
    /// Where it is: the name of a Kafka header or of a field that no column takes, wherever it lies; or a JSON pointer
    /// into `extra` of a row, such as `/request/metadata/consent`.
    pub field: String,
    /// What it holds then, as text without regard to case; empty: anything but false.
    pub equals: String,
}

impl OptOut {
    /// Checks that there is something to look for.
    pub fn validate(&self) -> Result<(), String> {
        match self.field.trim().is_empty() {
            true => Err("field is empty: write a name, such as x-consent, or a JSON pointer into extra".to_owned()),
            false => Ok(()),
        }
    }

    fn holds(&self, query: &Query, headers: &BTreeMap<String, String>) -> bool {
        if self.field.starts_with('/') {
            return find(&query.extra, &self.field).is_some_and(|value| self.forbids(value));
        }
        let in_headers = headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case(&self.field));
        in_headers.map(|(_, value)| Value::from(value.as_str())).any(|value| self.forbids(&value))
            || self.is_inside(&query.extra)
    }

    /// Returns true where a field of this name lies in an object, at any depth, and forbids.
    fn is_inside(&self, map: &Map) -> bool {
        map.iter().any(|(name, value)| {
            (name.eq_ignore_ascii_case(&self.field) && self.forbids(value))
                || match value {
                    Value::Object(inner) => self.is_inside(inner),
                    Value::Array(items) => items.iter().filter_map(Value::as_object).any(|item| self.is_inside(item)),
                    _ => false,
                }
        })
    }

    fn forbids(&self, value: &Value) -> bool {
        if self.equals.is_empty() {
            return !value.is_null() && truth(value) != Some(false);
        }
        match value {
            Value::String(text) => text.trim().eq_ignore_ascii_case(&self.equals),
            other => other.to_string().eq_ignore_ascii_case(&self.equals),
        }
    }
}

/// Returns what a JSON pointer names in an object.
fn find<'a>(map: &'a Map, pointer: &str) -> Option<&'a Value> {
    let rest = pointer.strip_prefix('/')?;
    let (first, deeper) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    map.get(&first.replace("~1", "/").replace("~0", "~"))?.pointer(deeper)
}

#[cfg(test)]
mod tests {
    use crate::json::json;

    use super::super::{Outcome, read};
    use super::*;

    /// Returns why the row of a record does not train, under one rule.
    fn reason(record: &Value, header: Option<(&str, &str)>, field: &str, equals: &str) -> Option<String> {
        let rules = Rules { opt_outs: vec![OptOut { field: field.into(), equals: equals.into() }], ..Rules::default() };
        let headers = header.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        match read(record.to_string().as_bytes(), &headers, &rules).as_slice() {
            [Outcome::Row(query)] => {
                assert_eq!(query.train_ok, query.reason.is_none());
                query.reason.clone()
            }
            other => panic!("{other:?}"),
        }
    }

    fn call(metadata: Value) -> Value {
        let request = json!({"messages": [{"role": "user", "content": "Hi"}], "metadata": metadata});
        json!({"request": request, "response": "Ho"})
    }

    #[test]
    fn a_sign_of_ones_own_is_found_by_name_and_by_pointer() {
        let out = Some("opt_out".to_owned());
        let refused = call(json!({"privacy": {"Consent": "None"}}));
        assert_eq!(reason(&refused, None, "consent", "none"), out);
        assert_eq!(reason(&refused, None, "/request/metadata/privacy/Consent", "none"), out);
        assert_eq!(reason(&refused, None, "/request/metadata/privacy/consent", "none"), None, "pointers are exact");
        assert_eq!(reason(&refused, None, "consent", "given"), None);
        assert_eq!(reason(&refused, None, "consent", ""), out, "anything forbids");
        assert_eq!(reason(&call(json!({"consent": false})), None, "consent", ""), None);
        assert_eq!(reason(&call(json!({"tier": 3})), None, "tier", "3"), out);
        assert_eq!(reason(&call(json!({})), Some(("X-Consent", "no")), "x-consent", "NO"), out);
        // The body as a text, as Databricks logs it.
        let row = json!({"databricks_request_id": "1", "request": refused["request"].to_string(), "response": "Ho"});
        assert_eq!(reason(&row, None, "/request/metadata/privacy/Consent", "none"), out);
        let attribute = |key: &str, value: &str| json!({"key": key, "value": {"stringValue": value}});
        let messages = json!([{"role": "user", "parts": [{"type": "text", "content": "Hi"}]}]).to_string();
        let attributes = json!([
            attribute("gen_ai.operation.name", "chat"),
            attribute("app.consent", "none"),
            attribute("gen_ai.input.messages", &messages)
        ]);
        let span = json!({"traceId": "0", "spanId": "0", "attributes": attributes});
        let batch = json!({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]});
        assert_eq!(reason(&batch, None, "app.consent", "none"), out);
    }

    #[test]
    fn an_opt_out_yields_to_self_alone() {
        let refused = json!({"consent": "none", "status": 500, "request": call(json!({}))["request"]});
        assert_eq!(reason(&refused, None, "consent", "none").as_deref(), Some("opt_out"));
        let own = call(json!({"consent": "none", "user": "taod-internal"}));
        assert_eq!(reason(&own, None, "consent", "none").as_deref(), Some("self"));
    }

    #[test]
    fn a_rule_without_a_field_is_refused() {
        assert!(OptOut::default().validate().unwrap_err().contains("field is empty"));
        assert_eq!(OptOut { field: "/a".into(), equals: String::new() }.validate(), Ok(()));
    }
}
