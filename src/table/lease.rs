//! A lease: exactly one of several processes owns a duty at a time, by a position in a table's log.
//!
//! The position's value only grows: twice a stamp, plus one once the owner gave it up. Taking, renewing and giving up are
//! compare-and-set commits, so of two that try one is fenced off. Nobody compares two machines' clocks: a challenger takes
//! over when it has itself watched the value stand still for a whole term. The owner counts from before its renewal was
//! written and stops acting after [`ACT`] of the term, by both its clocks, the steady one and the one on the wall; so a
//! clock that jumps, or a machine that slept, makes it stop early, never late. Two owners would need a machine that
//! slept, whose wall clock is wrong by as much, and then last until its next renewal.

use std::time::{Duration, Instant, SystemTime};

use super::{Table, TableError, TxnStep};

/// The part of a term for which an owner may act without having renewed, in percent.
const ACT: u32 = 80;

/// One contender for a duty.
pub struct Lease {
    table: Table,
    app_id: String,
    term: Duration,
    state: State,
}

enum State {
    /// Another may own it; what was seen, and since when it stands so.
    Watching {
        seen: Option<i64>,
        since: Instant,
    },
    Owning {
        value: i64,
        renewed: Moment,
    },
}

/// A moment by both clocks.
#[derive(Clone, Copy)]
struct Moment {
    steady: Instant,
    wall: SystemTime,
}

impl Moment {
    fn now() -> Self {
        Moment { steady: Instant::now(), wall: SystemTime::now() }
    }

    /// Returns how long ago this was, by the clock that says longer; a wall clock that was set back says for ever.
    fn age(&self) -> Duration {
        self.steady.elapsed().max(self.wall.elapsed().unwrap_or(Duration::MAX))
    }
}

/// How long an owner may go on acting, checked by itself.
#[derive(Clone, Copy)]
pub struct Grant {
    renewed: Moment,
    span: Duration,
}

impl Grant {
    /// Returns true while its owner may act.
    pub fn holds(&self) -> bool {
        self.renewed.age() < self.span
    }
}

impl Lease {
    /// Enters the contest for `app_id` in `table`. `term` is how long an owner that died keeps the others out.
    pub fn new(table: Table, app_id: &str, term: Duration) -> Self {
        let state = State::Watching { seen: None, since: Instant::now() };
        Lease { table, app_id: app_id.to_owned(), term, state }
    }

    /// Takes the lease or renews it; returns the grant, or nothing where another owns it. Call it three times a term.
    pub async fn keep(&mut self) -> Result<Option<Grant>, TableError> {
        let now = Moment::now();
        self.table.refresh().await?;
        let found = self.table.txn(&self.app_id).await?;
        let free = match &self.state {
            State::Owning { value, .. } => found == Some(*value),
            State::Watching { .. } if found.is_none_or(is_given_up) => true,
            State::Watching { seen, since } => *seen == found && since.elapsed() >= self.term,
        };
        if !free {
            self.watch(found);
            return Ok(None);
        }
        let value = next(found, now.wall) * 2;
        match self.step(found, value).await {
            Ok(()) => {
                self.state = State::Owning { value, renewed: now };
                Ok(self.grant())
            }
            Err(TableError::Fenced { found, .. }) => {
                self.watch(found);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the grant that the latest renewal gave, if it still holds.
    pub fn grant(&self) -> Option<Grant> {
        let State::Owning { renewed, .. } = &self.state else { return None };
        let grant = Grant { renewed: *renewed, span: self.term * ACT / 100 };
        grant.holds().then_some(grant)
    }

    /// Gives the lease up, so that the next one need not wait for a term. Stop acting first.
    pub async fn release(mut self) -> Result<(), TableError> {
        match self.state {
            State::Owning { value, .. } => match self.step(Some(value), value + 1).await {
                Err(TableError::Fenced { .. }) => Ok(()),
                other => other,
            },
            State::Watching { .. } => Ok(()),
        }
    }

    async fn step(&mut self, expect: Option<i64>, set: i64) -> Result<(), TableError> {
        self.table.append(&[], &[TxnStep { app_id: self.app_id.clone(), expect, set }]).await.map(|_| ())
    }

    fn watch(&mut self, found: Option<i64>) {
        match &self.state {
            State::Watching { seen, .. } if *seen == found => {}
            _ => self.state = State::Watching { seen: found, since: Instant::now() },
        }
    }
}

fn is_given_up(value: i64) -> bool {
    value % 2 != 0
}

/// Returns the next stamp: the time in milliseconds, for people, and more than the one before, whatever the clock says.
fn next(found: Option<i64>, wall: SystemTime) -> i64 {
    let millis = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
    let millis = i64::try_from(millis).unwrap_or_default();
    found.map_or(millis, |value| millis.max(value / 2 + 1))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use deltalake::logstore::object_store::memory::InMemory;
    use url::Url;

    use super::*;
    use crate::table::{Name, TableLocation, Tables};

    const TERM: Duration = Duration::from_millis(400);

    fn tables() -> Tables {
        let url = Url::parse("memory:///tables/").unwrap();
        Tables::at(TableLocation::with_store(url, Arc::new(InMemory::new())))
    }

    async fn lease(tables: &Tables) -> Lease {
        Lease::new(tables.open_one(Name::Rounds).await.unwrap(), "taod/lease", TERM)
    }

    /// The same contender as if its last look or renewal lay `age` back.
    fn aged(mut lease: Lease, age: Duration) -> Lease {
        match &mut lease.state {
            State::Watching { since, .. } => *since -= age,
            State::Owning { renewed, .. } => {
                renewed.steady -= age;
                renewed.wall -= age;
            }
        }
        lease
    }

    #[tokio::test]
    async fn one_owns_it_until_it_gives_it_up() {
        let tables = tables();
        let (mut a, mut b) = (lease(&tables).await, lease(&tables).await);
        assert!(a.keep().await.unwrap().is_some());
        assert!(b.keep().await.unwrap().is_none() && b.keep().await.unwrap().is_none());
        assert!(a.keep().await.unwrap().is_some(), "renewed");
        a.release().await.unwrap();
        assert!(b.keep().await.unwrap().is_some(), "at once, not after a term");
    }

    #[tokio::test]
    async fn of_two_that_reach_for_it_at_once_one_gets_it() {
        let tables = tables();
        let (mut a, mut b) = (lease(&tables).await, lease(&tables).await);
        let (first, second) = tokio::join!(a.keep(), b.keep());
        assert_eq!(usize::from(first.unwrap().is_some()) + usize::from(second.unwrap().is_some()), 1);
    }

    #[tokio::test]
    async fn a_dead_owner_is_followed_after_a_term_of_silence_and_no_sooner() {
        let tables = tables();
        let (mut a, mut b) = (lease(&tables).await, lease(&tables).await);
        a.keep().await.unwrap();
        b.keep().await.unwrap();
        let mut b = aged(b, TERM / 2);
        assert!(b.keep().await.unwrap().is_none());
        a.keep().await.unwrap();
        let mut b = aged(b, TERM);
        assert!(b.keep().await.unwrap().is_none(), "it renewed meanwhile");
        let mut b = aged(b, TERM);
        assert!(b.keep().await.unwrap().is_some());
        assert!(a.keep().await.unwrap().is_none(), "the old owner is fenced off");
        assert!(a.grant().is_none());
    }

    #[tokio::test]
    async fn an_owner_stops_by_itself_before_anyone_may_follow() {
        let tables = tables();
        let mut a = lease(&tables).await;
        let grant = a.keep().await.unwrap().unwrap();
        assert!(grant.holds());
        let a = aged(a, TERM * 9 / 10);
        assert!(a.grant().is_none());
        let jumped = |renewed: Moment| Grant { renewed, span: TERM }.holds();
        let (now, day) = (Moment::now(), Duration::from_secs(86_400));
        assert!(jumped(now));
        assert!(!jumped(Moment { wall: now.wall + day, ..now }), "the wall clock was set back");
        assert!(!jumped(Moment { wall: now.wall - day, ..now }), "the machine slept");
    }

    #[test]
    fn stamps_only_grow() {
        let epoch = SystemTime::UNIX_EPOCH;
        assert_eq!(next(None, epoch + Duration::from_millis(5)), 5);
        assert_eq!(next(Some(20), epoch), 11, "a clock that went back");
        assert_eq!(next(Some(21), epoch), 11, "after it was given up");
    }
}
