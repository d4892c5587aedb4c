//! The gate's independent guardrail: how natural the frozen base model finds an answer to the bare question.
//!
//! The measure is the mean log-prob of the answer's tokens after the prompt without the house rules. No reward computes
//! it, and form alone cannot raise it: an answer that shrank to a phrase, or that repeats what the rules ask for, becomes
//! less likely as an answer to the question.

use super::{Item, RewardError, Workload};
use crate::engine::{EngineError, Model, ScoreItem, logprobs};
use crate::record::FinishReason;

/// Returns the mean log-prob per token, in nats, of each answer under `base`. `workload_of` finds whose house rules to
/// take out of an item's prompt.
pub(super) fn mean_logprobs<'a>(
    base: &Model,
    items: &[Item],
    workload_of: impl Fn(&Item) -> Option<&'a Workload>,
) -> Result<Vec<f64>, RewardError> {
    let tokens = |item: &Item| tokenise(base, item, workload_of(item));
    let pairs: Vec<(Vec<u32>, Vec<u32>)> = items.iter().map(tokens).collect::<Result<_, _>>()?;
    if let Some(index) = pairs.iter().position(|(_, completion)| completion.is_empty()) {
        return Err(RewardError::NoTokens { index });
    }
    let scored: Vec<ScoreItem> = pairs.iter().map(|(prompt, completion)| ScoreItem { prompt, completion }).collect();
    Ok(logprobs(base, None, &scored)?.iter().map(|tokens| mean(tokens)).collect())
}

/// Returns the ids of the prompt without house rules, and of the answer. Ids win over text.
fn tokenise(base: &Model, item: &Item, workload: Option<&Workload>) -> Result<(Vec<u32>, Vec<u32>), EngineError> {
    let prompt = match workload {
        Some(workload) => base.prompt_ids(&workload.strip(&item.messages), None)?,
        None => base.prompt_ids(&item.messages, None)?,
    };
    let completion = match &item.token_ids {
        Some(ids) => ids.clone(),
        None => base.tokenizer().answer_ids(&item.response, item.finish_reason == FinishReason::Stop)?,
    };
    Ok((prompt, completion))
}

fn mean(logprobs: &[f32]) -> f64 {
    logprobs.iter().copied().map(f64::from).sum::<f64>() / logprobs.len() as f64
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_mean_is_per_token() {
        assert_eq!(super::mean(&[-1.0, -2.0, -6.0]), -3.0);
    }
}
