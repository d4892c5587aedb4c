//! How many values a document holds, told before it is parsed.
//!
//! A value in memory takes up to forty times the bytes that it has in a document (`0,` in JSON, two bytes of an empty
//! message in protobuf). So a record of some megabytes, or of some hundred kilobytes where it is compressed, could take
//! all memory, and again after each restart. Documents of calls are text for the most part and are far from the limit.

/// Most values in one document.
pub const MAX_VALUES: usize = 1_000_000;

/// Documents up to this size are not looked at: what they take is small.
const SMALL: usize = 1 << 20;

/// Deepest nesting of protobuf messages that is followed.
const MAX_DEPTH: usize = 16;

/// Returns true where a JSON document, or several of them, hold more values than is allowed; with those of the documents
/// that it holds as text.
pub(super) fn is_bomb(json: &[u8]) -> bool {
    json.len() > SMALL && values(json) > MAX_VALUES
}

/// Returns true where a protobuf message holds more fields, with those of all messages in it and the values of the
/// documents that it holds as text, than is allowed.
pub(super) fn is_protobuf_bomb(message: &[u8]) -> bool {
    message.len() > SMALL && fields(message, 0).is_some_and(|fields| fields > MAX_VALUES)
}

/// Where a count stands in a document.
#[derive(Clone, Copy)]
enum Place {
    /// Between values.
    Document,
    /// In a text.
    Text,
    /// In a text that is a document itself, or a stream of some.
    Inner,
    /// In a text of that.
    InnerText,
    /// In a text of that which is a document again.
    Innermost,
}

/// Counts what stands between brackets, colons and commas outside texts.
pub(super) fn values(json: &[u8]) -> usize {
    let (mut values, mut place, mut at) = (1, Place::Document, 0);
    while let Some(&byte) = json.get(at) {
        match byte {
            // One backslash before a quote: a text in a text begins or ends. Three: a quote in that.
            b'\\' => {
                let slashes = json[at..].iter().take_while(|&&byte| byte == b'\\').count();
                let escapes = json.get(at + slashes) == Some(&b'"') && slashes % 2 == 1;
                place = match place {
                    Place::Inner if escapes && slashes == 1 => match is_document(&json[at + 2..]) {
                        true => Place::Innermost,
                        false => Place::InnerText,
                    },
                    Place::InnerText | Place::Innermost if escapes && slashes == 1 => Place::Inner,
                    place => place,
                };
                at += slashes - 1 + usize::from(escapes);
            }
            b'"' => {
                place = match place {
                    Place::Document if is_document(&json[at + 1..]) => Place::Inner,
                    Place::Document => Place::Text,
                    _ => Place::Document,
                }
            }
            b',' | b':' | b'[' | b'{' if !matches!(place, Place::Text | Place::InnerText) => values += 1,
            _ => {}
        }
        at += 1;
    }
    values
}

/// Returns true where a text begins as JSON does, or as a stream of server-sent events; behind white space, which may be
/// escaped.
fn is_document(mut text: &[u8]) -> bool {
    loop {
        text = match text {
            [b' ' | b'\t' | b'\n' | b'\r' | 0x80.., rest @ ..] => rest,
            [b'\\', b'n' | b'r' | b't' | b'f', rest @ ..] | [b'\\', b'u', _, _, _, _, rest @ ..] => rest,
            _ => break,
        };
    }
    [&b"{"[..], b"[", b"data:", b"event:", b"id:", b":"].iter().any(|start| text.starts_with(start))
}

/// Counts fields; `None` where the bytes are no message. A text that could be one is counted as one, which errs on the
/// safe side.
fn fields(mut message: &[u8], depth: usize) -> Option<usize> {
    let mut count = 0;
    while !message.is_empty() {
        let key = varint(&mut message)?;
        count += 1;
        let length = match key & 7 {
            0 => {
                varint(&mut message)?;
                continue;
            }
            1 => 8,
            2 => usize::try_from(varint(&mut message)?).ok()?,
            5 => 4,
            _ => return None,
        };
        let (inner, rest) = message.split_at_checked(length)?;
        if key & 7 == 2 && depth < MAX_DEPTH {
            let document = if is_document(inner) { values(inner) } else { 0 };
            count += fields(inner, depth + 1).unwrap_or(0).max(document);
        }
        message = rest;
    }
    Some(count)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7F) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::json::json;

    use super::super::{Outcome, Reason, Rules, read};
    use super::*;

    fn reasons(payload: &[u8]) -> Vec<Reason> {
        let reason = |outcome| match outcome {
            Outcome::DeadLetter { reason, .. } | Outcome::Skip { reason } => reason,
            Outcome::Row(query) => panic!("{query:?}"),
        };
        read(payload, &BTreeMap::new(), &Rules::default()).into_iter().map(reason).collect()
    }

    /// Wraps bytes as a field of a message.
    fn field(tag: u8, inner: &[u8]) -> Vec<u8> {
        let mut out = vec![tag << 3 | 2];
        let mut length = inner.len();
        while length >= 0x80 {
            out.push(length as u8 | 0x80);
            length >>= 7;
        }
        out.push(length as u8);
        [out, inner.to_vec()].concat()
    }

    #[test]
    fn a_small_record_that_would_take_all_memory_is_one_dead_letter() {
        let zeros = format!("[{}0]", "0,".repeat(20_000_000));
        for document in [zeros.clone(), format!("{{\"request\": {zeros}}}"), format!("{{\"request\": \"{zeros}\"}}")] {
            let packed = zstd::encode_all(document.as_bytes(), 3).unwrap();
            let found = reasons(if packed.len() * 200 > document.len() { &packed } else { document.as_bytes() });
            assert_eq!(found, [Reason::TooManyItems]);
        }
        // Many documents that are small: as lines, as texts, and as attributes.
        let small = format!("[{}0]", "0,".repeat(400_000));
        let text = json!({"request": format!("{{\"messages\": {small}}}")}).to_string();
        let stream = json!({"request": {}, "response": format!("data: {small}\n\n")}).to_string();
        for line in [&small, &text, &stream] {
            assert_eq!(reasons([line.as_str(); 4].join("\n").as_bytes()), [Reason::TooManyItems]);
        }
        assert_eq!(
            reasons(&field(1, &field(2, &field(2, &field(9, small.as_bytes()).repeat(4))))),
            [Reason::TooManyItems]
        );
        // Empty spans, and one span of empty attributes.
        for spans in [[0x12, 0].repeat(1_500_000), field(2, &[0x4A, 0].repeat(1_500_000))] {
            assert_eq!(reasons(&field(1, &field(2, &spans))), [Reason::TooManyItems]);
        }
    }

    #[test]
    fn text_is_no_bomb_however_many_commas_it_has() {
        let text = "1,2,3;\\\"{".repeat(2_000_000);
        for text in
            [json!(text), json!(json!({"messages": text}).to_string()), json!(json!({"\\\"a": text}).to_string())]
        {
            assert!(!is_bomb(json!({"request": text}).to_string().as_bytes()));
        }
        assert!(!is_protobuf_bomb(&field(1, &field(2, "The tide, at noon. ".repeat(200_000).as_bytes()))));
    }
}
