//! The members of an object, in their order.

use std::collections::HashMap;
use std::fmt;
use std::ops::Index;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, Serializer};

use super::{NULL, Value};

/// The name of a member: short ones, which nearly all are, need no memory of their own.
pub type Name = compact_str::CompactString;

/// Members up to here are looked through; more are found by an index.
const FEW: usize = 48;

/// Members for which there is room from the start.
const USUAL: usize = 8;

/// Spreads signs over all numbers (the golden ratio).
const MIX: u32 = 0x9E37_79B9;

/// The members of an object, in their order. A name that comes again replaces the value and stays at its place.
///
/// An object of a log has some ten members. To look through so many takes no longer than to hash a name, and there is no
/// table to build. Larger objects have an index, so that no record can make the work grow with the square of its size.
#[derive(Debug, Clone, Default)]
pub struct Map {
    members: Vec<Member>,
    /// The places of the names, where there are more than [`FEW`].
    #[expect(clippy::box_collection, reason = "few objects have one, and each value of a tree is as large as a map")]
    index: Option<Box<HashMap<Name, usize>>>,
}

/// One member.
#[derive(Debug, Clone)]
pub struct Member {
    /// Of the name; see [`sign`].
    sign: u32,
    name: Name,
    value: Value,
}

/// Returns what most names differ in: the length and three of the bytes.
#[inline]
fn sign(name: &str) -> u32 {
    match name.as_bytes() {
        [] => 0,
        bytes => u32::from_le_bytes([bytes.len() as u8, bytes[0], bytes[bytes.len() / 2], bytes[bytes.len() - 1]]),
    }
}

impl Map {
    pub fn new() -> Self {
        Map::default()
    }

    /// Reads all members of an object.
    pub(super) fn of<'de, A: MapAccess<'de>>(mut members: A) -> Result<Self, A::Error> {
        let (mut map, mut seen) = (Map { members: Vec::with_capacity(USUAL), index: None }, 0_u64);
        while let Some(name) = members.next_key_seed(NameOf)? {
            let value = members.next_value()?;
            // A bit for each sign: most names are told to be new without a look at the others.
            let bit = 1 << (sign(&name).wrapping_mul(MIX) >> 26);
            match seen & bit {
                0 => map.push(name, value),
                _ => drop(map.insert(name, value)),
            }
            seen |= bit;
        }
        Ok(map)
    }

    pub fn len(&self) -> usize {
        self.members.len()
    }

    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub fn contains_key(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    pub fn get(&self, name: &str) -> Option<&Value> {
        self.find(name).map(|at| &self.members[at].value)
    }

    pub fn get_mut(&mut self, name: &str) -> Option<&mut Value> {
        self.find(name).map(|at| &mut self.members[at].value)
    }

    /// Returns a member with its name as it stands here.
    pub fn get_key_value(&self, name: &str) -> Option<(&Name, &Value)> {
        self.find(name).map(|at| (&self.members[at].name, &self.members[at].value))
    }

    /// Puts a value at its name's place, or at the end; returns the one that stood there.
    pub fn insert(&mut self, name: impl Into<Name>, value: Value) -> Option<Value> {
        let name = name.into();
        match self.find(&name) {
            Some(at) => Some(std::mem::replace(&mut self.members[at].value, value)),
            None => {
                self.push(name, value);
                None
            }
        }
    }

    /// Takes a member out; those behind it move up.
    pub fn shift_remove(&mut self, name: &str) -> Option<Value> {
        let member = self.members.remove(self.find(name)?);
        self.reindex();
        Some(member.value)
    }

    /// Keeps the members that `keep` is true for.
    pub fn retain(&mut self, mut keep: impl FnMut(&Name, &mut Value) -> bool) {
        let before = self.members.len();
        self.members.retain_mut(|member| keep(&member.name, &mut member.value));
        if self.members.len() < before {
            self.reindex();
        }
    }

    /// Returns the place of a name, for a value to be put there where there is none.
    pub fn entry(&mut self, name: impl Into<Name>) -> Entry<'_> {
        Entry { map: self, name: name.into() }
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&Name, &Value)> {
        self.members.iter().map(|member| (&member.name, &member.value))
    }

    pub fn keys(&self) -> impl ExactSizeIterator<Item = &Name> {
        self.members.iter().map(|member| &member.name)
    }

    pub fn iter_mut(&mut self) -> impl ExactSizeIterator<Item = (&Name, &mut Value)> {
        self.members.iter_mut().map(|member| (&member.name, &mut member.value))
    }

    pub fn values(&self) -> impl ExactSizeIterator<Item = &Value> {
        self.members.iter().map(|member| &member.value)
    }

    pub fn values_mut(&mut self) -> impl ExactSizeIterator<Item = &mut Value> {
        self.members.iter_mut().map(|member| &mut member.value)
    }

    fn find(&self, name: &str) -> Option<usize> {
        match &self.index {
            None => {
                let sign = sign(name);
                self.members.iter().position(|member| member.sign == sign && member.name == name)
            }
            Some(index) => index.get(name).copied(),
        }
    }

    fn push(&mut self, name: Name, value: Value) {
        let at = self.members.len();
        if let Some(index) = &mut self.index {
            index.insert(name.clone(), at);
        }
        self.members.push(Member { sign: sign(&name), name, value });
        if at == FEW {
            self.reindex();
        }
    }

    /// Makes the index anew; nothing where there are few members.
    fn reindex(&mut self) {
        let places = || self.members.iter().enumerate().map(|(at, member)| (member.name.clone(), at));
        self.index = (self.members.len() > FEW).then(|| Box::new(places().collect()));
    }
}

/// The place of a name in a map.
pub struct Entry<'a> {
    map: &'a mut Map,
    name: Name,
}

impl<'a> Entry<'a> {
    pub fn or_insert(self, value: Value) -> &'a mut Value {
        self.or_insert_with(|| value)
    }

    pub fn or_insert_with(self, value: impl FnOnce() -> Value) -> &'a mut Value {
        let at = self.map.find(&self.name).unwrap_or_else(|| {
            self.map.push(self.name, value());
            self.map.len() - 1
        });
        &mut self.map.members[at].value
    }
}

/// The order of the members makes no difference.
impl PartialEq for Map {
    fn eq(&self, other: &Map) -> bool {
        self.len() == other.len() && self.iter().all(|(name, value)| other.get(name) == Some(value))
    }
}

/// What is not there is null.
impl Index<&str> for Map {
    type Output = Value;

    fn index(&self, name: &str) -> &Value {
        self.get(name).unwrap_or(&NULL)
    }
}

impl<N: Into<Name>> FromIterator<(N, Value)> for Map {
    fn from_iter<I: IntoIterator<Item = (N, Value)>>(members: I) -> Self {
        let mut map = Map::new();
        map.extend(members);
        map
    }
}

impl<N: Into<Name>> Extend<(N, Value)> for Map {
    fn extend<I: IntoIterator<Item = (N, Value)>>(&mut self, members: I) {
        for (name, value) in members {
            self.insert(name, value);
        }
    }
}

impl IntoIterator for Map {
    type Item = (Name, Value);
    type IntoIter = std::iter::Map<std::vec::IntoIter<Member>, fn(Member) -> (Name, Value)>;

    fn into_iter(self) -> Self::IntoIter {
        self.members.into_iter().map(|member| (member.name, member.value))
    }
}

impl<'a> IntoIterator for &'a Map {
    type Item = (&'a Name, &'a Value);
    type IntoIter = std::iter::Map<std::slice::Iter<'a, Member>, fn(&'a Member) -> (&'a Name, &'a Value)>;

    fn into_iter(self) -> Self::IntoIter {
        self.members.iter().map(|member| (&member.name, &member.value))
    }
}

impl Serialize for Map {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter().map(|(name, value)| (name.as_str(), value)))
    }
}

impl<'de> Deserialize<'de> for Map {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = Map;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, members: A) -> Result<Map, A::Error> {
                Map::of(members)
            }
        }

        deserializer.deserialize_map(Members)
    }
}

/// Reads a name without a text in between.
struct NameOf;

impl<'de> serde::de::DeserializeSeed<'de> for NameOf {
    type Value = Name;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Name, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for NameOf {
    type Value = Name;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Name, E> {
        Ok(name.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Does the same to a map and to `serde_json`'s, which keeps the order, too.
    #[test]
    fn it_does_what_the_general_map_does_few_members_or_many() {
        for names in [1, 7, FEW, FEW + 1, 4 * FEW] {
            let (mut ours, mut theirs) = (Map::new(), serde_json::Map::new());
            let mut dice = 1_u64;
            for step in 0..3000_u64 {
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let name = format!("{}{}", "x".repeat((dice >> 60) as usize * 3), (dice >> 33) as usize % names);
                match (dice >> 20) % 8 {
                    0 => assert_eq!(ours.shift_remove(&name), theirs.shift_remove(&name).map(Value::from)),
                    1 if step % 50 == 0 => {
                        let keep = |name: &str| name.len() % 4 != 1;
                        ours.retain(|name, _| keep(name));
                        theirs.retain(|name, _| keep(name));
                    }
                    2 => assert_eq!(
                        *ours.entry(name.as_str()).or_insert(step.into()),
                        Value::from(theirs.entry(name).or_insert(step.into()).clone())
                    ),
                    3 => assert_eq!(ours.get(&name).cloned(), theirs.get(&name).cloned().map(Value::from)),
                    _ => assert_eq!(
                        ours.insert(name.clone(), step.into()),
                        theirs.insert(name, step.into()).map(Value::from)
                    ),
                }
                assert_eq!((ours.len(), ours.index.is_some()), (theirs.len(), theirs.len() > FEW));
            }
            assert_eq!(serde_json::to_string(&ours).unwrap(), serde_json::to_string(&theirs).unwrap());
            assert_eq!(serde_json::from_value::<Map>(theirs.into()).unwrap(), ours);
        }
    }
}
