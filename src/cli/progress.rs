//! Progress for people: bars with rate and remaining time on a terminal, plain lines now and then without one.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::progress::{Observer, Progress};

/// Without a terminal a step reports at most this often.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// What standard error is.
#[derive(Debug, Clone)]
pub enum Screen {
    /// A terminal, which can hold bars below the log lines.
    Terminal(MultiProgress),
    /// A file, a pipe, the journal.
    Plain,
}

impl Screen {
    /// Looks at standard error.
    pub fn detect() -> Self {
        if std::io::stderr().is_terminal() { Screen::Terminal(MultiProgress::new()) } else { Screen::Plain }
    }

    /// Returns true on a terminal.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Screen::Terminal(_))
    }

    /// Runs `write` so that what it writes stands above the bars.
    pub fn above<T>(&self, write: impl FnOnce() -> T) -> T {
        match self {
            Screen::Terminal(bars) => bars.suspend(write),
            Screen::Plain => write(),
        }
    }

    /// Returns a handle that shows the steps of a command here.
    pub fn progress(&self) -> Progress {
        Progress::to(match self {
            Screen::Terminal(bars) => Arc::new(Bars { all: bars.clone(), open: Mutex::default() }),
            Screen::Plain => Arc::new(Lines::to(Box::new(std::io::stderr()))),
        })
    }
}

/// One bar for each step under way.
struct Bars {
    all: MultiProgress,
    open: Mutex<HashMap<String, ProgressBar>>,
}

impl Observer for Bars {
    fn begin(&self, step: &str, total: u64, unit: &str) {
        let template = match total {
            0 => format!("{{spinner}} {{prefix:18}} {{human_pos}} {unit} ({{per_sec}}) {{elapsed}}  {{wide_msg}}"),
            _ => format!(
                "{{spinner}} {{prefix:18}} {{bar:24}} {{human_pos}}/{{human_len}} {unit} ({{per_sec}}, {{eta}} left)  {{wide_msg}}"
            ),
        };
        let style = ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = if total == 0 { ProgressBar::no_length() } else { ProgressBar::new(total) };
        let bar = self.all.add(bar.with_style(style).with_prefix(step.to_string()));
        bar.enable_steady_tick(Duration::from_millis(250));
        lock(&self.open).insert(step.to_string(), bar);
    }

    fn advance(&self, step: &str, done: u64, note: &str) {
        if let Some(bar) = lock(&self.open).get(step) {
            bar.set_position(done);
            bar.set_message(note.to_string());
        }
    }

    fn end(&self, step: &str, note: &str) {
        if let Some(bar) = lock(&self.open).remove(step) {
            // The bar makes way for one line that stays.
            let took = bar.elapsed().as_secs_f64();
            let line = finished(step, bar.position(), took, note);
            bar.finish_and_clear();
            self.all.suspend(|| eprintln!("{line}"));
        }
    }
}

/// A line at the end of each step, and one in between where a step takes long.
struct Lines {
    out: Mutex<Box<dyn Write + Send>>,
    open: Mutex<HashMap<String, Running>>,
}

struct Running {
    total: u64,
    unit: String,
    done: u64,
    since: Instant,
    told: Instant,
}

impl Lines {
    fn to(out: Box<dyn Write + Send>) -> Self {
        Lines { out: Mutex::new(out), open: Mutex::default() }
    }

    fn say(&self, line: &str) {
        // Progress that nobody can read is no reason to stop the work.
        drop(writeln!(lock(&self.out), "{line}"));
    }
}

impl Observer for Lines {
    fn begin(&self, step: &str, total: u64, unit: &str) {
        let now = Instant::now();
        let running = Running { total, unit: unit.to_string(), done: 0, since: now, told: now };
        lock(&self.open).insert(step.to_string(), running);
    }

    fn advance(&self, step: &str, done: u64, note: &str) {
        let mut open = lock(&self.open);
        let Some(running) = open.get_mut(step) else { return };
        running.done = done;
        if running.told.elapsed() < LINE_EVERY {
            return;
        }
        running.told = Instant::now();
        let line = under_way(step, running, running.since.elapsed().as_secs_f64(), note);
        drop(open);
        self.say(&line);
    }

    fn end(&self, step: &str, note: &str) {
        let Some(running) = lock(&self.open).remove(step) else { return };
        self.say(&finished(step, running.done, running.since.elapsed().as_secs_f64(), note));
    }
}

fn under_way(step: &str, running: &Running, seconds: f64, note: &str) -> String {
    let Running { total, unit, done, .. } = running;
    let rate = *done as f64 / seconds.max(1e-9);
    let left = match total.checked_sub(*done) {
        Some(left) if *total > 0 && *done > 0 => format!(" of {total}, about {:.0} s left", left as f64 / rate),
        _ => String::new(),
    };
    join_note(format!("{step}: {done} {unit}{left} ({rate:.1}/s)"), note)
}

fn finished(step: &str, done: u64, seconds: f64, note: &str) -> String {
    join_note(format!("{step}: {done} in {seconds:.1} s"), note)
}

fn join_note(line: String, note: &str) -> String {
    if note.is_empty() { line } else { format!("{line}: {note}") }
}

/// The maps are whole after every operation, so a panic elsewhere while the lock was held left nothing torn.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            lock(&self.0).write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn without_a_terminal_a_short_step_is_one_line() {
        let paper = Paper::default();
        let progress = Progress::to(Arc::new(Lines::to(Box::new(paper.clone()))));
        let mut step = progress.step("sampling", 10, "prompts");
        for _ in 0..10 {
            step.advance(1, "412 tokens/s");
        }
        drop(step);
        let text = String::from_utf8(lock(&paper.0).clone()).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.starts_with("sampling: 10 in 0.") && text.ends_with(" s: 412 tokens/s\n"), "{text}");
    }

    #[test]
    fn a_long_step_tells_its_rate_and_what_is_left() {
        let now = Instant::now();
        let mut running = Running { total: 100, unit: "prompts".into(), done: 25, since: now, told: now };
        assert_eq!(under_way("scoring", &running, 50.0, ""), "scoring: 25 prompts of 100, about 150 s left (0.5/s)");
        running.total = 0;
        assert_eq!(under_way("scoring", &running, 50.0, "x"), "scoring: 25 prompts (0.5/s): x");
    }
}
