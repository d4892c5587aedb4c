//! User feedback as a reward: how near an answer is to those to the same prompt that users rated.
//!
//! A rating belongs to the answer that somebody saw, and training's answers are new ones. So each rated answer votes for what it
//! was rated, with a weight that falls with the distance in meaning (a kernel regression; Nadaraya 1964, Watson 1964) and with a
//! vote of one half before all others: one thumb moves a score little, and an answer unlike any rated one gets one half. Prompts
//! that nobody rated get no score at all, and no prompt does in the gate, whose prompts are fresh. It is a signal among the answers
//! to one prompt. What it cannot see: why somebody was pleased, who did not say so, and whether nearness in meaning is what
//! pleased them.

use super::{Draft, Effort, Item, RewardError, Rewards, Scorer};

/// An answer that a user saw and rated.
#[derive(Debug, Clone, PartialEq)]
pub struct Rated {
    pub response: String,
    /// From 0, bad, to 1, good.
    pub score: f64,
}

/// Cosine below which a rated answer says nothing of another: two answers to one question, whatever they say, are that near.
const FLOOR: f64 = 0.5;

/// Weight of the vote for one half.
const PRIOR: f64 = 1.0;

/// Returns the score of an answer, in [0, 1], by the (cosine, rating) of each rated one.
fn vote(rated: impl Iterator<Item = (f64, f64)>) -> f64 {
    let (mut weights, mut sum) = (PRIOR, PRIOR * 0.5);
    for (cosine, rating) in rated {
        let weight = ((cosine - FLOOR) / (1.0 - FLOOR)).clamp(0.0, 1.0).powi(2);
        weights += weight;
        sum += weight * rating;
    }
    sum / weights
}

impl Rewards {
    /// Adds the score of each answer whose prompt has rated ones.
    pub(super) fn apply_feedback(
        &self,
        items: &[Item],
        drafts: &mut [Draft],
        effort: Effort,
    ) -> Result<(), RewardError> {
        let mut chosen = effort.chosen(items, drafts);
        chosen.retain(|(item, _)| !item.ratings.is_empty());
        let said = |rated: &Rated| self.settings.reasoning.answer(&rated.response).to_string();
        let answers = chosen.iter().map(|(item, _)| item.response.clone());
        let rated = chosen.iter().flat_map(|(item, _)| &item.ratings).map(said);
        let mut texts: Vec<String> = answers.chain(rated).collect();
        texts.sort_unstable();
        texts.dedup();
        let model = self.similarity_model()?;
        let embeddings = model.embed(&texts.iter().map(String::as_str).collect::<Vec<_>>())?;
        let embedding = |text: &str| texts.binary_search_by(|known| known.as_str().cmp(text)).map(|at| &embeddings[at]);
        let cosine = |a: &str, b: &str| match (embedding(a), embedding(b)) {
            (Ok(a), Ok(b)) => a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum(),
            // Every text was embedded.
            _ => 0.0,
        };
        for (item, draft) in &mut chosen {
            let rated = item.ratings.iter().map(|rated| (cosine(&item.response, &said(rated)), rated.score));
            let score = vote(rated);
            draft.graded(Scorer::Feedback.name(), score);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::record::{FinishReason, Message};

    #[test]
    fn near_ratings_vote_and_far_ones_are_silent() {
        let of = |rated: &[(f64, f64)]| vote(rated.iter().copied());
        assert_eq!((of(&[]), of(&[(0.5, 1.0)]), of(&[(-0.3, 0.0)])), (0.5, 0.5, 0.5));
        // The very answer: one vote beside the half.
        assert_eq!((of(&[(1.0, 1.0)]), of(&[(1.0, 0.0)]), of(&[(1.0, 1.0); 3])), (0.75, 0.25, 0.875));
        // Weight 0.25 at 0.75: (0.5 + 0.25) / 1.25.
        assert!((of(&[(0.75, 1.0)]) - 0.6).abs() < 1e-12);
        assert_eq!(of(&[(1.0, 1.0), (1.0, 0.0)]), 0.5, "a contested answer");
    }

    #[test]
    fn answers_are_ranked_by_what_users_rated_and_others_get_no_score() {
        let home = std::env::var("HOME").unwrap_or_default();
        let models = std::env::var("TAOD_MODELS").unwrap_or(format!("{home}/.cache/taod/models"));
        let folder = Path::new(&models).join("all-MiniLM-L6-v2");
        let required = std::env::var("TAOD_REQUIRE").is_ok_and(|list| list.split(',').any(|item| item == "models"));
        if !folder.exists() && !required {
            eprintln!("skipped: {} is not there", folder.display());
            return;
        }
        let toml = format!("train = ['feedback']\ngate = ['rules']\nsimilarity = {{ model = {folder:?} }}");
        let rewards = Rewards::without_base(&toml::from_str(&toml).unwrap(), &[]).unwrap();
        let rated = |response: &str, score| Rated { response: response.into(), score };
        let ratings = [
            rated("Prune the apple tree in late winter, while it is dormant.", 1.0),
            rated("I am sorry, but I cannot help with questions about gardening.", 0.0),
        ];
        let item = |response: &str, ratings: &[Rated]| Item {
            workload: None,
            messages: vec![Message::text("user", "When do I prune an apple tree?")],
            response: response.into(),
            finish_reason: FinishReason::Stop,
            prompt_ids: None,
            token_ids: None,
            ratings: ratings.to_vec(),
        };
        let answers = [
            item("Late winter is best for pruning apple trees, when they are dormant.", &ratings),
            item("The stock market closed lower on Tuesday.", &ratings),
            item("Sorry, I cannot help you with gardening questions.", &ratings),
            item("Late winter is best.", &[]),
        ];
        let scored = rewards.train(&answers).unwrap();
        let score = |at: usize| scored[at].parts.get("feedback").copied();
        assert!(score(0) > Some(0.6) && score(1) == Some(0.5) && score(2) < Some(0.4), "{scored:?}");
        assert_eq!((score(3), scored[3].total), (None, 1.0), "nobody rated an answer to it");
        let refused = toml::from_str::<super::super::Settings>("gate = ['rules', 'feedback']").unwrap().validate();
        assert!(refused.unwrap_err().contains("name it in train alone"));
    }
}
