//! What an operator asks for on the page: written down before it is begun, with who asked and why, and again when it ended.
//!
//! The page only asks. The daemon carries an action out, one at a time, since it alone talks to the endpoint; a promotion takes
//! as long as loading the model and proving who answers.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::durable::{self, FileError};

/// What is to happen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "what", rename_all = "lowercase")]
pub enum Action {
    /// Serve this version: by its trial's verdict where that passed and was not carried out, else on the operator's word.
    Promote { version: String },
    /// Serve what was served before, and quarantine `from`, which is what was served when this was asked for.
    Rollback {
        #[serde(default)]
        from: Option<String>,
    },
    /// Let nothing be trained, judged or promoted until the freeze is lifted.
    Freeze,
    /// Lift the freeze.
    Thaw,
    /// Begin a round now.
    Run,
}

/// How far an action is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Progress {
    /// Asked for, and under way. One that was asked of an earlier process was cut off with it.
    Asked,
    Done,
    Failed,
}

/// One action as it is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Record {
    pub id: String,
    #[serde(flatten)]
    pub action: Action,
    /// Who asked: the holder of a token, or a client certificate.
    pub by: String,
    pub reason: String,
    pub asked: DateTime<Utc>,
    pub state: Progress,
    /// What came of it, in words; empty while it is under way.
    pub outcome: String,
    pub ended: Option<DateTime<Utc>>,
}

/// Why an action is not taken up.
#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("other actions are still under way; wait for them")]
    Busy,
    #[error("this process only ingests; ask the daemon that runs rounds")]
    NotHere,
}

/// Takes actions and keeps their records.
pub struct Actions {
    path: PathBuf,
    writing: Mutex<()>,
    todo: Option<mpsc::Sender<Record>>,
}

/// Actions that may wait.
const WAITING: usize = 4;

impl Actions {
    /// Keeps records below the state folder and hands actions to whoever reads the returned channel.
    pub fn new(state: &Path) -> (Self, mpsc::Receiver<Record>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Actions { todo: Some(sender), ..Actions::none(state) }, receiver)
    }

    /// Takes no actions, but shows the records.
    pub fn none(state: &Path) -> Self {
        Actions { path: state.join("actions.jsonl"), writing: Mutex::default(), todo: None }
    }

    /// Records that `by` asks for an action and hands it on.
    pub fn ask(&self, action: Action, by: &str, reason: &str) -> Result<Record, ActionError> {
        let todo = self.todo.as_ref().ok_or(ActionError::NotHere)?;
        let place = todo.try_reserve().map_err(|_| ActionError::Busy)?;
        let record = Record {
            id: uuid::Uuid::now_v7().to_string(),
            action,
            by: by.to_string(),
            reason: reason.to_string(),
            asked: Utc::now(),
            state: Progress::Asked,
            outcome: String::new(),
            ended: None,
        };
        self.write(&record)?;
        tracing::info!(by, id = record.id, action = ?record.action, "an operator asks for an action");
        place.send(record.clone());
        Ok(record)
    }

    /// Records how an action ended.
    pub fn end(&self, record: Record, outcome: Result<String, String>) -> Result<(), FileError> {
        let (state, outcome) = match outcome {
            Ok(words) => (Progress::Done, words),
            Err(words) => (Progress::Failed, words),
        };
        self.write(&Record { state, outcome, ended: Some(Utc::now()), ..record })
    }

    /// Returns the newest actions, the newest first, each as it stands.
    pub fn list(&self, limit: usize) -> Result<Vec<Record>, FileError> {
        let text = match std::fs::read_to_string(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            read => read.map_err(|e| FileError::io("cannot read", &self.path, e))?,
        };
        let mut newest: Vec<Record> = Vec::new();
        // A line that was torn by a kill was never recorded.
        for record in text.lines().filter_map(|line| serde_json::from_str::<Record>(line).ok()) {
            match newest.iter_mut().find(|known| known.id == record.id) {
                Some(known) => *known = record,
                None => newest.push(record),
            }
        }
        newest.reverse();
        newest.truncate(limit);
        Ok(newest)
    }

    /// Appends a line, durable once this returns. It begins with a line break, which ends what a kill left torn.
    fn write(&self, record: &Record) -> Result<(), FileError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let line = serde_json::to_string(record)
            .map_err(|source| FileError::Json { path: self.path.display().to_string(), source })?;
        let is_new = !self.path.exists();
        let append = || -> std::io::Result<()> {
            let mut file = std::fs::File::options().create(true).append(true).open(&self.path)?;
            file.write_all(format!("\n{line}").as_bytes())?;
            file.sync_all()
        };
        append().map_err(|e| FileError::io("cannot append to", &self.path, e))?;
        if is_new { durable::sync_folder(self.path.parent().unwrap_or(Path::new("."))) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_action_is_on_disk_before_it_is_begun_and_when_it_ended() {
        let folder = tempfile::tempdir().unwrap();
        let (actions, mut todo) = Actions::new(folder.path());
        actions.ask(Action::Promote { version: "taod-1".into() }, "anna", "it is better").unwrap();
        let begun = todo.try_recv().unwrap();
        assert_eq!(actions.list(9).unwrap(), std::slice::from_ref(&begun));
        actions.ask(Action::Freeze, "bob", "holidays").unwrap();
        actions.end(begun, Err("the endpoint is down".into())).unwrap();
        std::fs::File::options().append(true).open(&actions.path).unwrap().write_all(b"\n{\"torn").unwrap();
        actions.end(todo.try_recv().unwrap(), Ok("frozen".into())).unwrap();
        let all = actions.list(9).unwrap();
        let seen: Vec<_> = all.iter().map(|r| (r.by.as_str(), r.state, r.outcome.as_str())).collect();
        assert_eq!(seen, [("bob", Progress::Done, "frozen"), ("anna", Progress::Failed, "the endpoint is down")]);
        assert!(all.iter().all(|record| record.ended.is_some()));
    }

    #[test]
    fn only_so_many_wait_and_who_only_ingests_takes_none() {
        let folder = tempfile::tempdir().unwrap();
        let (actions, _todo) = Actions::new(folder.path());
        (0..WAITING).for_each(|_| drop(actions.ask(Action::Run, "anna", "now").unwrap()));
        assert!(matches!(actions.ask(Action::Run, "anna", "now"), Err(ActionError::Busy)));
        assert_eq!(actions.list(100).unwrap().len(), WAITING, "one that was not taken up is recorded");
        assert!(matches!(Actions::none(folder.path()).ask(Action::Run, "a", "b"), Err(ActionError::NotHere)));
    }
}
