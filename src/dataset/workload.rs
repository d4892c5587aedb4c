//! Workloads: which kind of traffic a logged call is.
//!
//! Few logs name a workload, so an operator says how one is told: by the record's own field, by a tag, by any other field
//! of the record, by the model that was asked, by the system prompt; and one workload may take the rest. The first in the
//! order of the config that takes a call has it. This is the only place that decides; everything after a dataset goes by
//! the name.

use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::census::Row;
use crate::json::Value;
use crate::record::Message;

/// Most workloads of a config.
pub const MOST: usize = 64;

/// How a logged call is assigned to a workload.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Match {
    /// The record's workload field equals the workload's name.
    #[default]
    Name,
    /// Takes every call that no workload above it takes.
    Default,
    /// The call carries this tag: a text under `tags`, `tag` or `request_tags`, wherever that lies in the record's own
    /// fields (column `extra`), alone or in a list.
    Tag(String),
    /// The model that was asked, as a regular expression for the whole name, such as `llama-3.*`.
    Model(String),
    /// SHA-256, in hex, of the text of the call's system prompt without the white space around it:
    /// `printf %s "$PROMPT" | sha256sum`.
    SystemPrompt(String),
    /// A field of the record holds this text.
    Field {
        /// `tenant`, `model`, `served_version`, `format` or `topic`; a JSON pointer into column `extra`, such as
        /// `/metadata/route`; or `header:NAME` for a Kafka header.
        at: String,
        /// The text it holds; numbers and truth values as JSON writes them.
        equals: String,
    },
}

/// What a dataset needs to know of a workload.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkloadView {
    pub name: String,
    pub matching: Match,
    /// Text that every prompt of the workload carries; it is not compared.
    pub house_rules: String,
    /// False where its answers cannot be scored: its prompts are left out as `no_rules`.
    pub has_rules: bool,
}

/// The workloads of a config, ready to be asked.
#[derive(Debug)]
pub(super) struct Workloads {
    views: Vec<WorkloadView>,
    tests: Vec<Test>,
}

#[derive(Debug)]
enum Test {
    Name(String),
    Always,
    Tag(String),
    Model(Regex),
    System(u64),
    Column { name: String, equals: String },
    Extra { pointer: String, equals: String },
    Header { name: String, equals: String },
}

const COLUMNS: [&str; 5] = ["tenant", "model", "served_version", "format", "topic"];

impl Match {
    /// Checks that it can be used; the message says what to write instead.
    pub fn validate(&self) -> Result<(), String> {
        Test::of(self, "").map(drop)
    }
}

impl Test {
    fn of(matching: &Match, name: &str) -> Result<Test, String> {
        Ok(match matching {
            Match::Name => Test::Name(name.to_owned()),
            Match::Default => Test::Always,
            Match::Tag(tag) if tag.trim().is_empty() => return Err("tag is blank: name one".into()),
            Match::Tag(tag) => Test::Tag(tag.clone()),
            Match::Model(pattern) => Test::Model(Regex::new(&format!("^(?:{pattern})$")).map_err(|e| {
                let why = e.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
                format!("model is {pattern:?}, which is no regular expression: {why}")
            })?),
            Match::SystemPrompt(hash) => {
                let bytes = super::catalogue::bytes_of(&hash.to_ascii_lowercase());
                let bytes =
                    bytes.ok_or_else(|| format!("system_prompt is {hash:?}: give a SHA-256 of 64 hex digits"))?;
                Test::System(first_bytes(&bytes))
            }
            Match::Field { at, equals } => {
                let equals = equals.clone();
                if at.starts_with('/') {
                    Test::Extra { pointer: at.clone(), equals }
                } else if let Some(header) = at.strip_prefix("header:") {
                    Test::Header { name: header.to_ascii_lowercase(), equals }
                } else if COLUMNS.contains(&at.as_str()) {
                    Test::Column { name: at.clone(), equals }
                } else {
                    let known = COLUMNS.join(", ");
                    return Err(format!(
                        "field at is {at:?}: give one of {known}, a JSON pointer such as /metadata/route, or header:NAME"
                    ));
                }
            }
        })
    }

    fn reads_extra(&self) -> bool {
        matches!(self, Test::Tag(_) | Test::Extra { .. })
    }

    fn takes(&self, row: &Row<'_>, extra: Option<&Value>, headers: Option<&Value>) -> bool {
        match self {
            Test::Name(name) => row.workload == Some(name.as_str()),
            Test::Always => true,
            Test::Tag(tag) => extra.is_some_and(|extra| has_tag(extra, tag)),
            Test::Model(pattern) => row.model.is_some_and(|model| pattern.is_match(model)),
            Test::System(_) => false,
            Test::Column { name, equals } => column(row, name) == Some(equals.as_str()),
            Test::Extra { pointer, equals } => {
                extra.and_then(|extra| at(extra, pointer)).is_some_and(|v| is_text(v, equals))
            }
            Test::Header { name, equals } => headers.is_some_and(|headers| has_header(headers, name, equals)),
        }
    }
}

fn column<'a>(row: &Row<'a>, name: &str) -> Option<&'a str> {
    match name {
        "tenant" => row.tenant,
        "model" => row.model,
        "served_version" => row.served_version,
        "format" => Some(row.format),
        _ => Some(row.topic),
    }
}

fn at<'a>(value: &'a Value, pointer: &str) -> Option<&'a Value> {
    let names = pointer.split('/').skip(1).map(|name| name.replace("~1", "/").replace("~0", "~"));
    let mut found = value;
    for name in names {
        found = match found {
            Value::Array(list) => list.get(name.parse::<usize>().ok()?)?,
            other => other.get(&name)?,
        };
    }
    Some(found)
}

fn is_text(value: &Value, text: &str) -> bool {
    match value {
        Value::String(found) => found == text,
        Value::Number(number) => text == number.to_string().as_str(),
        Value::Bool(truth) => text == if *truth { "true" } else { "false" },
        _ => false,
    }
}

fn has_tag(value: &Value, tag: &str) -> bool {
    let holds = |value: &Value| match value {
        Value::Array(list) => list.iter().any(|item| is_text(item, tag)),
        other => is_text(other, tag),
    };
    match value {
        Value::Object(members) => members.iter().any(|(name, value)| {
            (["tags", "tag", "request_tags"].contains(&name.as_str()) && holds(value)) || has_tag(value, tag)
        }),
        Value::Array(list) => list.iter().any(|item| has_tag(item, tag)),
        _ => false,
    }
}

/// Headers are stored as an object, or as a list of pairs where a name comes twice.
fn has_header(headers: &Value, name: &str, text: &str) -> bool {
    match headers {
        Value::Object(members) => {
            members.iter().any(|(n, value)| n.as_str().eq_ignore_ascii_case(name) && is_text(value, text))
        }
        Value::Array(list) => list.iter().any(|item| match item {
            Value::Array(pair) => {
                pair.first().and_then(Value::as_str).is_some_and(|n| n.eq_ignore_ascii_case(name))
                    && pair.get(1).is_some_and(|value| is_text(value, text))
            }
            other => has_header(other, name, text),
        }),
        _ => false,
    }
}

/// Returns the first 8 bytes of a hash.
fn first_bytes(hash: &[u8; 32]) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| hash[i]))
}

/// Returns what a system prompt is known by: the first 8 bytes of the SHA-256 of its text; 0 where there is none.
pub(super) fn system_of(messages: &[Message]) -> u64 {
    let system = messages.iter().take_while(|message| ["system", "developer"].contains(&message.role.as_str()));
    let text = system.map(Message::plain_text).collect::<Vec<_>>().join("\n");
    match text.trim() {
        "" => 0,
        text => first_bytes(&Sha256::digest(text.as_bytes()).into()),
    }
}

impl Workloads {
    /// Makes the matchers ready. What `Match::validate` refuses takes no call.
    pub(super) fn of(views: &[WorkloadView]) -> Self {
        let ready =
            views.iter().take(MOST).filter_map(|view| Some((view.clone(), Test::of(&view.matching, &view.name).ok()?)));
        let (views, tests) = ready.unzip();
        Workloads { views, tests }
    }

    /// Returns true where a matcher reads what is not a column of its own.
    pub(super) fn read_extra(&self) -> bool {
        self.tests.iter().any(Test::reads_extra)
    }

    pub(super) fn read_headers(&self) -> bool {
        self.tests.iter().any(|test| matches!(test, Test::Header { .. }))
    }

    /// Returns which workloads take a row by what stands beside its text, as bits.
    pub(super) fn by_row(&self, row: &Row<'_>) -> u64 {
        let parse = |text: Option<&str>| text.and_then(|text| serde_json::from_str::<Value>(text).ok());
        let (extra, headers) = (parse(row.extra), parse(row.headers));
        let takes = |test: &Test| u64::from(test.takes(row, extra.as_ref(), headers.as_ref()));
        self.tests.iter().enumerate().map(|(bit, test)| takes(test) << bit).sum()
    }

    /// Returns the workload of a prompt, by the bits of its row and its system prompt.
    pub(super) fn find(&self, by_row: u64, system: u64) -> Option<&WorkloadView> {
        self.views.get(self.place(by_row, system)?)
    }

    /// Returns the place of that workload in the config.
    pub(super) fn place(&self, by_row: u64, system: u64) -> Option<usize> {
        let is_taken = |(bit, test): (usize, &Test)| {
            by_row >> bit & 1 == 1 || matches!(test, Test::System(hash) if *hash == system && system != 0)
        };
        self.tests.iter().enumerate().position(is_taken)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &WorkloadView> {
        self.views.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(name: &str, matching: &str) -> WorkloadView {
        #[derive(Deserialize)]
        struct Only {
            #[serde(rename = "match")]
            matching: Match,
        }
        let Only { matching } = toml::from_str(&format!("match = {matching}")).unwrap();
        WorkloadView { name: name.into(), matching, house_rules: String::new(), has_rules: true }
    }

    fn row<'a>(extra: &'a str, headers: &'a str) -> Row<'a> {
        Row { extra: Some(extra), headers: Some(headers), ..Row::default() }
    }

    #[test]
    fn each_matcher_takes_what_it_says_and_the_first_wins() {
        let prompt = [Message::text("system", " You are a lawyer. \n"), Message::text("user", "Hi")];
        let hash = hex::encode(Sha256::digest("You are a lawyer."));
        let workloads = Workloads::of(&[
            view("named", "'name'"),
            view("tagged", "{ tag = 'legal' }"),
            view("routed", "{ field = { at = '/metadata/route/0', equals = '7' } }"),
            view("headed", "{ field = { at = 'header:X-App', equals = 'mail' } }"),
            view("tenant", "{ field = { at = 'tenant', equals = 'acme' } }"),
            view("llama", "{ model = 'llama-3.*' }"),
            view("lawyer", &format!("{{ system_prompt = '{hash}' }}")),
            view("rest", "'default'"),
        ]);
        let find = |row: Row<'_>, system| workloads.find(workloads.by_row(&row), system).unwrap().name.clone();
        assert!(workloads.read_extra() && workloads.read_headers());
        assert_eq!(find(Row { workload: Some("named"), ..row(r#"{"tags":["legal"]}"#, "[]") }, 0), "named");
        assert_eq!(find(row(r#"{"metadata":{"request_tags":["x","legal"]}}"#, "null"), 0), "tagged");
        assert_eq!(find(row(r#"{"metadata":{"route":[7]}}"#, "null"), 0), "routed");
        assert_eq!(find(row("{", r#"[["x-app","mail"]]"#), 0), "headed");
        assert_eq!(find(row("{}", r#"{"x-app":"mail"}"#), 0), "headed");
        assert_eq!(find(Row { tenant: Some("acme"), model: Some("llama-3-8b"), ..row("{}", "{}") }, 0), "tenant");
        assert_eq!(find(Row { model: Some("llama-3-8b"), ..row("{}", "{}") }, 0), "llama");
        assert_eq!(find(row("{}", "{}"), system_of(&prompt)), "lawyer");
        assert_eq!(find(row(r#"{"tags":"law"}"#, "{}"), system_of(&prompt[1..])), "rest");
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_the_remedy() {
        let refusal = |matching: Match| matching.validate().unwrap_err();
        assert!(refusal(Match::Model("(".into())).contains("no regular expression"));
        assert!(refusal(Match::SystemPrompt("ab".into())).contains("64 hex digits"));
        let field = Match::Field { at: "user".into(), equals: "x".into() };
        assert!(refusal(field).contains("JSON pointer"));
        Match::Default.validate().unwrap();
    }
}
