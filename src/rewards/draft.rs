//! What the scorers say of one answer, before it is one number: each adds its score, rules first, and what a failed hard rule
//! has settled is not computed.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::rules::{Answer, text};
use super::scorer::Scale;
use super::workload::NamedCheck;
use super::{Item, RewardError, Rewards, Scorer};
use crate::record::Message;

/// Words at which shortness is worth one half.
const BREVITY_WORDS: f64 = 20.0;

/// How much is computed for an answer that a hard rule has already failed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Effort {
    /// Only what can still change the total.
    Needed,
    /// Every part.
    Full,
    /// Every part, and no score that was kept.
    Anew,
}

impl Effort {
    /// Returns the answers that are worth a forward pass.
    pub(super) fn chosen<'a>(self, items: &'a [Item], drafts: &'a mut [Draft]) -> Vec<(&'a Item, &'a mut Draft)> {
        items.iter().zip(drafts).filter(|(_, draft)| self != Effort::Needed || !draft.failed).collect()
    }
}

/// A graded score before calibration.
pub(super) struct Graded {
    pub(super) part: String,
    pub(super) raw: f64,
    pub(super) scale: Scale,
}

/// Scores of one answer while scorers add theirs.
#[derive(Default)]
pub(super) struct Draft {
    pub(super) failed: bool,
    pub(super) parts: BTreeMap<String, f64>,
    pub(super) graded: Vec<Graded>,
}

impl Draft {
    pub(super) fn graded(&mut self, part: &str, score: f64) {
        self.scaled(part, score, Scale::Share);
    }

    pub(super) fn scaled(&mut self, part: &str, raw: f64, scale: Scale) {
        self.parts.insert(part.to_owned(), raw);
        self.graded.push(Graded { part: part.to_owned(), raw, scale });
    }

    fn brevity(&mut self, item: &Item) {
        let words = text::words(&item.response).count() as f64;
        self.graded(Scorer::Brevity.name(), 1.0 / (1.0 + words / BREVITY_WORDS));
    }
}

impl Rewards {
    pub(super) fn drafts(&self, scorers: &[Scorer], items: &[Item], effort: Effort) -> Result<Vec<Draft>, RewardError> {
        let items = &self.without_thoughts(items);
        let mut drafts: Vec<Draft> = items.iter().map(|_| Draft::default()).collect();
        // Rules go first: they are cheap, and a failed hard one makes dearer scores needless.
        if scorers.contains(&Scorer::Rules) {
            for (index, (item, draft)) in items.iter().zip(&mut drafts).enumerate() {
                self.apply_rules(index, item, draft)?;
            }
        }
        for scorer in scorers {
            match scorer {
                Scorer::Rules => {}
                Scorer::Brevity => items.iter().zip(&mut drafts).for_each(|(item, draft)| draft.brevity(item)),
                Scorer::Similarity => self.apply_similarity(items, &mut drafts, effort)?,
                Scorer::Feedback => self.apply_feedback(items, &mut drafts, effort)?,
                Scorer::Defined(name) => self.apply_defined(name, items, &mut drafts, effort)?,
            }
        }
        Ok(drafts)
    }

    /// Returns the items with what is an answer of each; ids and all else stay.
    pub(super) fn without_thoughts<'a>(&self, items: &'a [Item]) -> Cow<'a, [Item]> {
        let answer = |item: &Item| self.settings.reasoning.answer(&item.response).to_string();
        match items.iter().all(|item| answer(item) == item.response) {
            true => Cow::Borrowed(items),
            false => items.iter().map(|item| Item { response: answer(item), ..item.clone() }).collect(),
        }
    }

    fn apply_rules(&self, index: usize, item: &Item, draft: &mut Draft) -> Result<(), RewardError> {
        let found = self.workloads.find(item.workload.as_deref()).filter(|(_, checks)| !checks.is_empty());
        let Some((_, checks)) = found else {
            return Err(RewardError::NoRules { index, workload: item.workload.clone().unwrap_or_default() });
        };
        let prompt = item.messages.iter().map(Message::plain_text).collect::<Vec<_>>().join("\n");
        let answer = Answer { text: &item.response, finish_reason: item.finish_reason, prompt: &prompt };
        for NamedCheck { part, hard, check } in checks {
            let credit = check.credit(&answer);
            if *hard {
                let passed = credit >= 1.0;
                draft.failed |= !passed;
                draft.parts.insert(part.clone(), f64::from(u8::from(passed)));
            } else {
                draft.graded(part, credit);
            }
        }
        Ok(())
    }

    fn apply_similarity(&self, items: &[Item], drafts: &mut [Draft], effort: Effort) -> Result<(), RewardError> {
        let mut chosen = effort.chosen(items, drafts);
        let pairs: Vec<_> = chosen.iter().map(|(item, _)| (self.question(item), item.response.clone())).collect();
        let scores = self.similarity(&pairs)?;
        for ((_, draft), score) in chosen.iter_mut().zip(scores) {
            draft.graded(Scorer::Similarity.name(), score);
        }
        Ok(())
    }

    fn apply_defined(
        &self,
        name: &str,
        items: &[Item],
        drafts: &mut [Draft],
        effort: Effort,
    ) -> Result<(), RewardError> {
        let Some(loaded) = self.defined.iter().find(|loaded| loaded.name == name) else { return Ok(()) };
        let mut chosen = effort.chosen(items, drafts);
        let asked: Vec<&Item> = chosen.iter().map(|(item, _)| *item).collect();
        let scores = if effort == Effort::Anew { loaded.score_anew(&asked)? } else { loaded.score(&asked)? };
        for ((_, draft), score) in chosen.iter_mut().zip(scores) {
            draft.scaled(name, score, loaded.scale());
        }
        Ok(())
    }
}
