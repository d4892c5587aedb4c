//! Each page: what it reads and which template shows it.

use axum::extract::{Form, Path, Query, State as Shared};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};
use minijinja::value::Serde;
use minijinja::{Value, context};
use serde::{Deserialize, Serialize};

use super::{charts, render};
use crate::admin::State;
use crate::admin::access::Who;
use crate::admin::actions::Action;
use crate::admin::facts::FactError;
use crate::admin::facts::prompts::Which;
use crate::admin::facts::rounds::Distribution;
use crate::admin::facts::trials::TrialDetail;
use crate::admin::session::same;

/// Items of a list on one page.
const ITEMS: usize = 60;

type Context = Result<Value, FactError>;

/// Returns a document as a template sees it.
fn of(document: impl Serialize) -> Value {
    Value::from(Serde(document))
}

/// Renders a page, or says in one why it cannot be shown.
fn page(template: &str, here: &str, who: &Who, context: Context) -> Response {
    match context {
        Ok(context) => render(template, here, who, context),
        Err(error) => {
            let shown = context! { title => "Nothing to show", message => error.to_string() };
            (error.status(), render("problem.html", here, who, shown)).into_response()
        }
    }
}

pub(super) async fn now(Shared(state): Shared<State>, who: Who) -> Response {
    page("now.html", "/", &who, now_context(&state).await)
}

/// The part of the first page that is kept fresh.
pub(super) async fn now_live(Shared(state): Shared<State>, who: Who) -> Response {
    page("now_live.html", "/", &who, now_context(&state).await)
}

async fn now_context(state: &State) -> Context {
    let status = state.facts.status().await?;
    let actions = state.actions.list(5).map_err(|e| FactError::Failed(e.to_string()))?;
    let decisions = state.facts.decisions(5).await?;
    let evidence = match &status.open_trial {
        Some(trial) => evidence(&state.facts.trial(&trial.trial).await?),
        None => String::new(),
    };
    let stage = status.running_round.as_ref().map(|_| stage_of(&status));
    let unreadable: u64 = status.ingest.dead_letters.values().sum();
    Ok(
        context! { title => "Now", status => of(status), actions => of(actions), decisions => of(decisions), evidence, stage, unreadable },
    )
}

/// Returns the place in the flow at which the running round is.
fn stage_of(status: &crate::admin::facts::now::Status) -> &'static str {
    let step = status.step.as_ref().map_or("", |live| live.step.as_str());
    let finished = status.running_round.iter().flat_map(|round| &round.stages).next_back();
    match finished.map_or("", |stage| stage.stage.split(' ').next().unwrap_or_default()) {
        _ if step.starts_with("gate") => "gate",
        _ if step.starts_with("sample") => "candidates",
        _ if step.starts_with("tuning") => "adapter",
        "" => "dataset",
        "dataset" => "candidates",
        "candidates" => "rewards",
        "rewards" => "adapter",
        _ => "gate",
    }
}

pub(super) async fn rounds(Shared(state): Shared<State>, who: Who) -> Response {
    let context = state.facts.rounds(ITEMS).map(|rounds| context! { title => "Rounds", rounds => of(rounds) });
    page("rounds.html", "/rounds", &who, context)
}

pub(super) async fn round(Shared(state): Shared<State>, who: Who, Path(id): Path<String>) -> Response {
    page("round.html", "/rounds", &who, round_context(&state, &id).await)
}

async fn round_context(state: &State, id: &str) -> Context {
    let round = state.facts.round(id)?;
    let Distribution { passes } = state.facts.distribution(id).await?;
    let longest = round.stages.iter().map(|stage| stage.seconds).fold(0.001, f64::max);
    let rewards = match (passes.first(), passes.last()) {
        (Some(first), Some(last)) if first.pass != last.pass => {
            let words = format!("Rewards of the answers drawn in pass {} and in pass {}", first.pass, last.pass);
            charts::distribution(&first.bins, &last.bins, &words)
        }
        (Some(only), _) => charts::distribution(&[], &only.bins, "Rewards of the answers"),
        _ => String::new(),
    };
    Ok(context! { title => round.round.clone(), round => of(round), passes => of(passes), longest, rewards })
}

pub(super) async fn trials(Shared(state): Shared<State>, who: Who) -> Response {
    let context = state.facts.trials(ITEMS).await.map(|trials| context! { title => "Trials", trials => of(trials) });
    page("trials.html", "/trials", &who, context)
}

pub(super) async fn trial(Shared(state): Shared<State>, who: Who, Path(id): Path<String>) -> Response {
    let context = state.facts.trial(&id).await.map(|detail| {
        let rewards = match detail.evidence.is_empty() {
            true => String::new(),
            false => charts::distribution(
                &charts::bins(detail.evidence.iter().map(|step| step.incumbent_score)),
                &charts::bins(detail.evidence.iter().map(|step| step.new_score)),
                "Scores on fresh prompts, of what is served and of the new adapter",
            ),
        };
        let (evidence, words) = (evidence(&detail), detail.words.clone());
        let (level, gain, guardrails) = (detail.level, detail.mean_gain, detail.guardrails);
        context! { title => format!("Trial {}", detail.trial.trial), trial => of(detail.trial), evidence, rewards, words, level, gain, guardrails => of(guardrails) }
    });
    page("trial.html", "/trials", &who, context)
}

fn evidence(detail: &TrialDetail) -> String {
    let points: Vec<(f64, f64)> = detail.evidence.iter().map(|step| (step.step as f64, step.ln_wealth)).collect();
    charts::evidence(&points, detail.trial.bar)
}

pub(super) async fn adapters(Shared(state): Shared<State>, who: Who) -> Response {
    let context = state.facts.adapters().and_then(|adapters| {
        let current = state.facts.current()?;
        Ok(context! { title => "Adapters", adapters => of(adapters), current => of(current) })
    });
    page("adapters.html", "/adapters", &who, context)
}

pub(super) async fn adapter(Shared(state): Shared<State>, who: Who, Path(version): Path<String>) -> Response {
    let context = state
        .facts
        .adapter(&version)
        .map(|adapter| context! { title => adapter.version.clone(), adapter => of(adapter) });
    page("adapter.html", "/adapters", &who, context)
}

/// Which prompts the browser shows.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Browse {
    round: Option<String>,
    trial: Option<String>,
    skip: u32,
    /// `yes` shows the text.
    text: String,
}

impl Browse {
    fn which(&self) -> Which {
        let chosen = |id: &Option<String>| id.clone().filter(|id| !id.is_empty());
        Which { round: chosen(&self.round), trial: chosen(&self.trial), limit: 50, skip: self.skip }
    }
}

pub(super) async fn prompts(Shared(state): Shared<State>, who: Who, Query(browse): Query<Browse>) -> Response {
    page("prompts.html", "/prompts", &who, prompts_context(&state, browse.which()).await)
}

async fn prompts_context(state: &State, mut which: Which) -> Context {
    let rounds = state.facts.rounds(ITEMS)?;
    let trials = state.facts.trials(ITEMS).await?;
    if which.round.is_none() && which.trial.is_none() {
        which.round = rounds.iter().find(|round| round.dataset.is_some()).map(|round| round.round.clone());
    }
    let prompts = match which.round.is_some() || which.trial.is_some() {
        true => state.facts.prompts(&which).await?,
        false => Vec::new(),
    };
    let (round, trial, skip) = (which.round, which.trial, which.skip);
    Ok(
        context! { title => "Prompts", rounds => of(rounds), trials => of(trials), prompts => of(prompts), round, trial, skip },
    )
}

/// One prompt. Its text needs a role and is shown only when asked for: a screen is seen by more than one person.
pub(super) async fn prompt(
    Shared(state): Shared<State>,
    who: Who,
    Path(hash): Path<String>,
    Query(browse): Query<Browse>,
) -> Response {
    let which = browse.which();
    let shown = browse.text == "yes";
    let context = state.facts.prompt(&which, &hash).await.map(|mut prompt| {
        if !shown {
            prompt.messages.iter_mut().for_each(|message| message.text = String::new());
            prompt.answers.iter_mut().for_each(|answer| answer.text = String::new());
        }
        let (round, trial) = (which.round, which.trial);
        context! { title => "One prompt", prompt => of(prompt), shown, round, trial }
    });
    page("prompt.html", "/prompts", &who, context)
}

pub(super) async fn decisions(Shared(state): Shared<State>, who: Who) -> Response {
    let context = async {
        let decisions = state.facts.decisions(ITEMS).await?;
        let actions = state.actions.list(ITEMS).map_err(|e| FactError::Failed(e.to_string()))?;
        Ok(context! { title => "Decisions", decisions => of(decisions), actions => of(actions) })
    };
    page("decisions.html", "/decisions", &who, context.await)
}

pub(super) async fn dead_letters(Shared(state): Shared<State>, who: Who) -> Response {
    let context = state.facts.dead_letters().await.map(|letters| {
        let total: u64 = letters.iter().map(|letter| letter.records).sum();
        context! { title => "Dead letters", letters => of(letters), total }
    });
    page("dead_letters.html", "/dead-letters", &who, context)
}

pub(super) async fn config(Shared(state): Shared<State>, who: Who) -> Response {
    let in_force = state.facts.config();
    let text = toml::to_string_pretty(&in_force.config).unwrap_or_else(|e| format!("the config is no TOML: {e}"));
    page("config.html", "/config", &who, Ok(context! { title => "Config in force", hash => in_force.hash, text }))
}

/// What the form of an action sends.
#[derive(Debug, Deserialize)]
pub(super) struct Wanted {
    #[serde(default)]
    csrf: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    version: String,
    /// The version once more, typed by hand: the approval.
    #[serde(default)]
    approve: String,
}

pub(super) async fn act(
    Shared(state): Shared<State>,
    who: Who,
    Path(what): Path<String>,
    Form(wanted): Form<Wanted>,
) -> Response {
    let refuse = |status: StatusCode, message: &str| {
        (status, render("problem.html", "/", &who, context! { title => "Not done", message })).into_response()
    };
    if who.csrf().is_some_and(|csrf| !same(csrf, &wanted.csrf)) {
        return refuse(StatusCode::FORBIDDEN, "The form is not from this page. Load the page again and repeat it.");
    }
    let reason = wanted.reason.trim();
    if !(1..=500).contains(&reason.chars().count()) {
        return refuse(StatusCode::UNPROCESSABLE_ENTITY, "Give a reason of 1 to 500 characters: it is recorded.");
    }
    let action = match what.as_str() {
        "promote" if wanted.approve.trim() != wanted.version || state.facts.adapter(&wanted.version).is_err() => {
            return refuse(StatusCode::UNPROCESSABLE_ENTITY, "What was typed is not the version. Nothing was changed.");
        }
        "promote" => Action::Promote { version: wanted.version },
        "rollback" => match state.facts.served_version() {
            Ok(from) => Action::Rollback { from: Some(from) },
            Err(error) => return refuse(StatusCode::INTERNAL_SERVER_ERROR, &format!("Not done: {error}.")),
        },
        "freeze" => Action::Freeze,
        "thaw" => Action::Thaw,
        "run" => Action::Run,
        _ => return refuse(StatusCode::NOT_FOUND, "There is no such action."),
    };
    match state.actions.ask(action, &who.name, reason) {
        Ok(_) => Redirect::to("/#actions").into_response(),
        Err(error) => refuse(StatusCode::CONFLICT, &format!("Not done: {error}.")),
    }
}
