//! `taod doctor`: does everything that taod needs answer, is it the right thing, and if not, what is to be done.
//!
//! Each check uses the same client as the daemon, so that what passes here works there. Nothing is changed, but for a small
//! file that is made and removed where taod must be able to write; only [`Options::load`] puts an adapter that changes no
//! answer into the servers. A check that cannot be made because of another one says so instead of failing in its own words.

mod endpoint;
mod model;
mod place;
mod source;
mod tables;
#[cfg(test)]
mod tests;

use serde::Serialize;

use crate::config::Config;

/// What is looked at. The order is that of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// The state folder: there, writable, private, all of one owner.
    State,
    /// Room on the disks of the state, the tables and temporary files.
    Disk,
    /// The files that hold secrets: there, readable, and not by everybody.
    Secrets,
    /// A Kafka broker answers.
    Broker,
    /// The topic is there and holds what the tables lack.
    Topic,
    /// The tables open, and their place can be written to.
    Tables,
    /// The base model loads and is the one that the registry knows.
    Model,
    /// Each scorer that training or the gate names scores an answer.
    Scorers,
    /// Each replica answers as a promotion needs it.
    Endpoint,
    /// This machine's clock agrees with the servers'.
    Clock,
}

impl Check {
    /// Returns its name in reports and for `--only`.
    pub fn as_str(self) -> &'static str {
        match self {
            Check::State => "state",
            Check::Disk => "disk",
            Check::Secrets => "secrets",
            Check::Broker => "broker",
            Check::Topic => "topic",
            Check::Tables => "tables",
            Check::Model => "model",
            Check::Scorers => "scorers",
            Check::Endpoint => "endpoint",
            Check::Clock => "clock",
        }
    }
}

/// How one thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Ok,
    /// It works and will not go on working, or not as well as it could.
    Warning,
    /// It does not work.
    Failure,
}

impl State {
    fn as_str(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Failure => "FAILURE",
        }
    }
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub check: Check,
    pub state: State,
    pub says: String,
    /// What to do; there is something for whatever is not ok.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    fn ok(check: Check, says: impl Into<String>) -> Self {
        Finding { check, state: State::Ok, says: says.into(), remedy: None }
    }

    fn warning(check: Check, says: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { check, state: State::Warning, says: says.into(), remedy: Some(remedy.into()) }
    }

    fn failure(check: Check, says: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { check, state: State::Failure, says: says.into(), remedy: Some(remedy.into()) }
    }
}

/// What is asked of the doctor.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// These checks alone; empty: all.
    pub only: Vec<Check>,
    /// Also load an adapter that changes nothing on every replica, ask it, and unload it.
    pub load: bool,
}

impl Options {
    fn wants(&self, check: Check) -> bool {
        self.only.is_empty() || self.only.contains(&check)
    }
}

/// All findings, in the order of the checks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    pub state: State,
    pub findings: Vec<Finding>,
}

impl Report {
    fn of(mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|finding| finding.check);
        Report { state: findings.iter().map(|finding| finding.state).max().unwrap_or(State::Ok), findings }
    }

    /// Returns the report for people: a line for each finding, and below it what to do.
    pub fn explain(&self) -> String {
        let line = |finding: &Finding| {
            let (state, check) = (finding.state.as_str(), finding.check.as_str());
            let remedy = finding.remedy.iter().map(|remedy| format!("{:18} -> {remedy}\n", "")).collect::<String>();
            format!("{state:7} {check:9}  {}\n{remedy}", finding.says)
        };
        let count = |state| self.findings.iter().filter(|finding| finding.state == state).count();
        let (failures, warnings) = (count(State::Failure), count(State::Warning));
        let lines: String = self.findings.iter().map(line).collect();
        format!("{lines}{failures} failures, {warnings} warnings\n")
    }
}

/// Makes all checks that are asked for.
pub async fn examine(config: &Config, options: &Options) -> Report {
    let mut findings = Vec::new();
    if options.wants(Check::State) {
        findings.extend(place::state(config));
    }
    if options.wants(Check::Disk) {
        findings.extend(place::disk(config));
    }
    if options.wants(Check::Secrets) {
        findings.extend(place::secrets(config));
        findings.extend(place::signing(config));
    }
    let of_log = [Check::Broker, Check::Topic, Check::Clock].into_iter().any(|check| options.wants(check));
    if of_log && config.state.stores_log() {
        findings.extend(source::check(config).await);
    }
    if options.wants(Check::Tables) {
        findings.extend(tables::check(config).await);
    }
    let mut loaded = None;
    if options.wants(Check::Model) || options.load {
        let (found, model) = model::load(config).await;
        findings.extend(found);
        loaded = model;
    }
    if options.wants(Check::Scorers) {
        findings.extend(model::scorers(config).await);
    }
    if options.wants(Check::Endpoint) || options.wants(Check::Clock) || options.load {
        let zero = options.load.then_some(loaded.as_ref());
        findings.extend(endpoint::check(config, zero).await);
    }
    findings.retain(|finding| options.wants(finding.check) || options.load && finding.check == Check::Endpoint);
    Report::of(findings)
}
