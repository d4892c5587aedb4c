//! A round told beforehand: what would train, what each filter leaves out, and what it would take.
//!
//! The dataset is made as the round would make it and thrown away. Tokens and seconds are those of the newest round that
//! has done each stage, by the row; where none has, the most tokens that may come, and no time.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Paths, RoundError, StageReport, state};
use crate::config::Config;
use crate::dataset::{self, Explained, Manifest, synthetic};
use crate::record::{Message, derive_seed};

/// Characters of a token, about, in the languages of most prompts.
const CHARS_PER_TOKEN: f64 = 4.0;

/// What a round would do now.
#[derive(Debug, Clone, Serialize)]
pub struct Forecast {
    pub manifest: Manifest,
    /// Why it would be skipped, if it would.
    pub shortfall: Option<String>,
    /// Prompts that would be made for workloads with too few, at most.
    pub synthetic: Vec<synthetic::Need>,
    /// Answers that would be drawn for training, in all iterations.
    pub answers: u64,
    /// Tokens of the prompts, about.
    pub prompt_tokens: u64,
    /// Tokens of the answers: about, or the most where no round tells.
    pub answer_tokens: u64,
    /// The round whose stages tell tokens and seconds.
    pub told_by: Option<String>,
    /// Seconds from the dataset to the adapter, without the gate.
    pub seconds: Option<f64>,
}

/// Makes the dataset of a round that began now and tells what the round would do. Nothing is stored but the index, which
/// is a cache; it waits for no running round and refuses instead.
pub fn forecast(config: &Config) -> Result<Forecast, RoundError> {
    let paths = Paths::new(&config.state.dir);
    let _lock = paths.lock()?;
    let round = paths.next_round()?;
    let views: Vec<_> = config.workload.iter().map(crate::rewards::Workload::view).collect();
    let freezing = dataset::Freezing {
        round: &round,
        settings: &config.dataset,
        workloads: &views,
        seed: derive_seed(config.round.seed, &[&round]),
        index: &paths.prompts(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(RoundError::Spawn)?;
    let (manifest, train) = runtime.block_on(dataset::preview(&config.state.open_tables()?, freezing))?;
    let chars = |message: &Message| message.plain_text().chars().count();
    let chars: usize = train.iter().flat_map(|prompt| &prompt.messages).map(chars).sum();
    let passes = config.tuning.iterations as u64;
    let synthetic = synthetic::needs(&train, &config.dataset.synthetic, |_| true);
    let made: u64 = synthetic.iter().map(|need| need.wanted as u64).sum();
    let per_pass = (manifest.train.prompts + made) * config.candidates.samples_per_prompt as u64;
    let rates = Rates::newest(&paths)?;
    let most = per_pass * passes * config.candidates.max_tokens as u64;
    Ok(Forecast {
        shortfall: manifest.shortfall(made),
        synthetic,
        answers: per_pass * passes,
        prompt_tokens: (chars as f64 / CHARS_PER_TOKEN).ceil() as u64,
        answer_tokens: rates
            .as_ref()
            .map_or(most, |rates| (rates.tokens_per_answer * (per_pass * passes) as f64) as u64),
        seconds: rates.as_ref().map(|rates| rates.seconds_per_answer * (per_pass * passes) as f64),
        told_by: rates.map(|rates| rates.round),
        manifest,
    })
}

impl Forecast {
    /// Returns it in plain words; with a price, what it costs.
    pub fn explain(&self, price_per_hour: Option<f64>) -> String {
        let mut lines = vec![Explained(&self.manifest).to_string()];
        lines.extend(synthetic::told(&self.synthetic, &self.manifest.settings.synthetic));
        if let Some(reason) = &self.shortfall {
            lines.push(format!("it would be skipped: {reason}"));
        }
        let (answers, prompts) = (self.answers, self.prompt_tokens);
        match (&self.told_by, self.seconds) {
            (Some(round), Some(seconds)) => {
                lines.push(format!(
                    "{answers} answers of about {} tokens in all to prompts of about {prompts}: about {:.1} h, as {round} took, and the gate",
                    self.answer_tokens,
                    seconds / 3600.0
                ));
                if let Some(price) = price_per_hour {
                    lines.push(format!("at {price} an hour that costs about {:.2}", price * seconds / 3600.0));
                }
            }
            _ => lines.push(format!(
                "{answers} answers of at most {} tokens in all to prompts of about {prompts}; no earlier round tells how long that takes",
                self.answer_tokens
            )),
        }
        lines.push("nothing was stored".to_owned());
        lines.join("\n") + "\n"
    }
}

/// What a round took by the answer.
struct Rates {
    round: String,
    tokens_per_answer: f64,
    seconds_per_answer: f64,
}

impl Rates {
    /// Reads the newest round that trained.
    fn newest(paths: &Paths) -> Result<Option<Rates>, RoundError> {
        for round in paths.round_ids()?.into_iter().rev() {
            let stages = state::read_stages(&paths.round(&round))?;
            if let Some((tokens_per_answer, seconds_per_answer)) = rates(&stages) {
                return Ok(Some(Rates { round, tokens_per_answer, seconds_per_answer }));
            }
        }
        Ok(None)
    }
}

/// Returns tokens and seconds by the answer, over all passes; nothing where no adapter was trained.
fn rates(stages: &[StageReport]) -> Option<(f64, f64)> {
    let mut sums: BTreeMap<&str, (u64, u64, f64)> = BTreeMap::new();
    for stage in stages {
        let kind = stage.stage.split(' ').next().unwrap_or_default();
        let sum = sums.entry(kind).or_default();
        *sum = (sum.0 + stage.rows, sum.1 + stage.tokens, sum.2 + stage.seconds);
    }
    let (answers, tokens, _) = *sums.get("candidates").filter(|(answers, ..)| *answers > 0)?;
    let seconds: f64 = ["candidates", "rewards", "adapter"].iter().filter_map(|kind| Some(sums.get(kind)?.2)).sum();
    sums.contains_key("adapter").then(|| (tokens as f64 / answers as f64, seconds / answers as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_over_all_passes_and_only_of_rounds_that_trained() {
        let stage = |stage: &str, rows, tokens, seconds| StageReport {
            stage: stage.into(),
            rows,
            tokens,
            seconds,
            ended_us: 0,
        };
        let mut stages = vec![
            stage("dataset", 500, 0, 9.0),
            stage("candidates 1", 100, 3000, 50.0),
            stage("rewards 1", 100, 0, 5.0),
            stage("candidates 2", 100, 5000, 70.0),
        ];
        assert_eq!(rates(&stages), None);
        stages.push(stage("adapter 1", 60, 900, 75.0));
        assert_eq!(rates(&stages), Some((40.0, 1.0)));
    }
}
