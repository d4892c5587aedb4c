//! In what two versions differ: their manifests, their settings, and how far their weights lie apart.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Result;
use candle_core::{Device, Tensor};
use serde_json::{Map, Value, json};

use crate::durable;
use crate::registry::Registry;

/// Returns every field that differs, each with both values, and for the weights of each side their size and distance.
pub(super) fn diff(registry: &Registry, from: &str, to: &str) -> Result<Value> {
    let (a, b) = (registry.verify(from)?, registry.verify(to)?);
    let config = |version: &str| durable::read_json::<Value>(&registry.path(version).join("adapter_config.json"));
    Ok(json!({
        "from": from,
        "to": to,
        "lineage": changed(&serde_json::to_value(&a.lineage)?, &serde_json::to_value(&b.lineage)?),
        "config": changed(&config(from)?, &config(to)?),
        "weights": weights(&registry.path(from), &registry.path(to))?,
    }))
}

/// Returns the fields in which two objects differ.
fn changed(a: &Value, b: &Value) -> Value {
    let (empty, mut out) = (Map::new(), Map::new());
    let (a, b) = (a.as_object().unwrap_or(&empty), b.as_object().unwrap_or(&empty));
    for key in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
        let (from, to) = (a.get(key), b.get(key));
        if from != to {
            out.insert(key.clone(), json!({ "from": from, "to": to }));
        }
    }
    Value::Object(out)
}

/// Compares the matrices that both have. A and B mean something only together, so that for adapters that were trained from
/// different beginnings the distance says little; for a version and its successor it says how far a night went.
fn weights(a: &Path, b: &Path) -> Result<Value> {
    let load = |folder: &Path| candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu);
    let (a, b) = (load(a)?, load(b)?);
    let names: BTreeMap<bool, Vec<&String>> = a.keys().fold(BTreeMap::new(), |mut names, name| {
        names
            .entry(b.get(name).is_some_and(|other| other.dims() == a[name].dims()))
            .or_insert_with(Vec::new)
            .push(name);
        names
    });
    let (mut distance, mut size) = (0.0, 0.0);
    let shared = names.get(&true).map_or(&[][..], Vec::as_slice);
    for name in shared {
        let (x, y) = (flat(&a[*name])?, flat(&b[*name])?);
        distance += (&x - &y)?.sqr()?.sum_all()?.to_scalar::<f64>()?;
        size += x.sqr()?.sum_all()?.to_scalar::<f64>()?;
    }
    Ok(json!({
        "matrices": { "from": a.len(), "to": b.len(), "of_one_shape": shared.len() },
        "distance": distance.sqrt(),
        "size_of_from": size.sqrt(),
    }))
}

fn flat(tensor: &Tensor) -> candle_core::Result<Tensor> {
    tensor.to_dtype(candle_core::DType::F64)?.flatten_all()
}
