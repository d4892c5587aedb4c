//! vLLM's own log: lines of text, or the same lines inside JSON, where its logger is told to write JSON.
//!
//! Its access log holds no bodies. With `--enable-log-requests` a line holds the prompt as the model saw it, the chat
//! template applied: a row that is kept and does not train. The answer (`--enable-log-outputs`) is a line of its own, so
//! it reaches the topic as another record and cannot be a row.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use regex::Regex;

use crate::json::{Map, Value};
use crate::record::{Kind, Message, Query};

use super::exclusion::{self, Exclusion};
use super::fields::{Fields, Headers};
use super::{Outcome, Reason, Refusal, feedback};

/// How a line of its log begins, after the name of the process that newer versions put in front.
static PREFIX: LazyLock<Regex> = LazyLock::new(|| {
    let pattern =
        r"^(?:\([\w -]+ pid=\d+\) )?(?:DEBUG|INFO|WARNING|ERROR)(?: \d\d-\d\d \d\d:\d\d:\d\d \[|:\s+\S+ - .[A-Z]+ /)";
    Regex::new(pattern).expect("a constant pattern")
});

/// A line with a prompt: the id, and what follows the prompt's label.
static PROMPT: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?s)(?:Received request|Request) (\S+?)(?: details)?: prompt: (.+)").expect("a constant pattern")
});

/// A line with an answer. Pieces of a stream come again as a whole.
static ANSWER: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"Generated response \S+( \(streaming delta\))?").expect("a constant pattern"));

/// A number or a truth among the sampling parameters.
static PARAMETER: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"\b(n|temperature|top_p|top_k|min_p|seed|max_tokens)=(-?[0-9.]+)[,)]").expect("a constant pattern")
});

/// Fields in which loggers of JSON put the line.
const LINES: [&str; 3] = ["message", "msg", "event"];

/// Reads a payload that is plain lines of the log, one outcome each; `None` where it is something else.
pub(super) fn read_lines(payload: &[u8], headers: &BTreeMap<String, String>) -> Option<Vec<Outcome>> {
    if !matches!(payload.first(), Some(b'(' | b'D' | b'I' | b'W' | b'E')) {
        return None;
    }
    let text = std::str::from_utf8(payload).ok()?;
    if !PREFIX.is_match(text) {
        return None;
    }
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    let read = |line| match prompt_of(line, Fields::default(), headers) {
        Ok(query) => Outcome::Row(Box::new(query)),
        Err(refusal) => refusal.into(),
    };
    Some(lines.map(read).collect())
}

/// Returns true where a JSON record holds a line with a prompt or an answer.
pub(super) fn is_vllm(fields: &Fields) -> bool {
    line(fields).is_some_and(|(_, line)| PROMPT.is_match(line) || ANSWER.is_match(line))
}

/// Reads a line inside JSON.
pub(super) fn read(mut fields: Fields, headers: &BTreeMap<String, String>) -> Result<Query, Refusal> {
    let Some((name, text)) = line(&fields) else { return Err(Refusal::skip(Reason::NoContent)) };
    let text = text.to_owned();
    fields.take(name);
    prompt_of(&text, fields, headers)
}

fn line(fields: &Fields) -> Option<(&'static str, &str)> {
    LINES.into_iter().find_map(|name| Some((name, fields.get(name)?.as_str()?)))
}

/// Reads one line; `fields` is what stood beside it.
fn prompt_of(line: &str, mut fields: Fields, headers: &BTreeMap<String, String>) -> Result<Query, Refusal> {
    let found = PROMPT.captures(line);
    let Some((id, said)) = found.as_ref().and_then(|found| Some((found.get(1)?, found.get(2)?))) else {
        return Err(without_prompt(line));
    };
    let Some((prompt, rest)) = literal(said.as_str()) else {
        return Err(match said.as_str().starts_with("None") {
            true => Refusal::skip(Reason::NoContent),
            false => Refusal::dead(Reason::BadRequest, "the prompt of the line breaks off: raise --max-log-len"),
        });
    };
    let mut query = feedback::blank(Kind::Call, "vllm");
    query.request_id = Some(id.as_str().to_owned());
    query.event_time_us = fields.time(&["timestamp", "time", "asctime", "@timestamp"]);
    query.messages = vec![Message::text("user", prompt)];
    query.params = parameters(rest);
    query.extra = fields.rest();
    // What the line says before its prompt and after it.
    let before = found.as_ref().and_then(|found| found.get(0)).map_or("", |said| &line[..said.start()]);
    for (name, text) in [("logger", before), ("line", rest.trim_start_matches([',', ' ']))] {
        if !text.is_empty() {
            query.extra.insert(name.to_owned(), text.trim_end().into());
        }
    }
    exclusion::mark(&mut query, &Headers::new(headers, None), vec![Exclusion::RawPrompt]);
    Ok(query)
}

fn without_prompt(line: &str) -> Refusal {
    match ANSWER.captures(line) {
        Some(answer) if answer.get(1).is_none() => {
            let message = "the line holds an answer and no prompt, which vLLM logs apart: log whole calls at a gateway, or \
                           as OpenTelemetry";
            Refusal::dead(Reason::MissingMessages, message)
        }
        _ => Refusal::skip(Reason::NoContent),
    }
}

fn parameters(text: &str) -> Map {
    let number = |text: &str| serde_json::from_str::<Value>(text).ok();
    let found = PARAMETER.captures_iter(text).filter_map(|found| Some((found[1].to_owned(), number(&found[2])?)));
    found.collect()
}

/// Reads the string literal of Python that a text begins with, and returns what follows it.
fn literal(text: &str) -> Option<(String, &str)> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    let mut out = String::new();
    let mut chars = text[1..].char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            _ if c == quote => return Some((out, &text[1 + at + 1..])),
            '\\' => {
                let (_, escape) = chars.next()?;
                let mut code = |digits: usize| {
                    let digits: String = chars.by_ref().take(digits).map(|(_, digit)| digit).collect();
                    // Half of a surrogate pair is no character; Python keeps it, JSON cannot.
                    let code = u32::from_str_radix(&digits, 16).ok()?;
                    Some(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER))
                };
                out.push(match escape {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    'x' => code(2)?,
                    'u' => code(4)?,
                    'U' => code(8)?,
                    other => other,
                });
            }
            other => out.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::json;
    use crate::query_log::format::{Rules, read};

    const TAIL: &str = "params: SamplingParams(n=1, presence_penalty=0.0, temperature=0.7, top_p=0.95, seed=None, stop=[], \
                        max_tokens=128, min_tokens=0), prompt_token_ids: None, lora_request: None.";

    fn one(record: &str) -> Outcome {
        let mut outcomes = read(record.as_bytes(), &BTreeMap::new(), &Rules::default());
        assert_eq!(outcomes.len(), 1, "{outcomes:?}");
        outcomes.remove(0)
    }

    #[test]
    fn a_logged_prompt_is_a_row_that_does_not_train() {
        let line = format!(
            r"INFO 07-18 10:00:00 [logger.py:43] Received request chatcmpl-7: prompt: '<|user|>\nWho\'s \u00e9lan?\\ \x41', {TAIL}"
        );
        let inner = line.split_once("] ").unwrap().1;
        let wrapped = json!({"level": "INFO", "message": inner, "timestamp": "2026-03-01T12:00:00Z"});
        let details = format!(
            "(APIServer pid=7) DEBUG 07-18 10:00:00 [l.py:1] {}",
            inner.replace("Received request", "Request").replace("chatcmpl-7:", "chatcmpl-7 details:")
        );
        for record in [line.clone(), wrapped.to_string(), details] {
            let Outcome::Row(query) = one(&record) else { panic!("{record}") };
            assert_eq!(query.messages, [Message::text("user", "<|user|>\nWho's élan?\\ A")]);
            assert_eq!((query.format, query.request_id.as_deref()), ("vllm", Some("chatcmpl-7")));
            assert_eq!((query.train_ok, query.reason.as_deref()), (false, Some("raw_prompt")));
            let params = json!({"n": 1, "temperature": 0.7, "top_p": 0.95, "max_tokens": 128});
            assert_eq!(Value::Object(query.params), params);
            assert!(query.extra["line"].as_str().unwrap().contains("presence_penalty=0.0"), "nothing is lost");
            assert_eq!(query.extra.contains_key("logger"), !record.starts_with('{'), "{record}");
        }
    }

    #[test]
    fn answers_are_kept_apart_and_other_lines_are_counted() {
        let answer =
            "INFO 07-18 10:00:01 [logger.py:71] Generated response chatcmpl-7: output: 'Yes', finish_reason: stop";
        assert!(matches!(one(answer), Outcome::DeadLetter { reason: Reason::MissingMessages, .. }));
        for line in [
            "INFO:     127.0.0.1:51844 - \"POST /v1/chat/completions HTTP/1.1\" 200 OK",
            "INFO 07-18 10:00:00 [logger.py:43] Received request chatcmpl-7: params: SamplingParams(n=1).",
            "INFO 07-18 10:00:00 [logger.py:43] Received request chatcmpl-7: prompt: None, params: None.",
            "INFO 07-18 10:00:01 [logger.py:71] Generated response chatcmpl-7 (streaming delta): output: 'Y'",
        ] {
            assert_eq!(one(line), Outcome::Skip { reason: Reason::NoContent }, "{line}");
        }
        let cut = "INFO 07-18 10:00:00 [logger.py:43] Received request chatcmpl-7: prompt: 'so lo";
        assert!(matches!(one(cut), Outcome::DeadLetter { reason: Reason::BadRequest, .. }));
        assert!(matches!(one("INFO is not a log line"), Outcome::DeadLetter { reason: Reason::NotJson, .. }));
        assert!(matches!(one(r#"{"message": "Hi"}"#), Outcome::DeadLetter { reason: Reason::UnknownFormat, .. }));
    }
}
