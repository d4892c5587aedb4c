//! Prompts on their way into the batch: waiting, being read a piece at a time, read.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use super::Group;
use crate::engine::cache::{BLOCK, Cache, Segment, Shape};
use crate::engine::low_rank::LoraPack;
use crate::engine::prefixes::{Key, Place, Prefixes};

/// A group that waits for room.
pub(super) struct Queued {
    pub(super) group: Group,
    pub(super) adapter: Option<Arc<LoraPack>>,
}

/// A group that has room: for its prompt and for one sample at least.
pub(super) struct Admitted {
    pub(super) group: Group,
    pub(super) adapter: Option<Arc<LoraPack>>,
    /// Samples started so far.
    pub(super) started: usize,
    pub(super) prompt: Prompt,
}

pub(super) enum Prompt {
    Reading(Reading),
    Read(Read),
}

/// A prompt that has been read: its cache and the logits after it, which every sample's first token is drawn from.
pub(super) struct Read {
    pub(super) prefix: Arc<Segment>,
    pub(super) logits: Arc<Vec<f32>>,
}

/// A prompt of which a part has been read.
pub(super) struct Reading {
    pub(super) cache: Cache,
    /// Where the pages end that other prompts can go on from.
    place: Place,
}

impl Admitted {
    pub(super) fn new(queued: Queued, shape: Shape, prefixes: &mut Prefixes) -> Self {
        let Queued { group, adapter } = queued;
        let place = prefixes.begin(adapter_id(&adapter));
        let prompt = Prompt::Reading(Reading { cache: Cache::new(shape), place });
        Admitted { group, adapter, started: 0, prompt }
    }

    /// Returns how many of its samples have not started.
    pub(super) fn left(&self) -> usize {
        self.group.seeds.len() - self.started
    }

    /// Keeps what its prompt has become now that all of it is read.
    pub(super) fn finish(&mut self, logits: Vec<f32>) {
        if let Prompt::Reading(reading) = &mut self.prompt {
            self.prompt = Prompt::Read(Read { prefix: reading.cache.take_prefix(), logits: Arc::new(logits) });
        }
    }

    /// Returns the pages that its prompt has still to take.
    pub(super) fn pages_to_read(&self) -> usize {
        match &self.prompt {
            Prompt::Reading(reading) => self.group.prompt.len().div_ceil(BLOCK) - reading.cache.own().pages(),
            Prompt::Read(_) => 0,
        }
    }
}

impl Reading {
    /// Returns the tokens read so far.
    pub(super) fn len(&self) -> usize {
        self.cache.len()
    }

    /// Goes on over pages that other prompts have read. The last token is read in any case: the answer begins with what comes
    /// of it.
    fn follow(&mut self, prompt: &[u32], prefixes: &mut Prefixes) {
        while self.cache.own().at_border() && self.len() + BLOCK < prompt.len() {
            let Some(key) = self.place.key(&prompt[self.len()..]) else { return };
            let Some(page) = prefixes.find(&key, &mut self.place) else { return };
            self.cache.own_mut().attach(page);
        }
    }

    /// Returns the key of the page that it reads next, if it will be full.
    fn key(&self, prompt: &[u32]) -> Option<Key> {
        self.place.key(&prompt[self.place.tokens()..])
    }

    /// Lets other prompts go on from the pages that are full now.
    pub(super) fn publish(&mut self, prompt: &[u32], prefixes: &mut Prefixes) {
        while let Some(key) = self.key(prompt) {
            let Some(page) = self.cache.own_mut().detach_full() else { return };
            let page = prefixes.insert(key, page, &mut self.place);
            self.cache.own_mut().put_back(page);
        }
    }
}

/// Chooses what is read in one forward pass of at most `rows` tokens; returns the tokens of each admitted prompt's piece.
///
/// A page that an earlier prompt is about to read is not read a second time: the later one waits for it.
pub(super) fn pieces(admitted: &mut VecDeque<Admitted>, rows: usize, prefixes: &mut Prefixes) -> Vec<usize> {
    let (mut rows, mut begun) = (rows, HashSet::new());
    let piece = |admitted: &mut Admitted| {
        let (Prompt::Reading(reading), prompt) = (&mut admitted.prompt, &admitted.group.prompt) else { return 0 };
        reading.follow(prompt, prefixes);
        let taken = reading.key(prompt).is_some_and(|key| !begun.insert(key));
        if taken && reading.cache.own().at_border() {
            return 0;
        }
        let piece = rows.min(prompt.len() - reading.len());
        rows -= piece;
        piece
    };
    admitted.iter_mut().map(piece).collect()
}

/// Returns what tells an adapter from all others, 0 for none.
pub(super) fn adapter_id(adapter: &Option<Arc<LoraPack>>) -> u64 {
    adapter.as_ref().map_or(0, |adapter| adapter.id())
}
