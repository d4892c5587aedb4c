//! From records of the log to rows of the tables. Pure but for the clock's date.

use std::collections::{BTreeMap, HashMap, HashSet};

use arrow::array::RecordBatch;
use hmac::{Hmac, KeyInit, Mac};
use serde::{Serialize, Serializer};
use sha2::Sha256;

use super::filter::Choice;
use crate::json::{Value, json};
use crate::query_log::format::{self, Outcome, Rules};
use crate::query_log::{Record, TopicPartition};
use crate::record::{Message, Query, canonical_messages, hex_of, last_user_text, prompt_hash_of};
use crate::table::{Columns, Key, Suppressions, TableError, schema};

/// Characters of a prompt that are enough to tell its language.
const LANGUAGE_CHARS: usize = 256;

/// Under which reason what was erased is counted when it is read again.
const ERASED: &str = "erased";
/// Under which reason calls are counted that [`super::Filter`] leaves to other endpoints.
const OTHER_ENDPOINT: &str = "other_endpoint";

/// Dead letters that already stand in the table: offset and record index, by partition.
pub(super) type Known = HashMap<TopicPartition, HashSet<(i64, i32)>>;

/// Turns records into rows. Holds what all rows of a run share.
pub(super) struct Reader {
    /// Keys the hash under which end users are stored; without one no user is.
    pub(super) user_key: Option<Vec<u8>>,
    pub(super) config_hash: String,
    /// True where the language of each prompt is told: slower than all the rest of reading a row.
    pub(super) detect_language: bool,
    /// The user's own log formats and signs, and how much of a record is kept.
    pub(super) rules: Rules,
    /// The calls that belong to this endpoint.
    pub(super) choice: Choice,
}

/// What became of some records.
pub(super) struct Parsed {
    pub(super) batch: RecordBatch,
    pub(super) letters: Vec<Letter>,
    pub(super) skipped: BTreeMap<&'static str, u64>,
    pub(super) bytes: u64,
}

/// One row of `dead_letters`; binary columns in hex.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Letter {
    topic: String,
    partition: i32,
    pub(super) offset: i64,
    pub(super) record_index: i32,
    key: Option<String>,
    headers: Option<String>,
    kafka_time: Option<i64>,
    ingest_date: String,
    pub(super) payload: String,
    pub(super) reason: &'static str,
    message: String,
    taod_version: &'static str,
    config_hash: String,
}

impl Letter {
    /// Returns the partition that the record came from.
    pub(super) fn place(&self) -> TopicPartition {
        TopicPartition::new(&self.topic, self.partition)
    }
}

/// One row of `queries`; JSON columns as text.
#[derive(Debug, Serialize)]
struct Row<'a> {
    topic: &'a str,
    partition: i32,
    offset: i64,
    record_index: i32,
    key: Option<Raw<'a>>,
    headers: Option<String>,
    kafka_time: Option<i64>,
    event_time: i64,
    ingest_date: &'a str,
    kind: &'static str,
    request_id: Option<String>,
    trace_id: Option<String>,
    conversation_id: Option<String>,
    workload: Option<String>,
    tenant: Option<String>,
    model: Option<String>,
    served_version: Option<String>,
    user_hash: Option<String>,
    status: i32,
    duration_ms: Option<f64>,
    messages: String,
    params: String,
    tools: Option<String>,
    response: Option<String>,
    finish_reason: Option<String>,
    prompt_tokens: Option<i64>,
    completion_tokens: Option<i64>,
    feedback: Option<String>,
    prompt_hash: String,
    language: Option<&'static str>,
    format: &'static str,
    redacted: bool,
    train_ok: bool,
    reason: Option<String>,
    sample_weight: f64,
    truncated: bool,
    taod_version: &'static str,
    config_hash: &'a str,
    extra: String,
}

/// Bytes as they are.
#[derive(Debug)]
struct Raw<'a>(&'a [u8]);

impl Serialize for Raw<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

/// The bytes of a record that its dead letters may keep. One record may hold thousands of items that cannot be read, and
/// each letter holds the whole record, so that it can be replayed: the bound is on all of them together.
struct Kept<'a> {
    payload: &'a [u8],
    left: usize,
    /// The item whose letter has the record's bytes.
    first: Option<i32>,
}

impl<'a> Kept<'a> {
    /// Returns the bytes for the letter of an item, and its message with what was left out.
    fn take(&mut self, index: i32, message: String) -> (&'a [u8], String) {
        let all = self.payload.len();
        let part = match self.first {
            _ if all <= self.left => self.payload,
            None => &self.payload[..self.left],
            Some(first) => {
                return (&[], format!("{message} (the record's {all} bytes stand with record_index {first})"));
            }
        };
        self.left -= part.len();
        self.first.get_or_insert(index);
        if part.len() < all {
            return (part, format!("{message} (of the record's {all} bytes the first {} are kept)", part.len()));
        }
        (part, message)
    }
}

impl Reader {
    /// Reads records. Whatever already stands in `dead_letters` is neither stored nor put there again, and what was erased
    /// is skipped.
    pub(super) fn read(&self, records: &[Record], known: &Known, erased: &Suppressions) -> Result<Parsed, TableError> {
        let now = chrono::Utc::now();
        let today = now.format("%Y-%m-%d").to_string();
        let (mut rows, mut letters, mut skipped) = (Columns::new(&schema::QUERIES), Vec::new(), BTreeMap::new());
        for record in records {
            // A tombstone is an empty record: the formats say what that is.
            let payload = record.payload.as_deref().unwrap_or_default();
            let place = &record.place;
            let dead = known.get(&record.place);
            let mut kept = Kept { payload, left: self.rules.max_text_bytes, first: None };
            for (index, outcome) in (0i32..).zip(format::read(payload, &text_headers(record), &self.rules)) {
                if dead.is_some_and(|dead| dead.contains(&(record.offset, index))) {
                    continue;
                }
                let is_erased = !erased.is_empty()
                    && (erased.hides(&Key::record(&place.topic, place.partition, record.offset, index))
                        || matches!(&outcome, Outcome::Row(query) if self.is_erased(query, erased)));
                if is_erased {
                    *skipped.entry(ERASED).or_default() += 1;
                    continue;
                }
                match outcome {
                    Outcome::Row(query) if !self.takes(&query) => {
                        *skipped.entry(OTHER_ENDPOINT).or_default() += 1;
                    }
                    Outcome::Row(query) => {
                        rows.push(&self.row(record, index, *query, &today, now.timestamp_micros()))?
                    }
                    Outcome::DeadLetter { reason, message } => {
                        let (payload, message) = kept.take(index, message);
                        letters.push(self.letter(record, index, payload, reason.as_str(), message, &today));
                    }
                    Outcome::Skip { reason } => *skipped.entry(reason.as_str()).or_default() += 1,
                }
            }
        }
        let bytes = records.iter().map(|r| r.size() as u64).sum();
        Ok(Parsed { batch: rows.finish()?, letters, skipped, bytes })
    }

    fn row<'a>(&'a self, record: &'a Record, index: i32, query: Query, today: &'a str, now_us: i64) -> Row<'a> {
        let messages = canonical_messages(&query.messages);
        let kafka_time = record.time_ms.map(|ms| ms.saturating_mul(1000));
        Row {
            topic: &record.place.topic,
            partition: record.place.partition,
            offset: record.offset,
            record_index: index,
            key: record.key.as_deref().map(Raw),
            headers: headers_json(record),
            kafka_time,
            event_time: query.event_time_us.or(kafka_time).unwrap_or(now_us),
            ingest_date: today,
            kind: query.kind.as_str(),
            request_id: query.request_id,
            trace_id: query.trace_id,
            conversation_id: query.conversation_id,
            workload: query.workload,
            tenant: query.tenant,
            model: query.model,
            served_version: query.served_version,
            user_hash: query.user.as_deref().and_then(|user| self.user_hash(user)),
            status: query.status,
            duration_ms: query.duration_ms.filter(|ms| ms.is_finite()),
            prompt_hash: prompt_hash_of(&messages, query.tools.as_ref()),
            language: self.detect_language.then(|| language(&query.messages)).flatten(),
            messages,
            params: json_text(&query.params),
            tools: query.tools.as_ref().map(json_text),
            response: query.response,
            finish_reason: query.finish_reason,
            prompt_tokens: query.prompt_tokens,
            completion_tokens: query.completion_tokens,
            feedback: query.feedback.as_ref().map(json_text),
            format: query.format,
            redacted: query.redacted,
            train_ok: query.train_ok,
            reason: query.reason,
            sample_weight: if query.sample_weight.is_finite() { query.sample_weight } else { 1.0 },
            truncated: query.truncated,
            taod_version: env!("CARGO_PKG_VERSION"),
            config_hash: &self.config_hash,
            extra: json_text(&query.extra),
        }
    }

    fn letter(
        &self,
        record: &Record,
        index: i32,
        payload: &[u8],
        reason: &'static str,
        message: String,
        today: &str,
    ) -> Letter {
        Letter {
            topic: record.place.topic.to_string(),
            partition: record.place.partition,
            offset: record.offset,
            record_index: index,
            key: record.key.as_ref().map(hex::encode),
            headers: headers_json(record),
            kafka_time: record.time_ms.map(|ms| ms.saturating_mul(1000)),
            ingest_date: today.to_owned(),
            payload: hex::encode(payload),
            reason,
            message,
            taod_version: env!("CARGO_PKG_VERSION"),
            config_hash: self.config_hash.clone(),
        }
    }

    fn takes(&self, query: &Query) -> bool {
        self.choice.takes(query.kind, query.model.as_deref(), query.workload.as_deref())
    }

    fn is_erased(&self, query: &Query, erased: &Suppressions) -> bool {
        let user = query.user.as_deref().and_then(|user| self.user_hash(user));
        erased.hides_call(user.as_deref(), query.request_id.as_deref())
    }

    /// Returns the keyed hash under which an end user is stored.
    fn user_hash(&self, user: &str) -> Option<String> {
        keyed_hash(self.user_key.as_ref()?, user)
    }
}

/// Returns HMAC-SHA-256 of a text in lower-case hex: what stands for an end user in the tables.
pub fn keyed_hash(key: &[u8], text: &str) -> Option<String> {
    // HMAC takes a key of any length.
    let mut mac = Hmac::<Sha256>::new_from_slice(key).ok()?;
    mac.update(text.as_bytes());
    Some(hex_of(mac.finalize().into_bytes().into()))
}

/// Returns the headers as formats see them: the last value of each name, as text.
fn text_headers(record: &Record) -> BTreeMap<String, String> {
    let text = |value: &Option<Vec<u8>>| String::from_utf8_lossy(value.as_deref().unwrap_or_default()).into_owned();
    record.headers.iter().map(|(name, value)| (name.clone(), text(value))).collect()
}

/// Returns the headers as they are stored, in order and lossless: `[name, text or null or {"hex": ...}]` each.
fn headers_json(record: &Record) -> Option<String> {
    let value = |bytes: &Option<Vec<u8>>| match bytes {
        None => Value::Null,
        Some(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => json!(text),
            Err(_) => json!({ "hex": hex::encode(bytes) }),
        },
    };
    let pairs: Vec<Value> = record.headers.iter().map(|(name, bytes)| json!([name, value(bytes)])).collect();
    (!pairs.is_empty()).then(|| Value::Array(pairs).to_string())
}

/// Returns JSON as text. Writing into memory cannot fail, nor can keys of an object that are texts.
fn json_text<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// Returns the language of the last user turn as an ISO 639-3 code, where it can be told.
fn language(messages: &[Message]) -> Option<&'static str> {
    let text = last_user_text(messages);
    let end = text.char_indices().nth(LANGUAGE_CHARS).map_or(text.len(), |(end, _)| end);
    whatlang::detect(&text[..end]).filter(whatlang::Info::is_reliable).map(|info| info.lang().code())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::derive_seed;

    fn record(offset: i64, payload: Option<&[u8]>) -> Record {
        Record {
            place: TopicPartition::new("t", 1),
            offset,
            time_ms: Some(1_700_000_000_123),
            key: Some(vec![0xff, 0x00]),
            headers: vec![("a".into(), Some(b"x".to_vec())), ("b".into(), Some(vec![0xff]))],
            payload: payload.map(<[u8]>::to_vec),
        }
    }

    fn reader(user_key: Option<&[u8]>) -> Reader {
        Reader {
            user_key: user_key.map(<[u8]>::to_vec),
            config_hash: "c".into(),
            detect_language: true,
            rules: Rules::default(),
            choice: Choice::default(),
        }
    }

    #[test]
    fn a_user_is_only_ever_a_keyed_hash() {
        let hash = reader(Some(b"0123456789abcdef")).user_hash("alice").unwrap();
        assert_eq!(hash, reader(Some(b"0123456789abcdef")).user_hash("alice").unwrap());
        assert_ne!(hash, reader(Some(b"another key here")).user_hash("alice").unwrap());
        assert_eq!(hash.len(), 64);
        assert_eq!(reader(None).user_hash("alice"), None);
    }

    #[test]
    fn what_cannot_be_read_keeps_its_bytes_and_what_is_known_dead_stays_out() {
        let records = [record(5, Some(b"not json")), record(6, None)];
        let parsed = reader(None).read(&records, &Known::new(), &Suppressions::default()).unwrap();
        assert_eq!((parsed.batch.num_rows(), parsed.letters.len()), (0, 1));
        assert_eq!(parsed.letters[0].payload, hex::encode(b"not json"));
        assert_eq!(parsed.letters[0].headers.as_deref(), Some(r#"[["a","x"],["b",{"hex":"ff"}]]"#));
        assert_eq!(parsed.skipped, BTreeMap::from([("empty", 1)]));
        let known = Known::from([(TopicPartition::new("t", 1), HashSet::from([(5, 0)]))]);
        assert!(reader(None).read(&records, &known, &Suppressions::default()).unwrap().letters.is_empty());
    }

    #[test]
    fn whatever_the_bytes_each_outcome_is_a_row_a_letter_or_a_counted_skip() {
        let texts = [
            include_str!("../../tests/fixtures/logs/mixed.ndjson"),
            include_str!("../../tests/fixtures/logs/litellm_success.json"),
            include_str!("../../tests/fixtures/logs/otlp_spans.json"),
            include_str!("../../tests/fixtures/logs/openai_stream.json"),
        ];
        let reader = reader(Some(b"0123456789abcdef"));
        let (mut rows, mut letters, mut skips) = (0, 0, 0);
        for round in 0..2000u64 {
            let draw = |what: &str, below: usize| derive_seed(round, &[what]) as usize % below.max(1);
            let mut bytes = texts[draw("text", texts.len())].as_bytes().to_vec();
            match draw("how", 4) {
                0 => bytes.truncate(draw("end", 64)),
                1 => bytes.truncate(draw("end", bytes.len())),
                2 => bytes.rotate_left(draw("at", 16)),
                _ => (0..3).for_each(|n| {
                    let at = draw(&format!("at {n}"), bytes.len());
                    bytes[at] = draw(&format!("byte {n}"), 256) as u8;
                }),
            }
            let outcomes = format::read(&bytes, &BTreeMap::new(), &reader.rules).len();
            let parsed = reader.read(&[record(5, Some(&bytes))], &Known::new(), &Suppressions::default()).unwrap();
            let skipped = parsed.skipped.values().sum::<u64>() as usize;
            let stored = parsed.batch.num_rows() + parsed.letters.len() + skipped;
            assert!(stored > 0 && stored == outcomes, "{stored} of {outcomes}: {}", String::from_utf8_lossy(&bytes));
            (rows, letters, skips) = (rows + parsed.batch.num_rows(), letters + parsed.letters.len(), skips + skipped);
        }
        assert!(rows > 100 && letters > 100 && skips > 10, "{rows} rows, {letters} letters, {skips} skips");
    }

    #[test]
    fn of_a_large_record_as_much_is_kept_as_the_bound_allows() {
        let small = Reader { rules: Rules { max_text_bytes: 4096, ..Rules::default() }, ..reader(None) };
        let letters = |payload: &[u8]| {
            small.read(&[record(5, Some(payload))], &Known::new(), &Suppressions::default()).unwrap().letters
        };
        let large = letters(&vec![b'x'; 5000]);
        assert_eq!((large.len(), large[0].payload.len()), (1, 2 * 4096));
        assert!(
            large[0].message.ends_with("(of the record's 5000 bytes the first 4096 are kept)"),
            "{}",
            large[0].message
        );
        // Many bad items: the bytes once for each while there is room, then a word on where they are.
        let many = letters(format!("[{}]", vec!["{\"a\":1}"; 100].join(",")).as_bytes());
        let sizes: Vec<usize> = many.iter().map(|letter| letter.payload.len() / 2).collect();
        assert_eq!((many.len(), sizes.iter().sum::<usize>()), (100, 5 * 801));
        assert_eq!((sizes[4], sizes[5]), (801, 0));
        assert!(
            many[99].message.ends_with("(the record's 801 bytes stand with record_index 0)"),
            "{}",
            many[99].message
        );
    }

    #[test]
    fn an_oversize_call_is_a_row_that_says_its_size() {
        let small = Reader { rules: Rules { max_text_bytes: 4096, ..Rules::default() }, ..reader(None) };
        let messages = json!([{"role": "user", "content": "x".repeat(10_000_000)}]);
        let call = json!({"request": {"messages": messages}, "response": "Yes."}).to_string();
        let parsed = small.read(&[record(5, Some(call.as_bytes()))], &Known::new(), &Suppressions::default()).unwrap();
        let column = |name: &str| parsed.batch.column_by_name(name).unwrap();
        use arrow::array::AsArray;
        assert_eq!(
            column("messages").as_string::<i32>().value(0).len(),
            4092 + r#"[{"content":"","role":"user"}]"#.len()
        );
        assert_eq!(column("extra").as_string::<i32>().value(0), r#"{"full_bytes":10000008}"#);
        assert_eq!(column("reason").as_string::<i32>().value(0), "truncated");
        assert!(column("truncated").as_boolean().value(0) && !column("train_ok").as_boolean().value(0));
    }
}
