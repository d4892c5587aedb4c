//! The memory of keys and values: kept within its bound, shared by prompts that begin alike, and never a reason for other
//! answers.

use super::*;

fn limits(cache_mib: usize, max_rows: usize) -> BatchLimits {
    BatchLimits { max_sequences: 64, max_rows, cache_mib }
}

/// Runs a batch until it is empty, looking at it after each step.
fn run(batcher: &mut Batcher, mut look: impl FnMut(&Batcher, &[Event])) -> Vec<(u64, usize, Completion)> {
    let mut done = Vec::new();
    while !batcher.is_empty() {
        let events = batcher.step().unwrap();
        look(batcher, &events);
        for event in events {
            if let Event::Done { group, sample, completion } = event {
                done.push((group, sample, completion));
            }
        }
    }
    done.sort_by_key(|(group, sample, _)| (*group, *sample));
    done
}

/// Prompts that begin with the same 100 tokens.
fn alike(id: u64) -> Group {
    let own = 200 + 20 * id as u32;
    group(id, &(3..103).chain(own..own + 20).collect::<Vec<u32>>(), 3, 25)
}

#[test]
fn the_memory_stays_within_its_bound_and_the_answers_are_the_same() {
    let model = load(&fixture("tiny-llama"));
    // A page of this model takes 8 KiB, so 128 of them are all that 1 MiB holds; a prompt with one answer may take 23.
    let groups = || (0..4).map(|id| group(id, &(3..60 + id as u32).collect::<Vec<_>>(), 8, 300));
    let answers = |cache_mib: usize| {
        let mut batcher = Batcher::new(exact(&model), limits(cache_mib, 512)).unwrap();
        groups().for_each(|group| batcher.push(group).unwrap());
        let (mut most, mut together) = (0, 0);
        let done = run(&mut batcher, |batcher, events| {
            most = most.max(batcher.cache_bytes());
            together = together.max(events.iter().filter(|e| matches!(e, Event::Token { .. })).count());
        });
        (done, most, together)
    };
    let (free, unbound, all) = answers(1024);
    let (tight, bound, few) = answers(1);
    assert!(unbound > 1 << 20, "the bound must matter: {unbound}");
    assert!(bound <= 1 << 20 && bound > 1 << 19, "{bound}");
    assert!(few < all && few > 2, "{few} of {all} sequences at once");
    assert_eq!(tight, free);
}

#[test]
fn what_cannot_fit_is_refused_with_what_it_needs() {
    let model = load(&fixture("tiny-gemma3"));
    let page = Shape::new(model.config()).page_bytes();
    let (prompt, new) = (40, 200);
    let needed = 16 * page;
    assert!(needed < 1 << 20, "{needed}");
    let none = BatchLimits { cache_mib: 0, ..BatchLimits::default() };
    let error = none.check(&model, prompt, new).unwrap_err().to_string();
    assert!(error.starts_with("a prompt of 40 tokens and an answer of up to 200 need 1 MiB of keys"), "{error}");
    assert!(error.contains("more than cache_mib = 0; raise it"), "{error}");
    let mut batcher = Batcher::new(exact(&model), none).unwrap();
    assert_eq!(batcher.push(group(0, &[5; 40], 1, 200)).unwrap_err().to_string(), error);
    assert!(limits(1, 512).check(&model, prompt, new).is_ok());
}

#[test]
fn prompts_that_begin_alike_read_their_beginning_once() {
    let model = load(&fixture("tiny-llama"));
    let alone: Vec<Vec<Completion>> = (0..5).map(|id| sample(&model, vec![alike(id)], 64).remove(0)).collect();
    let policy = exact(&model);
    for max_rows in [512, 50, 7] {
        let mut batcher = Batcher::new(policy.clone(), limits(64, max_rows)).unwrap();
        let groups = |ids: std::ops::Range<u64>| ids.map(|id| (policy.clone(), alike(id))).collect();
        let first = batcher.drain(groups(0..4), &mut |_, _, _| {}).unwrap();
        // Six full pages of the beginning are read once, and what is left of each prompt.
        assert_eq!(batcher.tokens_read(), 96 + 4 * 24, "{max_rows} rows");
        let later = batcher.drain(groups(4..5), &mut |_, _, _| {}).unwrap();
        assert_eq!(batcher.tokens_read(), 96 + 5 * 24, "a batch later it is still there");
        assert_eq!([first, later].concat(), alone, "{max_rows} rows");
        // The same prompt again: its last token is read in any case.
        let again = batcher.drain(groups(2..3), &mut |_, _, _| {}).unwrap();
        assert_eq!((batcher.tokens_read(), &again[0]), (96 + 5 * 24 + 8, &alone[2]));
    }
}

#[test]
fn a_beginning_is_not_shared_between_adapters() {
    let model = load(&fixture("tiny-llama"));
    let adapter = Adapter::load(&fixture("tiny-llama-lora"), &model).unwrap();
    let (base, tuned) = (exact(&model), Policy::new(&model, Some(&adapter), WeightForm::F32).unwrap());
    let groups = || vec![(base.clone(), alike(0)), (tuned.clone(), alike(0)), (base.clone(), alike(1))];
    let mut batcher = Batcher::new(base.clone(), limits(64, 512)).unwrap();
    let mixed = batcher.drain(groups(), &mut |_, _, _| {}).unwrap();
    assert_eq!(batcher.tokens_read(), 120 + 120 + 24);
    let alone = groups().into_iter().map(|group| generate_each(vec![group], &limits(64, 512), &mut |_, _, _| {}));
    assert_eq!(mixed, alone.map(|answers| answers.unwrap().remove(0)).collect::<Vec<_>>());
}

#[test]
fn a_long_prompt_is_read_in_pieces_beside_what_runs() {
    let model = load(&fixture("tiny-llama"));
    let long = group(2, &(0..400).map(|i| 3 + i % 300).collect::<Vec<_>>(), 1, 5);
    let alone =
        [sample(&model, vec![group(1, &[5, 6, 7], 1, 60)], 64), sample(&model, vec![long.clone()], 64)].concat();
    let mut batcher = Batcher::new(exact(&model), limits(64, 16)).unwrap();
    batcher.push(group(1, &[5, 6, 7], 1, 60)).unwrap();
    batcher.step().unwrap();
    batcher.push(long).unwrap();
    let mut before = 0;
    let mut steps = vec![];
    let done = run(&mut batcher, |batcher, events| {
        let of =
            |wanted: u64| events.iter().filter(|e| matches!(e, Event::Token { group, .. } if *group == wanted)).count();
        steps.push((batcher.tokens_read() - before, of(1), of(2)));
        before = batcher.tokens_read();
    });
    let reading: Vec<_> = steps.iter().take_while(|(_, _, long)| *long == 0).collect();
    assert_eq!(reading.len(), 24, "400 tokens, 16 a step: {steps:?}");
    assert!(reading.iter().skip(1).all(|(read, short, _)| (*read, *short) == (16, 1)), "{steps:?}");
    let done: Vec<Completion> = done.into_iter().map(|(_, _, completion)| completion).collect();
    assert_eq!(done, alone.concat());
}

#[test]
fn a_group_that_is_cancelled_while_it_is_read_gives_its_memory_back() {
    let model = load(&fixture("tiny-llama"));
    let mut batcher = Batcher::new(exact(&model), limits(1, 16)).unwrap();
    batcher.push(group(1, &[7; 300], 8, 200)).unwrap();
    batcher.step().unwrap();
    batcher.push(alike(2)).unwrap();
    batcher.cancel(1);
    let done = run(&mut batcher, |_, _| {});
    let done: Vec<Completion> = done.into_iter().map(|(_, _, completion)| completion).collect();
    assert_eq!(done, sample(&model, vec![alike(2)], 64)[0]);
    // What is left are pages that a later prompt may go on from.
    assert!(batcher.cache_bytes() <= (1 << 20) / 16 + 9 * Shape::new(model.config()).page_bytes());
}
