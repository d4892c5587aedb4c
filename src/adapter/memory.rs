//! What training will hold in memory, told before it starts: a night that is killed half-way is a night lost.
//!
//! The parts are what the passes really keep (`engine/train`); a tenth is added for what comes and goes. On SmolLM2-135M
//! with 568 and 1,016 rows, in f32 and in 16 bits, that is within a tenth of the largest resident set.

use std::path::Path;

use super::{Settings, TuneError};
use crate::engine::{Linear, ModelConfig, WeightForm};

/// Rows whose logits are held at once (`ops::token_logprobs`).
const LOGIT_ROWS: usize = 256;

/// Bytes by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Estimate {
    /// The model in f32, which is loaded before training starts.
    weights: u64,
    /// Both rounded copies.
    rounded: u64,
    activations: u64,
    logits: u64,
    /// The adapter, its gradients and both moments.
    adapter: u64,
    rows: usize,
}

impl Estimate {
    /// Estimates a run whose longest prompt with an answer has so many tokens.
    pub(super) fn new(config: &ModelConfig, settings: &Settings, longest: usize) -> Self {
        let rows = settings.batch_tokens.max(longest);
        let layers = config.layers.len();
        let linears: usize = Linear::ALL.iter().map(|linear| product(linear.shape(config))).sum();
        let table = config.vocab * config.hidden_size;
        let tables = if config.tied { table } else { 2 * table };
        // Inputs of both halves and their sum, queries and what attention gives, keys and values, gate and up.
        let kept =
            3 * config.hidden_size + 2 * config.query_size() + 2 * config.kv_size() + 2 * config.intermediate_size;
        let pair = |linear: &Linear| {
            let (ins, outs) = linear.shape(config);
            settings.rank * (ins + outs)
        };
        let adapter: usize = settings.lora().targets.iter().map(pair).sum();
        let rounded = match settings.precision.form() {
            WeightForm::F32 => 0,
            // Two bytes each and a scale of four for 64 of them, for either pass.
            WeightForm::Int16 | WeightForm::Int8 => (layers * linears + table) as u64 * 33 / 8,
        };
        let floats = |count: usize| count as u64 * 4;
        Estimate {
            weights: floats(layers * linears + tables),
            rounded,
            activations: floats(rows * layers * kept),
            logits: floats(rows.min(LOGIT_ROWS) * config.vocab),
            adapter: floats(4 * layers * adapter),
            rows,
        }
    }

    fn total(&self) -> u64 {
        (self.weights + self.rounded + self.activations + self.logits + self.adapter) * 11 / 10
    }

    /// Refuses a run that does not fit into the operator's budget. Without one, a run that may not fit into what is free is
    /// only warned of: what this process keeps for itself counts as taken, so that it may fit after all.
    pub(super) fn expect_room(&self, budget_mib: u64, free: Option<u64>) -> Result<(), TuneError> {
        if budget_mib > 0 {
            let problem = self.problem(self.total(), budget_mib << 20, "tuning.memory_mib");
            return problem.map_or(Ok(()), |problem| Err(TuneError::Memory(problem)));
        }
        if let Some(problem) = free.and_then(|free| self.problem(self.total() - self.weights, free, "free")) {
            tracing::warn!("{problem}");
        }
        Ok(())
    }

    /// Says what is needed, part by part, and what can be done, where there is less room.
    fn problem(&self, needed: u64, room: u64, what: &str) -> Option<String> {
        if needed <= room {
            return None;
        }
        let mib = |bytes: u64| bytes >> 20;
        let Estimate { weights, rounded, activations, logits, adapter, rows } = *self;
        Some(format!(
            "training needs about {} MiB and there are {} ({what}): weights {}, rounded copies {}, activations of {rows} rows {}, \
             logits {}, adapter {}; lower tuning.batch_tokens or tuning.rank, set tuning.precision to f32, or give it more",
            mib(needed),
            mib(room),
            mib(weights),
            mib(rounded),
            mib(activations),
            mib(logits),
            mib(adapter)
        ))
    }
}

fn product((a, b): (usize, usize)) -> usize {
    a * b
}

/// Returns the bytes that this process may still take: of the machine and of its control group; nothing where neither tells.
pub(super) fn free() -> Option<u64> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let machine = read(Path::new("/proc/meminfo")).and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
    });
    let group = read(Path::new("/proc/self/cgroup")).and_then(|text| {
        let own = text.lines().find_map(|line| line.strip_prefix("0::"))?.trim_start_matches('/').to_string();
        let number = |name: &str| read(&Path::new("/sys/fs/cgroup").join(&own).join(name))?.trim().parse::<u64>().ok();
        // The page cache counts as taken there and is given up when memory is asked for.
        let statistics = read(&Path::new("/sys/fs/cgroup").join(&own).join("memory.stat"))?;
        let cache = statistics
            .lines()
            .filter_map(|line| line.split_once("_file ").filter(|(kind, _)| kind.ends_with("active")));
        let cache: u64 = cache.filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok()).sum();
        Some(number("memory.max")?.saturating_sub(number("memory.current")?.saturating_sub(cache)))
    });
    [machine, group].into_iter().flatten().min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Precision;

    /// The shape of SmolLM2-135M.
    fn smollm2() -> ModelConfig {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0, "max_position_embeddings": 8192, "tie_word_embeddings": true, "hidden_act": "silu",
        });
        std::fs::write(&path, config.to_string()).unwrap();
        ModelConfig::from_json(&path).unwrap()
    }

    fn estimate(rows: usize, precision: Precision) -> Estimate {
        let settings = Settings { batch_tokens: 8, precision, ..Settings::default() };
        Estimate::new(&smollm2(), &settings, rows)
    }

    /// The largest resident sets of `make bench-engine`'s steps, in KiB.
    #[test]
    fn the_estimate_is_what_was_measured() {
        for (rows, precision, measured) in [
            (568, Precision::F32, 1_203_672u64),
            (1016, Precision::F32, 1_499_660),
            (568, Precision::Int16, 1_804_700),
            (1016, Precision::Int16, 2_095_040),
        ] {
            let ratio = (measured << 10) as f64 / estimate(rows, precision).total() as f64;
            assert!((0.9..1.1).contains(&ratio), "{rows} rows, {precision:?}: {ratio}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_parts_and_the_remedy() {
        let estimate = estimate(568, Precision::F32);
        let total = estimate.total();
        let refused = |budget: u64, free: Option<u64>| estimate.expect_room(budget, free).map_err(|e| e.to_string());
        assert_eq!((refused(0, None), refused(0, Some(0))), (Ok(()), Ok(())), "warned of");
        assert_eq!(refused((total >> 20) + 1, Some(0)), Ok(()), "the operator's word holds");
        let error = refused(1000, None).unwrap_err();
        for words in ["1000 (tuning.memory_mib)", "activations of 568 rows 411", "lower tuning.batch_tokens"] {
            assert!(error.contains(words), "{error}");
        }
        let needed = total - estimate.weights;
        assert_eq!(estimate.problem(needed, needed, "free"), None);
        assert!(estimate.problem(needed, needed - 1, "free").is_some_and(|problem| problem.contains("(free)")));
    }

    #[test]
    fn this_machine_tells_what_is_free() {
        assert!(free().is_some_and(|bytes| bytes > 1 << 20));
    }
}
