//! Scores from a program of the operator's own: one line of JSON in for each answer, one line of JSON out.
//!
//! The program is started without a shell, in an empty folder, with few environment variables, under limits of processor
//! time, memory, open files and file size, as the leader of a process group of its own. When its time is up, or when it
//! has said what it had to say, the group is killed: nothing that it started outlives a scoring. What it may reach over the
//! network is not limited; that is what a service manager or a container is for.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command as Process, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Item;
use super::scorer::Scale;
use crate::durable;

/// How long a program that has answered may take to end by itself.
const GRACE: Duration = Duration::from_secs(1);
/// Bytes of the longest line.
const MAX_LINE: u64 = 1 << 16;
/// Bytes of what the program says of its errors that are repeated in ours.
const MAX_SAID: u64 = 2000;

/// A scoring program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Program and arguments, such as `["/opt/score/bin/python", "/opt/score/score.py"]`; the program by its absolute path. It
    /// reads `{"index", "workload", "messages", "response", "finish_reason"}` a line and answers `{"score": number}` a line,
    /// in the same order.
    pub command: Vec<String>,
    /// A text that names what the program does; another one is another reward. The files that the command names are hashed
    /// besides.
    #[serde(default)]
    pub version: String,
    /// What the scores are: shares of [0, 1], or logits.
    #[serde(default)]
    pub scale: Scale,
    /// Answers that one run of the program scores. Range 1 to 100000.
    #[serde(default = "default_batch")]
    pub batch: usize,
    /// How long one run may take, in seconds. Range 1 to 86400.
    #[serde(default = "default_timeout")]
    pub timeout_s: u64,
    /// Processor time that each of its processes may take, in seconds. Range 1 to 86400.
    #[serde(default = "default_timeout")]
    pub cpu_s: u64,
    /// Address space of each of its processes, in MiB. Range 16 to 1048576.
    #[serde(default = "default_memory")]
    pub memory_mib: u64,
    /// Files that each of its processes may hold open. Range 8 to 65536.
    #[serde(default = "default_files")]
    pub open_files: u64,
    /// Size of the largest file that it may write, in MiB. Range 0 to 1048576.
    #[serde(default = "default_file_size")]
    pub file_mib: u64,
}

fn default_batch() -> usize {
    1000
}

fn default_timeout() -> u64 {
    300
}

fn default_memory() -> u64 {
    2048
}

fn default_files() -> u64 {
    256
}

fn default_file_size() -> u64 {
    64
}

impl Settings {
    /// Checks every key; the message names key, value and remedy.
    pub fn validate(&self) -> Result<(), String> {
        match self.command.first() {
            None => return Err("command = []: name a program by its absolute path".into()),
            Some(program) if !program.starts_with('/') => {
                return Err(format!("command begins with {program:?}: name the program by its absolute path"));
            }
            Some(_) => {}
        }
        let ranges = [
            ("batch", self.batch as u64, 1, 100_000),
            ("timeout_s", self.timeout_s, 1, 86_400),
            ("cpu_s", self.cpu_s, 1, 86_400),
            ("memory_mib", self.memory_mib, 16, 1 << 20),
            ("open_files", self.open_files, 8, 1 << 16),
            ("file_mib", self.file_mib, 0, 1 << 20),
        ];
        match ranges.into_iter().find(|(_, value, low, high)| !(low..=high).contains(&value)) {
            Some((key, value, low, high)) => Err(format!("{key} = {value}: choose {low} to {high}")),
            None => Ok(()),
        }
    }
}

/// A program that gave no usable scores. What it said may repeat the answers it was given, which belong into no log, so that
/// the messages leave it out; it is logged at debug.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("{program} cannot be started: {source}")]
    Start { program: String, source: std::io::Error },
    #[error("{program} did not answer within {seconds} s and was killed; raise timeout_s or lower batch")]
    Slow { program: String, seconds: u64 },
    #[error(
        "{program} gave {found} scores for {asked} answers and ended with {status}; `--log debug` shows what it said"
    )]
    Count { program: String, found: usize, asked: usize, status: String, said: String },
    #[error(
        "{program} answered line {line} with something else than {{\"score\": number}} with {wanted}; `--log debug` shows it"
    )]
    Line { program: String, line: usize, found: String, wanted: &'static str },
    #[error("{program}, line {line}: more than {MAX_LINE} bytes without a line break")]
    Long { program: String, line: usize },
}

/// A scoring program, with the hashes of its files.
pub(super) struct Command {
    settings: Settings,
    program: String,
    files: Vec<String>,
}

impl Command {
    /// Hashes the files that the command names. The program itself must be one.
    pub(super) fn open(settings: &Settings) -> Result<Self, CommandError> {
        let program = settings.command.first().cloned().unwrap_or_default();
        let is_file = |argument: &&String| std::path::Path::new(argument).is_file();
        let files = settings.command.iter().filter(is_file);
        let hash = |path: &String| durable::sha256_file(std::path::Path::new(path));
        let files = files.map(hash).collect::<Result<Vec<_>, _>>();
        let fail = |source| CommandError::Start { program: program.clone(), source };
        let files = files.map_err(|e| fail(std::io::Error::other(e.to_string())))?;
        if !std::path::Path::new(&program).is_file() {
            return Err(fail(std::io::Error::from(std::io::ErrorKind::NotFound)));
        }
        Ok(Command { settings: settings.clone(), program, files })
    }

    pub(super) fn scale(&self) -> Scale {
        self.settings.scale
    }

    /// Returns what decides the scores as far as can be known from here.
    pub(super) fn identity(&self) -> String {
        json!([self.settings.command, self.settings.version, self.settings.scale, self.files]).to_string()
    }

    /// Returns the raw score of each answer.
    pub(super) fn score(&self, items: &[&Item]) -> Result<Vec<f64>, CommandError> {
        let mut scores = Vec::with_capacity(items.len());
        for batch in items.chunks(self.settings.batch) {
            scores.extend(self.run(batch)?);
        }
        Ok(scores)
    }

    fn run(&self, items: &[&Item]) -> Result<Vec<f64>, CommandError> {
        let start = |source| CommandError::Start { program: self.program.clone(), source };
        let folder = tempfile::tempdir().map_err(start)?;
        let mut group = Group(self.spawn(folder.path()).map_err(start)?);
        let deadline = Instant::now() + Duration::from_secs(self.settings.timeout_s);
        let lines = items.iter().enumerate().map(line).collect::<Vec<String>>();
        let (answers, said) = group.listen(lines);
        let found = self.receive(&answers, items.len(), deadline);
        drop(answers);
        let status = group.end(found.is_ok(), deadline);
        match found {
            Ok(scores) if scores.len() == items.len() => Ok(scores),
            Ok(scores) => {
                let said = said.recv_timeout(GRACE).unwrap_or_default();
                tracing::debug!(program = self.program, said, "a scoring program ended early");
                let (found, asked) = (scores.len(), items.len());
                Err(CommandError::Count { program: self.program.clone(), found, asked, status, said })
            }
            Err(error) => Err(error),
        }
    }

    fn spawn(&self, folder: &std::path::Path) -> std::io::Result<Child> {
        let mut process = Process::new(&self.program);
        process.args(&self.settings.command[1..]).current_dir(folder).process_group(0).env_clear();
        process.env("PATH", "/usr/local/bin:/usr/bin:/bin").env("HOME", folder).env("TMPDIR", folder);
        process.env("LANG", "C.UTF-8");
        process.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        limit(&mut process, &self.settings);
        process.spawn()
    }

    /// Takes scores until all are there, the program ends, or the time is up.
    fn receive(
        &self,
        answers: &mpsc::Receiver<Answer>,
        asked: usize,
        deadline: Instant,
    ) -> Result<Vec<f64>, CommandError> {
        let mut scores = Vec::with_capacity(asked);
        loop {
            let program = || self.program.clone();
            let answered = scores.len() == asked;
            // What a program left behind may hold its output open: once all is there, only a line too many is waited for.
            let until = if answered { deadline.min(Instant::now() + GRACE) } else { deadline };
            match answers.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Answer::Line(text)) if scores.len() < asked => scores.push(self.read(&text, scores.len())?),
                // One more than was asked for: the lines do not belong to the answers.
                Ok(Answer::Line(_)) => return Ok([scores, vec![0.0]].concat()),
                Ok(Answer::TooLong) => return Err(CommandError::Long { program: program(), line: scores.len() }),
                Err(RecvTimeoutError::Disconnected) => return Ok(scores),
                Err(RecvTimeoutError::Timeout) if answered => return Ok(scores),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(CommandError::Slow { program: program(), seconds: self.settings.timeout_s });
                }
            }
        }
    }

    fn read(&self, text: &str, line: usize) -> Result<f64, CommandError> {
        let value: Option<Value> = serde_json::from_str(text).ok();
        let score = value.and_then(|value| value["score"].as_f64()).filter(|score| self.settings.scale.holds(*score));
        score.ok_or_else(|| {
            let found: String = text.chars().take(80).collect();
            tracing::debug!(program = self.program, line, found, "a scoring program gave no score");
            CommandError::Line { program: self.program.clone(), line, found, wanted: self.settings.scale.wanted() }
        })
    }
}

fn line((index, item): (usize, &&Item)) -> String {
    let Item { workload, messages, response, finish_reason, .. } = item;
    let value = json!({ "index": index, "workload": workload, "messages": messages, "response": response, "finish_reason": finish_reason });
    format!("{value}\n")
}

/// What comes out of a program.
enum Answer {
    Line(String),
    TooLong,
}

fn read_lines(stdout: impl Read, sender: &mpsc::SyncSender<Answer>) {
    let mut reader = BufReader::new(stdout);
    loop {
        let mut bytes = Vec::new();
        let read = reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes);
        let answer = match read {
            Ok(0) | Err(_) => return,
            Ok(_) if bytes.len() as u64 == MAX_LINE && bytes.last() != Some(&b'\n') => Answer::TooLong,
            Ok(_) if bytes.trim_ascii().is_empty() => continue,
            Ok(_) => Answer::Line(String::from_utf8_lossy(&bytes).trim().to_owned()),
        };
        // Where nobody listens any more, or no line can follow, the pipe is closed, and the program with it.
        let is_last = matches!(answer, Answer::TooLong);
        if sender.send(answer).is_err() || is_last {
            return;
        }
    }
}

/// Reads all and keeps the beginning.
fn read_some(mut stderr: impl Read) -> String {
    let mut bytes = Vec::new();
    let kept = stderr.by_ref().take(MAX_SAID).read_to_end(&mut bytes);
    let drained = std::io::copy(&mut stderr, &mut std::io::sink());
    if let (Err(error), _) | (_, Err(error)) = (kept.map(|n| n as u64), drained) {
        tracing::debug!(%error, "what a scoring program says cannot be read");
    }
    String::from_utf8_lossy(&bytes).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A running program and all that it started, as far as that stayed in its group.
struct Group(Child);

impl Group {
    /// Writes the lines to the program and reads what it says, each in a thread of its own that ends with the pipe.
    fn listen(&mut self, lines: Vec<String>) -> (mpsc::Receiver<Answer>, mpsc::Receiver<String>) {
        let (answer, answers) = mpsc::sync_channel(256);
        let (say, said) = mpsc::sync_channel(1);
        if let Some(mut stdin) = self.0.stdin.take() {
            // A program that reads nothing more breaks the pipe, which is no fault: what counts is what it answers.
            std::thread::spawn(move || lines.iter().try_for_each(|line| stdin.write_all(line.as_bytes())));
        }
        if let Some(stdout) = self.0.stdout.take() {
            std::thread::spawn(move || read_lines(stdout, &answer));
        }
        if let Some(stderr) = self.0.stderr.take() {
            std::thread::spawn(move || say.send(read_some(stderr)));
        }
        (answers, said)
    }

    /// Gives a program that answered all a moment to end by itself, kills what is left, and returns how it ended.
    fn end(&mut self, answered: bool, deadline: Instant) -> String {
        let until = deadline.min(Instant::now() + GRACE);
        while answered && !self.has_ended() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill();
        self.0.wait().map_or_else(|error| error.to_string(), |status| status.to_string())
    }

    /// Returns true where the leader is over; it stays waited for, so that its id, which is the group's, is not given away.
    #[expect(unsafe_code, reason = "the standard library only waits in a way that frees the id")]
    fn has_ended(&self) -> bool {
        // SAFETY: all zeros are a valid siginfo_t, and the call writes to this one alone.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let how = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // SAFETY: as above; with WNOHANG the call returns at once.
        let called = unsafe { libc::waitid(libc::P_PID, self.0.id(), &mut info, how) };
        // SAFETY: waitid filled it in, or left it at zero where the leader still runs.
        called == 0 && unsafe { info.si_pid() } != 0
    }

    #[expect(unsafe_code, reason = "the standard library kills one process, not its group")]
    fn kill(&self) {
        let Ok(group) = libc::pid_t::try_from(self.0.id()) else { return };
        // SAFETY: a system call on numbers. The leader was not waited for yet, so that the group's id is still its own.
        unsafe { libc::killpg(group, libc::SIGKILL) };
    }
}

/// Sets the limits of a process that is not there yet.
#[expect(unsafe_code, reason = "the standard library has no call for another process's limits")]
fn limit(process: &mut Process, settings: &Settings) {
    let limits = [
        (libc::RLIMIT_CPU, settings.cpu_s),
        (libc::RLIMIT_AS, settings.memory_mib << 20),
        (libc::RLIMIT_NOFILE, settings.open_files),
        (libc::RLIMIT_FSIZE, settings.file_mib << 20),
        (libc::RLIMIT_CORE, 0),
    ];
    let set = move || {
        for (resource, value) in limits {
            let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
            // SAFETY: the pointer is to a local value; setrlimit may be called between fork and exec.
            if unsafe { libc::setrlimit(resource, &limit) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only; it allocates nothing and takes no lock.
    unsafe { process.pre_exec(set) };
}

#[cfg(test)]
mod tests;
