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

/// Returns true where a JSON document holds more values than is allowed.
pub(super) fn is_bomb(json: &[u8]) -> bool {
    json.len() > SMALL && values(json) > MAX_VALUES
}

/// Returns true where a protobuf message holds more fields, with those of all messages in it, than is allowed.
pub(super) fn is_protobuf_bomb(message: &[u8]) -> bool {
    message.len() > SMALL && fields(message, 0).is_some_and(|fields| fields > MAX_VALUES)
}

/// Counts what stands between brackets, colons and commas outside strings.
fn values(json: &[u8]) -> usize {
    let (mut values, mut in_string, mut escaped) = (1, false, false);
    for &byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' | b':' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    values
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
            count += fields(inner, depth + 1).unwrap_or(0);
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
        // Empty spans, and one span of empty attributes.
        for spans in [[0x12, 0].repeat(1_500_000), field(2, &[0x4A, 0].repeat(1_500_000))] {
            assert_eq!(reasons(&field(1, &field(2, &spans))), [Reason::TooManyItems]);
        }
    }

    #[test]
    fn text_is_no_bomb_however_many_commas_it_has() {
        let text = "1,2,3;\\\"{".repeat(2_000_000);
        assert!(!is_bomb(format!("{{\"request\": \"{text}\"}}").as_bytes()));
        assert!(!is_protobuf_bomb(&field(1, &field(2, "The tide, at noon. ".repeat(200_000).as_bytes()))));
    }
}
