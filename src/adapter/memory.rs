//! What training will hold in memory, told before it starts: a night that is killed half-way is a night lost.
//!
//! The parts are what the passes really keep (`engine/train`); a tenth is added for what comes and goes. On SmolLM2-135M
//! with 568 and 1,016 rows, in f32 and in 16 bits, that is within a tenth of the largest resident set. From the same
//! numbers follows whether activations are kept or made again.

use std::path::Path;

use super::settings::Keep;
use super::{Settings, TuneError};
use crate::engine::ops::mat;
use crate::engine::train::Activations;
use crate::engine::{Factor, Linear, LoraSpec, ModelConfig, Module, WeightForm};

/// Rows whose logits are held at once (`ops::token_logprobs`).
const LOGIT_ROWS: usize = 512;

/// What a run will hold in memory, in bytes by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// The model's matrices as they are held, which are loaded before training starts.
    weights: u64,
    /// Both rounded copies.
    rounded: u64,
    /// All activations of a pass.
    kept: u64,
    /// The inputs of all layers, and what two layers make of theirs and of the gradients.
    again: u64,
    /// What the threads hold of attention while they work: for each a head's scores of the longest sequence and their gradients.
    scores: u64,
    logits: u64,
    /// The adapter, its gradients and both moments.
    adapter: u64,
    rows: usize,
}

impl Estimate {
    /// Estimates a run over matrices that take `weights` bytes and are multiplied in `form`; its longest prompt with an answer has
    /// so many tokens.
    pub fn new(config: &ModelConfig, settings: &Settings, longest: usize, form: WeightForm, weights: u64) -> Self {
        // Processors that cut numbers as they come hold no copies.
        let copies = form != WeightForm::F32 && !mat::cuts();
        Self::holding(config, settings, longest, copies, weights)
    }

    fn holding(config: &ModelConfig, settings: &Settings, longest: usize, copies: bool, weights: u64) -> Self {
        let rows = settings.batch_tokens.max(longest);
        let layers = config.layers.len();
        let table = config.vocab * config.hidden_size;
        // Inputs of both halves and their sum, queries and what attention gives, keys and values, gate and up.
        let kept =
            3 * config.hidden_size + 2 * config.query_size() + 2 * config.kv_size() + 2 * config.intermediate_size;
        let adapter = adapter_values(config, &settings.lora());
        // Two bytes each and a scale of four for 64 of them, for either pass.
        let rounded = if copies { (layers * linears(config) + table) as u64 * 33 / 8 } else { 0 };
        let floats = |count: usize| count as u64 * 4;
        Estimate {
            weights,
            rounded,
            kept: floats(rows * layers * kept),
            again: floats(rows * (layers * config.hidden_size + 2 * kept)),
            scores: floats(2 * rayon::current_num_threads() * longest * longest),
            logits: floats(rows.min(LOGIT_ROWS) * config.vocab),
            adapter: floats(4 * adapter),
            rows,
        }
    }

    /// Returns how many bytes all activations take, kept or made again, attention's scores included.
    pub fn activations(&self, activations: Activations) -> u64 {
        let layers = match activations {
            Activations::Kept => self.kept,
            Activations::Again => self.again,
        };
        layers + self.scores
    }

    /// Returns the bytes of the model as it is held, of its rounded copies, of logits, and of the adapter with its optimizer.
    pub fn parts(&self) -> [u64; 4] {
        [self.weights, self.rounded, self.logits, self.adapter]
    }

    /// Returns the bytes of all, and a tenth more.
    pub fn total(&self, activations: Activations) -> u64 {
        (self.weights + self.rounded + self.activations(activations) + self.logits + self.adapter) * 11 / 10
    }

    /// Returns what becomes of activations, and refuses a run that does not fit into the operator's budget. Without one, a run
    /// that may not fit into what is free is only warned of: what this process keeps for itself counts as taken, so that it may
    /// fit after all.
    pub(super) fn decide(&self, keep: Keep, budget_mib: u64, free: Option<u64>) -> Result<Activations, TuneError> {
        let problem = |activations: Activations| match (budget_mib, free) {
            (0, None) => None,
            (0, Some(free)) => self.problem(activations, self.total(activations) - self.weights, free, "free"),
            (budget, _) => self.problem(activations, self.total(activations), budget << 20, "tuning.memory_mib"),
        };
        let activations = match keep {
            Keep::Keep => Activations::Kept,
            Keep::Recompute => Activations::Again,
            Keep::Auto if problem(Activations::Kept).is_some() => Activations::Again,
            Keep::Auto => Activations::Kept,
        };
        match problem(activations) {
            Some(problem) if budget_mib > 0 => return Err(TuneError::Memory(problem)),
            Some(problem) => tracing::warn!("{problem}"),
            None => (),
        }
        Ok(activations)
    }

    /// Says what is needed, part by part, and what can be done, where there is less room.
    fn problem(&self, activations: Activations, needed: u64, room: u64, what: &str) -> Option<String> {
        if needed <= room {
            return None;
        }
        let mib = |bytes: u64| bytes >> 20;
        let Estimate { weights, rounded, logits, adapter, rows, .. } = *self;
        let how = match activations {
            Activations::Kept => "set tuning.activations to auto, ",
            Activations::Again => "",
        };
        Some(format!(
            "training needs about {} MiB and there are {} ({what}): weights {}, rounded copies {}, activations of {rows} rows {}, \
             logits {}, adapter {}; {how}lower tuning.batch_tokens or tuning.rank, set tuning.precision to f32, or give it more",
            mib(needed),
            mib(room),
            mib(weights),
            mib(rounded),
            mib(self.activations(activations)),
            mib(logits),
            mib(adapter)
        ))
    }
}

/// Returns how many weights the matrices of a model have.
pub fn weights(config: &ModelConfig) -> u64 {
    let table = config.vocab * config.hidden_size;
    let tables = if config.tied { table } else { 2 * table };
    (config.layers.len() * linears(config) + tables) as u64
}

/// Returns how many weights the linear layers of one layer have.
fn linears(config: &ModelConfig) -> usize {
    Linear::ALL.iter().map(|linear| product(linear.shape(config))).sum()
}

/// Returns how many numbers all matrices of an adapter hold.
fn adapter_values(config: &ModelConfig, lora: &LoraSpec) -> usize {
    let modules = Module::targeted(config, &lora.targets);
    let pairs = (0..config.layers.len()).flat_map(|layer| modules.iter().map(move |module| (layer, module)));
    let values = |(layer, module): (usize, &Module)| {
        let rank = lora.rank_of(&module.path(layer));
        [Factor::A, Factor::B]
            .map(|factor| module.shape(config, factor, rank))
            .iter()
            .map(|[a, b]| a * b)
            .sum::<usize>()
    };
    pairs.map(values).sum()
}

fn product((a, b): (usize, usize)) -> usize {
    a * b
}

/// Returns the bytes that this process may still take: of the machine and of its control group; nothing where neither tells.
pub(super) fn free() -> Option<u64> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let machine = read(Path::new("/proc/meminfo")).and_then(|text| kilobytes(&text, "MemAvailable:")).or_else(nodes);
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

/// Returns the bytes of a line such as `MemFree:   10620748 kB`.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.split_once(name))?.1;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
}

/// Returns the same from what each node of the machine tells: a service that sees nothing of /proc but processes
/// (`ProcSubset=pid`, as taod's own units have it) has no other source.
fn nodes() -> Option<u64> {
    let folders = std::fs::read_dir("/sys/devices/system/node").ok()?.flatten();
    let texts = folders.filter_map(|folder| std::fs::read_to_string(folder.path().join("meminfo")).ok());
    texts.map(|text| node(&text)).sum::<Option<u64>>().filter(|bytes| *bytes > 0)
}

/// Returns what is free on a node, and what is given up when memory is asked for: the page cache and the kernel's own caches.
fn node(text: &str) -> Option<u64> {
    ["MemFree:", "Active(file):", "Inactive(file):", "SReclaimable:"].iter().map(|name| kilobytes(text, name)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

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

    fn estimate(rows: usize, copies: bool) -> Estimate {
        let settings = Settings { batch_tokens: 8, ..Settings::default() };
        Estimate::holding(&smollm2(), &settings, rows, copies, 4 * weights(&smollm2()))
    }

    /// The largest resident sets of `make bench-engine`'s steps, in KiB: f32, and 16 bits with copies.
    #[test]
    fn the_estimate_is_what_was_measured() {
        for (rows, copies, measured) in
            [(568, false, 1_203_672u64), (1016, false, 1_499_660), (568, true, 1_804_700), (1016, true, 2_095_040)]
        {
            let ratio = (measured << 10) as f64 / estimate(rows, copies).total(Activations::Kept) as f64;
            assert!((0.9..1.1).contains(&ratio), "{rows} rows, copies {copies}: {ratio}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_parts_and_the_remedy() {
        let estimate = estimate(568, false);
        let total = estimate.total(Activations::Kept);
        let kept =
            |budget: u64, free: Option<u64>| estimate.decide(Keep::Keep, budget, free).map_err(|e| e.to_string());
        assert_eq!((kept(0, None), kept(0, Some(0))), (Ok(Activations::Kept), Ok(Activations::Kept)), "warned of");
        assert_eq!(kept((total >> 20) + 1, Some(0)), Ok(Activations::Kept), "the operator's word holds");
        let error = kept(1000, None).unwrap_err();
        let activations = format!("activations of 568 rows {}", estimate.activations(Activations::Kept) >> 20);
        for words in ["1000 (tuning.memory_mib)", &activations, "set tuning.activations to auto"] {
            assert!(error.contains(words), "{error}");
        }
        assert_eq!(estimate.kept >> 20, 411);
        let needed = total - estimate.weights;
        let problem = |room: u64| estimate.problem(Activations::Kept, needed, room, "free");
        assert_eq!(problem(needed), None);
        assert!(problem(needed - 1).is_some_and(|problem| problem.contains("(free)")));
    }

    #[test]
    fn activations_are_made_again_where_keeping_them_would_not_fit() {
        let estimate = estimate(568, false);
        let decide = |keep, budget, free| estimate.decide(keep, budget, free).map_err(|e| e.to_string());
        let [kept, again] = [Activations::Kept, Activations::Again].map(|activations| estimate.total(activations));
        assert!(again + (300 << 20) < kept, "{again} {kept}");
        assert_eq!(decide(Keep::Auto, (kept >> 20) + 1, None), Ok(Activations::Kept));
        assert_eq!(decide(Keep::Auto, kept >> 20, None), Ok(Activations::Again));
        assert_eq!(decide(Keep::Recompute, 0, Some(u64::MAX)), Ok(Activations::Again));
        let free = kept - estimate.weights;
        assert_eq!(decide(Keep::Auto, 0, Some(free)), Ok(Activations::Kept));
        assert_eq!(decide(Keep::Auto, 0, Some(free - 1)), Ok(Activations::Again));
        let error = decide(Keep::Auto, (again >> 20) - 1, None).unwrap_err();
        assert_eq!(estimate.again >> 20, 64);
        assert!(error.contains("activations of 568 rows ") && !error.contains("tuning.activations"), "{error}");
    }

    #[test]
    fn attention_grows_with_the_square_of_the_longest_sequence() {
        let [short, long] = [1024, 8192].map(|rows| estimate(rows, false));
        assert_eq!(long.scores, 64 * short.scores);
        // 8,192 by 8,192 scores and as many gradients, for each thread.
        assert_eq!(long.scores, rayon::current_num_threads() as u64 * (512 << 20));
        assert_eq!(long.activations(Activations::Again), long.again + long.scores);
    }

    #[test]
    fn a_node_gives_what_is_free_and_what_the_kernel_gives_up() {
        let text = "Node 0 MemTotal: 24683656 kB\nNode 0 MemFree: 10620800 kB\nNode 0 Active(anon): 2820 kB\n\
                    Node 0 Active(file): 3772832 kB\nNode 0 Inactive(file): 8825148 kB\nNode 0 KReclaimable: 929928 kB\n\
                    Node 0 SReclaimable: 929928 kB\n";
        assert_eq!(node(text), Some((10_620_800 + 3_772_832 + 8_825_148 + 929_928) << 10));
        // What the same machine called available, but for what the kernel keeps for itself.
        let available = kilobytes("MemAvailable:   23539032 kB\n", "MemAvailable:").unwrap() as f64;
        assert!((node(text).unwrap() as f64 / available - 1.0).abs() < 0.05);
        assert_eq!(node("Node 0 MemFree: 1 kB\n"), None, "half of it is no number");
    }

    #[test]
    fn this_machine_tells_what_is_free() {
        assert!(free().is_some_and(|bytes| bytes > 1 << 20));
    }
}
