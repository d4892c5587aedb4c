//! What tests do with values as if they were `serde_json`'s: change them in place and compare them.

use std::ops::IndexMut;

use super::{Map, Value};

impl Value {
    pub(crate) fn as_array_mut(&mut self) -> Option<&mut Vec<Value>> {
        if let Value::Array(items) = self { Some(items) } else { None }
    }
}

/// What is not there is made; of null an object.
impl IndexMut<&str> for Value {
    fn index_mut(&mut self, name: &str) -> &mut Value {
        if self.is_null() {
            *self = Value::Object(Map::new());
        }
        self.as_object_mut().unwrap().entry(name).or_insert(Value::Null)
    }
}

impl IndexMut<usize> for Value {
    fn index_mut(&mut self, position: usize) -> &mut Value {
        &mut self.as_array_mut().unwrap()[position]
    }
}

impl PartialEq<String> for Value {
    fn eq(&self, text: &String) -> bool {
        self == text.as_str()
    }
}

impl PartialEq<usize> for Value {
    fn eq(&self, number: &usize) -> bool {
        self.as_u64() == Some(*number as u64)
    }
}

impl PartialEq<f64> for Value {
    fn eq(&self, number: &f64) -> bool {
        self.as_f64() == Some(*number)
    }
}

impl PartialEq<bool> for Value {
    fn eq(&self, truth: &bool) -> bool {
        self.as_bool() == Some(*truth)
    }
}
