//! Stop strings end a sample, and change nothing else of it.

use super::*;

/// Returns a stretch of a text that begins inside one token and ends inside a later one.
fn across(model: &Model, ids: &[u32]) -> String {
    let whole = model.tokenizer().decode(ids);
    let border = (5..20).map(|n| model.tokenizer().decode(&ids[..n]).len());
    let mut stretches = border.filter_map(|at| whole.get(at.checked_sub(1)?..at + 1));
    stretches.find(|text| text.is_ascii() && whole.matches(text).count() == 1).unwrap().to_string()
}

#[test]
fn a_stop_string_across_tokens_ends_a_sample_and_leaves_its_draws_alone() {
    let model = load(&fixture("tiny-llama"));
    let free = &sample(&model, vec![group(3, &[5, 6, 7], 6, 40)], 64)[0];
    let stop = across(&model, &free[0].token_ids);
    let mut stopping = group(3, &[5, 6, 7], 6, 40);
    stopping.sampling.stop = vec!["never said".into(), stop.clone()];
    let stopped = &sample(&model, vec![stopping], 64)[0];
    for (free, stopped) in free.iter().zip(stopped) {
        let n = stopped.token_ids.len();
        assert_eq!(stopped.token_ids, free.token_ids[..n]);
        assert_eq!(
            (&stopped.logprobs[..], &stopped.sampler_logprobs[..]),
            (&free.logprobs[..n], &free.sampler_logprobs[..n])
        );
        let Some(at) = free.text.find(&stop) else {
            assert_eq!(stopped, free);
            continue;
        };
        assert_eq!((&stopped.text[..], stopped.finish_reason), (&free.text[..at], FinishReason::Stop));
        assert_eq!(stopped.stop_string.as_ref(), Some(&stop));
        // The last token is the one that completed it: without it the string does not stand there.
        assert!(!model.tokenizer().decode(&stopped.token_ids[..n - 1]).contains(&stop));
    }
    assert_eq!(stopped[0].stop_string.as_ref(), Some(&stop));
}

#[test]
fn a_stop_string_at_the_limit_of_tokens_counts_as_a_stop() {
    let model = load(&fixture("tiny-llama"));
    let free = &sample(&model, vec![group(3, &[5, 6, 7], 1, 40)], 64)[0][0];
    let stop = across(&model, &free.token_ids);
    let needed = (1..).find(|n| model.tokenizer().decode(&free.token_ids[..*n]).contains(&stop)).unwrap();
    let mut stopping = group(3, &[5, 6, 7], 1, needed);
    stopping.sampling.stop = vec![stop];
    assert_eq!(sample(&model, vec![stopping], 64)[0][0].finish_reason, FinishReason::Stop);
    let mut empty = group(3, &[5, 6, 7], 1, 4);
    empty.sampling.stop = vec![String::new()];
    let error = Batcher::new(exact(&model), BatchLimits::default()).unwrap().push(empty).unwrap_err().to_string();
    assert!(error.contains("stop holds an empty string"), "{error}");
}
