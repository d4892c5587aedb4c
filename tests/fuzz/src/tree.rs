//! Changes of a JSON document that leave it JSON: so mutations reach what lies behind the parser.

use serde_json::{Map, Value, json};

/// Numbers that depend on a seed alone.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n.max(1)
    }
}

/// Changes one or a few places.
pub(crate) fn change(value: &mut Value, seed: u32) {
    let mut dice = Dice(u64::from(seed) << 17 | 1);
    for _ in 0..=dice.below(3) {
        let nodes = count(value);
        let other = nth(value, &mut dice.below(nodes)).cloned();
        let mut at = dice.below(nodes);
        if let Some(place) = nth_mut(value, &mut at) {
            edit(place, other.unwrap_or_default(), &mut dice);
        }
    }
}

fn edit(place: &mut Value, other: Value, dice: &mut Dice) {
    match dice.below(7) {
        // What lies elsewhere in the document.
        0 => *place = other,
        1 => *place = odd(dice),
        // A document as text, and text as a document.
        2 => *place = Value::String(place.to_string()),
        3 => {
            let inner = place.as_str().and_then(|text| serde_json::from_str(text).ok());
            *place = inner.unwrap_or_else(|| json!([place.take()]));
        }
        _ => match place {
            Value::Object(map) => edit_object(map, other, dice),
            Value::Array(items) if !items.is_empty() => {
                let (at, to) = (dice.below(items.len()), dice.below(items.len()));
                match dice.below(3) {
                    0 => drop(items.remove(at)),
                    1 => items.swap(at, to),
                    _ => items.insert(at, other),
                }
            }
            Value::Array(items) => items.push(other),
            other => *other = odd(dice),
        },
    }
}

fn edit_object(map: &mut Map<String, Value>, other: Value, dice: &mut Dice) {
    let Some(name) = map.keys().nth(dice.below(map.len())).cloned() else {
        map.insert("role".into(), other);
        return;
    };
    match dice.below(3) {
        0 => drop(map.shift_remove(&name)),
        1 => drop(map.insert(name, other)),
        // A field under another's name.
        _ => {
            let to = map.keys().nth(dice.below(map.len())).cloned().unwrap_or_default();
            let value = map.shift_remove(&name).unwrap_or_default();
            map.insert(to, value);
        }
    }
}

/// Returns a value that has broken readers before.
fn odd(dice: &mut Dice) -> Value {
    let values = [
        json!(null),
        json!([]),
        json!({}),
        json!(-1),
        json!(1e300),
        json!(u64::MAX),
        json!(0.1),
        json!(true),
        json!(""),
        json!("9999-12-31T23:59:59Z"),
        json!("0001-01-01"),
        json!("{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]}"),
        json!("data: {\"choices\":[{\"index\":-5,\"delta\":{\"content\":\"x\"}}]}\n\n"),
        json!("redacted-by-litellm"),
        json!([{"index": -5}]),
        json!([{"type": "text", "text": "x"}]),
        json!("\u{0}\u{1}\u{7f}"),
    ];
    let at = dice.below(values.len());
    values.into_iter().nth(at).unwrap_or_default()
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum::<usize>(),
        _ => 0,
    }
}

/// Returns the node at a place in the order of the document.
fn nth<'a>(value: &'a Value, at: &mut usize) -> Option<&'a Value> {
    if *at == 0 {
        return Some(value);
    }
    *at -= 1;
    match value {
        Value::Array(items) => items.iter().find_map(|item| nth(item, at)),
        Value::Object(map) => map.values().find_map(|item| nth(item, at)),
        _ => None,
    }
}

fn nth_mut<'a>(value: &'a mut Value, at: &mut usize) -> Option<&'a mut Value> {
    if *at == 0 {
        return Some(value);
    }
    *at -= 1;
    match value {
        Value::Array(items) => items.iter_mut().find_map(|item| nth_mut(item, at)),
        Value::Object(map) => map.values_mut().find_map(|item| nth_mut(item, at)),
        _ => None,
    }
}
