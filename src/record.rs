//! What flows through taod: chat messages, one logged call, and where it came from.
//!
//! These are plain data carriers shared by all stages. A log format parses foreign bytes into a [`Query`]; from there
//! on nothing knows which format a record came in. Text is kept as it was logged; identity is the hash of its
//! canonical JSON (RFC 8785), so that key order and white space of a producer never make two prompts of one.

mod canonical;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use self::canonical::canonical_messages;
use crate::json::{Map, Value};

/// One chat message in OpenAI's shape. Fields that taod does not interpret (tool calls, names, ids) stay in `rest`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, ...
    pub role: String,
    /// A string, a list of content parts, or null (an assistant turn that only calls tools).
    #[serde(default)]
    pub content: Value,
    /// Everything else the message carried, unchanged.
    #[serde(flatten)]
    pub rest: Map,
}

impl Message {
    /// Returns a message with plain text content.
    pub fn text(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: Value::String(content.into()), rest: Map::new() }
    }

    /// Returns the text of the message: the string itself, or its text parts joined by line breaks.
    pub fn plain_text(&self) -> String {
        match &self.content {
            Value::String(text) => text.clone(),
            Value::Array(parts) => {
                let texts: Vec<&str> = parts.iter().filter_map(|part| part.get("text")?.as_str()).collect();
                texts.join("\n")
            }
            _ => String::new(),
        }
    }
}

/// Returns the text of the last user turn, or an empty string.
pub fn last_user_text(messages: &[Message]) -> String {
    messages.iter().rev().find(|m| m.role == "user").map(Message::plain_text).unwrap_or_default()
}

/// Returns the identity of a prompt: SHA-256, in lower-case hex, of the RFC 8785 JSON of its messages and tools.
pub fn prompt_hash(messages: &[Message], tools: Option<&Value>) -> String {
    prompt_hash_of(&canonical_messages(messages), tools)
}

/// Returns the identity of a prompt whose messages are in canonical form already.
pub fn prompt_hash_of(canonical_messages: &str, tools: Option<&Value>) -> String {
    let mut hasher = Sha256::new();
    hasher.update(r#"{"messages":"#);
    hasher.update(canonical_messages);
    hasher.update(r#","tools":"#);
    hasher.update(canonical::canonical(tools.unwrap_or(&Value::Null)));
    hasher.update("}");
    hex_of(hasher.finalize().into())
}

/// Returns a hash as text, in lower-case hex.
pub fn hex_of(hash: [u8; 32]) -> String {
    let mut text = [0; 64];
    for (byte, pair) in hash.iter().zip(text.chunks_exact_mut(2)) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
    String::from_utf8_lossy(&text).into_owned()
}

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// Where a row came from; unique for every row taod ever stores.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Coordinates {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    /// A Kafka record may hold several calls (an array, or JSON lines); this counts them from 0.
    pub record_index: i32,
}

/// What a row of the log is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    #[default]
    Call,
    Feedback,
}

impl Kind {
    /// Returns the name stored in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Call => "call",
            Kind::Feedback => "feedback",
        }
    }
}

/// One logged call in canonical form: what a log format makes of a record, before Kafka's own columns are added.
///
/// The columns of the `queries` table are these fields and the coordinates (ARCHITECTURE.md, "Tables").
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Query {
    pub kind: Kind,
    /// Microseconds since the epoch; `None` where the record says nothing (then Kafka's time stands in).
    pub event_time_us: Option<i64>,
    pub request_id: Option<String>,
    pub trace_id: Option<String>,
    pub conversation_id: Option<String>,
    pub workload: Option<String>,
    pub tenant: Option<String>,
    pub model: Option<String>,
    /// The adapter version that answered, where the endpoint logged it.
    pub served_version: Option<String>,
    /// The end user as logged. Never stored: ingestion keeps only its keyed hash.
    #[serde(skip)]
    pub user: Option<String>,
    /// HTTP status of the call; 200 where a format only says that it succeeded.
    pub status: i32,
    pub duration_ms: Option<f64>,
    pub messages: Vec<Message>,
    /// Decoding parameters of the request.
    pub params: Map,
    pub tools: Option<Value>,
    /// The assistant's message of the first choice, as text.
    pub response: Option<String>,
    pub finish_reason: Option<String>,
    pub prompt_tokens: Option<i64>,
    pub completion_tokens: Option<i64>,
    pub feedback: Option<Value>,
    /// Name of the log format that read the record.
    pub format: &'static str,
    /// True where the text was masked by the logger, so that it must never train.
    pub redacted: bool,
    /// False where this row must not train; `reason` says why.
    pub train_ok: bool,
    pub reason: Option<String>,
    /// How many calls this row stands for (the inverse of the sampling fraction).
    pub sample_weight: f64,
    /// True where the logger cut the text.
    pub truncated: bool,
    /// Fields that no column takes; nothing is lost.
    pub extra: Map,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model closed its turn, and the closing token is the last of the ids; or a stop string was met.
    Stop,
    /// The limit on new tokens or the context was reached: no closing token.
    Length,
}

impl FinishReason {
    /// Returns OpenAI's name for it.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// What candidates were drawn for. Purposes never mix: a gate candidate cannot reach training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    Train,
    Gate,
    Audit,
}

impl Purpose {
    /// Returns the name stored in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Purpose::Train => "train",
            Purpose::Gate => "gate",
            Purpose::Audit => "audit",
        }
    }
}

/// Returns the seed of one draw, derived from everything that names it and from nothing else (no clock, no counter).
///
/// `parts` are hashed with their lengths, so that ("ab", "c") and ("a", "bc") differ.
pub fn derive_seed(root: u64, parts: &[&str]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&root.to_le_bytes());
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let mut bytes = [0u8; 8];
    bytes.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_of_a_prompt_ignores_key_order_but_not_text() {
        let a: Vec<Message> = serde_json::from_str(r#"[{"role":"user","content":"hi","name":"x"}]"#).unwrap();
        let b: Vec<Message> = serde_json::from_str(r#"[{"name":"x","content":"hi","role":"user"}]"#).unwrap();
        assert_eq!(prompt_hash(&a, None), prompt_hash(&b, None));
        assert_ne!(prompt_hash(&a, None), prompt_hash(&[Message::text("user", "hi!")], None));
        assert_ne!(prompt_hash(&a, None), prompt_hash(&a, Some(&crate::json::json!([{"type": "function"}]))));
    }

    #[test]
    fn seeds_depend_on_every_part_and_on_where_they_are_cut() {
        let seed = derive_seed(7, &["ab", "c"]);
        assert_eq!(seed, derive_seed(7, &["ab", "c"]));
        assert_ne!(seed, derive_seed(8, &["ab", "c"]));
        assert_ne!(seed, derive_seed(7, &["a", "bc"]));
    }

    #[test]
    fn a_hash_is_written_as_everyone_writes_it() {
        let hash = std::array::from_fn(|at| (at as u8).wrapping_mul(37));
        assert_eq!(hex_of(hash), hex::encode(hash));
    }

    #[test]
    fn text_parts_are_joined() {
        let message: Message = serde_json::from_str(
            r#"{"role":"user","content":[{"type":"text","text":"a"},{"type":"image_url"},{"type":"text","text":"b"}]}"#,
        )
        .unwrap();
        assert_eq!(message.plain_text(), "a\nb");
    }
}
