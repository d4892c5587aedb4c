//! Decoders that end in one number: reward models in Hugging Face's layout for sequence classification.
//!
//! Such a model is a decoder whose output layer is one row, `score.weight`. Its number is read at the last token that is
//! no padding, where transformers reads it. Texts of any length go through one pass side by side, without padding, and
//! texts that begin alike (the answers to one prompt) read what they share once. What is shared ends at the border of a
//! cache page, so that a text gets the same bits alone and in any company.

use std::sync::Arc;

use super::cache::{BLOCK, Cache, Pool, Segment};
use super::error::EngineError;
use super::held::Hold;
use super::model::{Model, ModelIdentity};
use super::sampler::check_tokens;
use super::score::read;
use super::source::ModelSource;
use super::weights::Output;
use crate::record::Message;

/// Tokens whose keys and values are held at once.
const HELD: usize = 2048;
/// Tokens in common below which reading them once is not worth its bookkeeping.
const WORTH_SHARING: usize = 2 * BLOCK;

/// A decoder with a scalar head. Cloning shares it.
#[derive(Debug, Clone)]
pub struct SequenceClassifier {
    model: Model,
    /// The id that transformers takes for padding, wherever it stands at the end of a text.
    padding: Option<u32>,
}

impl SequenceClassifier {
    /// Loads a `...ForSequenceClassification` of one label of a supported decoder family, as f32 on the CPU. `model` is a
    /// folder in Hugging Face layout or a hub id; a GGUF file keeps no such head.
    pub fn load(model: &str) -> Result<Self, EngineError> {
        let source = ModelSource::parse(model)?;
        let files = source.resolve()?;
        let mut config = files.config()?;
        // Gemma 2 bends the logits of its vocabulary, never a score.
        config.logit_cap = None;
        let padding = files.json("config.json")?["pad_token_id"].as_u64().map(|id| id as u32);
        let model = Model::assemble(&source, &files, config, Output::Score, Hold::F32, None)?;
        Ok(SequenceClassifier { model, padding })
    }

    /// Returns the name and the hashes.
    pub fn identity(&self) -> &ModelIdentity {
        self.model.identity()
    }

    /// Returns the longest text, in tokens.
    pub fn max_tokens(&self) -> usize {
        self.model.config().max_positions
    }

    /// Returns the token ids of a whole conversation.
    pub fn conversation_ids(&self, messages: &[Message]) -> Result<Vec<u32>, EngineError> {
        self.model.conversation_ids(messages)
    }

    /// Returns the token ids of a plain text, with the tokenizer's special tokens around it.
    pub fn text_ids(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        self.model.tokenizer().encode_whole(text)
    }

    /// Returns the raw score of each text: unbounded, and comparable between answers to one prompt only.
    pub fn score(&self, texts: &[&[u32]]) -> Result<Vec<f32>, EngineError> {
        for text in texts {
            check_tokens(&self.model, text)?;
            if text.is_empty() {
                return Err(EngineError::request("a text to score has no tokens; leave it out"));
            }
            if text.len() > self.max_tokens() {
                return Err(EngineError::PromptTooLong { tokens: text.len(), context: self.max_tokens() });
            }
        }
        // Nothing after the token that is read changes what stands there.
        let texts: Vec<&[u32]> = texts.iter().map(|text| &text[..=self.pooled(text)]).collect();
        let decoder = self.model.decoder()?;
        let pool = Pool::new(decoder.shape());
        let mut scores = vec![0.0; texts.len()];
        for batch in batches(families(&texts), &texts) {
            let rows = self.last_rows(&batch, &texts, &pool)?;
            let product = decoder.logits(&rows, Vec::new());
            let mut row = Vec::new();
            for (at, member) in batch.iter().flat_map(|family| &family.members).enumerate() {
                product.read_row(at, &mut row);
                scores[*member] = row[0];
            }
        }
        Ok(scores)
    }

    /// Returns the place of the last token that is no padding; the first where all are.
    fn pooled(&self, text: &[u32]) -> usize {
        match self.padding {
            Some(padding) => text.iter().rposition(|id| *id != padding).unwrap_or(0),
            None => text.len() - 1,
        }
    }

    /// Returns the normed hidden row of each text's last token, family after family.
    fn last_rows(&self, batch: &[Family], texts: &[&[u32]], pool: &Pool) -> Result<Vec<f32>, EngineError> {
        let decoder = self.model.decoder()?;
        let prefixes: Vec<&[u32]> = batch.iter().map(|family| &texts[family.members[0]][..family.prefix]).collect();
        let mut shared: Vec<Cache> = batch.iter().map(|_| Cache::new(decoder.shape())).collect();
        read(decoder, None, &mut shared, &prefixes, pool, |_, _, _| {});
        let shared: Vec<Arc<Segment>> = shared.iter_mut().map(Cache::take_prefix).collect();
        let members = || {
            batch
                .iter()
                .zip(&shared)
                .flat_map(|(family, segment)| family.members.iter().map(move |m| (family, segment, *m)))
        };
        let mut caches: Vec<Cache> = members().map(|(_, segment, _)| Cache::after(segment)).collect();
        let rest: Vec<&[u32]> = members().map(|(family, _, member)| &texts[member][family.prefix..]).collect();
        drop(shared);
        let mut last = vec![0.0; rest.len() * decoder.hidden_size()];
        read(decoder, None, &mut caches, &rest, pool, |i, place, row| {
            if place + 1 == rest[i].len() {
                last[i * row.len()..][..row.len()].copy_from_slice(row);
            }
        });
        Ok(last)
    }
}

/// Texts that begin with the same `prefix` tokens.
struct Family {
    prefix: usize,
    members: Vec<usize>,
}

/// Groups texts by what they begin with; each keeps at least one token of its own.
fn families(texts: &[&[u32]]) -> Vec<Family> {
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by(|a, b| texts[*a].cmp(texts[*b]).then(a.cmp(b)));
    let mut families: Vec<Family> = Vec::new();
    for i in order {
        if let Some(family) = families.last_mut() {
            let first = texts[family.members[0]];
            let most = first.len().min(texts[i].len()) - 1;
            let alike = first.iter().zip(texts[i]).take(most).take_while(|(a, b)| a == b).count();
            let alone = family.members.len() == 1;
            let prefix = if alone { alike } else { alike.min(family.prefix) };
            let prefix = prefix - prefix % BLOCK;
            // Taking in a text that shares little would make all the others read more.
            if prefix >= WORTH_SHARING && (alone || 2 * prefix >= family.prefix) {
                family.prefix = prefix;
                family.members.push(i);
                continue;
            }
        }
        families.push(Family { prefix: 0, members: vec![i] });
    }
    families.iter_mut().filter(|family| family.members.len() == 1).for_each(|family| family.prefix = 0);
    families
}

/// Cuts families into batches of about [`HELD`] tokens. One that is larger is read in parts, its beginning again in each.
fn batches(families: Vec<Family>, texts: &[&[u32]]) -> Vec<Vec<Family>> {
    let mut batches: Vec<Vec<Family>> = Vec::new();
    let mut held = usize::MAX;
    for Family { prefix, members } in families {
        let mut open = false;
        for member in members {
            let own = texts[member].len() - prefix;
            let more = if open { own } else { prefix + own };
            if held.saturating_add(more) > HELD {
                batches.push(Vec::new());
                (held, open) = (0, false);
            }
            held += if open { own } else { prefix + own };
            let Some(batch) = batches.last_mut() else { continue };
            match batch.last_mut().filter(|_| open) {
                Some(family) => family.members.push(member),
                None => batch.push(Family { prefix, members: vec![member] }),
            }
            open = true;
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(texts: &[Vec<u32>]) -> Vec<(usize, Vec<usize>)> {
        let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        families(&texts).into_iter().map(|family| (family.prefix, family.members)).collect()
    }

    /// A text of `len` tokens that differs from others from `at` on.
    fn text(start: u32, at: usize, own: u32, len: usize) -> Vec<u32> {
        (0..len).map(|i| if i < at { start } else { own }).collect()
    }

    #[test]
    fn texts_that_begin_alike_share_whole_pages_and_keep_a_token() {
        let alike = [text(1, 50, 2, 60), text(5, 0, 5, 60), text(1, 50, 3, 70)];
        assert_eq!(plan(&alike), [(48, vec![0, 2]), (0, vec![1])]);
        // The shorter is the beginning of the longer, and the same text comes twice.
        let inside = [text(1, 0, 1, 48), text(1, 0, 1, 90), text(1, 0, 1, 48)];
        assert_eq!(plan(&inside), [(32, vec![0, 2, 1])]);
        assert_eq!(plan(&[text(1, 20, 2, 60), text(1, 20, 3, 60)]), [(0, vec![0]), (0, vec![1])]);
    }

    #[test]
    fn a_text_that_shares_little_is_left_out() {
        let texts = [text(1, 400, 2, 500), text(1, 400, 3, 500), text(1, 40, 4, 500)];
        assert_eq!(plan(&texts), [(400, vec![0, 1]), (0, vec![2])]);
    }

    #[test]
    fn batches_hold_every_text_once_and_stay_small() {
        let texts: Vec<Vec<u32>> = (0..9).map(|i| text(1, 480, 2 + i, 900)).chain([text(7, 0, 7, 1900)]).collect();
        let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        let batches = batches(families(&texts), &texts);
        let held = |batch: &Vec<Family>| -> usize {
            let own = |family: &Family| family.members.iter().map(|m| texts[*m].len() - family.prefix).sum::<usize>();
            batch.iter().map(|family| family.prefix + own(family)).sum()
        };
        assert!(batches.iter().all(|batch| held(batch) <= HELD && !batch.is_empty()));
        let mut members: Vec<usize> = batches.iter().flatten().flat_map(|family| family.members.clone()).collect();
        members.sort();
        assert_eq!(members, (0..10).collect::<Vec<_>>());
        assert_eq!(batches.len(), 4);
    }
}
