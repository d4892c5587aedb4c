//! A manifest in plain words: what was read, why rows were left out, and where the prompts went.

use std::fmt::{self, Display, Formatter};

use super::{Manifest, Part};

/// A manifest to be read by people.
pub struct Explained<'a>(pub &'a Manifest);

/// Returns what a reason for leaving rows out means, and what changes it.
fn reason(name: &str) -> &'static str {
    match name {
        "self" => "asked by taod itself",
        "opt_out" => "the caller forbids training",
        "redacted" => "the logger masked text in it",
        "failed" => "the call failed",
        "cached" => "the answer came from a cache",
        "truncated" => "the text was cut",
        "incomplete" => "earlier turns or a template are known to the server only",
        "raw_prompt" => "a raw text, which no chat template fits around",
        "not_train_ok" => "marked as not to be trained on, without a reason",
        "erased" => "an erasure has yet to take it out of the table",
        "old" => "before dataset.lookback_days",
        "filter" => "dataset.filter says no",
        "burst" => "one user sent more in an hour than dataset.max_user_hour: quarantined, see below",
        "feedback" => "a record of feedback that has joined its call",
        "feedback_unmatched" => "a record of feedback on a call that is not in the log",
        "bad_hash" => "the prompt's hash is none: the row is not of taod's making",
        "bad_messages" => "the messages cannot be read",
        "empty" => "nothing is asked",
        "no_user_turn" => "no user turn",
        "secrets" => "holds a secret or personal data; kinds below, dataset.allow_kinds",
        "too_long" => "longer than dataset.max_prompt_chars",
        "no_rules" => "its workload has no rules, or no [[workload]] takes it",
        "duplicate" => "the same prompt as another row, which stands for it",
        "near_duplicate" => "nearly the same text as a prompt that stands for it",
        "same_cluster" => "the gate and the audit take one prompt of a cluster",
        "straddles" => "near prompts of two splits, so that none may use it",
        "forward" => "in the newest dataset.forward_hours, which are kept for the gate",
        "user_cap" => "more than dataset.max_user_prompts of one user",
        "over_limit" => "not drawn: more than dataset.max_train_prompts",
        "held_over_limit" => "older than the newest dataset.max_held_prompts of its split",
        _ => "as ingestion says",
    }
}

/// Returns why a training prompt was drawn.
fn drawn(name: &str) -> &'static str {
    match name {
        "new_cluster" => "of a cluster that never trained",
        "new" => "never trained itself",
        "informative" => "its answers differed in reward when it trained last",
        "settled" => "its answers did not differ when it trained last; there was room",
        _ => "of an earlier round, against forgetting (dataset.replay_share)",
    }
}

impl Display for Explained<'_> {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let manifest = self.0;
        writeln!(out, "dataset of {}, seed {}, hash {}", manifest.round, manifest.seed, manifest.hash)?;
        for (table, version) in &manifest.inputs.tables {
            writeln!(out, "  table {table} at version {version}")?;
        }
        for (partition, range) in &manifest.inputs.offsets {
            writeln!(out, "  {partition}: offsets {} to {}", range.first, range.last)?;
        }
        writeln!(out, "\n{:>10} rows read", manifest.rows)?;
        let mut reasons: Vec<(&String, &u64)> = manifest.excluded.iter().collect();
        reasons.sort_by_key(|(name, rows)| (std::cmp::Reverse(**rows), *name));
        for (name, rows) in reasons {
            writeln!(out, "{rows:>10} {name}: {}", reason(name))?;
        }
        for (kind, rows) in &manifest.masked {
            writeln!(out, "{:>10} with {kind}: {rows}", "")?;
        }
        for (name, part, use_of_it) in [
            ("train", &manifest.train, "may train"),
            ("gate", &manifest.gate, "may judge a challenger, each cluster once"),
            ("audit", &manifest.audit, "are locked for people to label"),
        ] {
            let Part { prompts, clusters, rows, .. } = part;
            writeln!(out, "{prompts:>10} {name}: prompts of {clusters} clusters, for {rows} rows, that {use_of_it}")?;
        }
        for (name, prompts) in &manifest.drawn {
            writeln!(out, "{:>10} {name}: {prompts}, {}", "", drawn(name))?;
        }
        if !manifest.quarantine.is_empty() {
            writeln!(out, "\nquarantined; release a user by its hash in dataset.released_users:")?;
        }
        for burst in &manifest.quarantine {
            let hour = chrono::DateTime::from_timestamp_micros(burst.hour_us).unwrap_or_default();
            writeln!(
                out,
                "{:>10} calls of {} in the hour from {}",
                burst.calls,
                burst.user_hash,
                hour.format("%F %H:%M")
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_of_the_code_is_explained() {
        let sources =
            [include_str!("census.rs"), include_str!("select.rs"), include_str!("place.rs"), include_str!("read.rs")];
        let mut found = 0;
        for source in sources {
            for (at, marker) in ["Some(\"", "add(\""].iter().flat_map(|marker| source.match_indices(marker)) {
                let name = source[at + marker.len()..].split('"').next().unwrap();
                assert_ne!(reason(name), reason("?"), "{name} is not explained");
                found += 1;
            }
        }
        assert!(found > 15, "{found}");
    }
}
