//! Drawing on this machine: every prompt in every way that is asked for, in one batch.

use super::{Candidate, CandidateError, Formats, PLAIN, Strategy, Stream};
use crate::dataset::Prompt;
use crate::engine::{BatchLimits, Batcher, Completion, Group, Model, Policy, SamplingSettings};
use crate::progress::Step;
use crate::record::{FinishReason, derive_seed};

/// How much is drawn, and how.
#[derive(Debug, Clone)]
pub struct Draw {
    /// Answers to each prompt.
    pub samples: usize,
    pub sampling: SamplingSettings,
    pub limits: BatchLimits,
    /// Further answers, drawn in other ways.
    pub strategies: Vec<Strategy>,
    /// Workloads whose answers must be something; an answer that stands after reasoning is free.
    pub formats: Formats,
}

/// What one prompt is asked in one way.
struct Ask<'a> {
    /// The prompt's place.
    owner: usize,
    strategy: Option<&'a Strategy>,
    /// The number of its first sample among all of the prompt's.
    first: usize,
    /// The prompt as clients send it, which is what is trained.
    prompt_ids: Vec<u32>,
    group: Group,
}

/// Draws answers to each prompt and returns them prompt by prompt; prompts that do not fit the context give none.
pub fn draw(
    policy: &Policy,
    prompts: &[&Prompt],
    how: &Draw,
    stream: Stream<'_>,
    step: &mut Step,
) -> Result<Vec<Vec<Candidate>>, CandidateError> {
    Ok(draw_sides(&[(policy, stream)], prompts, how, step)?.into_iter().flatten().collect())
}

/// Draws answers to the same prompts from each of several policies on the same weights, all in one batch, and returns them side by
/// side: each is what [`draw()`] gives it alone, to the same bits, because a sample depends on nothing beside it.
pub fn draw_sides(
    sides: &[(&Policy, Stream<'_>)],
    prompts: &[&Prompt],
    how: &Draw,
    step: &mut Step,
) -> Result<Vec<Vec<Vec<Candidate>>>, CandidateError> {
    let Some((first, _)) = sides.first() else { return Ok(Vec::new()) };
    let mut batcher = Batcher::new((*first).clone(), how.limits.clone())?;
    draw_on(&mut batcher, sides, prompts, how, step)
}

/// Draws as [`draw_sides`] does, in a batch that may remember earlier prompts.
pub(super) fn draw_on(
    batcher: &mut Batcher,
    sides: &[(&Policy, Stream<'_>)],
    prompts: &[&Prompt],
    how: &Draw,
    step: &mut Step,
) -> Result<Vec<Vec<Vec<Candidate>>>, CandidateError> {
    let mut asks = Vec::new();
    // The sides of a prompt follow each other, so that they begin and end at about the same time.
    for (owner, prompt) in prompts.iter().enumerate() {
        for (side, (policy, stream)) in sides.iter().enumerate() {
            asks.extend(plan(policy.model(), owner, prompt, how, *stream)?.into_iter().map(|ask| (side, ask)));
        }
    }
    let groups = asks.iter().map(|(side, ask)| (sides[*side].0.clone(), ask.group.clone())).collect();
    let completions = batcher.drain(groups, &mut |_, _, done| step.advance(done.token_ids.len() as u64, ""))?;

    let mut drawn = vec![vec![Vec::new(); prompts.len()]; sides.len()];
    for ((side, ask), group) in asks.iter().zip(completions) {
        let (policy, stream) = sides[*side];
        for (sample, done) in group.into_iter().enumerate() {
            drawn[*side][ask.owner].extend(candidate(policy, prompts[ask.owner], ask, sample, done, stream)?);
        }
    }
    Ok(drawn)
}

/// Returns true where a prompt fits the context with its answer.
pub(super) fn fits(model: &Model, tokens: usize, sampling: &SamplingSettings) -> bool {
    tokens + sampling.max_tokens <= model.config().max_positions
}

/// Returns all ways in which a prompt is asked; those that the template refuses, or that do not fit the context or the
/// cache with their answer, are left out.
fn plan<'a>(
    model: &Model,
    owner: usize,
    prompt: &Prompt,
    how: &'a Draw,
    stream: Stream<'_>,
) -> Result<Vec<Ask<'a>>, CandidateError> {
    let Some(prompt_ids) = model.readable_ids(&prompt.messages, prompt.tools.as_ref())? else {
        return Ok(Vec::new());
    };
    let fits = |ids: &[u32]| {
        let tokens = ids.len();
        fits(model, tokens, &how.sampling) && how.limits.check(model, tokens, how.sampling.max_tokens).is_ok()
    };
    let mut asks = Vec::new();
    let mut first = 0;
    for strategy in std::iter::once(None).chain(how.strategies.iter().map(Some)) {
        let (asked, sampling, samples) = match strategy {
            None => (prompt_ids.clone(), how.sampling.clone(), how.samples),
            Some(s) => {
                let Some(asked) = model.readable_ids(&s.messages(&prompt.messages), prompt.tools.as_ref())? else {
                    first += s.samples;
                    continue;
                };
                (asked, s.sampling(&how.sampling), s.samples)
            }
        };
        let reasons = strategy.is_some_and(|strategy| strategy.answer_after.is_some());
        let format = prompt.workload.as_ref().and_then(|workload| how.formats.get(workload)).filter(|_| !reasons);
        if fits(&prompt_ids) && fits(&asked) {
            let seed = |k: usize| {
                let place = [stream.name, stream.sampler, &prompt.prompt_hash, &k.to_string()];
                derive_seed(stream.seed, &place)
            };
            let group = Group {
                id: owner as u64,
                prompt: asked,
                seeds: (first..first + samples).map(seed).collect(),
                sampling: SamplingSettings { grammar: format.cloned(), ..sampling },
            };
            asks.push(Ask { owner, strategy, first, prompt_ids: prompt_ids.clone(), group });
        }
        first += samples;
    }
    Ok(asks)
}

/// Returns the candidate that a completion is, or none where the strategy finds no answer in it.
fn candidate(
    policy: &Policy,
    prompt: &Prompt,
    ask: &Ask<'_>,
    sample: usize,
    done: Completion,
    stream: Stream<'_>,
) -> Result<Option<Candidate>, CandidateError> {
    let mut candidate = Candidate {
        prompt_hash: prompt.prompt_hash.clone(),
        cluster: prompt.cluster.clone(),
        workload: prompt.workload.clone(),
        sample: ask.first + sample,
        seed: ask.group.seeds[sample],
        sampler: stream.sampler.to_string(),
        strategy: ask.strategy.map_or(PLAIN, |strategy| &strategy.name).to_string(),
        text: done.text,
        prompt_ids: ask.prompt_ids.clone(),
        token_ids: done.token_ids,
        logprobs: done.logprobs,
        sampler_logprobs: done.sampler_logprobs,
        finish_reason: done.finish_reason,
        approximate: !policy.is_exact(),
    };
    let Some(strategy) = ask.strategy.filter(|strategy| !strategy.asks_plainly()) else { return Ok(Some(candidate)) };
    let Some(answer) = strategy.answer(&candidate.text).map(str::to_string) else { return Ok(None) };
    // Drawn after another prompt, or cut out of more: as an answer to this prompt it was never drawn.
    let finished = candidate.finish_reason == FinishReason::Stop;
    candidate.token_ids = policy.model().tokenizer().answer_ids(&answer, finished)?;
    candidate.text = answer;
    candidate.logprobs.clear();
    candidate.sampler_logprobs.clear();
    Ok(Some(candidate))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::engine::WeightForm;
    use crate::progress::Progress;
    use crate::record::Message;

    fn prompt(text: &str) -> Prompt {
        let message = Message::text("user", text);
        serde_json::from_value(serde_json::json!({
            "prompt_hash": text, "cluster": "c", "workload": null, "tenant": null, "messages": [message], "tools": null,
            "first_seen": {"topic": "t", "partition": 0, "offset": 0, "record_index": 0}, "event_time_us": 0, "count": 1,
        }))
        .unwrap()
    }

    fn strategy(name: &str, temperature: Option<f64>, system: Option<&str>, mark: Option<&str>) -> Strategy {
        let owned = |text: Option<&str>| text.map(str::to_string);
        let (system, answer_after) = (owned(system), owned(mark));
        Strategy { name: name.into(), samples: 2, temperature, system, answer_after }
    }

    fn model() -> Model {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/tiny-llama");
        Model::load(&path.display().to_string()).unwrap()
    }

    fn drawn(strategies: Vec<Strategy>, max_tokens: usize) -> (Model, Vec<Candidate>) {
        let model = model();
        let policy = Policy::new(&model, None, WeightForm::F32).unwrap();
        let sampling = SamplingSettings { max_tokens, ..SamplingSettings::default() };
        let limits = BatchLimits { max_sequences: 4, ..BatchLimits::default() };
        let how = Draw { samples: 3, sampling, limits, strategies, formats: Formats::new() };
        let stream = Stream { seed: 5, name: "train/1", sampler: "base" };
        let (prompt, mut step) = (prompt("why"), Progress::silent().step("draw", 0, "tokens"));
        let candidates = draw(&policy, &[&prompt], &how, stream, &mut step).unwrap().remove(0);
        (model, candidates)
    }

    #[test]
    fn strategies_add_answers_and_leave_the_plain_ones_as_they_are() {
        let plain = drawn(Vec::new(), 12).1;
        let put = |name| strategy(name, None, Some("Answer {system} briefly."), None);
        let (model, all) = drawn(vec![strategy("hot", Some(1.7), None, None), put("brief")], 12);
        assert_eq!(all[..3], plain[..]);
        let names: Vec<(&str, usize)> = all.iter().map(|c| (c.strategy.as_str(), c.sample)).collect();
        let expected = [(PLAIN, 0), (PLAIN, 1), (PLAIN, 2), ("hot", 3), ("hot", 4), ("brief", 5), ("brief", 6)];
        assert_eq!(names, expected);
        let seeds: std::collections::BTreeSet<u64> = all.iter().map(|c| c.seed).collect();
        assert_eq!(seeds.len(), all.len());
        // A hot answer is still one to this prompt; one after another system prompt was never drawn as such.
        assert!(all[3..5].iter().all(|c| c.logprobs.len() == c.token_ids.len() && c.sampler_logprobs != c.logprobs));
        for brief in &all[5..] {
            assert_eq!(brief.prompt_ids, all[0].prompt_ids);
            assert!(brief.logprobs.is_empty() && brief.sampler_logprobs.is_empty());
            let finished = brief.finish_reason == FinishReason::Stop;
            assert_eq!(brief.token_ids, model.tokenizer().answer_ids(&brief.text, finished).unwrap());
        }
    }

    #[test]
    fn answers_of_a_workload_with_a_format_keep_it_and_tell_what_they_were_drawn_from() {
        let model = model();
        let schema =
            serde_json::json!({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]});
        let formats =
            Formats::from([("json".to_string(), crate::engine::Grammar::json_schema(&model, &schema).unwrap())]);
        let policy = Policy::new(&model, None, WeightForm::F32).unwrap();
        let sampling = SamplingSettings { max_tokens: 60, ..SamplingSettings::default() };
        let strategies = vec![strategy("think", None, None, Some("no model says this"))];
        let how = Draw { samples: 3, sampling, limits: BatchLimits::default(), strategies, formats };
        let stream = Stream { seed: 5, name: "train/1", sampler: "base" };
        let ruled = Prompt { workload: Some("json".into()), ..prompt("why") };
        let mut step = Progress::silent().step("draw", 0, "tokens");
        let all = draw(&policy, &[&ruled, &prompt("why")], &how, stream, &mut step).unwrap();
        for candidate in &all[0] {
            assert!(candidate.text.starts_with('{'), "{:?}", candidate.text);
            let log_probs = candidate.logprobs.iter().zip(&candidate.sampler_logprobs);
            assert!(log_probs.clone().all(|(own, drawn)| *drawn >= own - 1e-4), "{candidate:?}");
            assert!(log_probs.clone().any(|(own, drawn)| *drawn > own + 0.1), "{candidate:?}");
        }
        for free in &all[1] {
            let mut log_probs = free.logprobs.iter().zip(&free.sampler_logprobs);
            assert!(log_probs.all(|(own, drawn)| (own - drawn).abs() < 1e-4), "{free:?}");
        }
        let settings = super::super::Settings { follow_json_rules: true, ..Default::default() };
        assert!(settings.off_policy().unwrap().contains("follow_json_rules"));
    }

    #[test]
    fn two_sides_in_one_batch_answer_as_each_does_alone() {
        let model = model();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/tiny-llama-lora");
        let adapter = crate::engine::Adapter::load(&folder, &model).unwrap();
        let challenger = Policy::new(&model, Some(&adapter), WeightForm::F32).unwrap();
        let incumbent = Policy::new(&model, None, WeightForm::F32).unwrap();
        let stream = |name, sampler| Stream { seed: 5, name, sampler };
        let sides = [(&challenger, stream("gate/t/new", "new")), (&incumbent, stream("gate/t/incumbent", "base"))];
        let prompts = ["why", "tell me of the sea and of what lives in it", "sum 3 and 4", "who are you?", "why not"];
        let prompts = prompts.map(prompt);
        let prompts: Vec<&Prompt> = prompts.iter().collect();
        for max_sequences in [64, 3] {
            let limits = BatchLimits { max_sequences, ..BatchLimits::default() };
            let sampling = SamplingSettings { temperature: 0.7, max_tokens: 24, ..SamplingSettings::default() };
            let how = Draw { samples: 2, sampling, limits, strategies: Vec::new(), formats: Formats::new() };
            let mut step = Progress::silent().step("draw", 0, "tokens");
            let together = draw_sides(&sides, &prompts, &how, &mut step).unwrap();
            let alone = sides.map(|(policy, stream)| draw(policy, &prompts, &how, stream, &mut step).unwrap());
            assert_eq!(together, alone);
            // The test could not fail if both sides said the same.
            let texts = |side: &[Vec<Candidate>]| side.concat().into_iter().map(|c| c.text).collect::<Vec<_>>();
            assert_ne!(texts(&together[0]), texts(&together[1]));
        }
    }

    #[test]
    fn an_answer_without_the_mark_is_thrown_away() {
        let (_, all) = drawn(vec![strategy("think", None, None, Some("no model says this"))], 12);
        assert_eq!(all.len(), 3);
        assert!(all.iter().all(|c| c.strategy == PLAIN));
    }
}
