//! The index against brute force, night by night, and after a kill.

use super::*;
use crate::dataset::sketch::shingles;
use crate::dataset::sketch::tests::jaccard;
use crate::record::derive_seed;

const WORDS: [&str; 24] = [
    "river", "paint", "seven", "quiet", "market", "orbit", "lemon", "glass", "winter", "copper", "garden", "signal",
    "thread", "basil", "engine", "paper", "silver", "tunnel", "ocean", "violin", "meadow", "stone", "candle", "rocket",
];

/// Families of texts in which some words are replaced.
fn texts(n: usize) -> Vec<String> {
    let pick = |i: usize, j: usize, what: &str| {
        let seed = derive_seed(3, &[what, &i.to_string(), &j.to_string()]);
        (seed % 1_000_003) as usize
    };
    let text = |i: usize| {
        let family = i / 4;
        let word = |j: usize| {
            let changed = !i.is_multiple_of(4) && pick(i, j, "change") % 100 < 6 * (i % 4);
            WORDS[if changed { pick(i, j, "new") } else { pick(family, j, "word") } % WORDS.len()]
        };
        (0..12 + pick(family, 0, "length") % 30).map(word).collect::<Vec<_>>().join(" ")
    };
    (0..n).map(text).collect()
}

fn record(text: &str) -> Record {
    let hash = blake3::hash(text.as_bytes());
    Record {
        id: std::array::from_fn(|i| hash.as_bytes()[i]),
        context: 0,
        text: mix(0, u64::from_le_bytes(std::array::from_fn(|i| hash.as_bytes()[i]))),
        conversation: 0,
        start: 0,
        tail: 0,
        sketch: Sketch::of(text),
    }
}

/// Finds and appends the records in batches; the folder is opened again before each.
fn nights(folder: &Path, records: &[Record], batch: usize) -> Vec<Vec<Hit>> {
    let mut hits = Vec::new();
    for batch in records.chunks(batch) {
        let mut index = Index::open(folder, &Settings::default()).unwrap();
        hits.extend(index.find(batch).unwrap());
        index.append(batch, |_| true).unwrap();
    }
    hits
}

#[test]
fn the_search_finds_what_brute_force_finds_at_a_similarity_of_0_8() {
    let texts = texts(2400);
    let sets: Vec<Vec<u32>> = texts.iter().map(|text| shingles(text)).collect();
    let records: Vec<Record> = texts.iter().map(|text| record(text)).collect();
    let folder = tempfile::tempdir().unwrap();
    let hits = nights(folder.path(), &records, 2400);
    let (mut truth, mut found, mut false_pairs) = (0, 0, 0);
    for (i, hits) in hits.iter().enumerate() {
        let expected: Vec<u32> = (0..i).filter(|&j| jaccard(&sets[i], &sets[j]) >= 0.8).map(|j| j as u32).collect();
        truth += expected.len();
        found += expected.iter().filter(|j| hits.iter().any(|hit| hit.number == **j)).count();
        false_pairs += hits.iter().filter(|hit| jaccard(&sets[i], &sets[hit.number as usize]) < 0.55).count();
    }
    println!(
        "near duplicates at a Jaccard similarity of 0.8: {found} of {truth} found, {false_pairs} false (below 0.55)"
    );
    assert!(truth > 300, "too few pairs to test with: {truth}");
    assert!(found as f64 >= 0.99 * truth as f64, "recall {found}/{truth}");
    assert_eq!(false_pairs, 0);
}

#[test]
fn nights_find_what_one_night_finds() {
    let records: Vec<Record> = texts(700).iter().map(|text| record(text)).collect();
    let (one, many) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let expected = nights(one.path(), &records, 700);
    assert_eq!(nights(many.path(), &records, 30), expected);
    let index = Index::open(many.path(), &Settings::default()).unwrap();
    assert_eq!(index.len(), 700);
    assert!(index.runs.len() <= 6, "runs are joined: {}", index.runs.len());
    assert_eq!(index.record(33).unwrap(), records[33]);
    let files = std::fs::read_dir(many.path()).unwrap().count();
    assert_eq!(files, 2 + index.runs.len(), "nothing is left over");
}

#[test]
fn what_a_killed_writer_left_does_not_count() {
    let records: Vec<Record> = texts(200).iter().map(|text| record(text)).collect();
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let expected = nights(whole.path(), &records, 50);
    nights(killed.path(), &records[..100], 50);
    let manifest = std::fs::read(killed.path().join(MANIFEST)).unwrap();
    let mut index = Index::open(killed.path(), &Settings::default()).unwrap();
    let before: Vec<Header> = index.runs.iter().map(|run| run.header.clone()).collect();
    let kept: Vec<(String, Vec<u8>)> =
        before.iter().map(|h| (h.file.clone(), std::fs::read(killed.path().join(&h.file)).unwrap())).collect();
    index.append(&records[150..], |_| true).unwrap();
    // As if it was killed before the manifest: the old runs are still there.
    kept.iter().for_each(|(name, bytes)| std::fs::write(killed.path().join(name), bytes).unwrap());
    std::fs::write(killed.path().join(MANIFEST), manifest).unwrap();
    assert_eq!(nights(killed.path(), &records[100..], 50), expected[100..]);
}

#[test]
fn an_index_that_is_damaged_or_of_other_bands_begins_anew() {
    let records: Vec<Record> = texts(40).iter().map(|text| record(text)).collect();
    let folder = tempfile::tempdir().unwrap();
    nights(folder.path(), &records, 40);
    let other = Settings { minhash_bands: 16, ..Settings::default() };
    assert_eq!(Index::open(folder.path(), &other).unwrap().len(), 0);
    nights(folder.path(), &records, 40);
    std::fs::write(folder.path().join(RECORDS), [0; 5]).unwrap();
    assert_eq!(Index::open(folder.path(), &Settings::default()).unwrap().len(), 0);
}

#[test]
fn conversations_are_found_without_a_near_text_and_hidden_prompts_are_not() {
    let texts = texts(40);
    let talk = |i: usize, conversation: u64, start: u64| Record { conversation, start, ..record(&texts[4 * i]) };
    let batch = [talk(0, 7, 0), talk(1, 0, 9), talk(2, 7, 9), talk(3, 8, 8), talk(0, 0, 0)];
    let folder = tempfile::tempdir().unwrap();
    let mut index = Index::open(folder.path(), &Settings::default()).unwrap();
    let far = |number| Hit { number, relation: Relation::Talk };
    let twin = |number| Hit { number, relation: Relation::Twin };
    let expected = [vec![], vec![], vec![far(0), far(1)], vec![], vec![twin(0)]];
    assert_eq!(index.find(&batch).unwrap(), expected);
    index.append(&batch, |i| i != 0).unwrap();
    assert_eq!(index.find(&[talk(5, 7, 0)]).unwrap(), [vec![far(2)]]);
    assert_eq!(index.find(&[talk(0, 0, 0)]).unwrap(), [vec![twin(4)]]);
    let step = Record { tail: 5, ..talk(0, 0, 0) };
    assert_eq!(index.find(&[step]).unwrap(), [vec![Hit { number: 4, relation: Relation::Near }]]);
}
