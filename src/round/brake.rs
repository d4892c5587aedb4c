//! Ends or pauses a round between two pieces of its work: a budget of time and tokens for training, and a time at which to
//! leave off.
//!
//! Sampling may take half of what the budget still holds when it begins, so that training always has the other half; at
//! least one chunk is drawn and training goes to its first checkpoint, so that there is something to judge. What was spent
//! stands in the round's folder: a round that is killed and resumed does not begin to count anew. The trial is no part of
//! the budget: it is bounded by the night's fresh prompts.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::RoundError;
use crate::config::RoundSettings;
use crate::durable;
use crate::progress::{Ask, Observer};

/// What training may spend in one round; `None` is without limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Budget {
    pub seconds: Option<f64>,
    /// Tokens sampled and tokens trained on, together.
    pub tokens: Option<u64>,
}

/// What was spent, as `spent.json` in the round's folder holds it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Spent {
    seconds: f64,
    tokens: u64,
}

impl Budget {
    /// Returns what an operator set.
    pub fn of(settings: &RoundSettings) -> Self {
        let (hours, tokens) = (settings.max_hours, settings.max_tokens);
        Budget { seconds: (hours > 0.0).then_some(hours * 3600.0), tokens: (tokens > 0).then_some(tokens) }
    }

    /// Returns true where nothing is left.
    fn is_spent(self, spent: Spent) -> bool {
        self.seconds.is_some_and(|most| spent.seconds >= most) || self.tokens.is_some_and(|most| spent.tokens >= most)
    }

    /// Returns the budget whose end is half-way between what was spent and this one's.
    fn half(self, spent: Spent) -> Budget {
        Budget {
            seconds: self.seconds.map(|most| spent.seconds + (most - spent.seconds).max(0.0) / 2.0),
            tokens: self.tokens.map(|most| spent.tokens + most.saturating_sub(spent.tokens) / 2),
        }
    }
}

/// The step that runs now.
struct Running {
    name: String,
    /// Its own units that are counted already.
    done: u64,
    counts: bool,
    budget: Budget,
}

struct Now {
    spent: Spent,
    since: Instant,
    running: Option<Running>,
}

/// Looks on as an observer does, and says when it is enough.
pub struct Brake {
    path: PathBuf,
    budget: Budget,
    until: Option<DateTime<Utc>>,
    now: Mutex<Now>,
}

impl Brake {
    /// Goes on counting where the round in `folder` left off.
    pub fn open(folder: &Path, budget: Budget, until: Option<DateTime<Utc>>) -> Result<Self, RoundError> {
        let path = folder.join("spent.json");
        let spent = match durable::read_json(&path) {
            Err(error) if error.is_not_found() => Spent::default(),
            read => read?,
        };
        Ok(Brake { path, budget, until, now: Mutex::new(Now { spent, since: Instant::now(), running: None }) })
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what to do at `time`, when `elapsed` seconds went by since the last look.
    fn judge(&self, time: DateTime<Utc>, elapsed: f64) -> (Ask, Spent) {
        let mut now = self.now();
        now.spent.seconds += elapsed;
        now.since = Instant::now();
        let budget = now.running.as_ref().map_or(self.budget, |running| running.budget);
        let ask = match (self.until.is_some_and(|until| time >= until), budget.is_spent(now.spent)) {
            (true, _) => Ask::Pause,
            (false, true) => Ask::Enough,
            (false, false) => Ask::GoOn,
        };
        (ask, now.spent)
    }
}

impl Observer for Brake {
    fn begin(&self, step: &str, _: u64, unit: &str) {
        let mut now = self.now();
        let budget = if step.starts_with("sample") { self.budget.half(now.spent) } else { self.budget };
        let counts = unit == "tokens" && !step.starts_with("gate");
        now.running = Some(Running { name: step.to_owned(), done: 0, counts, budget });
    }

    fn advance(&self, step: &str, done: u64, _: &str) {
        let mut now = self.now();
        let Some(running) = now.running.as_mut().filter(|running| running.name == step && running.counts) else {
            return;
        };
        let more = done.saturating_sub(running.done);
        running.done = done;
        now.spent.tokens += more;
    }

    fn end(&self, step: &str, _: &str) {
        let mut now = self.now();
        if now.running.as_ref().is_some_and(|running| running.name == step) {
            now.running = None;
        }
    }

    fn asks(&self) -> Ask {
        let elapsed = self.now().since.elapsed().as_secs_f64();
        let (ask, spent) = self.judge(Utc::now(), elapsed);
        // A count that is lost costs a resumed round some of its budget's exactness, and no round ends for it.
        if let Err(error) = durable::write_json(&self.path, &spent) {
            tracing::warn!(%error, "what the round has spent could not be kept");
        }
        ask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    fn ask(brake: &Brake, elapsed: f64) -> Ask {
        brake.judge(at("2026-01-10T02:00:00Z"), elapsed).0
    }

    #[test]
    fn sampling_may_take_half_of_what_is_left_and_training_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let budget = Budget { seconds: Some(100.0), tokens: Some(1_000) };
        let brake = Brake::open(folder.path(), budget, None).unwrap();
        brake.begin("sample from base", 0, "tokens");
        assert_eq!((ask(&brake, 49.0), ask(&brake, 1.0)), (Ask::GoOn, Ask::Enough));
        brake.end("sample from base", "");
        brake.begin("tuning", 0, "tokens");
        assert_eq!((ask(&brake, 49.0), ask(&brake, 1.0)), (Ask::GoOn, Ask::Enough));

        let brake = Brake::open(folder.path(), budget, None).unwrap();
        brake.begin("sample from base", 0, "tokens");
        brake.advance("sample from base", 499, "");
        assert_eq!(ask(&brake, 0.0), Ask::GoOn);
        brake.advance("sample from base", 500, "");
        assert_eq!(ask(&brake, 0.0), Ask::Enough, "an advance tells all that is done, not what is new");
        brake.end("sample from base", "");
        brake.begin("scoring", 0, "answers");
        brake.advance("scoring", 100_000, "");
        assert_eq!(ask(&brake, 0.0), Ask::GoOn, "answers are no tokens");
    }

    #[test]
    fn without_a_budget_nothing_ends_and_at_the_time_everything_pauses() {
        let folder = tempfile::tempdir().unwrap();
        let free = Brake::open(folder.path(), Budget::default(), None).unwrap();
        assert_eq!(ask(&free, 1e9), Ask::GoOn);
        let timed = |until: &str| Brake::open(folder.path(), Budget::default(), Some(at(until))).unwrap();
        assert_eq!(ask(&timed("2026-01-10T02:00:01Z"), 0.0), Ask::GoOn);
        assert_eq!(ask(&timed("2026-01-10T02:00:00Z"), 0.0), Ask::Pause);
    }

    #[test]
    fn a_resumed_round_goes_on_counting() {
        let folder = tempfile::tempdir().unwrap();
        let budget = Budget { seconds: None, tokens: Some(10) };
        let brake = Brake::open(folder.path(), budget, None).unwrap();
        brake.begin("tuning", 0, "tokens");
        brake.advance("tuning", 9, "");
        assert_eq!(brake.asks(), Ask::GoOn);
        let resumed = Brake::open(folder.path(), budget, None).unwrap();
        resumed.begin("tuning", 0, "tokens");
        resumed.advance("tuning", 1, "");
        assert_eq!(resumed.asks(), Ask::Enough);
    }
}
