//! Training by a program of the operator's own, for models that outgrow this machine.
//!
//! The program gets a frozen folder and an empty one: `COMMAND... DATASET OUT`. The dataset holds `candidates.parquet` (ids,
//! rewards, log-probs), `settings.json` (what taod would train with, the base, the adapter to continue) and, written last,
//! `manifest.json` with their hashes. Into the other folder goes a PEFT adapter. It is loaded, measured and judged like
//! one of taod's own before it takes its place, so that a trainer that fails or errs leaves nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float32Builder, Float64Array, ListBuilder, RecordBatch, StringArray, UInt32Builder};
use arrow::error::ArrowError;
use parquet::arrow::ArrowWriter;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::batches::{self, Chosen, Selection};
use super::checkpoint::Origin;
use super::losses::drift;
use super::{ADAPTER, Frozen, OUTCOME, Outcome, Sample, Settings, TuneError, check, finished, program};
use crate::durable::{self, FileError};
use crate::engine::{Adapter, Linear, Model, ScoreItem, logprobs};
use crate::progress::Progress;

/// Folder of what the program gets, inside a run's folder.
const DATASET: &str = "dataset";
/// Folder that the program writes into, inside a run's folder.
const ATTEMPT: &str = "attempt";
const CANDIDATES: &str = "candidates.parquet";
const SETTINGS: &str = "settings.json";
const MANIFEST: &str = "manifest.json";

/// What stands in the folder of a whole dataset.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    /// Of this layout.
    format: u32,
    origin: Origin,
    samples: usize,
    /// SHA-256 by file.
    files: Vec<(String, String)>,
}

/// Does what [`super::tune`] does, by the program that the settings name.
pub(super) fn tune(
    model: &Model,
    samples: &[Sample],
    start: Option<&Path>,
    settings: &Settings,
    seed: u64,
    out: &Path,
    progress: &Progress,
) -> Result<Outcome, TuneError> {
    check(settings, model.config())?;
    let selection = batches::select(samples, settings, model.config())?;
    // A pass before it, or any adapter in PEFT's layout; the program may run in another folder.
    let start = start.map(|from| if from.join(ADAPTER).is_dir() { from.join(ADAPTER) } else { from.to_path_buf() });
    let start = start.map(std::path::absolute).transpose();
    let start = start.map_err(|e| FileError::io("cannot find", out, e))?;
    let mut origin = Origin::new(Frozen::of(model), settings, seed, samples, None)?;
    let hash = |from: &PathBuf| durable::sha256_file(&from.join("adapter_model.safetensors"));
    origin.start = start.as_ref().map(hash).transpose()?;
    let dataset = out.join(DATASET);
    match durable::read_json::<Manifest>(&dataset.join(MANIFEST)) {
        Ok(found) => found.origin.expect(&origin, &dataset)?,
        Err(error) if error.is_not_found() => {
            freeze(model, samples, start.as_deref(), settings, seed, origin, &dataset)?
        }
        Err(error) => return Err(error.into()),
    }
    if let Some(outcome) = finished(out)? {
        return Ok(outcome);
    }
    let attempt = out.join(ATTEMPT);
    begin_anew(&attempt)?;
    run(&settings.command, &dataset, &attempt)?;
    let kl_sample = judge(model, &selection, settings, &attempt, progress)?;
    let place = out.join(ADAPTER);
    sync(&attempt)?;
    // One without an outcome is of a try that was cut short.
    match fs::remove_dir_all(&place) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(FileError::io("cannot remove", &place, error).into());
        }
        _ => {}
    }
    fs::rename(&attempt, &place).map_err(|e| FileError::io("cannot move the adapter to", &place, e))?;
    let outcome = Outcome {
        steps: Vec::new(),
        groups_used: selection.groups.len(),
        samples_used: selection.samples,
        groups_all_equal: selection.all_equal,
        groups_none_above: selection.none_above,
        tokens: chosen(&selection).map(|(_, sample)| sample.completion.len() as u64).sum(),
        kl_sample,
        mismatch: None,
        adapter_dir: PathBuf::new(),
    };
    durable::sync_folder(out)?;
    durable::write_json(&out.join(OUTCOME), &outcome)?;
    Ok(outcome.at(out))
}

fn freeze(
    model: &Model,
    samples: &[Sample],
    start: Option<&Path>,
    settings: &Settings,
    seed: u64,
    origin: Origin,
    dataset: &Path,
) -> Result<(), TuneError> {
    durable::create_folder(dataset)?;
    let base = model.identity();
    let told =
        json!({ "base": base.name, "base_sha256": base.sha256, "start": start, "seed": seed, "tuning": settings });
    durable::write_json(&dataset.join(SETTINGS), &told)?;
    let table = parquet(samples).map_err(|e| TuneError::Command { what: format!("cannot write {CANDIDATES}: {e}") })?;
    durable::write(&dataset.join(CANDIDATES), &table)?;
    let hash = |name: &str| Ok::<_, TuneError>((name.to_owned(), durable::sha256_file(&dataset.join(name))?));
    let files = [CANDIDATES, SETTINGS].map(hash).into_iter().collect::<Result<_, _>>()?;
    let manifest = Manifest { format: 1, origin, samples: samples.len(), files };
    Ok(durable::write_json(&dataset.join(MANIFEST), &manifest)?)
}

/// Returns the samples as a Parquet file: one row each, ids and log-probs as lists.
fn parquet(samples: &[Sample]) -> Result<Vec<u8>, ArrowError> {
    let ids = |of: fn(&Sample) -> &[u32]| -> ArrayRef {
        let mut lists = ListBuilder::new(UInt32Builder::new());
        samples.iter().for_each(|sample| lists.append_value(of(sample).iter().copied().map(Some)));
        Arc::new(lists.finish())
    };
    let logs = |of: fn(&Sample) -> Option<&[f32]>| -> ArrayRef {
        let mut lists = ListBuilder::new(Float32Builder::new());
        samples.iter().for_each(|s| lists.append_option(of(s).map(|logs| logs.iter().copied().map(Some))));
        Arc::new(lists.finish())
    };
    let groups: ArrayRef = Arc::new(StringArray::from_iter_values(samples.iter().map(|sample| &sample.group)));
    let rewards: ArrayRef = Arc::new(Float64Array::from_iter_values(samples.iter().map(|sample| sample.reward)));
    let batch = RecordBatch::try_from_iter_with_nullable([
        ("group", groups, false),
        ("prompt_ids", ids(|sample| &sample.prompt), false),
        ("completion_ids", ids(|sample| &sample.completion), false),
        ("reward", rewards, false),
        ("logprobs", logs(|sample| sample.old_logprobs.as_deref()), true),
        ("base_logprobs", logs(|sample| sample.base_logprobs.as_deref()), true),
    ])?;
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, batch.schema(), None)?;
    writer.write(&batch)?;
    writer.close()?;
    Ok(bytes)
}

/// Makes an empty folder in the place of what an attempt that was cut short left.
fn begin_anew(attempt: &Path) -> Result<(), TuneError> {
    match fs::remove_dir_all(attempt) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(FileError::io("cannot remove", attempt, error).into())
        }
        _ => Ok(durable::create_folder(attempt)?),
    }
}

/// Runs the program to its end.
fn run(command: &[String], dataset: &Path, attempt: &Path) -> Result<(), TuneError> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(TuneError::Command { what: "it is empty".to_owned() });
    };
    let fail = |what: String| TuneError::Command { what: format!("{program} {what}") };
    match program::run(Command::new(program).args(arguments).arg(dataset).arg(attempt)) {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(fail(format!("ended with {status}"))),
        Err(error) => Err(fail(format!("cannot be run: {error}"))),
    }
}

/// Makes what the program wrote outlast a power loss; its own writes need not.
fn sync(attempt: &Path) -> Result<(), TuneError> {
    let fail = |e| FileError::io("cannot sync", attempt, e);
    for entry in fs::read_dir(attempt).map_err(fail)? {
        fs::File::open(entry.map_err(fail)?.path()).and_then(|file| file.sync_all()).map_err(fail)?;
    }
    Ok(durable::sync_folder(attempt)?)
}

/// Loads the adapter and measures how far it went; an adapter that cannot be used is refused.
fn judge(
    model: &Model,
    selection: &Selection,
    settings: &Settings,
    attempt: &Path,
    progress: &Progress,
) -> Result<f32, TuneError> {
    let refuse = |what: &str| TuneError::Command { what: format!("its adapter {what}") };
    let adapter = Adapter::load(attempt, model)?;
    let pairs = (0..model.config().layers.len()).flat_map(|layer| Linear::ALL.map(|linear| (layer, linear)));
    let mut changes = false;
    for pair in pairs.filter_map(|(layer, linear)| adapter.get(layer, linear)) {
        let sum = |tensor: &candle_core::Tensor| tensor.abs()?.sum_all()?.to_scalar::<f32>();
        let (a, b) = (sum(&pair.a)?, sum(&pair.b)?);
        if !(a.is_finite() && b.is_finite()) {
            return Err(refuse("holds values that are not numbers"));
        }
        changes |= a > 0.0 && b > 0.0;
    }
    if !changes {
        return Err(refuse("changes nothing: a matrix of each pair is zero"));
    }
    let items = chosen(selection).map(|(prompt, sample)| ScoreItem { prompt, completion: sample.completion });
    let items: Vec<ScoreItem> = items.collect();
    let mut report = progress.step("measuring the adapter", items.len() as u64, "samples");
    let (policy, base) = (logprobs(model, Some(&adapter), &items)?, logprobs(model, None, &items)?);
    report.advance(items.len() as u64, "");
    let tokens: usize = policy.iter().map(Vec::len).sum();
    let kl = policy.iter().zip(&base).map(|(policy, base)| drift(policy, base)).sum::<f64>() / tokens.max(1) as f64;
    if kl.is_nan() || kl > settings.max_kl {
        let (what, key) = ("the mean divergence from the base", "max_kl");
        return Err(TuneError::Collapsed { what, value: kl, step: 0, key, bound: settings.max_kl });
    }
    Ok(kl as f32)
}

fn chosen<'a>(selection: &'a Selection<'a>) -> impl Iterator<Item = (&'a [u32], &'a Chosen<'a>)> {
    selection.groups.iter().flat_map(|group| group.samples.iter().map(|sample| (group.prompt, sample)))
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;
