//! What the fuzz targets share: how bytes become a record of one format, and how a record is changed.
//!
//! Each target leads to one decoder. Bytes that are a JSON object get the fields that tell the format, where they lack
//! them; all others become a body inside a record of it. So whatever the mutations do, the decoder is reached. What must
//! hold afterwards is `taod::query_log::format::invariants`, which the tests check too.

mod tree;

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::LazyLock;

use serde_json::{Map, Value, json};
use taod::query_log::format::{self, Mapping, OptOut, Rules, invariants};

#[doc(hidden)]
pub use libfuzzer_sys;

/// Makes a program of a target.
#[macro_export]
macro_rules! target {
    ($name:ident) => {
        $crate::libfuzzer_sys::fuzz_target!(|bytes: &[u8]| $crate::Target::$name.run(bytes));
        $crate::libfuzzer_sys::fuzz_mutator!(|bytes: &mut [u8], size: usize, most: usize, seed: u32| {
            $crate::mutate(bytes, size, most, seed)
        });
    };
}

/// Formats of an operator's own, and a sign of theirs that forbids training.
static RULES: LazyLock<Rules> = LazyLock::new(|| {
    let parts = [("messages", "/q/text"), ("system", "/q/rules"), ("params", "/q/how"), ("response", "/a/0")];
    let more = [("time", "/at"), ("user", "/who"), ("do_not_train", "/private"), ("tools", "/q~1t/~0")];
    let parts = parts.into_iter().chain(more).map(|(part, pointer)| (part.to_owned(), pointer.to_owned()));
    let ours = Mapping { name: "ours".into(), when: "/kind".into(), equals: "ask".into(), parts: parts.collect() };
    let body = [("request".to_owned(), "/body".to_owned())].into();
    let whole = Mapping { name: "whole".into(), when: "/body".into(), equals: String::new(), parts: body };
    let opt_out = |field: &str| OptOut { field: field.into(), equals: String::new() };
    Rules { mappings: vec![ours, whole], opt_outs: vec![opt_out("consent"), opt_out("/a/b")], ..Rules::default() }
});

/// One decoder.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    Chat,
    Completions,
    Responses,
    Stream,
    Litellm,
    Databricks,
    OtlpJson,
    OtlpProtobuf,
    Kong,
    Apisix,
    Flywheel,
    Envoy,
    Vllm,
    Feedback,
    Mapping,
    Envelope,
    Read,
}

impl Target {
    /// Reads bytes as a record of the target's format and checks what must hold.
    pub fn run(self, bytes: &[u8]) {
        let rules = if matches!(self, Target::Mapping) { RULES.clone() } else { Rules::default() };
        let record = match self {
            Target::Read | Target::OtlpProtobuf => bytes.to_vec(),
            Target::Envelope => enveloped(bytes, &rules),
            Target::Vllm => line(bytes),
            _ => self.record(bytes).to_string().into_bytes(),
        };
        invariants::check(&record, &rules);
    }

    /// Makes a record of bytes.
    fn record(self, bytes: &[u8]) -> Value {
        let text = || Value::String(String::from_utf8_lossy(bytes).into_owned());
        let body = serde_json::from_slice::<Value>(bytes).unwrap_or_else(|_| text());
        if let (Value::Object(map), Some(signs)) = (&body, self.signs()) {
            let mut map = map.clone();
            for (name, value) in signs {
                map.entry(name).or_insert(value);
            }
            return Value::Object(map);
        }
        let chat = || json!({"messages": [{"role": "user", "content": "Hi"}]});
        match self {
            Target::Chat => json!({"request": body, "response": {"choices": [{"message": {"content": "Ho"}}]}}),
            Target::Completions => json!({"request": {"prompt": body, "max_tokens": 1}, "response": {"choices": []}}),
            Target::Responses => json!({"request": {"input": body, "store": true}, "response": {"output": []}}),
            Target::Stream => json!({"request": chat(), "response": text()}),
            Target::Litellm => json!({"id": "1", "call_type": "aresponses", "messages": body}),
            Target::OtlpJson => json!({"resourceSpans": [{"scopeSpans": [{"spans": [body]}]}]}),
            Target::Kong => json!({"ai": {"proxy": {"payload": {"request": body, "response": text()}}}}),
            Target::Apisix => json!({"llm_request": body, "llm_response_text": {"content": text()}}),
            Target::Envoy => json!({"http_buffered_trace": {"request": {"body": {"as_bytes": body}}}}),
            Target::Feedback => json!({"feedback": body, "request_id": "1"}),
            Target::Mapping => json!({"kind": "ask", "q": {"text": body}, "a": [text()]}),
            _ => json!({"databricks_request_id": "1", "request": body, "response": text()}),
        }
    }

    /// Returns the fields that tell the format of an object; nothing where an object is only a body.
    fn signs(self) -> Option<Map<String, Value>> {
        let chat = json!({"messages": [{"role": "user", "content": "Hi"}]});
        let signs = match self {
            Target::Chat => json!({"request": chat}),
            Target::Completions => json!({"request": {"prompt": "Hi", "max_tokens": 1}}),
            Target::Responses => json!({"request": {"input": "Hi", "store": true}}),
            Target::Litellm => json!({"id": "1", "call_type": "acompletion", "messages": "Hi"}),
            Target::Databricks => json!({"databricks_request_id": "1", "request": chat.to_string()}),
            Target::Kong => json!({"ai": {"proxy": {"payload": {"request": chat}}}}),
            Target::Apisix => json!({"llm_request": chat}),
            Target::Flywheel => json!({"timestamp": 1, "workload_id": "w", "client_id": "c", "request": chat}),
            Target::Envoy => json!({"http_buffered_trace": {"request": {"body": {"as_string": chat.to_string()}}}}),
            Target::Feedback => json!({"kind": "feedback", "request_id": "1"}),
            Target::OtlpJson => json!({"resourceLogs": []}),
            Target::Mapping => json!({"kind": "ask"}),
            _ => return None,
        };
        signs.as_object().cloned()
    }
}

/// Makes a line of vLLM's log of bytes that are none.
fn line(bytes: &[u8]) -> Vec<u8> {
    match bytes.first() {
        Some(b'I' | b'D' | b'(' | b'{') => bytes.to_vec(),
        _ => [b"INFO 07-18 10:00:00 [logger.py:43] Received request 7: prompt: '", bytes].concat(),
    }
}

/// Packs bytes as the first of them says, in one frame or in two, and breaks the result where it says so too. What is not
/// broken must be read as the bytes themselves are.
fn enveloped(bytes: &[u8], rules: &Rules) -> Vec<u8> {
    let Some((&how, bytes)) = bytes.split_first() else { return Vec::new() };
    let (first, second) = bytes.split_at(if how & 4 == 0 { bytes.len() } else { bytes.len() / 2 });
    let mut record = packed(how, first).unwrap_or_default();
    if how & 4 != 0 {
        record.extend(packed(how, second).unwrap_or_default());
    }
    match how >> 3 {
        // Bytes that are packed already would be read as such.
        0..8 if !matches!(bytes, [0 | 0x04 | 0x1F | 0x28, ..]) => {
            let read = |bytes: &[u8]| format::read(bytes, &BTreeMap::new(), rules);
            assert_eq!(read(&record), read(bytes), "packed and plain are not read alike");
        }
        0..8 => {}
        cut @ 8..16 => record.truncate(record.len().saturating_sub(usize::from(cut) - 7)),
        at => {
            let at = (usize::from(at) * 7) % record.len().max(1);
            record.get_mut(at).into_iter().for_each(|byte| *byte ^= how);
        }
    }
    record
}

fn packed(how: u8, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    match how & 3 {
        0 => Ok(bytes.to_vec()),
        1 => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(bytes).and_then(|()| gzip.finish())
        }
        2 => zstd::encode_all(bytes, 1),
        _ => {
            let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
            lz4.write_all(bytes).and_then(|()| lz4.finish().map_err(std::io::Error::other))
        }
    }
}

/// Changes an input: as a tree where it is JSON, as bytes otherwise and in between. Returns its new size.
pub fn mutate(bytes: &mut [u8], size: usize, most: usize, seed: u32) -> usize {
    if seed & 1 == 0
        && let Ok(mut value) = serde_json::from_slice::<Value>(&bytes[..size])
    {
        tree::change(&mut value, seed >> 1);
        let text = value.to_string();
        if text.len() <= most.min(bytes.len()) {
            bytes[..text.len()].copy_from_slice(text.as_bytes());
            return text.len();
        }
    }
    libfuzzer_sys::fuzzer_mutate(bytes, size, most)
}
