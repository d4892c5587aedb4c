//! The index of prompts: which earlier ones a new prompt may belong with.
//!
//! It is a fold over the rows of the table `splits` in the order of their numbers, kept in files so that a night costs what
//! is new: a list of fixed-size records, and sorted runs of postings (`run`) that are joined as they grow, as in a
//! log-structured merge tree. Every relation between prompts is a key: each band of the sketch, the text, the
//! conversation's id, its first question. What a key finds is judged by the records, so no key can make a false pair.
//!
//! The files hold nothing that the table does not: where they are missing, cut, or of other settings, they are made anew.
//! One prompt takes 312 bytes of records and 8 for each of its 32 bands and up to 3 other keys: 100 million take 59 GB of
//! disk; in memory stands one of 512 postings, 55 MB.

mod run;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Settings;
use super::sketch::{Sketch, WIDTH, mix};
use crate::durable::{self, FileError};
use run::{Header, Run};

const MANIFEST: &str = "index.json";
const RECORDS: &str = "records.bin";

/// The form of the files; raised when it changes, so that older ones are made anew.
const FORM: u32 = 1;

/// What is known of a prompt to tell whether another belongs with it. A relation that it has not is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    /// The first half of the prompt's hash.
    pub(super) id: [u8; 16],
    /// Hash of the user turns before the last; prompts with other contexts are no near duplicates.
    pub(super) context: u64,
    /// Hash of the text that is compared.
    pub(super) text: u64,
    /// Hash of tenant and conversation id.
    pub(super) conversation: u64,
    /// Hash of the conversation up to its first answer.
    pub(super) start: u64,
    /// Hash of what follows the last user turn.
    pub(super) tail: u64,
    pub(super) sketch: Sketch,
}

const RECORD: usize = 16 + 5 * 8 + WIDTH;

/// Where the sketch begins in a record's bytes.
const SKETCH: usize = RECORD - WIDTH;

/// How two prompts belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Relation {
    /// They are of one conversation.
    Talk,
    /// Their texts are near as well, or only.
    Near,
    /// So near that one stands for the other: nothing else follows the text.
    Twin,
}

/// An earlier prompt that belongs with one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Hit {
    pub(super) number: u32,
    pub(super) relation: Relation,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    form: u32,
    bands: usize,
    rows: usize,
    prompts: u32,
    runs: Vec<Header>,
    next_run: u64,
}

/// The index, open for one writer.
#[derive(Debug)]
pub(super) struct Index {
    folder: PathBuf,
    settings: Settings,
    manifest: Manifest,
    records: File,
    runs: Vec<Run>,
}

impl Record {
    fn to_bytes(self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        bytes[..16].copy_from_slice(&self.id);
        let numbers = [self.context, self.text, self.conversation, self.start, self.tail];
        for (place, number) in bytes[16..SKETCH].chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes[SKETCH..].copy_from_slice(&self.sketch.0);
        bytes
    }

    fn of_bytes(bytes: &[u8; RECORD]) -> Self {
        let number = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        Record {
            id: std::array::from_fn(|i| bytes[i]),
            context: number(16),
            text: number(24),
            conversation: number(32),
            start: number(40),
            tail: number(48),
            sketch: Sketch(std::array::from_fn(|i| bytes[SKETCH + i])),
        }
    }

    /// Yields the keys by which others find this prompt.
    fn keys<'a>(&'a self, settings: &'a Settings) -> impl Iterator<Item = u64> + 'a {
        let named = [(1, self.conversation), (2, self.start)];
        let named =
            named.into_iter().filter(|(_, value)| *value != 0).map(|(what, value)| mix(mix(u64::MAX, what), value));
        let text = mix(mix(mix(u64::MAX, 3), self.context), self.text);
        named.chain([text]).chain(self.sketch.keys(self.context, settings))
    }

    /// Returns how an earlier prompt belongs with this one, if it does.
    fn judge(&self, earlier: &Record, threshold: f64) -> Option<Relation> {
        let is_near = self.context == earlier.context
            && (self.text == earlier.text || self.sketch.similarity(&earlier.sketch) >= threshold);
        let same = |ours: u64, theirs: u64| ours != 0 && ours == theirs;
        let is_one_talk = same(self.conversation, earlier.conversation) || same(self.start, earlier.start);
        match (is_near, self.tail == earlier.tail) {
            (true, true) => Some(Relation::Twin),
            (true, false) => Some(Relation::Near),
            (false, _) => is_one_talk.then_some(Relation::Talk),
        }
    }
}

impl Index {
    /// Opens the index in a folder. Where there is none of this form and these bands, an empty one is begun.
    pub(super) fn open(folder: &Path, settings: &Settings) -> Result<Index, FileError> {
        durable::create_folder(folder)?;
        match durable::read_json::<Manifest>(&folder.join(MANIFEST)) {
            Ok(manifest) if manifest.fits(settings) => match Index::attach(folder, settings, manifest) {
                Ok(index) => return Ok(index),
                Err(error) => {
                    tracing::warn!(%error, "the index of prompts is damaged and is made anew from table splits")
                }
            },
            Ok(_) | Err(FileError::Json { .. }) => {
                tracing::info!("the index of prompts is made anew for other settings")
            }
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        Index::begin(folder, settings)
    }

    /// Begins an empty index in place of what is there.
    pub(super) fn begin(folder: &Path, settings: &Settings) -> Result<Index, FileError> {
        let path = folder.join(MANIFEST);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(FileError::io("cannot remove", &path, error));
            }
            _ => {}
        }
        let path = folder.join(RECORDS);
        File::create(&path).map_err(|e| FileError::io("cannot create", &path, e))?;
        let (bands, rows) = (settings.minhash_bands, settings.minhash_rows);
        let manifest = Manifest { form: FORM, bands, rows, prompts: 0, runs: Vec::new(), next_run: 0 };
        durable::write_json(&folder.join(MANIFEST), &manifest)?;
        Index::attach(folder, settings, manifest)
    }

    fn attach(folder: &Path, settings: &Settings, manifest: Manifest) -> Result<Index, FileError> {
        let path = folder.join(RECORDS);
        let fail = |e| FileError::io("cannot use", &path, e);
        let records = OpenOptions::new().read(true).write(true).open(&path).map_err(fail)?;
        let whole = u64::from(manifest.prompts) * RECORD as u64;
        if records.metadata().map_err(fail)?.len() < whole {
            return Err(fail(std::io::Error::other(format!("it should have {whole} bytes"))));
        }
        // What a killed writer left behind the last record that counts.
        records.set_len(whole).map_err(fail)?;
        let runs = manifest.runs.iter().map(|header| Run::open(folder, header.clone())).collect::<Result<_, _>>()?;
        let index = Index { folder: folder.to_owned(), settings: settings.clone(), manifest, records, runs };
        index.sweep();
        Ok(index)
    }

    /// Forgets all prompts.
    pub(super) fn clear(&mut self) -> Result<(), FileError> {
        *self = Index::begin(&self.folder, &self.settings)?;
        Ok(())
    }

    /// Returns the number of prompts.
    pub(super) fn len(&self) -> u32 {
        self.manifest.prompts
    }

    /// Returns the record of a prompt.
    pub(super) fn record(&self, number: u32) -> Result<Record, FileError> {
        let mut bytes = [0; RECORD];
        let read = self.records.read_exact_at(&mut bytes, u64::from(number) * RECORD as u64);
        read.map_err(|e| FileError::io("cannot read", &self.folder.join(RECORDS), e))?;
        Ok(Record::of_bytes(&bytes))
    }

    /// Returns for each prompt of a batch the earlier ones that belong with it, in their order. Those of the batch itself
    /// are numbered as if it was appended.
    pub(super) fn find(&self, batch: &[Record]) -> Result<Vec<Vec<Hit>>, FileError> {
        let mut asked: Vec<(u64, u32)> = Vec::new();
        for (asker, record) in batch.iter().enumerate() {
            asked.extend(record.keys(&self.settings).map(|key| (key, asker as u32)));
        }
        asked.sort_unstable();
        let mut pairs: Vec<(u32, u32)> = Vec::new();
        let own: Vec<u64> = asked.iter().map(|(key, asker)| run::posting(*key, *asker)).collect();
        run::pairs_within(&own, |later, earlier| pairs.push((later, self.len() + earlier)));
        for run in &self.runs {
            let found = run.find(&asked, |asker, number| pairs.push((asker, number)));
            found.map_err(|e| FileError::io("cannot read", &self.folder.join(&run.header.file), e))?;
        }
        pairs.sort_unstable();
        pairs.dedup();
        let mut hits = vec![Vec::new(); batch.len()];
        for (asker, number) in pairs {
            let earlier = match number.checked_sub(self.len()) {
                Some(own) => batch[own as usize],
                None => self.record(number)?,
            };
            if let Some(relation) = batch[asker as usize].judge(&earlier, self.settings.near_duplicate) {
                hits[asker as usize].push(Hit { number, relation });
            }
        }
        Ok(hits)
    }

    /// Appends a batch; prompts for which `is_found` is false keep their number and are never found.
    pub(super) fn append(&mut self, batch: &[Record], is_found: impl Fn(usize) -> bool) -> Result<(), FileError> {
        if batch.is_empty() {
            return Ok(());
        }
        let path = self.folder.join(RECORDS);
        let fail = |e| FileError::io("cannot write", &path, e);
        let bytes: Vec<u8> = batch.iter().flat_map(|record| record.to_bytes()).collect();
        self.records.write_all_at(&bytes, u64::from(self.len()) * RECORD as u64).map_err(fail)?;
        self.records.sync_all().map_err(fail)?;
        let mut postings: Vec<u64> = Vec::new();
        for (place, record) in batch.iter().enumerate().filter(|(place, _)| is_found(*place)) {
            postings.extend(record.keys(&self.settings).map(|key| run::posting(key, place as u32)));
        }
        postings.sort_unstable();
        postings.dedup();
        let header = Header {
            file: self.next_file(),
            first: self.len(),
            prompts: batch.len() as u32,
            postings: postings.len() as u64,
        };
        self.runs.push(Run::write(&self.folder, header, postings.into_iter().map(Ok))?);
        self.manifest.prompts += batch.len() as u32;
        self.join()?;
        durable::sync_folder(&self.folder)?;
        self.manifest.runs = self.runs.iter().map(|run| run.header.clone()).collect();
        durable::write_json(&self.folder.join(MANIFEST), &self.manifest)?;
        self.sweep();
        Ok(())
    }

    /// Joins the last runs while the earlier is not at least twice the later: so there are few, and each posting is
    /// written again about as often as the number of prompts can be halved.
    fn join(&mut self) -> Result<(), FileError> {
        while let [.., a, b] = self.runs.as_slice() {
            let prompts = a.header.prompts + b.header.prompts;
            if a.header.prompts >= 2 * b.header.prompts || prompts > run::MOST {
                break;
            }
            let (first, postings) = (a.header.first, a.header.postings + b.header.postings);
            let both = run::merged(a.postings(&self.folder, first)?, b.postings(&self.folder, first)?);
            let folder = self.folder.clone();
            let both = both.map(|posting| posting.map_err(|e| FileError::io("cannot read a run in", &folder, e)));
            let header = Header { file: self.next_file(), first, prompts, postings };
            let joined = Run::write(&self.folder, header, both)?;
            self.runs.truncate(self.runs.len() - 2);
            self.runs.push(joined);
        }
        Ok(())
    }

    fn next_file(&mut self) -> String {
        self.manifest.next_run += 1;
        format!("run-{}.bin", self.manifest.next_run)
    }

    /// Removes runs that were joined into others, or that a killed writer left. What cannot be removed costs only space.
    fn sweep(&self) {
        let is_own = |name: &str| self.runs.iter().any(|run| run.header.file == name);
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("run-")
                && !is_own(&name)
                && let Err(error) = std::fs::remove_file(entry.path())
            {
                tracing::warn!(file = %entry.path().display(), %error, "a run of the index is left over");
            }
        }
    }
}

impl Manifest {
    fn fits(&self, settings: &Settings) -> bool {
        (self.form, self.bands, self.rows) == (FORM, settings.minhash_bands, settings.minhash_rows)
    }
}

#[cfg(test)]
mod tests;
