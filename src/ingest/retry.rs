//! Whether a session that failed is followed by another, when, and what is said of it.

use std::time::Duration;

use super::{IngestError, Mode};

/// Restarts that `--until-idle` accepts from other members or lost replies before it gives up.
const RESTARTS: u32 = 10;
const BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// Between two looks at whether a name in the group is free. It is once a session has timed out, 45 s by default.
const NAME_HELD: Duration = Duration::from_secs(5);

/// What is remembered from one session to the next.
pub(super) struct Retry {
    mode: Mode,
    restarts: u32,
    backoff: Duration,
    /// What was said last: that a name is another's is said once and not at every look.
    told: Option<String>,
}

impl Retry {
    pub(super) fn new(mode: Mode) -> Self {
        Retry { mode, restarts: 0, backoff: BACKOFF, told: None }
    }

    /// Takes in why a session ended, how long it lasted and whether it got as far as to read. Returns how long to wait before
    /// the next one, or the error where there is none.
    pub(super) fn after(
        &mut self,
        error: IngestError,
        lasted: Duration,
        worked: bool,
    ) -> Result<Duration, IngestError> {
        self.restarts += 1;
        let hopeless = match self.mode {
            Mode::UntilIdle => !error.is_restart() || self.restarts > RESTARTS,
            // What could be read once may be back in a moment, such as a secret that is being renewed.
            Mode::Forever => error.is_final() && (self.restarts == 1 || !matches!(error, IngestError::Source(_))),
        };
        if hopeless {
            return Err(error);
        }
        // Two that take a name from each other do so ever more slowly, however long each one has it.
        if lasted > LONGEST_BACKOFF && !error.is_fenced() {
            self.backoff = BACKOFF;
        }
        let wait = if error.is_name_held() { NAME_HELD } else { self.backoff };
        let line = error.to_string();
        match error.is_fenced() && !worked && self.told.as_ref() == Some(&line) {
            true => tracing::debug!(wait_s = wait.as_secs(), "the name in the group is still another's"),
            false => tell(&error, wait),
        }
        self.told = Some(line);
        if !error.is_name_held() {
            self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
        }
        Ok(wait)
    }
}

fn tell(error: &IngestError, wait: Duration) {
    let wait_s = wait.as_secs();
    match error.needs_hands() {
        true => tracing::error!(%error, wait_s, "ingestion starts again from what the tables hold"),
        false => tracing::warn!(%error, wait_s, "ingestion starts again from what the tables hold"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::query_log::SourceError;

    const SHORT: Duration = Duration::from_millis(10);
    const LONG: Duration = Duration::from_secs(3600);

    fn fenced() -> IngestError {
        SourceError::Fenced { instance: "a".into(), group: "g".into() }.into()
    }

    fn held() -> IngestError {
        SourceError::Unreleased { instance: "a".into(), group: "g".into() }.into()
    }

    fn refused() -> IngestError {
        SourceError::Refused { brokers: "b".into(), cause: "c".into(), remedy: "r" }.into()
    }

    fn seconds(retry: &mut Retry, errors: impl IntoIterator<Item = (IngestError, Duration)>) -> Vec<u64> {
        errors.into_iter().map(|(error, lasted)| retry.after(error, lasted, false).unwrap().as_secs()).collect()
    }

    #[test]
    fn a_wait_grows_until_a_session_has_lasted() {
        let mut retry = Retry::new(Mode::Forever);
        let errors = (0..8).map(|i| (refused(), if i == 7 { LONG } else { SHORT }));
        assert_eq!(seconds(&mut retry, errors), [1, 2, 4, 8, 16, 32, 60, 1]);
    }

    #[test]
    fn two_with_one_name_take_it_from_each_other_ever_more_slowly() {
        let mut retry = Retry::new(Mode::Forever);
        assert_eq!(seconds(&mut retry, (0..8).map(|_| (fenced(), LONG))), [1, 2, 4, 8, 16, 32, 60, 60]);
        let mut retry = Retry::new(Mode::Forever);
        assert_eq!(seconds(&mut retry, (0..20).map(|_| (held(), SHORT))), [5; 20]);
    }

    #[test]
    fn what_is_refused_is_final_only_where_it_ends_by_itself() {
        assert!(Retry::new(Mode::UntilIdle).after(refused(), SHORT, false).is_err());
        assert!(Retry::new(Mode::Forever).after(refused(), SHORT, false).is_ok());
        let unreadable = || SourceError::Secret { key: "k".into(), path: "p".into(), why: "w".into() }.into();
        assert!(Retry::new(Mode::Forever).after(unreadable(), SHORT, false).is_err());
        let mut retry = Retry::new(Mode::Forever);
        assert_eq!(seconds(&mut retry, [(refused(), SHORT), (unreadable(), SHORT)]), [1, 2]);
        let mut retry = Retry::new(Mode::UntilIdle);
        assert_eq!(seconds(&mut retry, (0..10).map(|_| (held(), SHORT))), [5; 10]);
        assert!(retry.after(held(), SHORT, false).is_err());
    }
}
