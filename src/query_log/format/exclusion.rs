//! Rows that must not train: what tells them, and which reason counts where several hold.

use std::sync::LazyLock;

use regex::Regex;

use crate::json::Value;
use crate::record::{Message, Query};

use super::fields::{Fields, Headers};

/// The user name that taod puts into every request of its own.
pub const INTERNAL_USER: &str = "taod-internal";

/// The header that taod puts into every request of its own.
pub const INTERNAL_HEADER: &str = "x-taod-internal";

/// The headers by which a caller forbids training: ours, and Cloudflare's.
pub(super) const HEADERS: [&str; 2] = ["x-taod-train", "cf-aig-collect-log-payload"];

/// What loggers leave in place of masked text. A mask anywhere excludes the row: half-masked rows are common, and a
/// model must not learn to write masks. Closing brackets are left out on purpose (`[REDACTED_EMAIL]`).
static SENTINELS: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?i)redacted-by-litellm|__redacted__|[\[<*]redacted(?:\b|_)").expect("a constant pattern")
});

/// What every mask holds. Nearly no text does, and this search is the faster one by far.
static SUSPECT: LazyLock<Regex> = LazyLock::new(|| Regex::new("(?i-u)redacted").expect("a constant pattern"));

/// Why a row must not train, the strongest reason first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Exclusion {
    /// taod asked it itself.
    Own,
    /// The caller asked not to train on it.
    OptOut,
    /// The logger masked text.
    Redacted,
    /// The call failed.
    Failed,
    /// The answer came from a cache: no new sample of the model.
    Cached,
    /// The logger cut the text.
    Truncated,
    /// Earlier turns, or a stored template, are known to the server only.
    Incomplete,
    /// The prompt is raw text: a chat template around it would ask something else.
    RawPrompt,
}

impl Exclusion {
    const ALL: [Exclusion; 8] = [
        Exclusion::Own,
        Exclusion::OptOut,
        Exclusion::Redacted,
        Exclusion::Failed,
        Exclusion::Cached,
        Exclusion::Truncated,
        Exclusion::Incomplete,
        Exclusion::RawPrompt,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Exclusion::Own => "self",
            Exclusion::OptOut => "opt_out",
            Exclusion::Redacted => "redacted",
            Exclusion::Failed => "failed",
            Exclusion::Cached => "cached",
            Exclusion::Truncated => "truncated",
            Exclusion::Incomplete => "incomplete",
            Exclusion::RawPrompt => "raw_prompt",
        }
    }
}

/// Marks a row that must not train: `found` by the format, or told by the row itself.
pub(super) fn mark(query: &mut Query, headers: &Headers<'_>, mut found: Vec<Exclusion>) {
    if query.user.as_deref() == Some(INTERNAL_USER) || headers.get(INTERNAL_HEADER).is_some() {
        found.push(Exclusion::Own);
    }
    if HEADERS.iter().any(|name| headers.denies(name)) {
        found.push(Exclusion::OptOut);
    }
    query.redacted = is_redacted(query);
    let told = [
        (query.redacted, Exclusion::Redacted),
        (query.status >= 400, Exclusion::Failed),
        (query.truncated, Exclusion::Truncated),
    ];
    found.extend(told.into_iter().filter(|(holds, _)| *holds).map(|(_, exclusion)| exclusion));
    if let Some(strongest) = found.into_iter().min() {
        query.train_ok = false;
        query.reason = Some(strongest.as_str().to_owned());
    }
}

/// Adds a reason to a row that may have one already; the stronger stays. Feedback keeps its own.
pub(super) fn add(query: &mut Query, exclusion: Exclusion) {
    query.train_ok = false;
    let stronger = match query.reason.as_deref() {
        None => true,
        Some(reason) => Exclusion::ALL.iter().any(|known| known.as_str() == reason && exclusion < *known),
    };
    if stronger {
        query.reason = Some(exclusion.as_str().to_owned());
    }
}

/// The fields by which a caller forbids training.
pub(super) const OPT_OUTS: [&str; 3] = ["do_not_train", "no_train", "allow_training"];

/// Takes the fields by which a caller forbids training; true where one does.
pub(super) fn takes_opt_out(fields: &mut Fields) -> bool {
    let [refuse, refuse_too, allow] = OPT_OUTS;
    // Each is taken, whatever the others say.
    let said = [fields.truth(&[refuse]), fields.truth(&[refuse_too]), fields.truth(&[allow]).map(|allowed| !allowed)];
    said.contains(&Some(true))
}

/// Returns true where a mask stands in the prompt, the tools or the answer, tool calls included.
fn is_redacted(query: &Query) -> bool {
    let masked_answer = query.response.as_deref().is_some_and(is_masked);
    let in_message = |m: &Message| holds_mask(&m.content) || m.rest.values().any(holds_mask);
    masked_answer
        || query.messages.iter().any(in_message)
        || query.tools.as_ref().is_some_and(holds_mask)
        || query.extra.get("response").is_some_and(holds_mask)
}

/// Returns true where a text holds a mask.
pub(super) fn is_masked(text: &str) -> bool {
    SUSPECT.is_match(text) && SENTINELS.is_match(text)
}

fn holds_mask(value: &Value) -> bool {
    match value {
        Value::String(text) => is_masked(text),
        Value::Array(items) => items.iter().any(holds_mask),
        Value::Object(map) => map.values().any(holds_mask),
        _ => false,
    }
}
