//! One run of the index: a file of sorted postings that never changes.
//!
//! A posting is a number of 64 bits: 40 of a key, 24 of the prompt's place in the run. Sorted, the postings of one key
//! stand together, the earliest prompt first. Every 512th stands in memory, so that a key costs one read of 4 KiB, and keys
//! that are asked for in order read each block once.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::durable::FileError;

/// Most prompts of one run: what 24 bits can number.
pub(super) const MOST: u32 = 1 << 24;

/// Most postings of one key that are looked at, the earliest. A key has more only where many texts are alike in a band
/// without being near one another; without a limit such a log would cost quadratic time.
pub(super) const MOST_HITS: usize = 64;

/// Postings from one in memory to the next.
const BLOCK: usize = 512;

const BYTES: usize = size_of::<u64>();

/// The prompts that a run is of, and its file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    pub(super) file: String,
    /// Number of its first prompt.
    pub(super) first: u32,
    pub(super) prompts: u32,
    pub(super) postings: u64,
}

/// A run that is open.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) header: Header,
    file: File,
    fences: Vec<u64>,
}

/// Returns the posting of a key for the prompt at a place of a run.
pub(super) fn posting(key: u64, place: u32) -> u64 {
    key >> 24 << 24 | u64::from(place)
}

fn key_of(posting: u64) -> u64 {
    posting >> 24
}

fn place_of(posting: u64) -> u32 {
    (posting & u64::from(MOST - 1)) as u32
}

/// Tells `hit` the places that share a key with another posting of the same list: (the later, an earlier).
pub(super) fn pairs_within(sorted: &[u64], mut hit: impl FnMut(u32, u32)) {
    for group in sorted.chunk_by(|a, b| key_of(*a) == key_of(*b)) {
        for (at, later) in group.iter().enumerate().skip(1) {
            for earlier in &group[..at.min(MOST_HITS)] {
                hit(place_of(*later), place_of(*earlier));
            }
        }
    }
}

impl Run {
    /// Writes a run of sorted postings and opens it.
    pub(super) fn write(
        folder: &Path,
        header: Header,
        postings: impl Iterator<Item = Result<u64, FileError>>,
    ) -> Result<Run, FileError> {
        let path = folder.join(&header.file);
        let fail = |e| FileError::io("cannot write", &path, e);
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(fail)?);
        for posting in postings {
            out.write_all(&posting?.to_le_bytes()).map_err(fail)?;
        }
        let file = out.into_inner().map_err(|e| fail(e.into_error()))?;
        file.sync_all().map_err(fail)?;
        Run::open(folder, header)
    }

    /// Opens a run and reads its fences.
    pub(super) fn open(folder: &Path, header: Header) -> Result<Run, FileError> {
        let path = folder.join(&header.file);
        let fail = |e| FileError::io("cannot read", &path, e);
        let file = File::open(&path).map_err(fail)?;
        let expected = header.postings * BYTES as u64;
        if file.metadata().map_err(fail)?.len() != expected {
            let why = std::io::Error::other(format!("it should have {expected} bytes"));
            return Err(FileError::io("cannot use", &path, why));
        }
        let mut run = Run { header, file, fences: Vec::new() };
        let mut one = [0; BYTES];
        for at in (0..run.header.postings).step_by(BLOCK) {
            run.file.read_exact_at(&mut one, at * BYTES as u64).map_err(fail)?;
            run.fences.push(u64::from_le_bytes(one));
        }
        Ok(run)
    }

    /// Tells `hit` for each (key, asker), sorted by key, the numbers of the earliest prompts that have the key.
    pub(super) fn find(&self, asked: &[(u64, u32)], mut hit: impl FnMut(u32, u32)) -> std::io::Result<()> {
        let mut block = Block::default();
        for &(key, asker) in asked {
            let key = key_of(key);
            // The last block that begins before the key may hold its first posting.
            let mut number = self.fences.partition_point(|fence| key_of(*fence) < key).saturating_sub(1);
            let mut found = 0;
            while number < self.fences.len() {
                self.load(number, &mut block)?;
                let from = block.postings.partition_point(|posting| key_of(*posting) < key);
                let of_key = block.postings[from..].iter().take_while(|posting| key_of(**posting) == key);
                let before = found;
                for posting in of_key.take(MOST_HITS - found) {
                    hit(asker, self.header.first + place_of(*posting));
                    found += 1;
                }
                let goes_on = from + (found - before) == block.postings.len();
                if found == MOST_HITS || !goes_on {
                    break;
                }
                number += 1;
            }
        }
        Ok(())
    }

    fn load(&self, number: usize, block: &mut Block) -> std::io::Result<()> {
        if block.number == Some(number) {
            return Ok(());
        }
        let from = (number * BLOCK) as u64;
        let n = (self.header.postings - from).min(BLOCK as u64) as usize;
        let mut bytes = [0; BLOCK * BYTES];
        self.file.read_exact_at(&mut bytes[..n * BYTES], from * BYTES as u64)?;
        block.postings.clear();
        block.postings.extend(bytes[..n * BYTES].chunks_exact(BYTES).map(to_posting));
        block.number = Some(number);
        Ok(())
    }

    /// Reads all postings in order, renumbered for a run that begins at `first`.
    pub(super) fn postings(&self, folder: &Path, first: u32) -> Result<Postings, FileError> {
        let path = folder.join(&self.header.file);
        let file = File::open(&path).map_err(|e| FileError::io("cannot read", &path, e))?;
        let shift = u64::from(self.header.first - first);
        Ok(Postings { file: BufReader::with_capacity(1 << 20, file), left: self.header.postings, shift, next: None })
    }
}

#[derive(Default)]
struct Block {
    number: Option<usize>,
    postings: Vec<u64>,
}

fn to_posting(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// The postings of a run, one after the other.
pub(super) struct Postings {
    file: BufReader<File>,
    left: u64,
    shift: u64,
    next: Option<u64>,
}

impl Postings {
    fn peek(&mut self) -> std::io::Result<Option<u64>> {
        if self.next.is_none() && self.left > 0 {
            let mut one = [0; BYTES];
            self.file.read_exact(&mut one)?;
            self.left -= 1;
            self.next = Some(u64::from_le_bytes(one) + self.shift);
        }
        Ok(self.next)
    }
}

/// Yields the postings of two runs as one sorted list.
pub(super) fn merged(mut a: Postings, mut b: Postings) -> impl Iterator<Item = std::io::Result<u64>> {
    std::iter::from_fn(move || {
        let next = a.peek().and_then(|x| Ok((x, b.peek()?)));
        match next {
            Ok((None, None)) => None,
            Ok((Some(x), y)) if y.is_none_or(|y| x <= y) => a.next.take().map(Ok),
            Ok(_) => b.next.take().map(Ok),
            Err(error) => Some(Err(error)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(folder: &Path, name: &str, first: u32, keys: &[(u64, u32)]) -> Run {
        let mut postings: Vec<u64> = keys.iter().map(|(key, place)| posting(key << 24, *place)).collect();
        postings.sort_unstable();
        let header = Header { file: name.into(), first, prompts: 10, postings: postings.len() as u64 };
        Run::write(folder, header, postings.into_iter().map(Ok)).unwrap()
    }

    fn find(run: &Run, keys: &[u64]) -> Vec<(u32, u32)> {
        let asked: Vec<(u64, u32)> = keys.iter().enumerate().map(|(i, key)| (key << 24, i as u32)).collect();
        let mut found = Vec::new();
        run.find(&asked, |asker, number| found.push((asker, number))).unwrap();
        found
    }

    #[test]
    fn a_key_is_found_wherever_its_postings_stand() {
        let folder = tempfile::tempdir().unwrap();
        let many: Vec<(u64, u32)> = (0..4000u32).map(|i| (u64::from(i / 3) * 2, i)).collect();
        let run = run(folder.path(), "a", 100, &many);
        assert_eq!(
            find(&run, &[0, 1, 340, 341, 342, 2666, 9999]),
            [(0, 100), (0, 101), (0, 102), (2, 610), (2, 611), (2, 612), (4, 613), (4, 614), (4, 615), (5, 4099)]
        );
        let mut none = Vec::new();
        run.find(&[], |a, b| none.push((a, b))).unwrap();
        assert!(none.is_empty());
    }

    #[test]
    fn a_flooded_key_gives_its_earliest_prompts_also_across_blocks() {
        let folder = tempfile::tempdir().unwrap();
        let mut keys: Vec<(u64, u32)> = (0..500u32).map(|i| (1, i)).collect();
        keys.extend((0..300u32).map(|i| (7, 1000 + i)));
        let found = find(&run(folder.path(), "a", 0, &keys), &[7]);
        assert_eq!(found, (0..64).map(|i| (0, 1000 + i)).collect::<Vec<_>>());
        let mut pairs = 0;
        pairs_within(&(0..100).map(|i| posting(5 << 24, i)).collect::<Vec<_>>(), |later, earlier| {
            assert!(earlier < later && earlier < 64);
            pairs += 1;
        });
        assert_eq!(pairs, 64 * 63 / 2 + 36 * 64);
    }

    #[test]
    fn two_runs_become_one_with_the_same_answers() {
        let folder = tempfile::tempdir().unwrap();
        let a = run(folder.path(), "a", 50, &[(1, 0), (3, 1), (3, 2)]);
        let b = run(folder.path(), "b", 60, &[(1, 0), (2, 1), (3, 4)]);
        let both = merged(a.postings(folder.path(), 50).unwrap(), b.postings(folder.path(), 50).unwrap());
        let header = Header { file: "c".into(), first: 50, prompts: 20, postings: 6 };
        let both = both.map(|posting| Ok(posting.unwrap()));
        let c = Run::write(folder.path(), header, both).unwrap();
        assert_eq!(find(&c, &[1, 2, 3]), [(0, 50), (0, 60), (1, 61), (2, 51), (2, 52), (2, 64)]);
    }

    #[test]
    fn a_file_that_was_cut_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let header = run(folder.path(), "cut", 0, &[(1, 0), (3, 1)]).header;
        std::fs::write(folder.path().join("cut"), [0; 9]).unwrap();
        let error = Run::open(folder.path(), header).unwrap_err().to_string();
        assert!(error.contains("cut") && error.contains("16 bytes"), "{error}");
    }
}
