//! Whether the process is alive and whether it is ready: two different questions with two different answers.
//!
//! *Alive* means that the loops still turn, however little they achieve; the watchdog follows it, so that a broker that
//! is down never gets the daemon killed. *Ready* means that nothing stands in the way of the work; each part names its
//! own obstacle here and clears it. A leaf, so that a driver can report without knowing who asks.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The health of one process, shared by its parts.
#[derive(Debug, Default)]
pub struct Health {
    parts: Mutex<Parts>,
}

#[derive(Debug, Default)]
struct Parts {
    /// Part -> why it is not ready.
    obstacles: BTreeMap<&'static str, String>,
    /// Loop -> when it last turned, and how long a turn may take.
    loops: BTreeMap<&'static str, (Instant, Duration)>,
}

impl Health {
    /// Records that `part` cannot work now, and why.
    pub fn not_ready(&self, part: &'static str, why: impl Into<String>) {
        self.lock().obstacles.insert(part, why.into());
    }

    /// Records that `part` works (again).
    pub fn ready(&self, part: &'static str) {
        self.lock().obstacles.remove(part);
    }

    /// Records that the loop `name` turned now; it counts as stuck when the next turn takes longer than `within`.
    pub fn beat(&self, name: &'static str, within: Duration) {
        self.lock().loops.insert(name, (Instant::now(), within));
    }

    /// Records that the loop `name` ended on purpose.
    pub fn finished(&self, name: &'static str) {
        self.lock().loops.remove(name);
    }

    /// Returns what stands in the way, by part; empty when ready.
    pub fn obstacles(&self) -> BTreeMap<&'static str, String> {
        self.lock().obstacles.clone()
    }

    /// Returns the loops that have not turned in time at `now`; empty when alive.
    pub fn stuck(&self, now: Instant) -> Vec<&'static str> {
        let parts = self.lock();
        let late = |(at, within): &(Instant, Duration)| now.saturating_duration_since(*at) > *within;
        parts.loops.iter().filter(|(_, beat)| late(beat)).map(|(name, _)| *name).collect()
    }

    /// The maps are whole after every single operation, so a panic elsewhere while the lock was held left nothing torn.
    fn lock(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_the_absence_of_obstacles() {
        let health = Health::default();
        health.not_ready("broker", "cannot reach 127.0.0.1:9092");
        health.not_ready("table", "is foreign");
        health.ready("table");
        assert_eq!(
            health.obstacles().into_iter().collect::<Vec<_>>(),
            [("broker", "cannot reach 127.0.0.1:9092".into())]
        );
    }

    #[test]
    fn a_loop_is_stuck_only_past_its_own_limit() {
        let health = Health::default();
        health.beat("ingest", Duration::from_secs(10));
        health.beat("schedule", Duration::from_secs(100));
        let later = |seconds| Instant::now() + Duration::from_secs(seconds);
        assert!(health.stuck(later(5)).is_empty());
        assert_eq!(health.stuck(later(50)), ["ingest"]);
        health.finished("ingest");
        assert!(health.stuck(later(50)).is_empty());
    }
}
